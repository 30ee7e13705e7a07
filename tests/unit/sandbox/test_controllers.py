"""What the cgroups of a machine enforce, and each reason why they do not, with what mends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hayflick_sandbox import controllers
from hayflick_sandbox.cgroups import Hierarchy, Tree
from hayflick_sandbox.environment import Facts
from hayflick_sandbox.layer import Layer

STATUS = {"/proc/self/status": "Uid:\t1000\t1000\t1000\t1000\n"}
UNIFIED = "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
READ_ONLY = "30 22 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup ro\n"
LEGACY = (
    "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
    "32 30 0:28 / /sys/fs/cgroup/memory rw shared:11 - cgroup cgroup rw,memory\n"
    "33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
)
HYBRID = LEGACY + "36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
OFF = "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\ncpu\t0\t1\t1\n"


def facts(mountinfo: str, *, euid: int = 1000, marks: tuple[str, ...] = (), **more: str) -> Facts:
    """Return the facts of a machine with these mounts."""
    texts = {**STATUS, "/proc/self/mountinfo": mountinfo, **more}
    return Facts(euid, "6.8.0", texts, frozenset(marks))


SYSTEMD, DOCKER, PODMAN, POD = (
    *("/run/systemd/system", "/.dockerenv", "/run/.containerenv"),
    "/var/run/secrets/kubernetes.io",
)
OURS = [Hierarchy(Path("/sys/fs/cgroup/user.slice/app.service"), 2, frozenset({"memory", "pids"}))]
TOP = [Hierarchy(Path("/sys/fs/cgroup"), 2, frozenset({"pids"}))]


@pytest.mark.parametrize(
    ("name", "used", "machine", "told", "remedy"),
    [
        pytest.param(
            "memory",
            [],
            facts(UNIFIED, marks=(SYSTEMD,)),
            *("not delegated", "systemd-run --user --scope -p Delegate=yes"),
            id="an undelegated user session",
        ),
        pytest.param(
            "memory",
            [],
            facts(UNIFIED),
            *("v2 at /sys/fs/cgroup is not delegated to uid 1000", "chown -R 1000"),
            id="no systemd",
        ),
        pytest.param(
            "memory", [], facts(HYBRID), "v1 at /sys/fs/cgroup/memory", "chown -R 1000", id="hybrid"
        ),
        pytest.param(
            "kill", [], facts(HYBRID), "v2 at /sys/fs/cgroup/unified", "chown -R 1000", id="hybrid kill"
        ),
        pytest.param(
            "kill", [], facts(LEGACY, euid=0), "only cgroup version 1", "mount -t cgroup2", id="v1 only"
        ),
        pytest.param(
            "cpu",
            OURS,
            facts(UNIFIED, marks=(SYSTEMD,)),
            *("hands this user no cpu", "user@.service.d/delegate.conf"),
            id="a controller that systemd keeps",
        ),
        pytest.param(
            "memory",
            TOP,
            facts(UNIFIED, euid=0),
            *("not handed down", "echo +memory > /sys/fs/cgroup/cgroup.subtree_control"),
            id="no controller enabled",
        ),
        pytest.param(
            "memory", [], facts("", euid=0), "no cgroup hierarchy is mounted", "mount -t cgroup2", id="none"
        ),
        pytest.param(
            "memory",
            [],
            facts(LEGACY.splitlines()[0] + "\n", euid=0),
            *("no mounted hierarchy has the memory controller", "mount -t cgroup -o memory"),
            id="a controller that nobody mounted",
        ),
        pytest.param(
            "memory",
            [],
            facts(UNIFIED, euid=0, **{"/proc/cgroups": OFF}),
            *("switched off", "cgroup_enable=memory"),
            id="switched off at boot",
        ),
        pytest.param(
            "memory",
            TOP,
            facts(UNIFIED, euid=0, **{"/proc/cgroups": OFF.replace("0\t1\t0", "4\t1\t1")}),
            *("version 1 holds the memory controller", "mount -t cgroup -o memory"),
            id="kept by version 1",
        ),
        pytest.param(
            "memory",
            [],
            facts(READ_ONLY, euid=0, marks=(DOCKER,)),
            *("read-only", "writable-cgroups=true"),
            id="docker's read-only mount",
        ),
        pytest.param(
            "memory",
            [],
            facts(READ_ONLY, marks=(PODMAN,)),
            "read-only",
            "podman run",
            id="podman's read-only mount",
        ),
        pytest.param(
            "kill",
            [],
            facts(READ_ONLY, marks=(POD,)),
            "read-only",
            "cgroup_writable",
            id="a pod's read-only mount",
        ),
        pytest.param("memory", [], facts(READ_ONLY), "read-only", "mount -o remount,rw", id="read-only"),
        pytest.param(
            "memory",
            [],
            facts(UNIFIED, marks=(DOCKER,)),
            *("the container may not write", "docker run"),
            id="a container's ordinary user",
        ),
        pytest.param(
            "cpu",
            TOP,
            facts(UNIFIED, euid=0, marks=(PODMAN,)),
            *("container's own cgroup has no cpu controller", "Delegate=cpu"),
            id="a container without a controller",
        ),
        pytest.param(
            "memory",
            [],
            replace(facts(""), release="5.15.90.1-microsoft-standard-WSL2"),
            *("WSL", "/etc/wsl.conf"),
            id="WSL 2 without systemd",
        ),
    ],
)
def test_every_reason_has_its_words(
    name: str, used: list[Hierarchy], machine: Facts, told: str, remedy: str
) -> None:
    """The detail names why the controller is not to be had, and the remedy is what one would type there."""
    detail, mend = controllers.missing(name, used, machine)
    assert told in detail
    assert remedy in mend


def test_mounts_are_read() -> None:
    """Our controllers' mounts are found with their version, and whether they are read-only."""
    found = controllers.mounts(HYBRID + "37 30 0:33 / /x rw - cgroup cgroup rw,freezer\n")
    assert [(one.version, sorted(one.controllers), one.read_only) for one in found] == [
        *((1, ["cpu"], False), (1, ["memory"], False), (1, ["pids"], False), (2, [], False)),
    ]
    assert controllers.mounts(READ_ONLY)[0].read_only


