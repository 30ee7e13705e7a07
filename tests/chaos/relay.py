"""A Unix socket that passes on what comes to another, until the way between them is cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

CHUNK_BYTES = 65_536


class Relay:
    """Passes bytes both ways. *Held*, they arrive when it is healed; *cut*, connections break.

    Args:
        listen: Where callers come.
        target: Where they want to.
    """

    def __init__(self, listen: Path, target: Path) -> None:
        self._listen, self._target = listen, target
        self._open = threading.Event()
        self._open.set()
        self._refusing = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._guard = threading.Lock()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(listen))
        self._server.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def hold(self) -> None:
        """Let nothing through; what was sent waits."""
        self._open.clear()

    def cut(self) -> None:
        """Break every connection, and each new one."""
        self._refusing = True
        self._break()

    def heal(self) -> None:
        """Let everything through again."""
        self._refusing = False
        self._open.set()

    def close(self) -> None:
        """End; return when no thread is left."""
        self.cut()
        self._open.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for thread in self._threads:
            thread.join(10)
        self._listen.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._server.accept()
            except OSError:
                return
            callee = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                if self._refusing:
                    raise ConnectionRefusedError
                callee.connect(str(self._target))
            except OSError:
                caller.close()
                callee.close()
                continue
            with self._guard:
                self._pairs.add((caller, callee))
            for source, sink in ((caller, callee), (callee, caller)):
                thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                self._open.wait()
                sink.sendall(data)
        self._drop(source, sink)

    def _drop(self, one: socket.socket, other: socket.socket) -> None:
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._guard:
            for pair in {(one, other), (other, one)} & self._pairs:
                self._pairs.discard(pair)
                for end in pair:
                    end.close()

    def _break(self) -> None:
        with self._guard:
            pairs = list(self._pairs)
        for caller, callee in pairs:
            self._drop(caller, callee)
