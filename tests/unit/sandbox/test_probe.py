"""Refuse rather than pretend: what is missing is refused unless it was let go by name."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import landlock, probe
from hayflick_sandbox.environment import Facts
from hayflick_sandbox.layer import Layer, LimitNotEnforceable
from hayflick_sandbox.probe import GRADED, INDISPENSABLE, require
from hayflick_sandbox.refusals import Outcome
from hayflick_sandbox.subordinate import Grant, Ids, Refusal

NAMES = (
    *("kernel", "namespaces", "uid-range", "memory", "cpu", "pids", "kill", "seccomp"),
    *("tripwire", "landlock", "idmapped-mounts"),
    "launch",
)


def layers(missing: set[str] = frozenset()) -> tuple[Layer, ...]:  # type: ignore[assignment]
    """Return all layers, those in *missing* not enforced."""
    return tuple(Layer(name, name not in missing, "found", "mend") for name in NAMES)


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_require(missing: set[str], allowed: set[str]) -> None:
    """What is missing is returned when it was let go or only graded, else refused, and some never can be."""
    if allowed & INDISPENSABLE:
        with pytest.raises(ValueError, match=r"^allow_degraded: "):
            require(layers(missing), allowed)
    elif missing - GRADED <= allowed:
        assert set(require(layers(missing), allowed)) == missing
    else:
        with pytest.raises(LimitNotEnforceable, match="mend") as caught:
            require(layers(missing), allowed)
        assert caught.value.layer.name in missing - allowed - GRADED


def test_unknown_names_are_refused() -> None:
    """Letting go what is no layer is an error, and so is an empty name."""
    for name in ("memroy", "", "*", "all"):
        with pytest.raises(ValueError, match=r"^allow_degraded: "):
            require(layers(), [name])


@pytest.mark.parametrize("name", sorted(INDISPENSABLE))
def test_the_indispensable_cannot_be_let_go(name: str) -> None:
    """Without kernel, namespaces, seccomp or a launch that works there is no sandbox, on any machine."""
    with pytest.raises(ValueError, match=name):
        require(layers(), [name])


@pytest.mark.parametrize(
    ("release", "enough"),
    [
        ("6.18.44-fc-v669", True),
        ("5.14.0", True),
        ("5.13.19-generic", False),
        ("4.18.0-553.el8.x86_64", False),
        ("6.8-rc1", True),
        ("6.1+", True),
        ("10.0", True),
        ("odd", False),
    ],
)
def test_kernel_releases(release: str, enough: bool) -> None:
    """Every way of writing a kernel's release is understood, and one that is not is too old."""
    layer = probe.judge_kernel(Facts(0, release))
    assert layer.enforced is enough
    assert bool(layer.remedy) is not enough


@pytest.mark.parametrize(
    ("facts", "told", "remedy"),
    [
        (
            Facts(0, "4.4.0", {"/proc/version": "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016"}),
            *("gVisor", "--runtime=runc"),
        ),
        (Facts(0, "4.4.0-19041-Microsoft"), "WSL 1", "wsl --set-version"),
        (Facts(0, "5.10.16.3-microsoft-standard-WSL2"), "5.10", "wsl --update"),
    ],
)
def test_what_is_no_linux(facts: Facts, told: str, remedy: str) -> None:
    """GVisor and WSL are named as what they are, with what to run on instead."""
    layer = probe.judge_kernel(facts)
    assert not layer.enforced
    assert told in layer.detail
    assert remedy in layer.remedy


@pytest.mark.parametrize(
    ("text", "enough"),
    [
        ("         0          0 4294967295\n", True),
        ("0 1000 1\n", False),
        ("0 100000 65536\n", False),
        ("0 100000 65536\n1879048192 1879048192 8388608\n", True),
        ("0 0 2147483647\n", True),
        ("", False),
    ],
)
def test_a_range_must_be_mapped(text: str, enough: bool) -> None:
    """Root in a user namespace without our uids does not count as having them."""
    facts = Facts(0, "6.1", {"/proc/self/uid_map": text, "/proc/self/gid_map": text})
    assert probe.judge_identities(facts, None, Outcome()).enforced is enough


GRANT = Grant(Ids(100_000, 65_536), Ids(100_000, 65_536), "newuidmap", "newgidmap")


