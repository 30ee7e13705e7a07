"""How many values a message has, counted in its bytes before anything is made of them. Pure.

On the wire an empty string takes two bytes, and a hundred times that where it is
parsed, kept and passed on. A caller that is not trusted may send as many bytes as its
longest payload needs, but not as many values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

MAX_FIELDS = 65_536
# As deep as protobuf itself parses.
MAX_DEPTH = 100
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


class _End(Exception):
    """The bytes are no message from here on; what parses them says so too."""


def has_few(data: bytes, message: Descriptor | None, most: int = MAX_FIELDS) -> bool:
    """Return whether *data* has at most *most* fields, those of messages within it included.

    Of bytes that are no message, those that a parser reads before it finds out are counted.

    Args:
        data: A message as it came.
        message: Its type; ``None`` where it is not known, and then nothing within it is counted.
        most: How many it may have.
    """
    try:
        return _count(memoryview(data), message, most, 0) >= 0
    except _End:
        return True


def _count(data: memoryview, message: Descriptor | None, left: int, depth: int) -> int:
    """Return how many of *left* fields are not used up; below zero when there are more."""
    if depth > MAX_DEPTH:
        raise _End
    at = 0
    while at < len(data):
        left -= 1
        if left < 0:
            return left
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise _End
            field = None if message is None else message.fields_by_number.get(key >> 3)
            if field is not None and field.message_type is not None:
                left = _count(data[at : at + size], field.message_type, left, depth + 1)
                if left < 0:
                    return left
            at += size
        else:
            return -1  # a group, which no message of ours has; what is in it is not looked into
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for number in range(_MAX_VARINT_BYTES):
        if at >= len(data):
            raise _End
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << 7 * number
        if byte < 0x80:
            return value, at
    raise _End
