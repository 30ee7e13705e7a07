"""Landlock: for each ABI all that it can handle, and the size of structure that it knows."""

from __future__ import annotations

import pytest

from hayflick_sandbox import landlock
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.steps import ApplyLandlock

# https://docs.kernel.org/userspace-api/landlock.html, "Previous limitations".
TABLE = {
    1: (0x1FFF, 0, 0),
    2: (0x3FFF, 0, 0),
    3: (0x7FFF, 0, 0),
    4: (0x7FFF, 0b11, 0),
    5: (0xFFFF, 0b11, 0),
    6: (0xFFFF, 0b11, 0b11),
    7: (0xFFFF, 0b11, 0b11),
    99: (0xFFFF, 0b11, 0b11),
}


@pytest.mark.parametrize("version", TABLE)
def test_all_that_the_kernel_can_handle_is_handled(version: int) -> None:
    """Each ABI handles every right and scope that it has, never a lesser set."""
    assert landlock.handled(version) == TABLE[version]


@pytest.mark.parametrize("version", TABLE)
def test_the_structure_fits(version: int) -> None:
    """The structure passed is as large as its last member that is not zero, and no larger than the ABI's."""
    _, tcp, scopes = landlock.handled(version)
    size = landlock._SIZES.get(version, landlock._LAST_SIZE)
    assert size == 8 * (1 + bool(tcp or scopes) + bool(scopes))


def test_only_private_directories_are_writable() -> None:
    """Files can be made below /workspace, /tmp and /dev/shm alone."""
    rules = ApplyLandlock(tcp=False).rules()
    makes = landlock.MAKE_REG | landlock.MAKE_DIR | landlock.REMOVE_FILE | landlock.REFER
    assert {path for path, rights in rules.items() if rights & makes} == {"/workspace", "/tmp", "/dev/shm"}
    assert {path for path, rights in rules.items() if rights & landlock.WRITE_FILE} == {
        *("/workspace", "/tmp", "/dev/shm", "/dev", "/proc"),
    }


def test_devices_are_made_nowhere() -> None:
    """No rule gives the right to make a character or block device."""
    devices = landlock.MAKE_CHAR | landlock.MAKE_BLOCK
    assert not any(rights & devices for rights in ApplyLandlock(tcp=False).rules().values())


def test_device_ioctls_stay_in_dev() -> None:
    """Only below /dev may a device be asked by ioctl."""
    rules = ApplyLandlock(tcp=False).rules()
    assert {path for path, rights in rules.items() if rights & landlock.IOCTL_DEV} == {"/dev"}


def test_tcp_is_handled_unless_licensed() -> None:
    """TCP is denied by Landlock too, except where the policy gives loopback."""
    assert not Policy().loopback
    assert "TCP 0x0" in ApplyLandlock(tcp=True).describe()
