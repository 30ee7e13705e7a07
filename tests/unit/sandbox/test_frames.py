"""Frames between a task and its orchestrator: strict, whatever the bytes."""

from __future__ import annotations

import json
import socket
import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import frames

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text(), json_values, max_size=4)
one_frame = st.tuples(headers, st.binary(max_size=64))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Return *data* in pieces, cut at *places*."""
    edges = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(st.lists(one_frame, max_size=4), st.lists(st.integers(0, 600), max_size=8))
def test_round_trip(sent: list[tuple[dict[str, Any], bytes]], places: list[int]) -> None:
    """Frames come out as they went in, wherever the stream is cut."""
    stream = b"".join(frames.encode(header, body) for header, body in sent)
    decoder = frames.Decoder()
    received = [frame for piece in cut(stream, places) for frame in decoder.feed(piece)]
    assert received == sent


@given(st.lists(st.binary(max_size=64), max_size=6))
def test_any_bytes(pieces: list[bytes]) -> None:
    """Bytes that are no frames raise FrameError and nothing else."""
    decoder = frames.Decoder()
    try:
        for piece in pieces:
            decoder.feed(piece)
    except frames.FrameError:
        return


@given(st.binary(max_size=200))
def test_any_header(header: bytes) -> None:
    """A well-formed frame around any header bytes gives an object or FrameError."""
    packet = struct.pack(">II", 4 + len(header), len(header)) + header
    try:
        ((parsed, body),) = frames.Decoder().feed(packet)
    except frames.FrameError:
        return
    assert isinstance(parsed, dict)
    assert body == b""


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a":1}x',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"n":' + b"9" * 5_000 + b"}",
        b"\xff\xfe",
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\xed\xa0\x80"}',
    ],
)
def test_hostile_headers(header: bytes) -> None:
    """Headers that are not one JSON object, too deep or too long a number, raise FrameError."""
    packet = struct.pack(">II", 4 + len(header), len(header)) + header
    with pytest.raises(frames.FrameError):
        frames.Decoder().feed(packet)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_no_number_that_json_lacks(constant: bytes) -> None:
    """NaN and the infinities, which Python's parser takes and JSON does not know, raise FrameError."""
    header = b'{"id":' + constant + b"}"
    with pytest.raises(frames.FrameError):
        frames.Decoder().feed(struct.pack(">II", 4 + len(header), len(header)) + header)


@pytest.mark.parametrize(
    ("total", "head"),
    [(0, 0), (3, 0), (10, 7), (10, 2**32 - 1), (frames.MAX_FRAME_BYTES + 1, 2), (2**32 - 1, 2)],
)
def test_impossible_lengths(total: int, head: int) -> None:
    """Lengths that contradict each other or the limit raise before anything is stored."""
    with pytest.raises(frames.FrameError):
        frames.Decoder().feed(struct.pack(">II", total, head))


def test_the_limit_is_the_decoders() -> None:
    """A decoder refuses a frame over its own limit and takes one at it."""
    frame = frames.encode({}, bytes(100))
    assert frames.Decoder(len(frame) - 4).feed(frame) == [({}, bytes(100))]
    with pytest.raises(frames.FrameError):
        frames.Decoder(len(frame) - 5).feed(frame)


def test_an_oversized_frame_is_not_made() -> None:
    """encode() refuses what no decoder would take."""
    with pytest.raises(frames.FrameError):
        frames.encode({}, bytes(frames.MAX_FRAME_BYTES))


def test_blocking_ends_meet() -> None:
    """read_frame() returns what write_frame() sent, and None once the other end hung up."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            frames.write_frame(theirs, {"type": "start"}, b"payload")
        assert frames.read_frame(ours) == ({"type": "start"}, b"payload")
        assert frames.read_frame(ours) is None


@pytest.mark.parametrize("kept", [1, 7, 8, 12])
def test_a_cut_frame_is_an_end(kept: int) -> None:
    """A stream that ends within a frame reads as hung up."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(frames.encode({"type": "result"}, b"x")[:kept])
        assert frames.read_frame(ours) is None


MANY = frames.MAX_HEADER_VALUES + 1


@pytest.mark.parametrize(
    "value",
    [[[]] * MANY, [1] * MANY, [""] * MANY, [{"": 0}] * MANY, {str(n): 0 for n in range(MANY)}],
    ids=["lists", "numbers", "strings", "objects", "names"],
)
def test_many_values_are_refused_before_they_are_made(value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of very many small values, which would cost a hundred times its size, is never parsed."""
    stream = frames.encode({"a": value})
    monkeypatch.setattr(frames, "_DECODER", None)
    with pytest.raises(frames.FrameError, match="values"):
        frames.Decoder().feed(stream)


@pytest.mark.parametrize("text", ['[{"', "\\", '\\"', ',\\\\"[', 'é"', "\0"])
def test_long_strings_are_no_values(text: str) -> None:
    """What looks like values inside of a string counts for nothing, whatever is quoted there."""
    header = {text: [text * MANY, text], "n": [1.5, None, {text: []}]}
    assert frames.Decoder().feed(frames.encode(header, b"body")) == [(header, b"body")]


@given(st.text(alphabet='\\"[]{},:a'), st.integers(0, 8))
def test_values_are_counted_outside_of_strings(text: str, spare: int) -> None:
    """The count is that of the commas and brackets which the JSON has outside of its strings, to one."""
    head = json.dumps({text: [text, {text: []}]}).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "MAX_HEADER_VALUES", spare)
        refused = len(head) > spare and spare < 5  # {, [, a comma, { and [
        if refused:
            with pytest.raises(frames.FrameError, match="values"):
                frames._require_few_values(head)
        else:
            frames._require_few_values(head)
