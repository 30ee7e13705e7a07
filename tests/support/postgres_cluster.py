"""A PostgreSQL server of one's own: in a temporary folder, on a Unix socket, gone without a trace."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import select
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

USERS = ("postgres", "nobody")
"""Who owns the cluster where root makes it: PostgreSQL refuses root, and a uid without a name."""
WAIT_SECONDS = 30.0


def binaries() -> Path | None:
    """Return the directory of the newest PostgreSQL installed, or ``None``."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    found = [path for path in debian if (path / "initdb").exists()]
    if found:
        return found[-1]
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def _owner() -> pwd.struct_passwd:
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next(names[name] for name in USERS if name in names)


class Cluster:
    """A server with synchronous commits; dies with whoever made it.

    Raises:
        RuntimeError: It does not start.
    """

    def __init__(self) -> None:
        found = binaries()
        if found is None:
            raise RuntimeError("PostgreSQL is not installed")
        self._binaries = found
        self.directory = Path(tempfile.mkdtemp(prefix="hf-pg-"))
        self._process: subprocess.Popen[str] | None = None
        self._numbers = itertools.count(1)
        self._as: list[str] = []
        if os.geteuid() == 0:
            owner = _owner()
            os.chown(self.directory, owner.pw_uid, owner.pw_gid)
            self._as = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}"]
            self._as += ["--clear-groups", "--pdeathsig=QUIT"]
        try:
            subprocess.run(
                [*self._as, found / "initdb", "-D", self.directory / "data", "-U", "hayflick", "-A", "trust"],
                cwd=self.directory,
                check=True,
                capture_output=True,
                timeout=WAIT_SECONDS,
            )
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start; return when it accepts connections."""
        options = {"listen_addresses": "", "unix_socket_directories": self.directory, "fsync": "on"}
        self._process = subprocess.Popen(
            [
                *self._as,
                self._binaries / "postgres",
                "-D",
                self.directory / "data",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "ready to accept connections" in line:
                break
        else:
            raise RuntimeError("PostgreSQL ended as it started")
        drain = threading.Thread(target=self._process.stderr.read, daemon=True)
        drain.start()
        self._drain = drain

    @property
    def running(self) -> bool:
        """Whether the server runs."""
        return self._process is not None

    def processes(self) -> list[int]:
        """Return the server's process and those that it forked."""
        if self._process is None:
            return []
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]

    def crash(self) -> None:
        """Kill every process of it at once, with no time for a last word; return when all are gone."""
        found = [os.pidfd_open(pid) for pid in self.processes()]
        try:
            for descriptor in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            self.stop()
            for descriptor in found:
                select.select([descriptor], [], [], WAIT_SECONDS)
        finally:
            for descriptor in found:
                os.close(descriptor)

    def url(self, database: str = "postgres") -> str:
        """Return where a database is."""
        return f"postgresql:///{database}?host={self.directory}&user=hayflick"

    def new_database(self) -> str:
        """Make an empty database; return its URL."""
        name = f"test{next(self._numbers)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def stop(self) -> None:
        """Stop at once, as a crash does; return when it is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGQUIT)
            try:
                process.wait(WAIT_SECONDS)
            finally:
                process.kill()
                process.wait()
                self._drain.join(WAIT_SECONDS)
                assert process.stderr is not None
                process.stderr.close()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop its time: it keeps its connections and answers nothing."""
        assert self._process is not None
        # Its own processes alone: each worker of the server is a child of it.
        server = self._process.pid
        still = [server]
        try:
            os.kill(server, signal.SIGSTOP)  # first, so that it starts nobody more
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            for child in map(int, children):
                os.kill(child, signal.SIGSTOP)
                still.append(child)
            yield
        finally:
            for pid in reversed(still):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop, and leave nothing."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory)
