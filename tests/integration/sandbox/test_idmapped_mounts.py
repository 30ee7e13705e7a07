"""What workers see of the host has no owner, so that none of its sockets, pipes and devices answers them."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hayflick_sandbox.zygote_client import ZygoteDied

pytestmark = [pytest.mark.root, pytest.mark.layers("idmapped-mounts")]

TRY = """
    import errno, json, os, socket, stat, sys

    def tried(function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno]
        return "ok"

    def connect(kind, path):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.connect(path)

    def send(path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", path)

    there = sys.argv[1]
    print(json.dumps({
        "stream": tried(connect, socket.SOCK_STREAM, f"{there}/stream"),
        "datagram": tried(send, f"{there}/datagram"),
        "by a link": tried(connect, socket.SOCK_STREAM, "/tmp/link")
            if not os.symlink(f"{there}/stream", "/tmp/link") else "",
        "by a descriptor": tried(
            connect, socket.SOCK_STREAM, f"/proc/self/fd/{os.open(there, os.O_PATH)}/stream"),
        "pipe": tried(os.open, f"{there}/pipe", os.O_WRONLY | os.O_NONBLOCK),
        "both ends": tried(os.open, f"{there}/pipe", os.O_RDWR | os.O_NONBLOCK),
        "device": tried(os.open, f"{there}/device", os.O_RDONLY),
        "file": tried(os.open, f"{there}/file", os.O_RDONLY),
        "file, to write": tried(os.open, f"{there}/file", os.O_WRONLY),
        "locked file": tried(os.open, f"{there}/locked", os.O_RDONLY),
        "program": tried(os.open, f"{there}/program", os.O_RDONLY),
        "runs": os.spawnv(os.P_WAIT, f"{there}/program", ["program"]),
        "owner": os.stat(f"{there}/file").st_uid,
    }))
"""


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Path]:
    """A directory with one of each, open to everybody, that somebody listens in."""
    tmp_path.chmod(0o755)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
    ):
        for sock, name in ((stream, "stream"), (datagram, "datagram")):
            sock.bind(str(tmp_path / name))
            (tmp_path / name).chmod(0o777)
        stream.listen(4)
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "pipe").chmod(0o666)
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        os.mknod(tmp_path / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (tmp_path / "device").chmod(0o666)
        for name, text, mode in (
            ("file", "text", 0o666),
            ("locked", "secret", 0o600),
            ("program", "#!/bin/sh\nexit 7\n", 0o755),
        ):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(mode)
        yield tmp_path
        os.close(reader)


def test_nothing_there_answers(make_house: Callable[..., AbstractContextManager[Any]], shown: Path) -> None:
    """Sockets, pipes and devices below a shown path are closed to workers; files are as readable as ever."""
    with make_house(readable=[str(shown)]) as house, house.sandbox() as sandbox:
        found = sandbox.ask(TRY, str(shown))
    assert found == {
        **dict.fromkeys(("stream", "datagram", "by a link", "by a descriptor"), "EACCES"),
        **dict.fromkeys(("pipe", "both ends", "device", "locked file"), "EACCES"),
        **dict.fromkeys(("file", "program"), "ok"),
        "file, to write": "EACCES",
        "runs": 7,
        "owner": 65_534,
    }


def test_without_the_layer_they_would(
    make_house: Callable[..., AbstractContextManager[Any]], shown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain read-only mounts the very same sockets and pipes answer, so that the test can fail."""
    let_go = os.environ.get("HAYFLICK_ALLOW_DEGRADED", "")
    monkeypatch.setenv("HAYFLICK_ALLOW_DEGRADED", f"{let_go},idmapped-mounts".strip(","))
    with make_house(readable=[str(shown)]) as house, house.sandbox() as sandbox:
        found = sandbox.ask(TRY, str(shown))
    answering = ("stream", "datagram", "by a link", "by a descriptor", "pipe", "both ends")
    assert {found[name] for name in answering} == {"ok"}
    assert (found["device"], found["file, to write"]) == ("EACCES", "EROFS")


def test_what_cannot_be_mounted_so_is_refused(
    make_house: Callable[..., AbstractContextManager[Any]],
) -> None:
    """A zygote that was not told to do without fails at a path whose file system knows no such mounts."""
    with (
        pytest.raises(ZygoteDied, match=r"Invalid argument.*/sys/kernel"),
        make_house(readable=["/sys/kernel"]),
    ):
        pass
