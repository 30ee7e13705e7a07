"""Where our own cgroup is, in every way that mounts and namespaces can show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hayflick_sandbox import delegation
from hayflick_sandbox.cgroups import Hierarchy, places

OWN = "9:name=systemd:/\n8:pids:/jobs/a:b\n4:memory:/jobs\n1:cpu,cpuacct:/\n0::/user.slice/app.service\n"


def test_our_paths() -> None:
    """Each controller has its path, version 2 the empty name, and a colon in a path is part of it."""
    found = delegation.own_paths(OWN)
    assert found[""] == "/user.slice/app.service"
    assert (found["pids"], found["memory"], found["cpu"], found["cpuacct"]) == (
        "/jobs/a:b",
        "/jobs",
        "/",
        "/",
    )


@pytest.mark.parametrize(
    ("mounted", "path", "expected"),
    [
        ("/", "/user.slice/app.service", "/cg/user.slice/app.service"),
        ("/", "/", "/cg"),
        # A container without a cgroup namespace of its own, and only its part bound.
        ("/docker/8f2", "/docker/8f2", "/cg"),
        ("/docker/8f2", "/docker/8f2/inner", "/cg/inner"),
        # What the mount does not show cannot be used, and neither can what lies outside our namespace.
        ("/docker/8f2", "/docker/8f", None),
        ("/docker/8f2", "/", None),
        ("/", "/../../system.slice", None),
        ("/", "", None),
        # A process that was moved aside is still at home above.
        ("/", "/app.service/hayflick-services", "/cg/app.service"),
    ],
)
def test_our_directory(mounted: str, path: str, expected: str | None) -> None:
    """Our cgroup's directory is below the mount point by what the mount shows of our path."""
    found = delegation.own_directory(Path("/cg"), mounted, path)
    assert found == (None if expected is None else Path(expected))


def test_the_top_comes_first() -> None:
    """The top of the hierarchy is tried before our own cgroup, and the same place not twice."""
    own = delegation.own_paths(OWN)
    unified = Hierarchy(Path("/cg"), 2, frozenset({"memory"}))
    assert [one.root for one in places(unified, own)] == [Path("/cg"), Path("/cg/user.slice/app.service")]
    cpu = Hierarchy(Path("/cpu"), 1, frozenset({"cpu"}))
    assert [one.root for one in places(cpu, own)] == [Path("/cpu")]
    pids = Hierarchy(Path("/pids"), 1, frozenset({"pids"}))
    assert [one.root for one in places(pids, own)] == [Path("/pids"), Path("/pids/jobs/a:b")]


def test_a_directory_is_not_a_cgroup(tmp_path: Path) -> None:
    """What has no type, as the machine's own root, is not taken for handed to us."""
    assert not delegation.is_handed(tmp_path)
    for name in ("cgroup.procs", "cgroup.subtree_control"):
        (tmp_path / name).touch()
    assert not delegation.is_handed(tmp_path)
    (tmp_path / "cgroup.type").touch()
    assert delegation.is_handed(tmp_path)
