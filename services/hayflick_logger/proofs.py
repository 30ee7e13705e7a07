"""What the log proves, for the wire. Pure but for the tiles it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hayflick.v1 import logger_pb2
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger.recovery import corrupt
from hayflick_rpc.errors import HayflickError, invalid_field
from hayflick_tlog.merkle import consistency_proof, inclusion_proof, leaf_hash
from hayflick_tlog.tiles import BadTile, parse_path

if TYPE_CHECKING:
    from hayflick_logger.journal import Journal


def inclusion(
    journal: Journal, request: logger_pb2.GetInclusionProofRequest
) -> logger_pb2.GetInclusionProofResponse:
    """Return the proof that an entry is in the tree.

    Raises:
        HayflickError: BEYOND_THE_LOG; JOURNAL_CORRUPT when the tiles cannot be read back.
    """
    size = _size(journal, request.tree_size)
    if request.index >= size:
        raise _beyond(f"index: a tree of {size} entries has no entry {request.index}", journal)
    try:
        return logger_pb2.GetInclusionProofResponse(
            leaf_hash=leaf_hash(journal.read([request.index])[0]),
            tree_size=size,
            hashes=inclusion_proof(request.index, size, journal.subtree),
            root_hash=journal.root(size),
        )
    except (OSError, BadTile) as error:
        raise corrupt(f"a tile cannot be read back: {error}", -1) from error


def consistency(
    journal: Journal, request: logger_pb2.GetConsistencyProofRequest
) -> logger_pb2.GetConsistencyProofResponse:
    """Return the proof that one tree is the beginning of another.

    Raises:
        HayflickError: INVALID_FIELD; BEYOND_THE_LOG; JOURNAL_CORRUPT when the
            tiles cannot be read back.
    """
    new = _size(journal, request.new_tree_size)
    if not 1 <= request.old_tree_size <= new:
        raise invalid_field("old_tree_size", f"must be from 1 to the newer tree's size, {new}")
    try:
        hashes = consistency_proof(request.old_tree_size, new, journal.subtree)
    except (OSError, BadTile) as error:
        raise corrupt(f"a tile cannot be read back: {error}", -1) from error
    return logger_pb2.GetConsistencyProofResponse(new_tree_size=new, hashes=hashes)


def tile(journal: Journal, request: logger_pb2.GetTileRequest) -> logger_pb2.GetTileResponse:
    """Return a tile or an entry bundle.

    Raises:
        HayflickError: INVALID_FIELD; BEYOND_THE_LOG; JOURNAL_CORRUPT when it cannot be read back.
    """
    try:
        wanted = parse_path(request.path)
    except BadTile as error:
        raise invalid_field("path", f"{error}; tile/0/x001/234 and tile/entries/000.p/7 are") from error
    try:
        data = journal.tile(wanted)
    except (OSError, BadTile) as error:
        raise corrupt(f"a tile cannot be read back: {error}", -1) from error
    if data is None:
        raise _beyond("path: the log does not reach that far", journal)
    return logger_pb2.GetTileResponse(data=data)


def _size(journal: Journal, asked: int) -> int:
    if asked > journal.next_index:
        raise _beyond(f"tree_size: the log has {journal.next_index} entries, not {asked}", journal)
    return asked or journal.next_index


def _beyond(message: str, journal: Journal) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_BEYOND_THE_LOG, message, metadata={"tree_size": str(journal.next_index)}
    )
