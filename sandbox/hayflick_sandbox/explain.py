"""The confinement, read aloud."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hayflick_sandbox import seccomp, steps
from hayflick_sandbox.identities import FIRST_UID
from hayflick_sandbox.layer import Layer
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.probe import GRADED, INDISPENSABLE
from hayflick_sandbox.template import readable_paths

_BIRTH = (
    "fork from a single-threaded zygote into new user, mount, pid, ipc and uts namespaces, "
    "born in the worker's own cgroup (clone3) and in an unused network namespace that "
    "the worker has no power over, with loopback {loopback}"
)


def confinement(policy: Policy, degraded: frozenset[str]) -> Iterator[str]:
    """Yield each step of the confinement of *policy* on this machine, in order."""
    host = steps.Host(
        template=readable_paths(),
        last_capability=int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii")),
        degraded=degraded,
        filters=(seccomp.compile_filter(inet=False, listener="tripwire" not in degraded),),
        inet_filters=(seccomp.compile_filter(inet=True, listener="tripwire" not in degraded),),
    )
    yield _BIRTH.format(loopback="up" if policy.inet else "down")
    for step in steps.plan(policy, host, host_uid=FIRST_UID):
        yield step.describe()


_ANSWERS = {
    "allow": "passes",
    "refuse": "EPERM",
    "trip": "EPERM, and seen",
    "absent": "ENOSYS, on purpose",
}


def system_calls() -> Iterator[str]:
    """Yield the system call policy with its reasons, a group or a rule a paragraph."""
    policy = seccomp.read()
    for group in policy.groups:
        if group.calls:
            head = f"{group.answer} {group.name}: {_ANSWERS[group.answer]}"
            yield f"{head}\n    {group.reason}\n    {' '.join(group.calls)}"
    for entry in policy.by_argument:
        yield f"by argument {entry.call}: otherwise {_otherwise(entry)}\n    {entry.reason}"
        for rule in entry.rules:
            yield _rule(entry.call, rule)
    yield "everything else: ENOSYS; foreign architectures and x32 numbers: the process dies"


def _otherwise(entry: seccomp.ByArgument) -> str:
    return {"": "ENOSYS", "allow": "passes"}.get(entry.otherwise, entry.otherwise)


def _rule(call: str, rule: seccomp.Rule) -> str:
    answer = _ANSWERS[rule.answer].replace("EPERM", rule.error)
    licence = f" with the licence {rule.licence}" if rule.licence else ""
    kind = f" as {rule.denial_class}" if rule.denial_class else ""
    lines = [f"    {rule.answer} {call}{licence}{kind}: {answer}", f"        {rule.reason}"]
    lines.append(f"        {_condition(rule.condition)}")
    for condition in rule.further:
        tail = f", otherwise {condition.otherwise}" if condition.otherwise else ""
        lines.append(f"        and {_condition(condition)}{tail}")
    return "\n".join(lines)


def _condition(condition: seccomp.Condition) -> str:
    words = {"is": "is", "isnt": "is not", "any": "has a bit of", "only": "has no bit but"}
    values = " ".join(f"{name}={value:#x}" for name, value in condition.values.items())
    width = " (all 64 bits)" if condition.wide or condition.kind == "isnt" else ""
    return f"argument {condition.argument}{width} {words[condition.kind]} {values}"


def table(layers: tuple[Layer, ...]) -> Iterator[str]:
    """Yield the layers of this machine: a line for each, and below one that is missing what mends it."""
    width = max(len(layer.name) for layer in layers)
    for layer in layers:
        mark = "enforced" if layer.enforced else "MISSING "
        yield f"{layer.name:<{width}}  {mark}  {layer.detail}"
        if layer.remedy:
            yield f"{'':<{width}}            → {layer.remedy}"
        if not layer.enforced and layer.name in GRADED:
            yield f"{'':<{width}}            workers run without it, and their grade says so"
        elif not layer.enforced and layer.name not in INDISPENSABLE:
            yield f"{'':<{width}}            or do without: --allow-degraded {layer.name}"


def grades(best: str, lacking: list[str]) -> str:
    """Say which isolation grade is the best here, and what the next one lacks."""
    if not best:
        return f"isolation grade: none, no worker runs here for want of {', '.join(lacking)}"
    if not lacking:
        return f"isolation grade: {best}, the highest"
    return f"isolation grade: {best}; the next one lacks {', '.join(lacking)}"
