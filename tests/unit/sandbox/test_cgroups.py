"""Where controllers are found and what is written to them, on version 1, 2 and hybrid hosts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import bounds, disks
from hayflick_sandbox.bounds import Bounds
from hayflick_sandbox.cgroups import Hierarchy, Tree, hierarchies
from hayflick_sandbox.policy import Limits

UNIFIED = """\
22 27 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
30 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
31 27 0:27 / /tmp rw - tmpfs tmpfs rw
"""
HYBRID = """\
30 22 0:26 / /sys/fs/cgroup rw shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw shared:11 master:1 - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
LEGACY = "".join(line + "\n" for line in HYBRID.splitlines() if "cgroup2" not in line)


def found(mountinfo: str, controllers: str = "cpuset cpu io memory hugetlb pids rdma") -> list[Hierarchy]:
    """Return the hierarchies of *mountinfo*, with *controllers* at the version 2 root."""
    return hierarchies(mountinfo, lambda path: controllers + "\n")


def test_unified() -> None:
    """On a version 2 host the one hierarchy has our controllers."""
    assert found(UNIFIED) == [
        Hierarchy(Path("/sys/fs/cgroup"), 2, frozenset({"memory", "cpu", "pids", "io"})),
    ]


def test_hybrid() -> None:
    """On a hybrid host version 2 comes first, without the controllers that version 1 holds."""
    root = Path("/sys/fs/cgroup")
    assert found(HYBRID, "hugetlb") == [
        Hierarchy(root / "unified", 2, frozenset()),
        Hierarchy(root / "cpu,cpuacct", 1, frozenset({"cpu"})),
        Hierarchy(root / "memory", 1, frozenset({"memory"})),
        Hierarchy(root / "pids", 1, frozenset({"pids"})),
    ]


def test_legacy() -> None:
    """On a version 1 host there is no unified hierarchy, so kill is not enforced."""
    used = found(LEGACY)
    tree = Tree("node", used)
    assert [one.version for one in used] == [1, 1, 1]
    assert [tree.enforces(what) for what in ("memory", "cpu", "pids", "kill")] == [True, True, True, False]


def test_nothing_mounted() -> None:
    """Where no hierarchy is mounted, nothing is enforced."""
    tree = Tree("node", found("31 27 0:27 / /tmp rw - tmpfs tmpfs rw\n"))
    assert not any(tree.enforces(what) for what in ("memory", "cpu", "pids", "kill"))


def test_a_mount_point_with_a_space() -> None:
    """An escaped space in a mount point is read as the space it is."""
    line = "30 22 0:26 / /my\\040cgroups rw - cgroup2 cgroup2 rw\n"
    assert found(line)[0].root == Path("/my cgroups")


def settings(limits: Limits, version: int) -> dict[str, str]:
    """Return what is written for *limits* where all controllers are of *version*."""
    return dict(bounds.settings(limits, dict.fromkeys(("memory", "cpu", "pids"), version)))


LIMITS = Limits(memory_bytes=64 << 20, cpu_millis=250, pids=7)


def test_settings_of_version_1() -> None:
    """Version 1 gets memory, then memory and swap together, a quota in its period, and pids with init."""
    written = settings(LIMITS, 1)
    assert list(written) == [
        *("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
        *("cpu.cfs_quota_us", "pids.max"),
    ]
    assert written["memory.limit_in_bytes"] == written["memory.memsw.limit_in_bytes"] == str(64 << 20)
    assert written["cpu.cfs_quota_us"] == "25000"  # of the kernel's default period of 100 ms
    assert written["pids.max"] == "8"


def test_settings_of_version_2() -> None:
    """Version 2 gets memory.max, no swap, cpu.max as quota and period, and pids with init."""
    assert settings(LIMITS, 2) == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "cpu.max": "25000 100000",
        "pids.max": "8",
    }


def test_settings_where_nothing_is() -> None:
    """Where there is no controller nothing is written; probe has said so."""
    assert list(bounds.settings(LIMITS, {})) == []


def test_settings_of_io() -> None:
    """Each disk gets bytes and operations a second: two files in version 1, one line in version 2."""
    limits = Limits(io_read_bytes_per_second=10 << 20, io_reads_per_second=99)
    assert list(disks.settings(limits, {"blkio": 1}, ("8:0", "8:16"))) == [
        ("blkio.throttle.read_bps_device", f"8:0 {10 << 20}"),
        ("blkio.throttle.read_iops_device", "8:0 99"),
        ("blkio.throttle.read_bps_device", f"8:16 {10 << 20}"),
        ("blkio.throttle.read_iops_device", "8:16 99"),
    ]
    assert list(disks.settings(limits, {"io": 2}, ("8:0",))) == [("io.max", f"8:0 rbps={10 << 20} riops=99")]
    assert list(disks.settings(limits, {"io": 2}, ())) == []


def test_a_partition_stands_for_its_disk(tmp_path: Path) -> None:
    """A partition is limited as the disk it is on; what lies on no block device is on no disk."""
    number = tmp_path.stat().st_dev
    disk = tmp_path / "devices/vda"
    (disk / "vda1").mkdir(parents=True)
    (disk / "dev").write_text("254:0\n")
    (disk / "vda1/partition").write_text("1\n")
    listed = tmp_path / "block"
    listed.mkdir()
    assert disks.behind([str(tmp_path)], str(listed)) == ()
    (listed / f"{os.major(number)}:{os.minor(number)}").symlink_to(disk / "vda1")
    assert disks.behind([str(tmp_path), str(disk), "/no/such"], str(listed)) == ("254:0",)


