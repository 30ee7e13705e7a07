"""What a denial says: names and numbers from the registers, and never an address."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import seccomp
from hayflick_sandbox.denials import Book
from hayflick_sandbox.notifications import Notification

BOOK = Book()
POLICY = seccomp.read()
TRIPPED = sorted(call for call in POLICY.shapes if seccomp.resolve(call) is not None)
POINTER = 0x7FFF_DEAD_BEEF


def notification(call: str, *arguments: int) -> Notification:
    """Return what the kernel says of *call*."""
    number = seccomp.resolve(call)
    assert number is not None
    return Notification(1, number, (*arguments, *[0] * (6 - len(arguments))))


@pytest.mark.parametrize("call", TRIPPED)
def test_every_call_has_its_name_and_class(call: str) -> None:
    """Each call that trips is known by its number: its class, its errno, its arguments' names."""
    denial = BOOK.read(notification(call, *range(6)))
    assert denial.call == call
    assert list(denial.arguments) == [name for name in POLICY.shapes[call] if name]
    assert denial.error == ("EAFNOSUPPORT" if call == "socket" else "EPERM")
    groups = {group.name: group.calls for group in POLICY.groups if group.answer == "trip"}
    by_argument = {"clone": "namespaces", "socket": "sockets", "ioctl": "terminal"}
    assert denial.denial_class == by_argument.get(call) or call in groups[denial.denial_class]


@pytest.mark.parametrize("call", TRIPPED)
def test_pointers_are_left_out(call: str) -> None:
    """Where an argument is a pointer, nothing of it is in the record; where a number, its low 32 bits."""
    denial = BOOK.read(notification(call, *[POINTER] * 6))
    assert all(value != POINTER for value in denial.arguments.values())
    assert len(denial.arguments) == sum(bool(name) for name in POLICY.shapes[call])


@pytest.mark.parametrize(
    ("call", "arguments", "shape"),
    [
        ("unshare", (0x10020000,), {"flags": "CLONE_NEWNS|CLONE_NEWUSER"}),
        ("unshare", (0x10000400,), {"flags": "CLONE_NEWUSER|0x400"}),
        ("clone", (0x10000011,), {"flags": "CLONE_NEWUSER|0x11"}),
        ("setns", (9, 0), {"fd": 9, "flags": "0x0"}),
        ("socket", (1 << 32 | 17, 3, 768), {"family": "AF_PACKET", "type": 3, "protocol": 768}),
        ("ioctl", (0, 0xFFFFFFFF_00005412), {"fd": 0, "request": "TIOCSTI"}),
        ("umount2", (POINTER, 2), {"flags": 2}),
        ("chroot", (POINTER,), {}),
    ],
)
def test_shapes(call: str, arguments: tuple[int, ...], shape: dict[str, object]) -> None:
    """Flags, families and requests have the names that the kernel's headers give them."""
    assert BOOK.read(notification(call, *arguments)).arguments == shape


@given(st.integers(0, 2**31), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_any_notification_can_be_read(number: int, arguments: list[int]) -> None:
    """Whatever arrives is read and refused: an errno above zero, and a class."""
    denial = BOOK.read(Notification(1, number, tuple(arguments)))
    assert denial.denial_class
    assert denial.errno in {errno.EPERM, errno.EAFNOSUPPORT}