def test_an_ordinary_users_range() -> None:
    """A grant that could be mapped counts; one that could not, or none, does not, and says what mends it."""
    user = Facts(1000, "6.1")
    assert probe.judge_identities(user, GRANT, Outcome()).enforced
    # What failed later has nothing to do with ids.
    assert probe.judge_identities(user, GRANT, Outcome("proc", errno.EPERM)).enforced
    said = "newuidmap: write to uid_map failed"
    unmapped = probe.judge_identities(user, GRANT, Outcome("map", errno.EPERM, said))
    assert not unmapped.enforced
    assert said in unmapped.detail
    assert "set-user-id" in unmapped.remedy
    assert not probe.judge_identities(user, GRANT, Outcome("groups", errno.EPERM)).enforced
    none = probe.judge_identities(user, Refusal("no line", "add one"), Outcome())
    assert none == Layer("uid-range", False, "no line", "add one")


@pytest.mark.parametrize(
    ("version", "number", "container", "enforced", "told"),
    [
        (7, 0, "", True, "ABI 7"),
        (6, 0, "", True, "ABI 6"),
        (5, 0, "", True, "ABI 5; partial, without scopes for signals and abstract sockets (ABI 6)"),
        (1, 0, "", True, "truncation (ABI 3), TCP (ABI 4), device ioctls (ABI 5)"),
        (0, errno.ENOSYS, "", False, "the kernel has no Landlock"),
        (0, errno.EOPNOTSUPP, "", False, "it is off"),
        (0, errno.EPERM, "docker", False, "refused by the container's seccomp profile"),
    ],
)
def test_landlocks_versions(version: int, number: int, container: str, enforced: bool, told: str) -> None:
    """Any Landlock is on and an old one's gaps are named; none, one that is off and a refused one differ."""
    facts = Facts(0, "6.1", variables={"container": container} if container else {})
    layer = probe.judge_landlock(version, number, facts)
    assert layer.enforced is enforced
    assert told in layer.detail
    assert ("partial" in layer.detail) == (0 < version < 6)
    assert bool(layer.remedy) is not enforced


@pytest.mark.parametrize("version", range(1, 9))
def test_all_that_an_abi_can_is_handled(version: int) -> None:
    """What a version of Landlock added is in the handled set from that version on, and never before."""
    files, tcp, scopes = landlock.handled(version)
    has = {
        2: bool(files & landlock.REFER),
        3: bool(files & landlock.TRUNCATE),
        4: bool(tcp),
        5: bool(files & landlock.IOCTL_DEV),
        6: bool(scopes),
    }
    assert has == {since: version >= since for since in landlock.FEATURES}


def test_seccomp_is_known_by_its_actions() -> None:
    """A kernel counts when it can answer an errno and kill a process."""
    path = "/proc/sys/kernel/seccomp/actions_avail"
    assert probe.judge_seccomp(Facts(0, "6.1", {path: "kill_process kill_thread trap errno"})).enforced
    assert not probe.judge_seccomp(Facts(0, "6.1", {path: "kill_thread trap"})).enforced
    assert not probe.judge_seccomp(Facts(0, "6.1")).enforced


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EBUSY, "runtime"), (errno.EPERM, "profile"), (errno.EINVAL, "Invalid argument")],
)
def test_a_listener_that_cannot_be_had(number: int, words: str) -> None:
    """Without a seccomp listener the layer "tripwire" is missing, with its own reason and remedy."""
    layer = probe.judge_tripwire(number)
    assert not layer.enforced
    assert words in layer.detail
    assert layer.remedy
    assert probe.judge_tripwire(0).enforced


@pytest.mark.parametrize(
    ("euid", "path", "number", "detail", "remedy"),
    [
        (0, "/usr", errno.EINVAL, "the file system of /usr cannot", "put /usr on ext4"),
        (0, "/usr", errno.EPERM, "take root in the initial user namespace", "run as root"),
        (1000, "", errno.EPERM, "take root in the initial user namespace", "run as root"),
        (0, "", errno.ENOSPC, "No space left", "CONFIG_USER_NS"),
        (0, "/usr", errno.ENOSYS, "at /usr: Function not implemented", "CONFIG_USER_NS"),
    ],
)
def test_idmapped_mounts(euid: int, path: str, number: int, detail: str, remedy: str) -> None:
    """What cannot be mounted without an owner is told, with what that costs and what mends it."""
    layer = probe.judge_idmaps(path, number, Facts(euid, "6.1"))
    assert not layer.enforced
    assert detail in layer.detail
    assert "only its name keeps a socket of the host" in layer.detail
    assert remedy in layer.remedy
    assert probe.judge_idmaps("", 0, Facts(0, "6.1")).enforced
