"""The confinement of one worker, as a list of steps that can be read aloud.

:func:`plan` turns a policy into the list; the child applies it in order, from
the fork to the first instruction of init, and ``python -m hayflick_sandbox
--explain`` prints it. No step is optional at run time: a step that fails ends
the child, and a layer that this machine lacks is left out of the plan only
when its operator let it go by name (see :mod:`hayflick_sandbox.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hayflick_sandbox import landlock
from hayflick_sandbox.doors import PROXY_ADDRESS, HandOverNetwork, OpenProxy, OpenWorkerService
from hayflick_sandbox.mounts import (
    EnterRoot,
    ForbidUserNamespaces,
    FreshProc,
    FreshRoot,
    Link,
    PrivateDirectory,
    ShowReadOnly,
    UseResolver,
)
from hayflick_sandbox.policy import Policy
from hayflick_sandbox.process import (
    DieWithParent,
    DropCapabilities,
    EqualFooting,
    HideCgroups,
    JoinCgroups,
    KeepDescriptors,
    LeaveSession,
    LimitResources,
    NameHost,
    OwnKeyring,
    TakeIdentity,
)
from hayflick_sandbox.selfprobe import Facts, PlantCanary
from hayflick_sandbox.template import Template
from hayflick_sandbox.walls import ApplyLandlock, FilterSystemCalls

# What a task's environment may begin with; its policy adds to them by name.
VARIABLES = frozenset({"HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER"})


class Step(Protocol):
    """One thing that makes the sandbox tighter."""

    def describe(self) -> str:
        """Return what it does, as a sentence without a subject."""

    def apply(self) -> dict[str, int] | None:
        """Do it to this process.

        Returns:
            Descriptors that it opened for the orchestrator, by the names in
            :data:`hayflick_sandbox.messages.DESCRIPTORS`, if any.

        Raises:
            OSError: the kernel refused.
        """


@dataclass(frozen=True, slots=True)
class Host:
    """What is the same for every sandbox of one zygote.

    Attributes:
        template: What its root is cut from.
        last_capability: The highest that the kernel has.
        degraded: Layers that this machine lacks and the operator let go.
        filters: The compiled seccomp filters, in the order to install them.
        inet_filters: The same for workers that may make AF_INET sockets.
        namespaces: The inode of each namespace that the orchestrator is in.
        inherited_filters: How many seccomp filters the zygote itself is under.
    """

    template: Template
    last_capability: int
    degraded: frozenset[str]
    filters: tuple[bytes, ...]
    inet_filters: tuple[bytes, ...]
    namespaces: Mapping[str, int] = field(default_factory=dict)
    inherited_filters: int = 0


def plan(
    policy: Policy,
    host: Host,
    *,
    host_uid: int,
    channel_fd: int = -1,
    sync_fd: int = -1,
    task_fds: Sequence[int] = (),
) -> list[Step]:
    """Return the steps that confine a child just cloned, in order."""
    limits = policy.limits
    present = host.degraded.isdisjoint
    steps: list[Step] = []
    if task_fds or present({"memory"}):
        steps.append(JoinCgroups(tuple(task_fds)))
    steps += [
        # Before the change of user, which makes /proc/self root's.
        EqualFooting(),
        TakeIdentity(sync_fd, host_uid),
        HideCgroups(),
        KeepDescriptors(channel_fd),
        FreshRoot(),
        # Before the binds, for this Python may itself live below one of them.
        PrivateDirectory("/tmp", limits.tmp_bytes, "1777"),
        PrivateDirectory("/workspace", limits.workspace_bytes, "700"),
        *(Link(path, target) for path, target in host.template.links),
        *(ShowReadOnly(path, present({"idmapped-mounts"})) for path in host.template.binds),
        *(ShowReadOnly(path) for path in ("/etc", "/dev")),
        PrivateDirectory("/dev/shm", limits.tmp_bytes, "1777"),
        # While the new root can still be written to.
        *([OpenWorkerService()] if policy.worker_service else []),
        *([OpenProxy()] if policy.proxy else []),
        *([UseResolver()] if policy.external else []),
        *([HandOverNetwork()] if policy.external else []),
        ForbidUserNamespaces(),
        FreshProc(),
        EnterRoot(),
        NameHost(policy.hostname),
    ]
    steps += [OwnKeyring(), _resource_limits(policy, host), LeaveSession(), PlantCanary()]
    if present({"landlock"}):
        port = PROXY_ADDRESS[1] if policy.proxy else None
        steps.append(ApplyLandlock(tcp=policy.loopback or policy.external, connect_port=port))
    steps += [
        DropCapabilities(host.last_capability),
        DieWithParent(),
        FilterSystemCalls(host.inet_filters if policy.inet else host.filters, listener=present({"tripwire"})),
    ]
    return steps


def facts(policy: Policy, host: Host, environment: Mapping[str, str]) -> Facts:
    """Return what a sandbox of *policy* must be found to be, whatever its steps did."""
    return Facts(
        host_namespaces=host.namespaces,
        filters=host.inherited_filters + len(host.filters),
        inet=policy.inet,
        rlimits=_resource_limits(policy, host).values(),
        environment=environment,
        variables=VARIABLES,
        landlock_abi=landlock.abi(),
        shown=host.template.shown,
    )


def _resource_limits(policy: Policy, host: Host) -> LimitResources:
    return LimitResources(policy.limits, address_space="memory" in host.degraded)
