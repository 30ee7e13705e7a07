"""The logger's signing key: made with the record, kept beside it, readable by this user alone."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from hayflick_logger.directory import sync
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
    if private.stat().st_mode & 0o077:
        raise OSError(1, "others may read the logger's signing key; make it mode 0600", str(private))
    key = load_pem_private_key(private.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{private}: is no Ed25519 key")  # noqa: TRY004 -- a value, not a type, to the user
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
    _write(directory / PUBLIC, f"{public}\n".encode())
    _write(directory / PRIVATE, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sync(directory)


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    fresh.rename(path)
