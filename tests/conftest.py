"""What every test relies on: nothing is left behind, and a logger when one asks."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from postgres_cluster import Cluster, binaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MARK = "HAYFLICK_TEST_SESSION"
SETTLE_SECONDS = 5.0
MISSING = pytest.StashKey[dict[str, str]]()


def _missing_layers() -> dict[str, str]:
    """Return the layers of the sandbox that this machine lacks for this user, and why."""
    program = (
        "import json, os\n"
        "from hayflick_sandbox.cgroups import Tree\n"
        "from hayflick_sandbox.probe import probe\n"
        "tree = Tree.create(f'probe-{os.getpid()}')\n"
        "try: found = probe(tree)\n"
        "finally: tree.close()\n"
        "print(json.dumps({layer.name: layer.detail for layer in found if not layer.enforced}))"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, timeout=60)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Find out what this machine lacks, and let exactly that go in all that the tests start."""
    config.stash[MISSING] = missing = _missing_layers()
    let_go = ",".join(name for name in missing if name not in ("kernel", "namespaces", "seccomp"))
    if let_go:
        os.environ.setdefault("HAYFLICK_ALLOW_DEGRADED", let_go)
        os.environ.setdefault("HAYFLICK_ORCHESTRATOR_ALLOW_DEGRADED", let_go)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root, or a layer that is missing here, and say so."""
    missing = config.stash[MISSING]
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        wanted = {name for marker in item.iter_markers("layers") for name in marker.args}
        if lacking := sorted(wanted & missing.keys()):
            reason = f"this machine lacks {', '.join(lacking)}: {missing[lacking[0]]}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def missing_layers(pytestconfig: pytest.Config) -> frozenset[str]:
    """The layers of the sandbox that this machine lacks for this user; they are let go."""
    return frozenset(pytestconfig.stash[MISSING])


def _processes() -> Iterator[tuple[int, bytes]]:
    """Yield the pid and the environment of each process that may be looked at."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                yield int(entry.name), (entry / "environ").read_bytes()


def _of_this_session() -> dict[str, int]:
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for pid, environment in _processes():
        if pid != os.getpid() and mark in environment.split(b"\0"):
            with contextlib.suppress(OSError):
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                # A zombie has no command line; whoever reaps it is not our concern here.
                if command:
                    found[f"process {pid}: {command}"] = pid
    return found


def _another_session_runs() -> bool:
    """Return whether a process bears the mark of another session whose pytest still lives.

    What a session that is over left behind excuses nothing.
    """
    marks = {
        item.partition(b"=")[2].decode()
        for _, environment in _processes()
        for item in environment.split(b"\0")
        if item.startswith(MARK.encode() + b"=")
    }
    return any(_is_pytest(mark.partition("-")[0]) for mark in marks - {os.environ[MARK]})


def _is_pytest(pid: str) -> bool:
    try:
        return b"pytest" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _named() -> set[str]:
    """Return this user's mounts, sockets and cgroups whose names hold "hayflick"."""
    found = set()
    for kind, table in (("mount", "/proc/self/mountinfo"), ("socket", "/proc/net/unix")):
        column = 4 if kind == "mount" else -1
        points = {line.split()[column] for line in Path(table).read_text().splitlines()}
        found |= {f"{kind} {point}" for point in points if "hayflick" in point and _ours(point)}
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        named = [f"{directory}/{name}" for name in names if "hayflick" in name]
        found |= {f"cgroup {name}" for name in named if _ours(name)}
    return found


def _ours(path: str) -> bool:
    """Return whether this user made *path*; another's runs on the same machine are not our concern."""
    if path.startswith("@"):  # an abstract socket does not tell whose it is
        return os.geteuid() == 0
    try:
        return os.lstat(path).st_uid == os.geteuid()
    except PermissionError:
        return False
    except OSError:
        return True  # one that was removed while it listens


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session when a process, mount, cgroup or socket of ours outlives it."""
    os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
    before = _named()
    try:
        yield
        deadline = time.monotonic() + SETTLE_SECONDS
        while (left := _of_this_session()) and time.monotonic() < deadline:
            for pid in left.values():
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                    os.close(descriptor)
        # Nothing tells when a name goes away, so this looks again, until the same deadline.
        while (names := _named() - before) and time.monotonic() < deadline:
            time.sleep(0.05)
        # Another run on this machine makes names of its own; only processes can be told apart.
        leaks = list(left) if _another_session_runs() else [*left, *sorted(names)]
        assert not leaks, "left behind:\n" + "\n".join(leaks)
    finally:
        del os.environ[MARK]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server, where it is installed (Debian: apt-get install postgresql)."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    made = Cluster()
    yield made
    made.close()


class LoggerProcess:
    """A real logger, started by the command that users type."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        wrap: Callable[[list[str]], list[str]] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.data_dir = directory / "data"
        self.address = f"unix://{directory}/run/logger.sock"
        self._log = directory / "logger.log"
        command = [sys.executable, "-m", "hayflick_logger", "--listen", self.address]
        command += ["--data-dir", str(self.data_dir), "--drain-seconds", "0.5", *options]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                wrap(command) if wrap else command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=pass_fds,
            )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().decode()

    @property
    def log(self) -> str:
        """What it wrote to standard error, over all its starts."""
        return self._log.read_text()

    def socket_gone(self) -> bool:
        """Return whether nothing is left where it listened."""
        return not Path(self.address.removeprefix("unix://")).exists()

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it with a signal; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=20)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


@pytest.fixture
def start_logger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LoggerProcess]]:
    """Start loggers; those of one test share one directory, so that the next continues the last."""
    # Short: a socket's path has at most 107 bytes.
    directory = tmp_path_factory.mktemp("logger")
    started: list[LoggerProcess] = []

    def start(
        *options: str,
        wrap: Callable[[list[str]], list[str]] | None = None,
        pass_fds: tuple[int, ...] = (),
        expect_ready: bool = True,
    ) -> LoggerProcess:
        logger = LoggerProcess(directory, *options, wrap=wrap, pass_fds=pass_fds)
        started.append(logger)
        if expect_ready:
            assert logger.first_line == f"hayflick_logger listening on {logger.address}\n", logger.log
        return logger

    yield start
    for logger in started:
        logger.end(signal.SIGKILL)
