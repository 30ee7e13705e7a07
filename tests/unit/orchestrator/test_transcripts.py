"""What is kept of a sandbox's last output."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hayflick_orchestrator.transcripts import Transcript

OUTPUT = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1))
)


@given(OUTPUT, st.integers(1, 40), st.integers(1, 5))
def test_the_newest_is_kept(said: list[tuple[str, str, bytes]], max_bytes: int, max_pieces: int) -> None:
    """The transcript is a suffix of all that was said, within its bounds, and counts what it dropped."""
    transcript = Transcript(max_bytes, max_pieces)
    for task_id, stream, data in said:
        transcript.add(task_id, stream, data)
    kept = [(piece.task_id, piece.stream, byte) for piece in transcript.pieces for byte in bytes(piece.data)]
    everything = [(task_id, stream, byte) for task_id, stream, data in said for byte in data]
    assert kept == everything[len(everything) - len(kept) :]
    assert len(kept) <= max_bytes
    assert len(transcript.pieces) <= max_pieces
    assert transcript.dropped_bytes == len(everything) - len(kept)
    if len(everything) <= max_bytes and len(said) <= max_pieces:
        assert kept == everything
