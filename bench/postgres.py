"""A PostgreSQL server of the benchmark's own: in a temporary folder, with every commit on disk."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg

PACKAGE = "postgresql"
WAIT_SECONDS = "60"


def binaries() -> Path | None:
    """Return the directory of the newest PostgreSQL installed, or ``None``."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if debian:
        return debian[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


class Server:
    """A server that listens in *directory*."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count(1)

    def new_database(self) -> str:
        """Make an empty database; return its URL."""
        name = f"bench{next(self._numbers)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql:///{database}?host={self._directory}&user=hayflick"


@contextlib.contextmanager
def server(found: Path) -> Iterator[Server]:
    """Run the server whose programs are in *found*, and leave nothing of it."""
    # On a disk: /tmp may be memory, which makes a sync cost nothing.
    directory = Path(tempfile.mkdtemp(prefix="hayflick-bench-", dir="/var/tmp"))
    run_as: list[str] = []
    if os.geteuid() == 0:  # whom PostgreSQL refuses
        owner = pwd.getpwnam("postgres")
        os.chown(directory, owner.pw_uid, owner.pw_gid)
        run_as = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]

    def run(program: str, *arguments: str) -> None:
        command = [*run_as, str(found / program), "-D", str(directory / "data"), *arguments]
        subprocess.run(
            command, cwd=directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    try:
        run("initdb", "-U", "hayflick", "-A", "trust")
        options = f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=on"
        run("pg_ctl", "start", "-w", "-t", WAIT_SECONDS, "-l", str(directory / "log"), "-o", options)
        try:
            yield Server(directory)
        finally:
            run("pg_ctl", "stop", "-w", "-t", WAIT_SECONDS, "-m", "immediate")
    finally:
        shutil.rmtree(directory)
