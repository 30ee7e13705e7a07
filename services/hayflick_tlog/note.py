"""Signed notes and their keys, after C2SP signed-note: text that states who signed it.

Pure. A note is a text, an empty line, and one line for each signature. Only
Ed25519 signatures (algorithm 1) are made; others are passed over.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MAX_NOTE_BYTES = 1024 * 1024
_ED25519 = 1
_HASH_BYTES = 4
_KEY_BYTES = 32
_MARK = "\N{EM DASH} "
_NAME = re.compile(r"[^\s+]{1,255}")


class BadNote(Exception):
    """Text that is no signed note, or that the key did not sign."""


def strict_base64(text: str) -> bytes:
    """Return the bytes that *text* is the one spelling of.

    Raises:
        BadNote: it is no base64, or another spelling of the same bytes.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadNote("it is not base64") from None
    if base64.b64encode(data).decode() != text:
        raise BadNote("it is not base64 in its one spelling")
    return data


@dataclass(frozen=True)
class Verifier:
    """A public key with its owner's name.

    Attributes:
        name: Who signs; for a log, its origin.
        public_key: 32 bytes.
    """

    name: str
    public_key: bytes

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            BadNote: the name has a space or a plus sign, or the key not 32 bytes.
        """
        if not _NAME.fullmatch(self.name) or len(self.public_key) != _KEY_BYTES:
            raise BadNote("a key has a name without spaces and plus signs, and 32 bytes")

    @property
    def key_hash(self) -> bytes:
        """What a signature line names the key by."""
        encoded = bytes((_ED25519,)) + self.public_key
        return hashlib.sha256(self.name.encode() + b"\n" + encoded).digest()[:_HASH_BYTES]

    def __str__(self) -> str:
        """The key as one line: name, hash and key, with plus signs between."""
        encoded = base64.b64encode(bytes((_ED25519,)) + self.public_key).decode()
        return f"{self.name}+{self.key_hash.hex()}+{encoded}"

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """Return the key that :meth:`__str__` wrote.

        Raises:
            BadNote: *text* is none.
        """
        name, _, rest = text.strip().partition("+")
        hash_, _, encoded = rest.partition("+")
        data = strict_base64(encoded)
        if data[:1] != bytes((_ED25519,)):
            raise BadNote("it is no Ed25519 verifier key")
        verifier = cls(name, data[1:])
        if verifier.key_hash.hex() != hash_.lower():
            raise BadNote("the key does not have the hash it states")
        return verifier

    def open(self, note: str) -> str:
        """Return the text of *note* when this key signed it.

        Raises:
            BadNote: it did not.
        """
        if len(note.encode()) > MAX_NOTE_BYTES:
            raise BadNote("it is too long for a note")
        text, gap, signatures = note.rpartition("\n\n")
        if not gap or not signatures.endswith("\n"):
            raise BadNote("it is no signed note")
        text += "\n"
        for line in signatures.splitlines():
            name, _, encoded = line.removeprefix(_MARK).partition(" ")
            if not line.startswith(_MARK) or not encoded:
                raise BadNote("a line behind the text is no signature")
            data = strict_base64(encoded)
            if name != self.name or data[:_HASH_BYTES] != self.key_hash:
                continue
            try:
                Ed25519PublicKey.from_public_bytes(self.public_key).verify(data[_HASH_BYTES:], text.encode())
            except InvalidSignature:
                raise BadNote(f"the signature of {self.name} is wrong") from None
            return text
        raise BadNote(f"it is not signed by {self.name}")


@dataclass(frozen=True)
class Signer:
    """A private key with its owner's name."""

    name: str
    private_key: Ed25519PrivateKey = field(repr=False)

    @property
    def verifier(self) -> Verifier:
        """The public half."""
        raw = self.private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return Verifier(self.name, raw)

    def sign(self, text: str) -> str:
        """Return *text*, which ends in a newline, as a signed note."""
        verifier = self.verifier
        data = verifier.key_hash + self.private_key.sign(text.encode())
        return f"{text}\n{_MARK}{verifier.name} {base64.b64encode(data).decode()}\n"
