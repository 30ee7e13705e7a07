"""The file that a service keeps its Ed25519 private key in: PEM, for this user alone."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

if TYPE_CHECKING:
    from pathlib import Path

MODE = 0o600


def load(path: Path) -> Ed25519PrivateKey:
    """Return the key at *path*.

    Raises:
        OSError: it cannot be read; EPERM when others may read it.
        ValueError: the file holds no Ed25519 key.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        # Of the file that is read, not of whatever the name stands for next.
        if os.fstat(descriptor).st_mode & 0o077:
            raise OSError(errno.EPERM, "others may read the signing key; make it mode 0600", str(path))
        data = file.read()
    key = load_pem_private_key(data, password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: is no Ed25519 key")  # noqa: TRY004 -- a value, not a type, to the user
    return key


def store(path: Path, key: Ed25519PrivateKey) -> None:
    """Keep *key* at *path*: whole, and on the disk, before the name is there.

    Raises:
        OSError: the file cannot be written.
    """
    write(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def write(path: Path, data: bytes) -> None:
    """Put *data* at *path*, mode 0600; the caller syncs the directory when the name must last.

    Raises:
        OSError: the file cannot be written.
    """
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)  # of a start that was killed here
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    fresh.rename(path)
