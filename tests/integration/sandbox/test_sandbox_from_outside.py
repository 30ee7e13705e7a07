"""Proof from the host's /proc that each layer of a live sandbox is on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hayflick_sandbox.policy import Limits, Policy

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
WAIT = "print('up', flush=True); import sys, signal; signal.pause()"


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Limits that differ from every default, and a variable of the worker's own."""
    limits = Limits(pids=33, open_files=99, file_size_bytes=1 << 20, stack_bytes=1 << 20)
    return Policy(limits, hostname="elsewhere", environment={"GIVEN": "yes"})


@pytest.fixture(scope="module")
def live(house: Any, policy: Policy) -> Iterator[Any]:
    """A sandbox in which a task waits."""
    with house.sandbox(policy) as one:
        task = one.start("python", "-I", "-c", WAIT)
        assert task.line() == "up\n"
        yield one


def status(live: Any, pid: int) -> dict[str, str]:
    """Return /proc/PID/status as a dict."""
    pairs = (line.partition(":") for line in live.proc("status", pid).splitlines())
    return {name: value.strip() for name, _, value in pairs}


@pytest.fixture(params=["init", "task"])
def pid(request: pytest.FixtureRequest, live: Any) -> int:
    """The host pid of the sandbox's init, and of its task."""
    if request.param == "init":
        return int(live.pid)
    (task,) = live.children()
    return int(task)


@pytest.mark.layers("uid-range")
def test_the_host_uid_is_the_workers_own(live: Any, pid: int) -> None:
    """All four uids and gids on the host are the leased one, never 0 and never ours."""
    facts = status(live, pid)
    assert facts["Uid"].split() == facts["Gid"].split() == [str(live.uid)] * 4
    assert live.uid in range(live.house.uids.first, live.house.uids.first + live.house.uids.count)
    assert live.uid >= 65_536
    assert live.uid != os.geteuid()


def test_the_maps_hold_one_id(live: Any, pid: int) -> None:
    """uid_map and gid_map map one inner id to the leased one, and setgroups is denied."""
    for name in ("uid_map", "gid_map"):
        assert live.proc(name, pid).split() == ["1000", str(live.uid), "1"]
    assert live.proc("setgroups", pid) == "deny\n"


@pytest.mark.layers("uid-range")
def test_no_supplementary_groups(live: Any, pid: int) -> None:
    """No group of the orchestrator's comes along."""
    assert status(live, pid)["Groups"] == ""


