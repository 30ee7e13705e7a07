"""The logger's signing key: made with the record, kept beside it, readable by this user alone."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick_logger.directory import sync
from hayflick_rpc import keyfile
from hayflick_tlog.note import BadNote, Signer, Verifier

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE = "log.key"
PUBLIC = "log.pub"


def load_signer(directory: Path, origin: str = "") -> Signer:
    """Return the signer of the record in *directory*, made when there is none.

    Args:
        directory: The record's.
        origin: The name of a log that is made now; made up when empty.

    Raises:
        OSError: the key cannot be read, or others may read it.
        ValueError: the files hold no key, or *origin* is another than the log's.
    """
    private, public = directory / PRIVATE, directory / PUBLIC
    if not private.exists():
        _make(directory, origin or f"hayflick/{secrets.token_hex(8)}")
    key = keyfile.load(private)
    try:
        name = Verifier.parse(public.read_text(encoding="utf-8")).name
    except BadNote as error:
        raise ValueError(f"{public}: {error}") from error
    if origin and origin != name:
        raise ValueError(f"origin: this record is {name!r}; a log cannot be renamed")
    return Signer(name, key)


def _make(directory: Path, origin: str) -> None:
    key = Ed25519PrivateKey.generate()
    try:
        public = str(Signer(origin, key).verifier)
    except BadNote as error:
        raise ValueError(f"origin: {error}") from error
    # The public half first: a private key without it would not be found again.
    keyfile.write(directory / PUBLIC, f"{public}\n".encode())
    keyfile.store(directory / PRIVATE, key)
    sync(directory)
