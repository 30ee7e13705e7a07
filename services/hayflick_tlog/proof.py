"""A proof that can be kept and shown: an entry's place, the hashes to the root, the signed checkpoint.

Pure. The text form is C2SP tlog-proof, version 1.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.merkle import HASH_BYTES, MAX_PROOF_HASHES, BadProof, check_inclusion, leaf_hash
from hayflick_tlog.note import BadNote, Verifier, strict_base64

_HEADER = "c2sp.org/tlog-proof@v1"
_INDEX = re.compile(r"index (0|[1-9]\d{0,18})", re.ASCII)


@dataclass(frozen=True)
class Proof:
    """What shows that an entry is in a log.

    Attributes:
        index: Where.
        hashes: From the leaf up.
        note: The signed checkpoint of the tree that they lead to.
    """

    index: int
    hashes: tuple[bytes, ...]
    note: str

    def __str__(self) -> str:
        """The proof as text."""
        lines = [_HEADER, f"index {self.index}"]
        lines += [base64.b64encode(one).decode() for one in self.hashes]
        return "\n".join(lines) + "\n\n" + self.note

    @classmethod
    def parse(cls, text: str) -> Proof:
        """Return the proof that :meth:`__str__` wrote.

        Raises:
            BadProof: *text* is none.
        """
        head, gap, note = text.partition("\n\n")
        header, _, rest = head.partition("\n")
        lines = rest.split("\n")
        match = _INDEX.fullmatch(lines[0])
        if header != _HEADER or not gap or match is None or len(lines) > MAX_PROOF_HASHES + 1:
            raise BadProof(f"it does not begin with {_HEADER} and an index")
        try:
            hashes = tuple(map(strict_base64, lines[1:]))
        except BadNote:
            raise BadProof("a line of it is no hash") from None
        if not all(len(one) == HASH_BYTES for one in hashes):
            raise BadProof("a line of it is no hash")
        return cls(int(match[1]), hashes, note)

    def verify(self, entry: bytes, verifier: Verifier) -> Checkpoint:
        """Return the checkpoint when it is signed and *entry* is in its tree.

        Raises:
            BadNote: *verifier* did not sign the checkpoint.
            BadProof: the entry is not there.
        """
        checkpoint = Checkpoint.open(self.note, verifier)
        check_inclusion(self.index, checkpoint.size, leaf_hash(entry), self.hashes, checkpoint.root)
        return checkpoint
