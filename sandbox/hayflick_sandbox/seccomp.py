"""The system call policy, from a file that people can read to BPF that the kernel runs.

One filter says it all: what is allowed passes, what trips goes to a listener,
what is refused answers EPERM or the errno that the policy gives it, and all else,
calls of kernels to come included, answers ENOSYS. A foreign architecture, and
the x32 numbers of our own, end the process.

It is one filter and not several stacked ones because any filter's errno is
stricter than another's listener (seccomp(2)), and because the kernel takes as
long to install a filter as to install its instructions.

Where no listener can be had, what trips is refused with the same errno, unseen.
"""

from __future__ import annotations

import errno
import itertools
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyseccomp

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that are treated alike whatever their arguments are, and why.

    Attributes:
        answer: ``allow``, ``refuse``, ``trip`` or ``absent``.
        name: Of the group; of one that trips, the class of its denials.
    """

    answer: str
    name: str
    reason: str
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """What one argument is.

    Attributes:
        argument: Its position, from 0.
        kind: ``is`` one of the values, or ``isnt``; ``any`` of the bits is set; ``only`` those bits are.
        values: By the names that the kernel's headers give them.
        wide: Whether all 64 bits count; the kernel reads 32 of most arguments.
        otherwise: Of a further one: the errno where it does not hold, if there is one of its own.
    """

    argument: int
    kind: str
    values: Mapping[str, int]
    wide: bool = False
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a call with certain arguments is answered.

    Attributes:
        answer: ``allow``, ``refuse`` or ``trip``.
        reason: Why.
        condition: On the argument that decides.
        error: Of one that trips: what its caller gets.
        denial_class: Of one that trips.
        licence: Without it the rule is not there; ``inet`` or empty.
        further: On arguments after it, which must hold as well.
    """

    answer: str
    reason: str
    condition: Condition
    error: str = "EPERM"
    denial_class: str = ""
    licence: str = ""
    further: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class ByArgument:
    """A call whose arguments decide.

    Attributes:
        otherwise: What it answers where no rule holds: an errno, ``allow``, or
            empty for what every unknown call answers.
    """

    call: str
    reason: str
    otherwise: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole policy.

    Attributes:
        groups: By answer, then by name.
        by_argument: Calls whose arguments decide.
        shapes: Of each call that trips, what its numeric arguments are called;
            empty for one that is not recorded.
    """

    groups: tuple[Group, ...]
    by_argument: tuple[ByArgument, ...]
    shapes: Mapping[str, tuple[str, ...]]

    def calls(self, *answers: str) -> set[str]:
        """Return the names that are given one of *answers* whatever their arguments are."""
        return {call for group in self.groups if group.answer in answers for call in group.calls}


def document() -> dict[str, Any]:
    """Return the policy file as it stands."""
    # Not importlib.resources: it brings tempfile, zipfile and their kin into the zygote.
    with open(os.path.join(os.path.dirname(__file__), "seccomp.toml"), "rb") as file:
        return tomllib.load(file)


def read() -> Policy:
    """Return the policy.

    Raises:
        KeyError, TypeError: the file is not one.
    """
    text = document()
    return Policy(
        groups=tuple(
            Group(answer, name, group["reason"], tuple(group["calls"]))
            for answer in ("allow", "refuse", "trip", "absent")
            for name, group in text[answer].items()
        ),
        by_argument=tuple(
            ByArgument(call, entry["reason"], entry.get("otherwise", ""), tuple(map(_rule, entry["rules"])))
            for call, entry in text["arguments"].items()
        ),
        shapes={
            call: tuple(names) for group in text["trip"].values() for call, names in group["shape"].items()
        },
    )


def _rule(entry: Mapping[str, Any]) -> Rule:
    return Rule(
        answer=entry["answer"],
        reason=entry["reason"],
        condition=_condition(entry),
        error=entry.get("error", "EPERM"),
        denial_class=entry.get("class", ""),
        licence=entry.get("licence", ""),
        further=tuple(map(_condition, entry.get("and", ()))),
    )


def _condition(entry: Mapping[str, Any]) -> Condition:
    (kind,) = entry.keys() & {"is", "isnt", "any", "only"}
    return Condition(
        entry["argument"], kind, entry[kind], entry.get("wide", False), entry.get("otherwise", "")
    )


def compile_filter(*, inet: bool, listener: bool = True) -> bytes:
    """Return the compiled filter.

    Args:
        inet: Whether AF_INET and AF_INET6 sockets may be made.
        listener: Whether it is installed with a listener, to which what trips
            goes; without, that is refused, unseen.

    Raises:
        OSError: libseccomp refused a rule.
    """
    policy = read()
    licences = {"", "inet"} if inet else {""}
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for answer in ("allow", "refuse", "trip"):
        for name in sorted(policy.calls(answer)):
            _add(rules, _action(answer, "EPERM", listener=listener), name)
    for entry in policy.by_argument:
        _by_argument(rules, entry, licences, listener=listener)
    return _export(rules)


def _by_argument(
    rules: pyseccomp.SyscallFilter, entry: ByArgument, licences: set[str], *, listener: bool
) -> None:
    present = [rule for rule in entry.rules if rule.licence in licences]
    for rule in present:
        action = _action(rule.answer, rule.error, listener=listener)
        for arguments in itertools.product(*map(_holds, (rule.condition, *rule.further))):
            _add(rules, action, entry.call, *arguments)
        for condition in rule.further:
            if condition.otherwise:
                refuse = pyseccomp.ERRNO(_number(condition.otherwise))
                others = _outside(condition.argument, condition.values.values())
                for arguments in itertools.product(_holds(rule.condition), others):
                    _add(rules, refuse, entry.call, *arguments)
    if not entry.otherwise:
        return
    position = present[0].condition.argument
    values = [value for rule in present for value in rule.condition.values.values()]
    if entry.otherwise == "allow":
        _add(rules, pyseccomp.ALLOW, entry.call, _masked(position, sum(values), 0))
    else:
        for first in _outside(position, values):
            _add(rules, pyseccomp.ERRNO(_number(entry.otherwise)), entry.call, first)


def _action(answer: str, error: str, *, listener: bool) -> int:
    if answer == "allow":
        return int(pyseccomp.ALLOW)
    if answer == "trip" and listener:
        return int(pyseccomp.NOTIFY)
    return int(pyseccomp.ERRNO(_number(error)))


def _holds(condition: Condition) -> Iterator[pyseccomp.Arg]:
    """Yield comparisons of which at least one is true when *condition* is, and none when it is not."""
    values = condition.values.values()
    match condition.kind:
        case "is" if condition.wide:
            yield from (pyseccomp.Arg(condition.argument, pyseccomp.EQ, value) for value in values)
        case "is":
            yield from (_masked(condition.argument, mask, value) for mask, value in _inside(set(values)))
        case "isnt":
            (value,) = values
            yield pyseccomp.Arg(condition.argument, pyseccomp.NE, value)
        case "any":
            yield from (_masked(condition.argument, bit, bit) for bit in values)
        case _:
            yield _masked(condition.argument, _LOW_32 & ~sum(values), 0)


def _outside(argument: int, values: Iterable[int]) -> Iterator[pyseccomp.Arg]:
    """Yield comparisons of which exactly one is true when the low 32 bits equal none of *values*."""
    prefixes = {0: set(values)}  # of each prefix, the values that begin with it
    for bit in reversed(range(32)):
        mask = _LOW_32 & ~((1 << bit) - 1)
        longer: dict[int, set[int]] = {}
        for prefix, below in prefixes.items():
            for branch in (prefix, prefix | 1 << bit):
                if begun := {value for value in below if value & mask == branch}:
                    longer[branch] = begun
                else:
                    # Nothing begins so: whatever does is none of them.
                    yield _masked(argument, mask, branch)
        prefixes = longer


def _inside(values: set[int]) -> Iterator[tuple[int, int]]:
    """Yield (mask, value) pairs of which exactly one fits when the low 32 bits equal one of *values*."""
    bit = 1
    while values:
        pairs = {value for value in values if value ^ bit in values}
        for value in sorted(values - pairs):
            yield _LOW_32 & ~(bit - 1), value
        values = {value & ~bit for value in pairs}
        bit <<= 1


def _masked(argument: int, mask: int, value: int) -> pyseccomp.Arg:
    return pyseccomp.Arg(argument, pyseccomp.MASKED_EQ, mask, value)


def _number(name: str) -> int:
    return int(getattr(errno, name))


def resolve(name: str) -> int | None:
    """Return the number of the call *name* on this machine, or ``None`` where it has none."""
    try:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    except ValueError:
        return None
    # A negative one: libseccomp knows the name, this architecture does not have the call.
    return int(number) if number >= 0 else None


def _add(rules: pyseccomp.SyscallFilter, action: int, name: str, *arguments: pyseccomp.Arg) -> None:
    """Add a rule for *name*, unless this architecture never had that call."""
    number = resolve(name)
    if number is not None:
        rules.add_rule(action, number, *arguments)


def _export(rules: pyseccomp.SyscallFilter) -> bytes:
    # A binary tree instead of a list (libseccomp 2.5): the kernel walks the
    # program once for every call number when it is installed, and so do calls.
    rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    # By default libseccomp ends only the thread that tried.
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    descriptor = os.memfd_create("seccomp-bpf")
    with os.fdopen(descriptor, "rb") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