@given(st.integers(10, 1_024_000), st.sampled_from([1, 2]))
def test_the_share_is_kept(millis: int, version: int) -> None:
    """The quota is never under the kernel's millisecond, nor off the share by a microsecond a period."""
    written = settings(Limits(cpu_millis=millis), version)
    quota = int(written["cpu.cfs_quota_us"] if version == 1 else written["cpu.max"].split()[0])
    assert quota >= 1_000
    assert abs(quota / bounds.CPU_PERIOD_MICROSECONDS - millis / 1_000) <= 1e-5


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree over plain directories: a version 2 one and one of version 1, as on a hybrid host."""
    used = [
        Hierarchy(tmp_path / "unified", 2, frozenset()),
        Hierarchy(tmp_path / "pids", 1, frozenset({"pids"})),
    ]
    made = Tree("node", used)
    for root in made.roots.values():
        root.mkdir(parents=True)
    return made


def test_one_path_in_every_hierarchy(tree: Tree) -> None:
    """A worker has the same path, with a leaf of its own, in every hierarchy."""
    tree.add("contract/root")
    tree.add("contract/root/child")
    for root in tree.roots.values():
        assert (root / "contract/root/self").is_dir()
        assert (root / "contract/root/child/self").is_dir()


def test_removal_is_deep(tree: Tree) -> None:
    """Removing a worker removes its descendants' directories, and twice does no harm."""
    tree.add("contract/root/child/grandchild")
    tree.remove("contract/root")
    tree.remove("contract/root")
    assert [list(root.rglob("*")) for root in tree.roots.values()] == [
        [root / "contract"] for root in tree.roots.values()
    ]


def test_close_leaves_other_nodes(tree: Tree) -> None:
    """Closing removes this node's directories, and the common one only when it is empty."""
    neighbour = next(iter(tree.roots.values())).parent / "neighbour"
    neighbour.mkdir()
    tree.close()
    assert neighbour.is_dir()
    assert not any(root.exists() for root in tree.roots.values())
    assert not next(reversed(tree.roots.values())).parent.exists()
    neighbour.rmdir()


def test_kill_is_one_write(tree: Tree) -> None:
    """Killing, freezing and thawing a family are one write each, at its top."""
    tree.add("contract/root/child")
    top = next(iter(tree.roots.values())) / "contract/root"
    for name in ("cgroup.kill", "cgroup.freeze"):
        (top / name).touch()
    assert tree.kill("contract/root")
    tree.freeze("contract/root")
    assert ((top / "cgroup.kill").read_text(), (top / "cgroup.freeze").read_text()) == ("1", "1")
    tree.thaw("contract/root")
    assert (top / "cgroup.freeze").read_text() == "0"


def test_killing_nobody(tree: Tree) -> None:
    """Killing where no worker is succeeds: all that are there are dead."""
    assert tree.kill("contract/unknown")


def test_without_unified_the_caller_is_told(tmp_path: Path) -> None:
    """Without version 2, kill says that it could not, and freeze and events raise."""
    legacy = Tree("node", [Hierarchy(tmp_path, 1, frozenset({"memory"}))])
    assert legacy.kill("worker") is False
    for call in (legacy.freeze, legacy.frozen, legacy.populated, legacy.events_fd):
        with pytest.raises(OSError, match="cgroup2"):
            call("worker")


def test_usage_without_controllers_is_unknown(tree: Tree) -> None:
    """A figure that no controller gives is None and not zero."""
    usage = tree.usage("nobody")
    assert (usage.memory_bytes, usage.memory_peak_bytes, usage.cpu_seconds, usage.pids) == (None,) * 4
    assert tree.oom_kills("nobody") == 0


FAMILY = Bounds(
    max_replicas=3, max_depth=2, family_memory_bytes=64 << 20, family_cpu_millis=200, family_pids=9
)


def test_a_contract_is_counted_in_directories() -> None:
    """Two directories a worker, one level a generation, and two for the root and its leaf."""
    assert dict(FAMILY.counts) == {"cgroup.max.descendants": 6, "cgroup.max.depth": 4}


def test_settings_of_a_family() -> None:
    """A budget is written as a worker's limits are, pids exactly; what it does not name is not written."""
    versions = dict.fromkeys(("memory", "cpu", "pids"), 2)
    assert dict(FAMILY.family_settings(versions)) == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "cpu.max": "20000 100000",
        "pids.max": "9",
    }
    assert list(Bounds(3, 2).family_settings(versions)) == []
    assert list(FAMILY.family_settings({})) == []


def test_no_member_has_more_cpu_than_its_family() -> None:
    """A share above the family's is cut to it, which version 1 insists on; a smaller one is kept."""
    assert FAMILY.narrow(Limits(cpu_millis=1_000)).cpu_millis == 200
    assert FAMILY.narrow(Limits(cpu_millis=100)).cpu_millis == 100
    assert Bounds(3, 2).narrow(Limits(cpu_millis=1_000)).cpu_millis == 1_000


@pytest.mark.parametrize(
    ("text", "limit"),
    [("max\n", None), ("-1\n", None), ("max 100000\n", None), ("5000 100000\n", 5_000), ("7", 7)],
)
def test_limits_are_read_back(text: str, limit: int | None) -> None:
    """A limit reads as its number in either version, and no limit as none."""
    assert bounds.limit_in(text) == limit
