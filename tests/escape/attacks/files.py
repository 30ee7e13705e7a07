"""Attacks on what a worker sees of any file system."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from ..table import Row
from ..tools import Facts, Verdict, attempt, in_child, opened, summary, syscall, verdict

if TYPE_CHECKING:
    from ..arena import Arena

MIB = 1024 * 1024
DEVICES = ["fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"]


def create_everywhere(facts: Facts) -> Verdict:
    """Create a file in each directory of the system, and in one's own three."""
    flags = os.O_WRONLY | os.O_CREAT
    directories = (
        "/",
        "/usr",
        "/usr/bin",
        "/etc",
        "/dev",
        "/home",
        "/var/tmp",
        "/root",
        "/run",
        "/proc",
        "/sys",
    )
    tries = {where: opened(f"{where}/{facts['nonce']}", flags) for where in directories}
    own = {where: opened(f"{where}/mine", flags) for where in ("/workspace", "/tmp", "/dev/shm")}
    held = set(tries.values()) <= {"EROFS", "EACCES", "ENOENT"} and set(own.values()) == {"ok"}
    return verdict(held, summary(tries))


def read_secrets(facts: Facts) -> Verdict:
    """Read the host's password hashes, root's home, and what the services keep."""
    paths = ["/etc/shadow", "/etc/gshadow", "/root", "/root/.ssh", "/home", *facts["secrets"]]
    tries = {path.replace(facts["directory"], "…"): opened(path, os.O_RDONLY) for path in paths}
    # A home may be on the way to the Python that the worker runs or to its packages: it holds that alone.
    ways = [f"{path}/" for path in (facts["python_prefix"], sys.prefix, sys.base_prefix, *sys.path)]
    for home in ("/root", "/home"):
        if tries[home] == "ok":
            strangers = [
                name
                for name in os.listdir(home)
                if not any(way.startswith(f"{home}/{name}/") for way in ways)
            ]
            tries[home] = "ok" if strangers else "ENOENT"
    return verdict(set(tries.values()) == {"ENOENT"}, summary(tries))


def fill_file_systems(facts: Facts) -> Verdict:
    """Write past the size of /tmp, and make more files than it may hold."""
    wrote = 0
    with open("/tmp/flood", "wb", buffering=0) as file:
        try:
            while wrote < 4 * MIB:
                wrote += file.write(bytes(65_536))
        except OSError as error:
            bytes_answer = f"{type(error).__name__} {error.strerror}" if error.errno != 28 else "ENOSPC"
        else:
            bytes_answer = "ok"
    os.unlink("/tmp/flood")
    made, files_answer = 0, "ok"
    while files_answer == "ok" and made < 1_000:
        files_answer = opened(f"/tmp/{made}", os.O_WRONLY | os.O_CREAT)
        made += 1
    for number in range(made):
        if os.path.exists(f"/tmp/{number}"):
            os.unlink(f"/tmp/{number}")
    held = bytes_answer == "ENOSPC" and files_answer == "ENOSPC" and wrote <= MIB and made <= 300
    return verdict(held, f"after {wrote} bytes {bytes_answer}, after {made} files {files_answer}")


def make_devices(facts: Facts) -> Verdict:
    """Make device nodes, a whiteout among them, and open the host's root disk by number."""
    tries = {}
    for name, kind, device in (
        ("mem", stat.S_IFCHR, os.makedev(1, 1)),
        ("disk", stat.S_IFBLK, facts["root_device"]),
        ("whiteout", stat.S_IFCHR, os.makedev(0, 0)),
    ):
        path = f"/workspace/{name}"
        tries[f"mknod {name}"] = attempt(os.mknod, path, 0o600 | kind, device)
        if tries[f"mknod {name}"] == "ok" and name != "whiteout":
            tries[f"open {name}"] = opened(path, os.O_RDONLY)
    blocks = [name for name in os.listdir("/dev") if stat.S_ISBLK(os.lstat(f"/dev/{name}").st_mode)]
    held = set(tries.values()) <= {"EPERM", "EACCES"} and not blocks
    return verdict(held, f"{summary(tries)}; block devices: {blocks or 'none'}")


def find_devices(facts: Facts) -> Verdict:
    """Find a device that is more than harmless."""
    there = sorted(os.listdir("/dev"))
    wanted = (
        "kvm",
        "fuse",
        "net/tun",
        "userfaultfd",
        "kmsg",
        "mem",
        "kcore",
        "vda",
        "sda",
        "ptmx",
        "console",
    )
    tries = {name: opened(f"/dev/{name}", os.O_RDONLY) for name in wanted}
    tty = opened("/dev/tty", os.O_RDWR)
    touched = {name: attempt(os.utime, f"/dev/{name}") for name in ("null", "full")}
    held = (
        there == DEVICES
        and set(tries.values()) == {"ENOENT"}
        and tty == "ENXIO"
        and "ok" not in touched.values()
    )
    return verdict(held, f"{summary(tries)}; tty {tty}; {len(there)} entries")


def leave_a_note(facts: Facts) -> Verdict:
    """Write a note into the directories that two workers might share."""
    for where in ("/tmp", "/dev/shm", "/workspace"):
        with open(f"{where}/{facts['nonce']}", "w") as file:
            file.write("from a sister")
        os.chmod(f"{where}/{facts['nonce']}", 0o644)
    return verdict(True, "written")


