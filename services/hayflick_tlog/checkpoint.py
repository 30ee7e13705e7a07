"""The head of a log, as C2SP tlog-checkpoint writes it: origin, size and root, in a signed note. Pure."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from hayflick_tlog.merkle import HASH_BYTES
from hayflick_tlog.note import BadNote, Signer, Verifier, strict_base64

_SIZE = re.compile(r"0|[1-9]\d{0,18}", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """What a log says it is.

    Attributes:
        origin: Which log.
        size: How many entries.
        root: The hash over them.
    """

    origin: str
    size: int
    root: bytes

    def sign(self, signer: Signer) -> str:
        """Return the signed note."""
        return signer.sign(f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n")

    @classmethod
    def open(cls, note: str, verifier: Verifier) -> Checkpoint:
        """Return the checkpoint in *note*.

        Raises:
            BadNote: *verifier* did not sign it, or it is no checkpoint of its log.
        """
        lines = verifier.open(note).split("\n")
        if len(lines) < 4 or not _SIZE.fullmatch(lines[1]):
            raise BadNote("it is no checkpoint")
        root = strict_base64(lines[2])
        if len(root) != HASH_BYTES:
            raise BadNote("it is no checkpoint")
        if lines[0] != verifier.name:
            raise BadNote(f"it is of another log: {lines[0][:64]}")
        return cls(lines[0], int(lines[1]), root)
