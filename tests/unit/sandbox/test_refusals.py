"""Each environment that refuses namespaces is told what mends it there."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import refusals, trial
from hayflick_sandbox.doctor import grade, judge_launch
from hayflick_sandbox.environment import INITIAL, Facts
from hayflick_sandbox.layer import Layer
from hayflick_sandbox.refusals import Outcome
from hayflick_sandbox.session import SandboxFailed

USER = Facts(1000, "6.8.0", {"/proc/self/status": "CapEff:\t0000000000000000\n"})
ROOT = replace(USER, euid=0)
PROC = "22 1 0:5 / /proc rw - proc proc rw\n"
MASKS = f"{PROC}30 22 0:6 / /proc/kcore rw - tmpfs tmpfs rw\n31 22 0:5 /sys /proc/sys ro - proc proc rw\n"
VERSION = "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016"


def sysctl(name: str, value: str, facts: Facts = USER) -> Facts:
    """Return *facts* with a kernel parameter."""
    return replace(facts, texts={**facts.texts, f"/proc/sys/{name.replace('.', '/')}": f"{value}\n"})


def marked(mark: str, facts: Facts = USER, mountinfo: str = "") -> Facts:
    """Return *facts* in a container that bears *mark*."""
    return replace(facts, marks=frozenset({mark}), texts={**facts.texts, "/proc/self/mountinfo": mountinfo})


APPARMOR = sysctl("kernel.apparmor_restrict_unprivileged_userns", "1")
DOCKER, PODMAN, KUBERNETES = "/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io"


@pytest.mark.parametrize(
    ("outcome", "facts", "told", "remedy"),
    [
        pytest.param(
            Outcome("unshare", errno.EACCES),
            APPARMOR,
            "AppArmor",
            "with the rule userns",
            id="apparmor refuses",
        ),
        pytest.param(
            Outcome("mount", errno.EACCES),
            *(APPARMOR, "nothing can be mounted in it", "apparmor_restrict_unprivileged_userns=0"),
            id="apparmor strips the capabilities",
        ),
        pytest.param(
            Outcome("unshare", errno.EPERM),
            sysctl("kernel.unprivileged_userns_clone", "0"),
            *("unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1"),
            id="debian's switch",
        ),
        pytest.param(
            Outcome("unshare", errno.ENOSPC),
            sysctl("user.max_user_namespaces", "0"),
            *("user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=15000"),
            id="no user namespaces",
        ),
        pytest.param(
            Outcome("unshare", errno.ENOSPC),
            sysctl("user.max_net_namespaces", "0"),
            *("user.max_net_namespaces is 0", "user.max_net_namespaces=15000"),
            id="no network namespaces",
        ),
        pytest.param(
            Outcome("unshare", errno.ENOSPC), USER, "limit is used up", "raise user.max_", id="all in use"
        ),
        pytest.param(Outcome("unshare", errno.EUSERS), USER, "32", "nest fewer", id="nested too deeply"),
        pytest.param(Outcome("unshare", errno.EINVAL), USER, "refused", "CONFIG_USER_NS", id="not built"),
        pytest.param(
            Outcome("unshare", errno.EPERM),
            marked(DOCKER),
            *("(docker)", "--security-opt seccomp=unconfined"),
            id="docker's seccomp profile",
        ),
        pytest.param(
            Outcome("proc", errno.EPERM),
            marked(DOCKER, mountinfo=MASKS),
            *("/proc/kcore, /proc/sys are masked", "systempaths=unconfined"),
            id="docker's masks",
        ),
        pytest.param(
            Outcome("privilege", errno.EPERM),
            marked(DOCKER, ROOT),
            *("lacks CAP_SYS_ADMIN", "--cap-add SYS_ADMIN"),
            id="docker without a capability",
        ),
        pytest.param(
            Outcome("unshare", errno.EPERM),
            marked(PODMAN),
            *("(podman)", "podman run --security-opt seccomp=unconfined"),
            id="podman's seccomp profile",
        ),
        pytest.param(
            Outcome("proc", errno.EPERM),
            marked(PODMAN, mountinfo=MASKS),
            *("masked", "unmask=ALL"),
            id="podman's masks",
        ),
        pytest.param(
            Outcome("unshare", errno.EPERM),
            marked(KUBERNETES),
            *("(kubernetes)", "seccompProfile.type: Unconfined"),
            id="a pod's seccomp profile",
        ),
        pytest.param(
            Outcome("proc", errno.EPERM),
            marked(KUBERNETES, mountinfo=MASKS),
            *("masked", "hostUsers: false"),
            id="a pod's masks",
        ),
        pytest.param(
            Outcome("privilege", errno.EPERM),
            marked(KUBERNETES, ROOT),
            *("lacks CAP_SYS_ADMIN", "capabilities.add: [SYS_ADMIN]"),
            id="a pod without a capability",
        ),
        pytest.param(
            Outcome("proc", errno.EPERM),
            replace(USER, texts={"/proc/self/mountinfo": MASKS}),
            *("masked", "umount what lies over /proc: /proc/kcore, /proc/sys"),
            id="masks without a container",
        ),
        pytest.param(
            Outcome("unshare", errno.EINVAL),
            replace(USER, texts={"/proc/version": VERSION}),
            *("(gVisor)", "--runtime=runc"),
            id="gVisor",
        ),
        pytest.param(
            Outcome("unshare", errno.EINVAL),
            replace(USER, release="4.4.0-19041-Microsoft"),
            *("WSL 1", "wsl --set-version"),
            id="WSL 1",
        ),
        pytest.param(
            Outcome("map", errno.EPERM, "newuidmap: Could not set caps"),
            *(USER, "newuidmap: Could not set caps", "set-user-id root"),
            id="newuidmap without its bit",
        ),
        pytest.param(Outcome("unshare", errno.EPERM), USER, "not permitted", "chroot", id="who knows"),
    ],
)
def test_every_environment_has_its_words(outcome: Outcome, facts: Facts, told: str, remedy: str) -> None:
    """The detail names the environment's own cause, and the remedy is what one would type there."""
    layer = refusals.judge(outcome, facts)
    assert (layer.name, layer.enforced) == ("namespaces", False)
    assert told in layer.detail
    assert remedy in layer.remedy