def test_no_capability_in_any_set(live: Any, pid: int) -> None:
    """All five capability sets are empty."""
    facts = status(live, pid)
    assert {int(facts[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}


def test_filters_and_no_new_privs(live: Any, pid: int) -> None:
    """no_new_privs is set and the one filter runs, in every thread."""
    facts = status(live, pid)
    assert (facts["NoNewPrivs"], facts["Seccomp"], facts["Seccomp_filters"]) == ("1", "2", "1")
    for thread in Path(f"/proc/{pid}/task").iterdir():
        assert "Seccomp:\t2\n" in (thread / "status").read_text()


@pytest.mark.root  # who else may look into another user's process
@pytest.mark.parametrize("kind", NAMESPACES)
def test_every_namespace_is_another(live: Any, pid: int, kind: str) -> None:
    """Each of the seven namespaces is neither ours nor another sandbox's."""
    inner = Path(f"/proc/{pid}/ns/{kind}").readlink()
    assert inner != Path(f"/proc/self/ns/{kind}").readlink()
    with live.house.sandbox() as other:
        assert inner != Path(f"/proc/{other.pid}/ns/{kind}").readlink()


def test_it_is_in_its_cgroups(live: Any, pid: int) -> None:
    """In every hierarchy that we use it is in its own leaf."""
    ours = {str(one.root): live.house.tree.roots[one.root] for one in live.house.tree.hierarchies}
    for root in ours.values():
        procs = (root / live.name / "self" / "cgroup.procs").read_text().split()
        assert str(pid) in procs


def test_the_rlimits_are_the_policys(live: Any, pid: int, policy: Policy) -> None:
    """Soft and hard limits are those of the policy, so that none can be raised."""
    found = {}
    for line in live.proc("limits", pid).splitlines()[1:]:
        name, soft, hard = re.split(r"\s{2,}", line.strip())[:3]
        assert soft == hard or name == "Max cpu time"
        found[name] = soft
    limits = policy.limits
    expected = {
        "Max processes": limits.pids + 1,
        "Max open files": limits.open_files,
        "Max file size": limits.file_size_bytes,
        "Max stack size": limits.stack_bytes,
        "Max core file size": 1,
        "Max locked memory": 0,
        "Max msgqueue size": 0,
        "Max nice priority": 0,
        "Max realtime priority": 0,
    }
    assert {name: int(found[name]) for name in expected} == expected


@pytest.mark.root  # who else may look into another user's process
def test_the_environment_is_an_allow_list(live: Any, policy: Policy) -> None:
    """A task's environment holds a few fixed names and the policy's, and nothing of the host's."""
    (task,) = live.children()
    items = live.proc("environ", task).rstrip("\0").split("\0")
    names = {item.partition("=")[0] for item in items}
    assert names == {"HOME", "LANG", "PATH", "PWD", "TMPDIR", "USER", *policy.environment}


@pytest.mark.root  # who else may look into another user's process
def test_no_canary_anywhere(live: Any, pid: int) -> None:
    """A secret of the environment that the zygote was started from is in no process's environment."""
    assert "CANARY" not in live.proc("environ", pid)
    assert "CANARY" not in Path(f"/proc/{live.house.zygote.process.pid}/environ").read_text()


@pytest.mark.root  # who else may look into another user's process
def test_the_only_descriptors(live: Any) -> None:
    """A task holds its three standard streams; init one socket and its own wake-up pipe besides."""
    (task,) = live.children()
    kinds = {
        pid: sorted(str(entry.readlink()).partition(":")[0] for entry in Path(f"/proc/{pid}/fd").iterdir())
        for pid in (live.pid, task)
    }
    assert [kind for kind in kinds[task] if kind != "pipe"] == ["/"]
    assert kinds[task].count("pipe") == 2
    assert kinds[live.pid].count("socket") == 1
    assert set(kinds[live.pid]) <= {"/", "pipe", "socket", "anon_inode"}


@pytest.mark.root  # who else may look into another user's process
def test_the_root_is_not_the_hosts(live: Any, pid: int) -> None:
    """Root and working directory lie in the sandbox's own file systems."""
    for name in ("root", "cwd"):
        assert Path(f"/proc/{pid}/{name}/.").stat().st_dev != Path("/").stat().st_dev


def test_every_mount_is_nosuid_and_all_of_the_hosts_read_only(live: Any, pid: int) -> None:
    """Each mount has nosuid; only the four private ones and /proc are writable."""
    writable = set()
    for line in live.proc("mountinfo", pid).splitlines():
        _, _, _, _, point, flags = line.split()[:6]
        assert "nosuid" in flags.split(","), line
        assert "nodev" in flags.split(",") or point.startswith("/dev/"), line
        if "rw" in flags.split(","):
            writable.add(point)
    assert writable == {"/workspace", "/tmp", "/dev/shm", "/proc"}


def test_workers_go_first_when_the_host_runs_short(live: Any, pid: int) -> None:
    """A worker is the OOM killer's choice and an ordinary process to the scheduler, whoever started it."""
    assert live.proc("oom_score_adj", pid) == "500\n"
    assert os.getpriority(os.PRIO_PROCESS, pid) == 0
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER


def test_init_is_a_session_without_a_terminal(live: Any, pid: int) -> None:
    """Init and task lead sessions of their own, with no controlling terminal."""
    fields = live.proc("stat", pid).rpartition(")")[2].split()
    session, terminal = int(fields[3]), int(fields[4])
    assert terminal == 0
    assert session == pid


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the layout of signals is tested once")
def test_a_task_has_default_signals(live: Any) -> None:
    """A program starts with no signal ignored or blocked but what Python itself sets."""
    (task,) = live.children()
    facts = status(live, task)
    sigpipe, sigxfsz = 1 << 12, 1 << 24
    # The C library keeps 32 and 33 for itself; some starters leave them ignored.
    reserved = 1 << 31 | 1 << 32
    assert int(facts["SigIgn"], 16) & ~(sigpipe | sigxfsz | reserved) == 0
    assert int(facts["SigBlk"], 16) == 0


@pytest.mark.root
def test_no_user_namespace_can_be_made_in_a_workers(live: Any) -> None:
    """In a worker's user namespace the kernel allows no further one, whatever its filter says."""
    within = ["nsenter", f"--user=/proc/{live.pid}/ns/user", "--preserve-credentials"]
    argv = [*within, "cat", "/proc/sys/user/max_user_namespaces"]
    assert subprocess.run(argv, check=True, capture_output=True, text=True).stdout == "0\n"
