"""What a worker must fail to do, tried inside a real sandbox."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyseccomp
import pytest

from hayflick_sandbox import seccomp

ATTEMPTS = (Path(__file__).parent / "attempts.py").read_text()
REFUSED = sorted(seccomp.read().calls("refuse", "trip"))
FLAGS = [1 << 17, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30]
SHM_KEY = 0x48415946


def number_of(name: str) -> int:
    """Return the native number of a call, negative where this architecture has none."""
    try:
        return int(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name))
    except ValueError:
        return -1


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of the host that a worker must not find."""
    planted = tmp_path_factory.mktemp("host") / "secret"
    planted.write_text("secret")
    paths = [
        *("/etc/shadow", "/etc/hostname", "/etc/machine-id", "/root/.bashrc", "/root/.ssh", "/home"),
        *("/var", "/run", "/sys", "/sys/fs/cgroup", "/boot", "/mnt", "/opt", "/srv", str(planted)),
        *(
            "/proc/sys",
            "/proc/sysrq-trigger",
            "/proc/kcore",
            "/proc/keys",
            "/proc/kallsyms",
        ),
        *(
            "/proc/meminfo",
            "/proc/loadavg",
            "/proc/timer_list",
            "/proc/scsi",
            "/proc/cmdline",
            "/proc/modules",
        ),
        *("/dev/kvm", "/dev/fuse", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/net/tun"),
        *("/dev/userfaultfd", "/dev/ptmx", "/dev/pts", "/dev/vsock", "/dev/loop0", "/dev/mqueue"),
        *("/.hayflick", "/.hayflick/proc/1/root", "/proc/self/root/etc/shadow", "/proc/1/root/etc/shadow"),
    ]
    # What only leads to this Python is there, and empty but for it.
    shown = [path for path in (sys.prefix, sys.base_prefix, *sys.path) if path]
    return [path for path in paths if not any(one.startswith(f"{path}/") for one in shown)]


@pytest.fixture(scope="module")
def tried(
    house: Any, hidden: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What became of every attempt of one worker; it is alive until the module ends."""
    path = str(tmp_path_factory.mktemp("s") / "s")
    names = [*REFUSED, "prctl", "clone", "clone3", "ptrace", "prlimit64", "socket", "shmget"]
    abstract = f"hayflick-test-{os.getpid()}"
    facts = {
        "numbers": {name: number_of(name) for name in names if number_of(name) >= 0} | {"unknown": 1_000},
        "namespace_flags": FLAGS,
        "refused": REFUSED,
        "hidden": hidden,
        "root_device": Path("/").stat().st_dev,
        "abstract": abstract,
        "path": path,
        "shm_key": SHM_KEY,
    }
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.bind("\0" + abstract)
        two.bind(path)
        one.listen()
        two.listen()
        with house.sandbox() as sandbox:
            done = sandbox.run("python", "-I", "-c", ATTEMPTS, json.dumps(facts))
            assert done.exit_code == 0, done
            yield json.loads(done.out)
            # Init must have survived all of it.
            assert sandbox.run("true").exit_code == 0


def outcomes(tried: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the attempts whose name begins with *prefix*; there must be some."""
    found = {name: value for name, value in tried.items() if name.startswith(prefix)}
    assert found
    return found


def test_no_namespace_by_unshare_or_clone(tried: dict[str, Any]) -> None:
    """Each kind of namespace is refused to unshare and to clone."""
    assert set(outcomes(tried, "unshare ").values()) == set(outcomes(tried, "clone 0x").values()) == {"EPERM"}


def test_clone3_is_not_there(tried: dict[str, Any]) -> None:
    """clone3 answers ENOSYS, and so does a call that no kernel has."""
    assert tried["clone3"] == tried["unknown"] == "ENOSYS"


def test_no_namespace_can_be_entered(tried: dict[str, Any]) -> None:
    """Setns is refused; init's namespaces cannot even be opened."""
    assert set(outcomes(tried, "setns self").values()) == {"EPERM"}
    assert set(outcomes(tried, "setns 1").values()) <= {"EPERM", "EACCES"}


@pytest.mark.parametrize("name", [name for name in REFUSED if number_of(name) >= 0])
def test_refused_calls(tried: dict[str, Any], name: str) -> None:
    """A call that is refused by name answers EPERM in a live worker."""
    assert tried[f"refused {name}"] == "EPERM"


def test_nothing_of_the_host_is_found(tried: dict[str, Any]) -> None:
    """Files of the host, its devices, sysfs, cgroups and system-wide /proc files are not there."""
    found = outcomes(tried, "hidden ")
    assert {
        name: value for name, value in found.items() if value not in {"ENOENT", "ENOTDIR", "EACCES"}
    } == {}
    # EACCES is for what exists and is closed: init's own links, and a /root that only leads to Python.
    closed = {name.split()[1] for name, value in found.items() if value == "EACCES"}
    assert closed <= {"/proc/1/root/etc/shadow"}


def test_only_the_private_directories_take_files(tried: dict[str, Any]) -> None:
    """Files can be made in /workspace, /tmp and /dev/shm, and nowhere else."""
    assert set(outcomes(tried, "own /").values()) == {0}
    assert set(outcomes(tried, "create in ").values()) <= {"EROFS", "EACCES", "ENOENT"}


def test_what_is_shown_cannot_be_changed(tried: dict[str, Any]) -> None:
    """Neither contents, times nor modes of what the host shows can be changed."""
    assert set(outcomes(tried, "write ").values()) <= {"EROFS", "EACCES"}
    for kind in ("touch ", "chmod "):
        assert set(outcomes(tried, kind).values()) <= {"EROFS", "EACCES", "EPERM"}


def test_devices_are_six_and_inert(tried: dict[str, Any]) -> None:
    """/dev holds six harmless devices; /dev/null takes data, and /dev/tty has no terminal."""
    devices = {"null", "zero", "full", "random", "urandom", "tty"}
    assert set(tried["devices"]) == devices | {"fd", "stdin", "stdout", "stderr", "shm"}
    assert tried["null"] == 1
    assert tried["tty"] == "ENXIO"


def test_no_device_can_be_made(tried: dict[str, Any]) -> None:
    """Character and block devices cannot be made, not even where files can."""
    assert set(outcomes(tried, "device ").values()) <= {"EPERM", "EACCES"}


def test_proc_holds_processes_alone(tried: dict[str, Any]) -> None:
    """/proc shows the sandbox's own processes and no system-wide file."""
    assert tried["proc"] == ["self", "thread-self"]
    assert set(tried["pids"]) == {1, *tried["mine"]}


def test_no_way_to_another_user(tried: dict[str, Any]) -> None:
    """No uid, gid or group but its own can be taken, nor a file given away."""
    assert tried["ids"] == [1000] * 6
    assert {tried[name] for name in ("setuid", "setgid", "chown", "setgroups")} <= {"EPERM", "EINVAL"}


def test_setuid_programs_are_plain(tried: dict[str, Any]) -> None:
    """Set-user-id bits of the host's programs mean nothing: their file system is nosuid."""
    assert tried["usr nosuid"]


def test_no_capability_can_come_back(tried: dict[str, Any]) -> None:
    """The bounding set is empty, ambient capabilities cannot be raised, secure bits are closed."""
    assert tried["bounding"] == []
    assert tried["raise ambient"] == -1
    assert tried["prctl securebits"] == tried["prctl mm"] == "EPERM"


def test_init_is_opaque(tried: dict[str, Any]) -> None:
    """A worker sees neither memory, environment, descriptors nor root of its own init."""
    assert set(outcomes(tried, "pid 1 ").values()) <= {"EACCES", "EPERM"}
    assert tried["ptrace 1"] == "EPERM"


def test_init_cannot_be_signalled_away(tried: dict[str, Any]) -> None:
    """Signals to init, SIGKILL among them, change nothing: the fixture uses it afterwards."""
    assert set(outcomes(tried, "signal 1 ").values()) <= {None, "EPERM"}


def test_limits_cannot_be_raised(tried: dict[str, Any]) -> None:
    """No limit can be raised, neither its own nor init's."""
    assert {tried["raise nofile"], tried["raise core"], tried["prlimit 1"]} <= {"EPERM", "EINVAL"}
    assert tried["raise nofile"] != 0


def test_no_core_is_written(tried: dict[str, Any]) -> None:
    """A crash leaves no core file."""
    assert tried["core"] == -signal.SIGABRT
    assert tried["cores"] == []


def test_only_unix_sockets(tried: dict[str, Any]) -> None:
    """Of all socket families AF_UNIX alone can be made."""
    families = {int(number): value for number, value in tried["families"].items()}
    assert [number for number, value in families.items() if value == 0] == [socket.AF_UNIX]
    assert tried["vsock by high bits"] == "EAFNOSUPPORT"


def test_no_socket_of_the_host_is_reached(tried: dict[str, Any]) -> None:
    """Neither an abstract socket of the host nor one by path is reached; its own namespace works."""
    assert tried["connect abstract"] in {"ECONNREFUSED", "EPERM"}
    assert tried["connect path"] in {"ENOENT", "EACCES"}
    assert tried["own abstract"] is None


def test_it_starts_clean(tried: dict[str, Any]) -> None:
    """A task starts in its workspace, with umask 077, three descriptors and no foreign variable."""
    assert (tried["cwd"], tried["umask"], tried["hostname"]) == ("/workspace", 0o077, "worker")
    assert tried["fds"][:3] == [0, 1, 2]
    assert len(tried["fds"]) == 4  # and the directory just being read
    assert tried["canaries"] == []


@pytest.mark.skipif(number_of("iopl") < 0, reason="other instruction sets are x86-64's")
def test_other_instruction_sets_die(tried: dict[str, Any]) -> None:
    """A call through the 32-bit gate and one by an x32 number end the process with SIGSYS."""
    assert tried["int 0x80"] == tried["x32"] == -signal.SIGSYS


def test_a_neighbour_shares_nothing_writable(house: Any, tried: dict[str, Any]) -> None:
    """Files in /tmp, /dev/shm and /workspace and shared memory of one worker are not in another's."""
    assert tried["shm of another"] == "ENOENT"
    assert tried["own shm"] == 0
    code = """
        import json, os
        found = []
        for top in ("/tmp", "/dev/shm", "/workspace"):
            device = os.lstat(top).st_dev
            for path, directories, files in os.walk(top):
                # A checkout below the host's /tmp is bound there, on another device.
                directories[:] = [d for d in directories if os.lstat(f"{path}/{d}").st_dev == device]
                found += files
        print(json.dumps(found))
    """
    with house.sandbox() as neighbour:
        assert neighbour.ask(code) == []


@pytest.mark.layers("uid-range")
def test_neighbours_differ(house: Any) -> None:
    """Two sandboxes of one zygote have different uids and draw different random values."""
    code = """
        import json, os, random, secrets, ssl, uuid
        print(json.dumps([os.urandom(8).hex(), random.random(), str(uuid.uuid4()), ssl.RAND_bytes(8).hex(),
                          secrets.token_hex(8)]))
    """
    with house.sandbox() as one, house.sandbox() as other:
        assert one.uid != other.uid
        for mine, theirs in zip(one.ask(code), other.ask(code), strict=True):
            assert mine != theirs


def test_the_host_is_as_it_was(tried: dict[str, Any]) -> None:
    """After all attempts no file is planted on the host, and its null device is untouched."""
    del tried
    for directory in ("/", "/usr", "/usr/bin", "/etc", "/dev", sys.prefix, sys.base_prefix):
        assert not Path(directory, "planted").exists()
    assert Path("/dev/null").stat().st_mode & 0o777 == 0o666
