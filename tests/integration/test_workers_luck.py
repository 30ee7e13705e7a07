"""A warm fork clones code, and neither secrets nor luck."""

from __future__ import annotations

import json
import os
import secrets
from typing import Any

import pytest

from .conftest import Stack, call, command, running_stack

CANARY = "SECRET_TOKEN"


def draw(me: Any) -> dict[str, Any]:
    """Return one of everything that must be drawn anew; runs inside."""
    import sys

    loaded = sorted(sys.modules)
    import os
    import random
    import secrets
    import ssl
    import tempfile
    import uuid

    with tempfile.NamedTemporaryFile() as file:
        name = file.name
    return {
        "loaded": loaded,
        "fds": sorted(int(name) for name in os.listdir("/proc/self/fd")),  # noqa: PTH208
        "drawn": {
            "os.urandom": os.urandom(16).hex(),
            "getrandom": os.getrandom(16).hex(),
            "random.random": random.random(),
            "random.randbytes": random.randbytes(16).hex(),
            "secrets": secrets.token_hex(16),
            "uuid1": uuid.uuid1().hex,
            "uuid4": uuid.uuid4().hex,
            "ssl": ssl.RAND_bytes(16).hex(),
            "tempfile": name,
        },
    }


def test_luck_is_drawn_anew(stack: Stack) -> None:
    """Tasks of one worker and of others, all forks of one zygote, draw nothing twice."""
    workers = [stack.launch(cpu_millis=2_000) for _ in range(3)]
    found = [json.loads(stack.run(one, call(draw)).result.value_json) for one in workers for _ in range(2)]
    for kind in found[0]["drawn"]:
        drawn = [one["drawn"][kind] for one in found]
        assert len(set(drawn)) == len(drawn), kind
    for one in found:
        # 3 is the control stream; one more is the directory that was being read.
        assert one["fds"][:4] == [0, 1, 2, 3]
        assert len(one["fds"]) == 5
        # Whatever seeds itself once, at its import or first use, must not be there at the fork.
        assert not set(one["loaded"]) & {"ssl", "_ssl", "multiprocessing", "tempfile", "numpy", "grpc"}
    for worker in workers:
        stack.stop(worker)


def test_programs_hash_by_a_secret_of_their_own(stack: Stack) -> None:
    """Interpreters that tasks start have a hash secret each; callables have their zygote's, not ours."""
    fresh = command("python", "-c", "print(hash('hayflick'))")
    workers = [stack.launch() for _ in range(2)]
    programs = {int(stack.run(one, fresh).stdout) for one in workers for _ in range(2)}
    assert len(programs) == 4
    callables = {int(stack.run(one, call(lambda me: hash("hayflick"))).result.value_json) for one in workers}
    assert len(callables) == 1  # one secret for all forks of a zygote: known, and in docs/sandbox.md
    assert not callables & {*programs, hash("hayflick")}
    for worker in workers:
        stack.stop(worker)


def veiled(word: str) -> bytes:
    """Return *word* so that it can be sought without being there."""
    return bytes(byte ^ 0x55 for byte in word.encode())


def seek(me: Any, words: tuple[bytes, ...]) -> list[list[str]]:
    """Return where each of *words*, given veiled, can be read; runs inside."""
    import ctypes
    import os
    from pathlib import Path

    found: list[list[str]] = [[] for _ in words]
    veil = bytes(byte ^ 0x55 for byte in range(256))
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, so that our own memory is ours to read

    def look(where: str, data: bytes) -> None:
        hidden = data.translate(veil)
        for word, places in zip(words, found, strict=True):
            if word in hidden:
                places.append(where)

    look("os.environ", repr(dict(os.environ)).encode())
    for directory in Path("/proc").iterdir():
        for name in ("environ", "cmdline") if directory.name.isdigit() else ():
            try:
                look(str(directory / name), (directory / name).read_bytes())
            except OSError:
                continue
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/mem").open("rb", 0) as memory:
        for line in maps.read().splitlines():
            where, mode, *rest = line.split()
            if mode.startswith("r") and "[v" not in line:
                low, high = (int(edge, 16) for edge in where.split("-"))
                try:
                    memory.seek(low)
                    look(f"memory {rest[-1]}", memory.read(high - low))
                except OSError:
                    continue
    return found


def test_nothing_of_the_orchestrators_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the orchestrator's environment is nowhere inside: variables, /proc, arguments, memory."""
    value, own = secrets.token_hex(16), secrets.token_hex(16)
    monkeypatch.setenv(CANARY, value)
    words = (veiled(value), veiled(own))
    with running_stack() as stack:
        worker = stack.launch()
        ran = stack.run(worker, command("env"))
        names = {line.partition("=")[0] for line in ran.stdout.decode().splitlines()}
        assert names <= {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER", "HAYFLICK_WORKER"}, names

        def task(me: Any, seek: Any = seek, words: Any = words, own: str = own) -> Any:
            return [seek(me, words), len(own)]

        (places, own_places), _ = json.loads(stack.run(worker, call(task)).result.value_json)
        assert places == []
        assert own_places  # it finds what is there
    assert os.environ[CANARY] == value
