"""How a task and its orchestrator speak: framed JSON with an optional raw body.

A frame is a 4-byte big-endian total length, a 4-byte header length, a JSON
object of that length, and the body. Both ends are strict, because one of them
may be hostile.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, NoReturn

MAX_FRAME_BYTES = 24 * 1024 * 1024
MAX_HEADER_BYTES = MAX_FRAME_BYTES
# A value of two bytes costs its reader a hundred and more, and each one time. What is
# large in an honest header is a few long strings.
MAX_HEADER_VALUES = 65_536
_LENGTH = struct.Struct(">I")
_PREFIX_BYTES = 2 * _LENGTH.size

Header = dict[str, Any]


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


# Python's parser also takes NaN and the infinities, which JSON does not have,
# and from bytes other encodings than UTF-8.
_DECODER = json.JSONDecoder(parse_constant=_not_json)


class FrameError(Exception):
    """What came is not a frame; its sender broke the protocol."""


def encode(header: Header, body: bytes = b"") -> bytes:
    """Return the frame of *header* and *body*.

    Raises:
        FrameError: the frame would be larger than :data:`MAX_FRAME_BYTES`.
    """
    head = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    total = _LENGTH.size + len(head) + len(body)
    if total > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {total} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(total) + _LENGTH.pack(len(head)) + head + body


class Decoder:
    """Turns a stream of bytes, cut anywhere, into frames."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._limit = max_frame_bytes
        self._buffer = bytearray()

    @property
    def pending_bytes(self) -> int:
        """How much of a frame is here that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[tuple[Header, bytes]]:
        """Take *data*; return the frames it completed.

        Raises:
            FrameError: the stream is not made of frames, or one is too large.
        """
        self._buffer += data
        frames: list[tuple[Header, bytes]] = []
        while len(self._buffer) >= _PREFIX_BYTES:
            total = _checked_total(self._buffer, self._limit)
            end = _LENGTH.size + total
            if len(self._buffer) < end:
                break
            frames.append(_parse(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return frames


def write_frame(sock: socket.socket, header: Header, body: bytes = b"") -> None:
    """Send one frame on a blocking *sock*.

    Raises:
        FrameError: it is too large.
        OSError: the other end is gone.
    """
    sock.sendall(encode(header, body))


def read_frame(sock: socket.socket) -> tuple[Header, bytes] | None:
    """Receive one frame from a blocking *sock*; ``None`` when the other end hung up.

    Raises:
        FrameError: what came is not a frame.
    """
    prefix = _receive(sock, _PREFIX_BYTES)
    if prefix is None:
        return None
    total = _checked_total(prefix, MAX_FRAME_BYTES)
    rest = _receive(sock, total - _LENGTH.size)
    if rest is None:
        return None
    return _parse(prefix[_LENGTH.size :] + rest)


def _receive(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        piece = sock.recv(min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def _checked_total(buffer: bytes | bytearray, limit: int) -> int:
    (total,) = _LENGTH.unpack_from(buffer)
    (head,) = _LENGTH.unpack_from(buffer, _LENGTH.size)
    if not _LENGTH.size <= total <= limit or head > total - _LENGTH.size:
        raise FrameError(f"impossible lengths: {total} in all, {head} of header")
    return int(total)


def _require_few_values(head: bytes) -> None:
    """Refuse a header with too many values before anything is made of it.

    JSON has backslashes in strings alone, so without them and what they quote every
    other part between quotation marks is outside of strings.
    """
    if len(head) <= MAX_HEADER_VALUES:
        return
    bare = head.replace(b"\\\\", b"").replace(b'\\"', b"")
    # As many strings as values, and as many names: bounded first, for each part is an object too.
    if bare.count(b'"') <= 4 * MAX_HEADER_VALUES:
        outside = b"".join(bare.split(b'"')[::2])
        if sum(map(outside.count, (b",", b"[", b"{"))) <= MAX_HEADER_VALUES:
            return
    raise FrameError(f"the header has more than {MAX_HEADER_VALUES} values")


def _parse(frame: bytes) -> tuple[Header, bytes]:
    (length,) = _LENGTH.unpack_from(frame)
    end = _LENGTH.size + length
    _require_few_values(frame[_LENGTH.size : end])
    try:
        header = _DECODER.decode(frame[_LENGTH.size : end].decode())
    except (ValueError, RecursionError):
        raise FrameError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise FrameError("the header is not a JSON object")
    return header, frame[end:]
