"""What a refused call says about whoever made it: its name, its class, the shape of its arguments.

The shape is numbers and the names of flags; never a pointer, nor what one points to.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass

from hayflick_sandbox import notifications, seccomp
from hayflick_sandbox.notifications import Notification

_LOW_32 = 0xFFFFFFFF

Shape = Mapping[str, int | str]


@dataclass(frozen=True, slots=True)
class Denial:
    """One call that was refused and seen.

    Attributes:
        denial_class: Of the wire's ``DenialClass``, in lower case and without its prefix.
        call: The call's name.
        arguments: Its numeric arguments, by name.
        errno: What its caller got.
    """

    denial_class: str
    call: str
    arguments: Shape
    errno: int

    @property
    def error(self) -> str:
        """The errno's name."""
        return errno.errorcode[self.errno]


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    denial_class: str
    errno: int
    shape: tuple[str, ...]
    names: Mapping[int, str]
    bits: bool


class Book:
    """Every call that trips, by number; read once from the policy."""

    def __init__(self) -> None:
        policy = seccomp.read()
        self._calls: dict[int, _Call] = {}
        flags: Mapping[str, int] = {}
        for entry in policy.by_argument:
            for rule in entry.rules:
                if rule.answer == "trip":
                    number = getattr(errno, rule.error)
                    condition = rule.condition
                    self._add(policy, entry.call, rule.denial_class, number, condition)
                    if entry.call == "clone":
                        flags = condition.values
        for group in policy.groups:
            if group.answer == "trip":
                # unshare and setns take clone's flags.
                condition = seccomp.Condition(0, "any", flags if group.name == "namespaces" else {})
                for call in group.calls:
                    self._add(policy, call, group.name, errno.EPERM, condition)

    def _add(
        self, policy: seccomp.Policy, call: str, denial_class: str, number: int, condition: seccomp.Condition
    ) -> None:
        resolved = seccomp.resolve(call)
        if resolved is not None:
            names = {value: name for name, value in condition.values.items()}
            shape = policy.shapes[call]
            self._calls[resolved] = _Call(call, denial_class, number, shape, names, condition.kind == "any")

    def read(self, notification: Notification) -> Denial:
        """Return what *notification* was about."""
        call = self._calls.get(notification.number)
        if call is None:  # the filter sends no other
            return Denial("kernel", f"call {notification.number}", {}, errno.EPERM)
        arguments: dict[str, int | str] = {}
        for name, value in zip(call.shape, notification.arguments, strict=False):
            if name:
                arguments[name] = _say(name, value & _LOW_32, call)
        return Denial(call.denial_class, call.name, arguments, call.errno)

    def refuse(self, listener: int) -> Denial | None:
        """Refuse the next call that waits at *listener* and say what it was; ``None`` when it is gone.

        Raises:
            OSError: *listener* is no listener.
        """
        notification = notifications.receive(listener)
        if notification is None:
            return None
        denial = self.read(notification)
        # One that was killed, or interrupted and asks again, is counted all the same: it asked.
        notifications.refuse(listener, notification, denial.errno)
        return denial


def _say(name: str, value: int, call: _Call) -> int | str:
    """Return *value* by the names that the policy knows, or as it is."""
    if not call.bits:
        return call.names.get(value, value) if name in ("family", "request") else value
    if name != "flags" or not call.names:
        return value
    known = [word for bit, word in sorted(call.names.items()) if value & bit]
    rest = value & ~sum(bit for bit in call.names if value & bit)
    return "|".join([*known, *([hex(rest)] if rest or not known else [])])
