"""Machines that lack something, made for the test in namespaces and below filters of its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest

REFUSED = 125
EXAMINE = """
import dataclasses, json
from hayflick_sandbox.doctor import examine
print(json.dumps([dataclasses.asdict(layer) for layer in examine()]))
"""

pytestmark = pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare")


def layers(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """Return the layers that an examination printed, by name."""
    assert done.returncode == 0, done.stderr
    return {layer["name"]: layer for layer in json.loads(done.stdout)}


def run(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run *argv* to its end."""
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd="/", **options)


def below(prepare: str) -> dict[str, dict[str, Any]]:
    """Examine in a mount namespace of its own, which the shell script *prepare* has changed."""
    # An ordinary user may mount only in a user namespace of its own.
    mine = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f'set -e; {prepare}; exec "$0" -c "$1"'
    return layers(run(["unshare", *mine, "--mount", "sh", "-c", script, sys.executable, EXAMINE]))


def filtered(answers: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Examine below a system call filter that gives *answers*, as a container engine's may."""
    program = textwrap.dedent(
        f"""
        import pyseccomp
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        for name, number in {answers!r}.items():
            rules.add_rule(pyseccomp.ERRNO(number), name)
        rules.load()
        """
    )
    return layers(run([sys.executable, "-c", program + EXAMINE]))


def test_masks_over_proc_are_found() -> None:
    """Where a part of /proc is masked, a fresh one is refused, and the mask is named."""
    found = below("mount --bind /dev/null /proc/kallsyms")
    assert not found["namespaces"]["enforced"]
    assert "a fresh /proc cannot be mounted" in found["namespaces"]["detail"]
    assert "/proc/kallsyms" in found["namespaces"]["remedy"]
    assert not found["launch"]["enforced"]


def test_no_user_namespaces_left() -> None:
    """Where user.max_user_namespaces is 0, that is what is said, with the command that raises it."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" -c "$1"'
    found = layers(run(["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, EXAMINE]))
    assert not found["namespaces"]["enforced"]
    assert "user.max_user_namespaces is 0" in found["namespaces"]["detail"]
    assert "sysctl -w user.max_user_namespaces=" in found["namespaces"]["remedy"]


def test_an_engines_filter_refuses_namespaces() -> None:
    """Below a filter that refuses unshare, as engines' do, namespaces are missing and nothing is launched."""
    found = filtered({"unshare": errno.EPERM})
    assert not found["namespaces"]["enforced"]
    assert found["namespaces"]["remedy"]
    assert found["launch"]["detail"].startswith("not tried")


def test_namespaces_without_power_are_found() -> None:
    """Where namespaces are given and mounts refused in them, as AppArmor does, they do not count."""
    found = filtered({"mount": errno.EACCES})
    assert not found["namespaces"]["enforced"]
    assert "nothing can be mounted in it" in found["namespaces"]["detail"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSYS, "the kernel has no Landlock"),
        (errno.EOPNOTSUPP, "it is off"),
        (errno.EPERM, "refused by"),
    ],
)
def test_landlock_is_not_assumed(number: int, told: str) -> None:
    """Where Landlock answers an error, the layer is missing, and the error says why."""
    found = filtered({"landlock_create_ruleset": number})
    assert not found["landlock"]["enforced"]
    assert told in found["landlock"]["detail"]
    # All other layers make a sandbox, which shows that none of them leans on this one.
    assert found["launch"]["enforced"]


def test_what_only_a_launch_shows() -> None:
    """A call that no single trial makes, refused, is found by the launch, which names the step."""
    found = filtered({"sethostname": errno.EPERM})
    assert found["namespaces"]["enforced"]
    assert not found["launch"]["enforced"]
    assert "NameHost" in found["launch"]["detail"]
    assert found["launch"]["remedy"]


def test_a_step_that_is_refused_runs_nothing() -> None:
    """Where a step of the confinement is refused, the command does not run, and the step is told."""
    program = textwrap.dedent(
        f"""
        import pyseccomp, sys
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        rules.add_rule(pyseccomp.ERRNO({errno.EPERM}), "landlock_restrict_self")
        rules.load()
        from hayflick_sandbox.__main__ import main
        sys.exit(main(["--", "echo", "ran"]))
        """
    )
    done = run([sys.executable, "-c", program])
    assert (done.returncode, done.stdout) == (REFUSED, "")
    # An ordinary user's newuidmap does not work below a filter: then it is refused for that.
    assert "ApplyLandlock" in done.stderr or "uid-range" in done.stderr


@pytest.mark.root  # a user namespace may not unmount what it inherited
def test_version_1_alone() -> None:
    """With version 1 alone the limits hold, and the kill in one write is missing and says so."""
    found = below("umount /sys/fs/cgroup/unified || true; ! grep -q cgroup2 /proc/self/mountinfo")
    assert not found["kill"]["enforced"]
    assert "only cgroup version 1" in found["kill"]["detail"]
    assert "mount -t cgroup2" in found["kill"]["remedy"]
    assert found["launch"]["enforced"]


@pytest.mark.root
def test_version_2_alone() -> None:
    """With version 2 alone, what it has is enforced, and what version 1 keeps is named as kept there."""
    found = below("umount -R -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup")
    assert found["kill"]["enforced"]
    for name in ("memory", "cpu", "pids"):
        assert found[name]["enforced"] or "version 1 holds" in found[name]["detail"]
        assert found[name]["enforced"] or "mount -t cgroup -o" in found[name]["remedy"]
    assert found["launch"]["enforced"]


@pytest.mark.root
def test_read_only_cgroups() -> None:
    """Where the cgroups are mounted read-only, as engines mount them, each layer says that."""
    found = below(
        "for point in $(awk '$3 ~ /^cgroup/ {print $2}' /proc/mounts); do "
        "mount -o remount,ro,bind $point; done"
    )
    for name in ("memory", "cpu", "pids", "kill"):
        assert not found[name]["enforced"]
        assert "mounted read-only" in found[name]["detail"]
    assert found["launch"]["enforced"]