def test_a_trial_that_came_through() -> None:
    """Nothing but a trial that failed nowhere counts as enforced, whatever the facts say."""
    assert refusals.judge(Outcome(), APPARMOR).enforced
    for step in trial.STEPS:
        assert not refusals.judge(Outcome(step, errno.EPERM), USER).enforced


@given(
    st.sampled_from(trial.STEPS),
    st.sampled_from([errno.EPERM, errno.EACCES, errno.ENOSPC, errno.EINVAL, errno.ENOSYS, errno.EIO]),
    st.sampled_from([0, 1000]),
    st.sets(st.sampled_from([DOCKER, PODMAN, KUBERNETES])),
)
def test_nobody_is_left_without_words(step: str, number: int, euid: int, marks: set[str]) -> None:
    """Whatever fails wherever, there is a detail with the kernel's answer and a remedy."""
    facts = Facts(euid, "6.8.0", marks=frozenset(marks))
    detail, remedy = refusals.explain(Outcome(step, number), facts)
    assert detail
    assert remedy


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (USER, ""),
        (marked(DOCKER), "docker"),
        (marked(PODMAN), "podman"),
        (marked(KUBERNETES), "kubernetes"),
        (replace(USER, variables={"KUBERNETES_SERVICE_HOST": "10.0.0.1"}), "kubernetes"),
        (replace(USER, variables={"container": "lxc"}), "lxc"),
        (replace(USER, variables={"container": "oci"}), "container"),
        (replace(USER, texts={"/run/systemd/container": "systemd-nspawn\n"}), "systemd-nspawn"),
        (replace(USER, texts={"/proc/1/cgroup": "4:memory:/docker/8f2\n"}), "docker"),
        (replace(USER, texts={"/proc/1/cgroup": "4:memory:/kubepods/burstable/pod1\n"}), "kubernetes"),
        (replace(USER, texts={"/proc/1/cgroup": "0::/\n"}), ""),
        (replace(USER, texts={"/proc/self/mountinfo": "1 0 0:9 / / rw - overlay overlay rw\n"}), "container"),
        (replace(USER, texts={"/proc/self/mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda rw\n"}), ""),
        (replace(marked(DOCKER), initial=frozenset(INITIAL)), ""),
        (replace(marked(DOCKER), initial=frozenset({"pid"})), "docker"),
    ],
)
def test_containers_are_known_by_several_hints(facts: Facts, kind: str) -> None:
    """Each engine is known by its mark; a machine in its boot's own namespaces is no container."""
    assert facts.container == kind


def test_these_facts_can_be_read() -> None:
    """What is read of this machine is what is here, and reading it needs nothing."""
    facts = Facts.read()
    assert facts.status("Seccomp").isdecimal()
    assert facts.text("/proc/self/mountinfo")
    assert facts.text("/nothing") == ""


def test_a_launch_that_failed_is_explained() -> None:
    """The step that failed in a real sandbox has the words of the same step of the trial."""
    masked = marked(DOCKER, mountinfo=MASKS)
    layer = judge_launch(SandboxFailed("FreshProc: not permitted", "FreshProc", errno.EPERM), masked)
    assert not layer.enforced
    assert "FreshProc" in layer.detail
    assert "systempaths=unconfined" in layer.remedy
    odd = judge_launch(SandboxFailed("OwnKeyring: quota", "OwnKeyring", errno.EDQUOT), USER)
    assert not odd.enforced
    assert odd.remedy


ALL = ("kernel", "namespaces", "seccomp", "launch", "memory", "cpu", "pids", "kill", "uid-range", "landlock")


@pytest.mark.parametrize(
    ("missing", "best", "lacking"),
    [
        (set(), "A", []),
        ({"tripwire"}, "B", ["tripwire"]),
        ({"uid-range", "landlock"}, "B", ["landlock", "uid-range"]),
        ({"cpu", "uid-range"}, "C", ["cpu"]),
        ({"launch"}, "", ["launch"]),
        ({"seccomp", "memory"}, "", ["seccomp"]),
    ],
)
def test_the_grade_that_layers_allow(missing: set[str], best: str, lacking: list[str]) -> None:
    """The best grade is that of which no layer is missing, and what the next one lacks is named."""
    found = [Layer(name, name not in missing, "found") for name in (*ALL, "tripwire")]
    assert grade(found) == (best, lacking)
