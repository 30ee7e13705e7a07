"""The file of a service's private key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hayflick_controller.receipts import KEY_NAME, Signer
from hayflick_rpc import keyfile


def test_a_key_is_kept_for_this_user_alone(tmp_path: Path) -> None:
    """What is stored is loaded again, whatever the umask was, and nobody else may read it."""
    key, path = Ed25519PrivateKey.generate(), tmp_path / "a.key"
    before = os.umask(0)
    try:
        keyfile.store(path, key)
    finally:
        os.umask(before)
    assert keyfile.load(path).public_key() == key.public_key()
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_start_left_is_replaced(tmp_path: Path) -> None:
    """Half a key that others may read is neither kept nor written into."""
    left = tmp_path / "a.key.new"
    left.write_text("half")
    left.chmod(0o644)
    path = tmp_path / "a.key"
    keyfile.store(path, Ed25519PrivateKey.generate())
    assert path.stat().st_mode & 0o777 == 0o600
    assert not left.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_signs_nothing(tmp_path: Path, mode: int) -> None:
    """A key of receipts that was opened to others is refused by name."""
    assert Signer.load(tmp_path).key_id == Signer.load(tmp_path).key_id
    (tmp_path / KEY_NAME).chmod(mode)
    with pytest.raises(PermissionError, match=KEY_NAME):
        Signer.load(tmp_path)


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    """A private key that does not sign is no key of ours."""
    pem = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    keyfile.write(tmp_path / "a.key", pem)
    with pytest.raises(ValueError, match="no Ed25519 key"):
        keyfile.load(tmp_path / "a.key")
