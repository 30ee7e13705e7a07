"""What docs/record.md says can be done without our code, and its worked example."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature

from hayflick_logger import entries
from hayflick_logger.journal import Draft, Journal
from hayflick_rpc import events
from hayflick_tlog.merkle import leaf_hash, node_hash
from hayflick_tlog.tiles import Tile

DOCS = Path(__file__).parents[3] / "docs" / "record.md"
EVENT = b'{"event":"audit","timestamp":"1970-01-01T00:00:01Z"}'


def block(name: str) -> str:
    """Return the text of an example in the document."""
    (found,) = re.findall(rf"<!-- example: {name} -->\n```\w*\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return str(found)


def test_the_worked_example_is_true() -> None:
    """The two entries are what we would write, and have the hashes that the document states."""
    written = block("entries").encode().splitlines()
    leaves = [leaf_hash(entry) for entry in written]
    assert block("hashes").split() == [*(leaf.hex() for leaf in leaves), node_hash(*leaves).hex()]
    for index, entry in enumerate(written):
        recorded = entries.parse(entry, index)
        again = entries.compose(index, recorded.source, recorded.sequence, events.to_json(recorded.event))
        assert again == entry


@pytest.mark.parametrize("count", [0, 1, 300, 700])
def test_the_documents_verifier_accepts_a_log_and_finds_a_change(tmp_path: Path, count: int) -> None:
    """The few lines of Python in the document verify a log without any of our code."""
    scope: dict[str, Any] = {}
    exec(compile(block("verify"), str(DOCS), "exec"), scope)  # its own document, read from this checkout
    directory = tmp_path / "record"
    directory.mkdir(mode=0o700)
    journal = Journal(directory, max_segment_bytes=1_000_000)
    for start in range(0, count, 100):
        journal.append([Draft("s", start + number, EVENT) for number in range(1, 101)])
    journal.close()
    log, key = directory / "log", (directory / "log.pub").read_text()
    assert scope["verify"](log, key) == journal.next_index
    if count:
        bundle = log / Tile(None, 0, min(256, journal.next_index)).path
        bundle.write_bytes(bundle.read_bytes().replace(b"audit", b"audio", 1))
        with pytest.raises(ValueError, match="not the one"):
            scope["verify"](log, key)
    checkpoint = log / "checkpoint"
    checkpoint.write_text(checkpoint.read_text().replace(f"\n{journal.next_index}\n", "\n999\n"))
    with pytest.raises(InvalidSignature):
        scope["verify"](log, key)
