"""Programs that people really run do their work inside a worker, and none of it looks like an attack."""

from __future__ import annotations

import importlib.util
import json

import pytest

from ..integration.conftest import Stack, shell, until
from .conftest import Machine, need


def test_python_threads(machine: Machine) -> None:
    """CPython runs threads, a thread pool, and an event loop with subprocesses."""
    out = machine.python("threads.py")
    assert out == "16 328350 by cat\n"


def test_python_processes(machine: Machine) -> None:
    """CPython runs subprocesses, and process pools by each start method, with locks and shared memory."""
    out = machine.python("processes.py")
    assert out.split() == ["fork", "3", "spawn", "3", "forkserver", "3", "42"]


def test_numpy(machine: Machine) -> None:
    """numpy, installed by pip with its own OpenBLAS and threads, multiplies, inverts and draws."""
    if importlib.util.find_spec("numpy") is None:
        pytest.skip("numpy is not installed in this Python")
    out = machine.python("matrices.py")
    assert out.split() == ["True", "True"]


def test_sqlite(machine: Machine) -> None:
    """SQLite keeps a database with a write-ahead log, shared by threads and processes."""
    out = machine.python("database.py")
    assert out == "wal 151 ok\n"


def test_sqlite_shell(machine: Machine) -> None:
    """The sqlite3 shell makes and reads a database."""
    need("sqlite3")
    statements = "create table t(a); insert into t values(41),(1); select sum(a) from t;"
    assert machine.run("sqlite3", "s.db", statements) == "42\n"


def test_git(machine: Machine) -> None:
    """Git makes a repository, commits, branches, merges, packs, and clones it."""
    need("git")
    assert machine.shell("/bin/sh", "history.sh").split() == ["5"]


def test_bash(machine: Machine) -> None:
    """Bash runs pipelines, process substitution, background jobs, traps and arrays."""
    need("bash")
    assert machine.shell("bash", "pipelines.sh") == "sum 5050\ntrapped 2\n"


def test_node(machine: Machine) -> None:
    """Node runs file I/O, worker threads, child processes and timers."""
    need("node")
    assert json.loads(machine.shell("node", "node.js")) == [True, 100_000, "child", 16]


def test_grpc(machine: Machine) -> None:
    """A gRPC client with its threads calls the worker's own service over its socket."""
    out = machine.python("client.py")
    assert out.strip() == machine.worker.worker_id


@pytest.mark.slow
def test_go(machine: Machine, go_program: bytes) -> None:
    """A static Go program runs goroutines, timers, sockets and children."""
    machine.put("program", go_program, executable=True)
    assert machine.run("./program").endswith(" over a socket, from a child\n")


def test_the_wire_is_live(stack: Stack) -> None:
    """That none of these left a denial means something: a program that makes a namespace does."""
    need("unshare")
    worker = stack.launch()
    one = Machine(stack, worker)
    assert stack.run(worker, shell("unshare --user true"), keep=True).result.exit_code != 0
    assert one.counted() > 0
    until(one.denials)
    stack.stop(worker)
