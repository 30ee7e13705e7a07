"""The services that a program starts for itself: how they start, and that they go.

The services here are played by a few lines each, which print where they listen
and wait for their lifeline as the real ones do; everything around them is real.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from replication import ServiceUnavailable, _embedded, _supervisor
from replication.testing import embedded

SERVICE = """
import json, os, pathlib, signal, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
log = pathlib.Path(os.environ["PLAY"])
name = __spec__.parent
with log.open("a") as out:
    out.write(json.dumps(["start", name, options, os.getcwd(), sys.flags.safe_path]) + "\\n")
sys.stderr.write("a line for the log\\n")
if os.environ.get("FAILS") == name:
    sys.exit("the disk is on fire")
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
try:
    print(f"{name} listening on {options['--listen']}", flush=True)
    os.read(int(options["--lifeline-fd"]), 1)
finally:
    with log.open("a") as out:
        out.write(json.dumps(["stop", name]) + "\\n")
"""

PROGRAM = """
import sys
from replication import _embedded
endpoint = _embedded.resolve("controller", None)
print(endpoint.runtime.directory, flush=True)
{then}
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name, whoever runs the tests."""
    with tempfile.TemporaryDirectory(prefix="play-") as directory:
        yield Path(directory)


@pytest.fixture
def play(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put services that are played on the path, and let go of everything that the environment names."""
    for name in _supervisor.NAMES:
        package = home / "path" / f"hayflick_{name}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(SERVICE)
    (home / "run").mkdir(mode=0o700)
    for variable in _embedded.VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(home / "path"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    monkeypatch.setenv("PLAY", str(home / "play"))
    yield home
    assert list((home / "run").iterdir()) == []


def said(home: Path) -> list[list[object]]:
    """Return what the services wrote down of themselves."""
    import json

    return [json.loads(line) for line in (home / "play").read_text().splitlines()]


def wait_for_death(pid: int, seconds: float = 20) -> None:
    """Return when the process is gone."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], seconds)[0], f"{pid} lives on"
    finally:
        os.close(pidfd)


def supervisor_of(directory: str) -> int:
    """Return the process that keeps the services in *directory*."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if "replication._supervisor" in words and directory in words:
                return int(entry.name)
    raise AssertionError(f"nobody keeps {directory}")


def test_services_start_in_order_and_stop_in_reverse(play: Path) -> None:
    """Each service finds those it needs, and outlives those that need it."""
    with embedded(["landlock"]) as services:
        assert services.directory.stat().st_mode & 0o777 == 0o700
        assert services.directory.parent == play / "run"
    lines = said(play)
    assert [(line[0], line[1]) for line in lines] == [
        ("start", "hayflick_logger"),
        ("start", "hayflick_controller"),
        ("start", "hayflick_orchestrator"),
        ("stop", "hayflick_orchestrator"),
        ("stop", "hayflick_controller"),
        ("stop", "hayflick_logger"),
    ]
    options = lines[2][2]
    assert isinstance(options, dict)
    assert options["--controller"] == services.address("controller")
    assert options["--logger"] == services.address("logger")
    assert options["--allow-degraded"] == "landlock"
    # Not the user's folder, and nothing of it is imported.
    assert all(line[3:] == [str(services.directory), True] for line in lines[:3])


def test_a_service_that_does_not_start_is_quoted_and_the_others_go(
    play: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error holds what the service wrote, and nothing is left of those before it."""
    monkeypatch.setenv("FAILS", "hayflick_orchestrator")
    with pytest.raises(ServiceUnavailable, match="the disk is on fire") as failed, embedded():
        pass
    assert failed.value.details == {"service": "orchestrator"}
    assert [line[1] for line in said(play) if line[0] == "stop"] == ["hayflick_controller", "hayflick_logger"]


def test_many_threads_share_one_set_of_services(play: Path) -> None:
    """Whoever needs it first starts it, once, and the end of the program ends it."""
    then = """
import threading
found = set()
def look():
    found.add(_embedded.resolve("logger", None).runtime)
threads = [threading.Thread(target=look) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == {endpoint.runtime}
"""
    subprocess.run([sys.executable, "-c", PROGRAM.format(then=then)], check=True, timeout=60)
    assert [line[1] for line in said(play) if line[0] == "start"] == [
        f"hayflick_{name}" for name in _supervisor.NAMES
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_is_killed_leaves_nothing(play: Path, number: signal.Signals) -> None:
    """The lifeline ends with the program, and everything with the lifeline."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(then="sys.stdin.read()")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        directory = program.stdout.readline().strip()
        supervisor = supervisor_of(directory)
        program.send_signal(number)
    wait_for_death(supervisor)
    assert [line[1] for line in said(play) if line[0] == "stop"] == [
        f"hayflick_{name}" for name in reversed(_supervisor.NAMES)
    ]


def test_services_do_not_outlive_their_supervisor(play: Path) -> None:
    """If even the supervisor is killed, each service's own lifeline ends."""
    with embedded() as services:
        os.kill(supervisor_of(str(services.directory)), signal.SIGKILL)
        log = services.directory / "logger.log"
        assert log.read_text() == "a line for the log\n"
    for pid in services.pids.values():
        wait_for_death(pid)
    assert len([line for line in said(play) if line[0] == "stop"]) == 3


def test_a_forked_child_has_no_part_in_its_parents_services(play: Path) -> None:
    """A child neither stops the services when it exits nor keeps them when its parent does."""
    then = """
import os
reader, writer = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(writer)
    endpoint.runtime.close()
    fresh = _embedded._shared is None
    os.read(reader, 1)  # until the parent is gone, and its services with it
    os._exit(0 if fresh else 1)
print(pid)
assert endpoint.runtime._process.poll() is None
"""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then)], check=True, timeout=60, stdout=subprocess.PIPE
    )
    assert len(said(play)) == 6
    wait_for_death(int(done.stdout.split()[1]))


def test_an_environment_that_names_only_some_services_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is half connected would ask one logger about another's controller."""
    monkeypatch.setenv("HAYFLICK_CONTROLLER", "unix:///run/controller.sock")
    monkeypatch.delenv("HAYFLICK_LOGGER", raising=False)
    assert _embedded.resolve("controller", None).address == "unix:///run/controller.sock"
    with pytest.raises(ServiceUnavailable, match="HAYFLICK_LOGGER is not set"):
        _embedded.resolve("logger", None)


@pytest.mark.parametrize("address", ["localhost:50051", "", "unix:relative.sock", 7])
def test_an_address_that_is_no_unix_socket_is_refused(address: object) -> None:
    """Plain TCP would let in whoever reaches the port."""
    with pytest.raises(ValueError, match=r"^address: "):
        _embedded.resolve("controller", address)  # type: ignore[arg-type]


def test_a_path_too_long_for_a_socket_is_passed_over(play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first place is too deep for sun_path, the next is taken."""
    deep = play / "run" / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(play / "run"))
    directory = _embedded._private_directory()
    assert directory.parent == play / "run"
    directory.rmdir()
    deep.rmdir()
