"""The quick start, run as it stands: what the guide shows is what a user gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "quickstart.md"
SECONDS = 90


def blocks() -> list[str]:
    """Return the guide's Python blocks, in order; the last is the complete example."""
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def left_behind(home: Path, pid: int) -> list[str]:
    """Return every process, control group and file of the program *pid* that is still there."""
    left = [str(path) for path in (home / "run").iterdir()]
    node = f"embedded-{pid}-"
    left += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"*{node}*")]
    left += [line for line in Path("/proc/mounts").read_text().splitlines() if str(home) in line]
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "cgroup").read_bytes()
        except (OSError, NotADirectoryError):
            continue
        if str(home).encode() in words or node.encode() in words:
            left.append(f"{entry.name}: {words!r}")
    return left


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a working directory of a user who has folders with unlucky names."""
    for name in ("services", "sandbox", "replication", "hayflick", "grpc"):
        (tmp_path / "work" / name).mkdir(parents=True)
    for name in ("services", "sandbox"):
        (tmp_path / "work" / name / "__init__.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "work" / "json.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path


def run(program: str, home: Path) -> tuple[str, str]:
    """Run *program* in *home*; return what it printed, after checking that nothing of it is left."""
    script = home / "program.py"  # not in the working directory, whose json.py would be the script's own
    script.write_text(program, encoding="utf-8")
    environment = {**os.environ, "XDG_RUNTIME_DIR": "", "TMPDIR": str(home / "run")}
    with subprocess.Popen(
        [sys.executable, str(script)],
        cwd=home / "work",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert left_behind(home, process.pid) == []
    return out, errors


def test_the_numbered_fragments_run_in_order_as_one_program(home: Path) -> None:
    """Root and child work, the kill switch ends the root, and the audit trail tells it all."""
    *fragments, _ = blocks()
    out, errors = run("\n".join(fragments), home)
    assert errors == ""
    root, child, *events = out.splitlines()
    assert re.fullmatch(r"Worker [0-9a-f]+ analyzing data\.\.\.", root)
    assert re.fullmatch(r"Child [0-9a-f]+ working", child)
    root_id, child_id = root.split()[1], child.split()[1]
    for expected in (
        rf"\{{'event': 'worker_registered', 'worker_id': '{root_id}', 'depth': 0, .*",
        rf"\{{'event': 'heartbeat', 'worker_id': '{root_id}'.*",
        rf"\{{'event': 'audit', 'decision': 'replication_requested', .*'parent_id': '{root_id}', .*",
        rf"\{{'event': 'worker_registered', 'worker_id': '{child_id}', 'depth': 1, .*",
        rf"\{{'event': 'worker_shutdown', 'worker_id': '{child_id}', .*'reason': 'completed', .*",
        rf"\{{'event': 'worker_shutdown', 'worker_id': '{root_id}', .*'reason': 'kill_switch', .*",
    ):
        assert any(re.fullmatch(expected, event) for event in events), (expected, events)
    assert all(event.startswith("{'event': ") for event in events)
    assert all("'timestamp': datetime.datetime(" in event for event in events)


def test_the_complete_example_runs(home: Path) -> None:
    """Both workers print, and the summary counts events and metrics."""
    out, errors = run(blocks()[-1], home)
    assert errors == ""
    root, child, empty, events, metrics = out.splitlines()
    assert re.fullmatch(r"Root [0-9a-f]+ crawling", root)
    assert re.fullmatch(r"Child [0-9a-f]+ crawling page 2", child)
    assert empty == ""
    assert int(events.removeprefix("Total events logged: ")) >= 6
    assert int(metrics.removeprefix("Metrics captured: ")) >= 2


def test_every_fragment_is_python_that_an_editor_would_accept() -> None:
    """Each block compiles on its own, and there is one for every numbered section."""
    assert len(blocks()) == 9
    for block in blocks():
        compile(block, "quickstart", "exec")