def find_the_note(facts: Facts) -> Verdict:
    """Find a file that a sister wrote to /tmp, /dev/shm or her workspace."""
    found = [
        where for where in ("/tmp", "/dev/shm", "/workspace") if os.path.exists(f"{where}/{facts['nonce']}")
    ]
    return verdict(facts["first"]["held"] and not found, f"found in {found or 'none'}")


def mount_for_the_host(facts: Facts) -> Verdict:
    """Mount something, or find a mount by which the host and it would see one another's."""

    def mount() -> str:
        # MS_REC | MS_SHARED on the root, then a file system with a name to look for.
        syscall(facts, "mount", None, b"/", None, 16384 | 1 << 20, None)
        answer = syscall(facts, "mount", facts["nonce"].encode(), b"/workspace", b"tmpfs", 0, None)
        if answer == "ok":
            with open("/proc/self/mountinfo") as file:
                assert facts["nonce"] in file.read()
        return answer

    with open("/proc/self/mountinfo") as file:
        # Optional fields, up to the dash: what is shared has peers, what is a slave a master.
        shared = [line.split()[4] for line in file if line.split()[6] != "-"]
    answer = in_child(mount)
    return verdict(
        answer == "EPERM" and not shared, f"mount: {answer}; mounts that others are told of: {len(shared)}"
    )


def write_what_started_it(facts: Facts) -> Verdict:
    """Leave the root by the working directory, or write the program one runs."""
    try:
        where = os.getcwd()
    except OSError:
        where = "(unreachable)"
    link = attempt(os.readlink, "/proc/1/exe")
    writes = {path: opened(path, os.O_WRONLY) for path in ("/proc/self/exe", "/proc/1/exe", facts["python"])}
    inside = where == "/workspace" and attempt(os.listdir, "/proc/self/cwd") == "ok"
    held = inside and link == "EACCES" and set(writes.values()) <= {"EACCES", "EROFS", "ETXTBSY", "EPERM"}
    return verdict(held, f"cwd {where}; exe of init {link}; {summary(writes)}")


def plant_links(arena: Arena, words: tuple[str, ...]) -> Verdict:
    """Have files collected by links and pipes that lead elsewhere, and a file put through them."""
    import grpc

    from ...integration.conftest import reason_of

    worker = arena.launch(words)
    script = """
        ln -s /etc/passwd link; ln -s /etc dir; ln -s /proc/self/root magic; ln -s / root; ln -s /tmp out
        mkfifo pipe; ln -s loop loop; mkdir real; ln -s ../dir real/dir
    """
    assert arena.shell(worker, script).outcome == "SUCCEEDED"
    wanted = ("link", "dir/passwd", "magic/etc/passwd", "root/etc/passwd", "real/dir/passwd", "pipe", "loop")
    above = ("../etc/passwd", "/etc/passwd", "real/../dir/passwd", "dir/../../etc/passwd")
    tries = {}
    for path in (*wanted, *above):
        try:
            arena.get(worker, path)
            tries[f"get {path}"] = "ok"
        except grpc.RpcError as error:
            tries[f"get {path}"] = reason_of(error)
    for path in ("link", "dir/new", "out/new", "root/tmp/new", "pipe", "../new"):
        try:
            arena.put(worker, path, b"planted")
            tries[f"put {path}"] = "ok"
        except grpc.RpcError as error:
            tries[f"put {path}"] = reason_of(error)
    held = set(tries.values()) <= {"FILE_REFUSED", "INVALID_FIELD", "FILE_UNKNOWN"}
    return verdict(held, summary(tries))


ROWS = [
    Row(
        16,
        plant_links,
        ("openat2 beneath the workspace, without links", "the sandbox's own mounts"),
        ("follow-links",),
        where="outside",
        host=("files",),
        limits_of_it="weakened, it reads the sandbox's own /etc: the collector is confined too",
    ),
    Row(
        10,
        create_everywhere,
        ("read-only mounts", "Landlock"),
        ("writable-root", "no-landlock"),
        host=("files",),
    ),
    Row(11, read_secrets, ("mounts",), ("canary-readable",), host=("files",)),
    Row(
        12,
        fill_file_systems,
        ("tmpfs size and nr_inodes",),
        ("big-tmp",),
        resources={"tmp_limit_bytes": MIB},
        host=("disk",),
    ),
    Row(13, make_devices, ("Landlock", "user namespace", "nodev"), ("no-landlock",), host=("devices",)),
    Row(14, find_devices, ("mounts",), ("loose-dev",), host=("devices",)),
    Row(18, find_the_note, ("mounts",), ("shared-tmp",), first=leave_a_note),
    Row(
        19,
        mount_for_the_host,
        ("seccomp", "Landlock", "capabilities", "private mounts"),
        ("no-seccomp", "keep-capabilities", "no-landlock", "shared-mounts"),
        host=("mounts",),
        hole=r"mount: ok; mounts that others are told of: [1-9]",
        limits_of_it="weakened, it mounts what peers are told of; that the host is none is the outer wall",
    ),
    Row(
        20,
        write_what_started_it,
        ("pivot_root", "read-only mounts", "non-dumpable init"),
        ("outside-cwd",),
        host=("files",),
    ),
]
