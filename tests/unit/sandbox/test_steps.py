"""The confinement as a list: nothing left out, everything said, in an order that holds."""

from __future__ import annotations

import resource

import pytest

from hayflick_sandbox import explain, seccomp
from hayflick_sandbox.policy import MIB, Limits, Policy
from hayflick_sandbox.steps import (
    ApplyLandlock,
    DieWithParent,
    DropCapabilities,
    EnterRoot,
    FilterSystemCalls,
    Host,
    KeepDescriptors,
    LimitResources,
    OpenWorkerService,
    PrivateDirectory,
    Step,
    TakeIdentity,
    plan,
)
from hayflick_sandbox.template import Template

TEMPLATE = Template(("/opt/python", "/usr"), (("/bin", "usr/bin"),))


def steps_of(policy: Policy | None = None, degraded: frozenset[str] = frozenset()) -> list[Step]:
    """Return the plan of a policy on a machine that is made up."""
    host = Host(
        template=TEMPLATE,
        last_capability=40,
        degraded=degraded,
        filters=(seccomp.compile_filter(inet=False, listener=True),),
        inet_filters=(seccomp.compile_filter(inet=True, listener=True),),
    )
    return plan(policy or Policy(), host, host_uid=1_879_048_192)


def at(steps: list[Step], kind: type[Step]) -> int:
    """Return where the first step of *kind* stands."""
    return next(index for index, step in enumerate(steps) if isinstance(step, kind))


@pytest.mark.parametrize("licensed", [False, True])
def test_every_step_describes_itself(licensed: bool) -> None:
    """Each step says what it does in a line, beginning in lower case and without a full stop."""
    lines = [
        step.describe()
        for step in steps_of(
            Policy(loopback=licensed, worker_service=licensed, proxy=licensed, external=licensed)
        )
    ]
    assert all(line and line == line.strip() and "\n" not in line for line in lines)
    assert all(line[0].islower() and not line.endswith(".") for line in lines)
    assert len(set(lines)) == len(lines)


def test_every_step_has_a_docstring() -> None:
    """Each step says why it is there."""
    assert all(type(step).__doc__ for step in steps_of())


def test_the_filter_is_last() -> None:
    """Nothing comes after the system call filter, and capabilities go before no_new_privs."""
    steps = steps_of()
    assert isinstance(steps[-1], FilterSystemCalls)
    assert at(steps, DropCapabilities) < at(steps, DieWithParent) < at(steps, FilterSystemCalls)
    # Dropping capabilities would clear a death signal set before it (prctl(2)).
    assert (
        at(steps, TakeIdentity) < at(steps, KeepDescriptors) < at(steps, EnterRoot) < at(steps, ApplyLandlock)
    )


def test_degraded_layers_are_left_out_by_name() -> None:
    """Landlock is left out when it was let go by name, and then alone."""
    kinds = {type(step).__name__ for step in steps_of()}
    without = {type(step).__name__ for step in steps_of(degraded=frozenset({"landlock"}))}
    assert kinds - without == {"ApplyLandlock"}


def test_without_memory_control_the_address_space_is_limited() -> None:
    """Where no cgroup limits memory, RLIMIT_AS does; where one does, it does not."""
    steps = steps_of(degraded=frozenset({"memory"}))
    limits = steps[at(steps, LimitResources)]
    assert isinstance(limits, LimitResources)
    assert limits.values()[resource.RLIMIT_AS] == Limits().memory_bytes
    steps = steps_of()
    limits = steps[at(steps, LimitResources)]
    assert isinstance(limits, LimitResources)
    assert resource.RLIMIT_AS not in limits.values()


def test_core_dumps_are_off_for_pipes_too() -> None:
    """RLIMIT_CORE is 1, the one value at which the kernel starts no piped handler either."""
    assert LimitResources(Limits(), address_space=False).values()[resource.RLIMIT_CORE] == 1


def test_private_directories_are_bounded() -> None:
    """Each private directory has a limit in bytes and in files, and none is without limit."""
    limits = Limits(tmp_bytes=0, workspace_bytes=2 * MIB)
    private = [step for step in steps_of(Policy(limits)) if isinstance(step, PrivateDirectory)]
    assert {step.path: step.size_bytes for step in private} == {
        "/tmp": 0,
        "/dev/shm": 0,
        "/workspace": 2 * MIB,
    }
    assert all(step.inodes >= 64 for step in private)
    assert next(step.inodes for step in private if step.path == "/workspace") == 512


def test_loopback_takes_the_other_filters() -> None:
    """The filters that allow AF_INET are installed only where the policy gives loopback."""
    closed, opened = steps_of()[-1], steps_of(Policy(loopback=True))[-1]
    assert closed != opened


def test_a_door_costs_only_those_who_have_it() -> None:
    """A worker without the licence goes through no step of it; with it, before the root is read-only."""
    plain = steps_of()
    licensed = steps_of(Policy(worker_service=True))
    assert len(licensed) == len(plain) + 1
    assert at(licensed, OpenWorkerService) < at(licensed, EnterRoot)


def test_the_explanation_is_the_plan() -> None:
    """What --explain prints is the plan itself, after the birth."""
    lines = list(explain.confinement(Policy(), frozenset()))
    kinds = [step.describe() for step in steps_of()]
    assert lines[-1] == kinds[-1]
    assert lines[0].startswith("fork from a single-threaded zygote")
    assert any("/usr, read-only" in line for line in lines)


def test_the_listener_is_left_out_by_name() -> None:
    """The filter comes with a listener, unless the operator let the tripwire go by name."""
    (with_it, without) = (steps_of()[-1], steps_of(degraded=frozenset({"tripwire"}))[-1])
    assert isinstance(with_it, FilterSystemCalls)
    assert isinstance(without, FilterSystemCalls)
    assert with_it.listener
    assert not without.listener
    assert "seen" in with_it.describe()
    assert "seen" not in without.describe()