def cgroup_layers(tree: Tree, machine: Facts | None = None) -> dict[str, Layer]:
    """Return the layers that the cgroups give, by name."""
    return {layer.name: layer for layer in controllers.layers(tree, machine or facts(UNIFIED))}


def test_a_version_1_host(tmp_path: Path) -> None:
    """A host with version 1 alone enforces the limits and not the kill in one write."""
    tree = Tree("node", [Hierarchy(tmp_path, 1, frozenset({"memory", "cpu", "pids"}))])
    found = cgroup_layers(tree, facts(LEGACY))
    assert {name for name, layer in found.items() if not layer.enforced} == {"kill"}
    assert found["kill"].remedy


def test_a_host_without_cgroups() -> None:
    """A host without cgroups enforces none of the four, and each has a remedy."""
    found = cgroup_layers(Tree("node", []), facts(""))
    assert set(found) == {"memory", "cpu", "pids", "kill"}
    assert not any(layer.enforced for layer in found.values())
    assert all(layer.remedy for layer in found.values())


@pytest.mark.parametrize(("version", "limit"), [(1, "memory.memsw.limit_in_bytes"), (2, "memory.swap.max")])
def test_swap_that_cannot_be_limited(version: int, limit: str, tmp_path: Path) -> None:
    """Memory does not count as enforced where swap is on and cannot be limited."""
    title = "Filename Type Size Used Priority\n"
    swapping = facts(UNIFIED, **{"/proc/swaps": f"{title}/dev/vdb partition 1 0 -2\n"})
    tree = Tree("node", [Hierarchy(tmp_path, version, frozenset({"memory"}))])
    node = tree.roots[tmp_path]
    node.mkdir(parents=True)
    assert not cgroup_layers(tree, swapping)["memory"].enforced
    (node / limit).touch()
    assert cgroup_layers(tree, swapping)["memory"].enforced
    (node / limit).unlink()
    assert cgroup_layers(tree, facts(UNIFIED, **{"/proc/swaps": title}))["memory"].enforced
