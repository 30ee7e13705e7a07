"""Attacks on who a worker is: users, groups, capabilities, namespaces, mounts."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess

from ..table import Row
from ..tools import Facts, Verdict, attempt, in_child, opened, status_of, summary, syscall, verdict

CLONE_FLAGS = {
    "time": 0x80,
    "mount": 0x20000,
    "cgroup": 0x2000000,
    "uts": 0x4000000,
    "ipc": 0x8000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}


def own_ids(facts: Facts) -> Verdict:
    """Read who one is on the host."""
    with open("/proc/self/uid_map") as users, open("/proc/self/gid_map") as groups:
        maps = [users.read().split(), groups.read().split()]
    return verdict(True, " ".join(maps[0])) | {"maps": maps}


def be_root_or_another(facts: Facts) -> Verdict:
    """Be uid 0 on the host, or the uid of a live sister."""
    mine, hers = own_ids(facts)["maps"], facts["first"]["maps"]
    outer = [int(one[1]) for one in mine]
    tries = {
        "setuid 0": attempt(os.setuid, 0),
        "setgid 0": attempt(os.setgid, 0),
        "setuid of the sister": attempt(os.setuid, int(hers[0][1])),
    }
    # An ordinary user's node numbers its range from 1; what those are on the host, the arena checks.
    alone = (
        min(outer) >= (1 if facts["rootless"] else 100_000)
        and mine != hers
        and all(int(one[2]) == 1 for one in mine)
    )
    return verdict(alone and "ok" not in tries.values(), f"uid_map {' '.join(mine[0])}; {summary(tries)}")


def use_a_capability(facts: Facts) -> Verdict:
    """Hold a capability, or raise an ambient one."""
    status = status_of()
    held = {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    libc = ctypes.CDLL(None, use_errno=True)
    ambient = libc.prctl(47, 2, 21, 0, 0)
    return verdict(not any(int(value, 16) for value in held.values()) and ambient != 0, held)


def execute_setuid(facts: Facts) -> Verdict:
    """Execute a set-user-id root program and keep what it gains."""
    # The loader prints this only to a program that the kernel did not raise.
    program = next(
        path for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount") if os.path.exists(path)
    )
    env = {"LD_SHOW_AUXV": "1", "PATH": "/usr/bin"}
    done = subprocess.run(
        [program, "--version"], env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False
    )
    raised = b"AT_EUID" not in done.stdout or b"AT_SECURE:            0" not in done.stdout
    no_new = status_of()["NoNewPrivs"]
    nosuid = bool(os.statvfs(program).f_flag & os.ST_NOSUID)
    return verdict(
        not raised and no_new == "1" and nosuid, f"NoNewPrivs {no_new}, nosuid {nosuid}, raised {raised}"
    )


def join_groups(facts: Facts) -> Verdict:
    """Get a supplementary group, or drop one that denies."""
    with open("/proc/self/setgroups") as file:
        policy = file.read().strip()
    tries = {"none": attempt(os.setgroups, []), "own": attempt(os.setgroups, [os.getgid()])}
    held = policy == "deny" and set(tries.values()) == {"EPERM"}
    return verdict(
        held and not os.getgroups(), f"setgroups {policy}, groups {os.getgroups()}, {summary(tries)}"
    )


def widen_the_filter(facts: Facts) -> Verdict:
    """Install a filter that allows everything, then do what the first one refuses."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    def widened() -> str:
        allow_all = ctypes.create_string_buffer(bytes.fromhex("060000000000ff7f"), 8)
        program = Program(1, ctypes.addressof(allow_all))
        if syscall(facts, "seccomp", 1, 0, ctypes.byref(program)) != "ok":
            return "EBADE"
        # ADDR_NO_RANDOMIZE: harms nobody, and only the filter refuses it.
        return syscall(facts, "personality", 0x0040000)

    libc = ctypes.CDLL(None, use_errno=True)
    bits = [attempt_prctl(libc, option) for option in (28, 35)]
    answer = in_child(widened)
    mode = status_of()["Seccomp"]
    held = mode == "2" and answer in ("EPERM", "ENOSYS") and bits == ["EPERM", "EPERM"]
    return verdict(held, f"mode {mode}; personality under a second filter: {answer}; securebits, mm: {bits}")


def attempt_prctl(libc: ctypes.CDLL, option: int) -> str:
    """Call prctl with nothing but *option*; return "ok" or the name of the error."""
    import errno

    ctypes.set_errno(0)
    return "ok" if libc.prctl(option, 0, 0, 0, 0) >= 0 else errno.errorcode[ctypes.get_errno()]


def unshare_each(facts: Facts) -> Verdict:
    """Unshare each kind of namespace."""
    tries = {
        kind: in_child(lambda flag=flag: syscall(facts, "unshare", flag))  # type: ignore[misc]
        for kind, flag in CLONE_FLAGS.items()
    }
    return verdict(set(tries.values()) <= {"EPERM", "ENOSPC"}, summary(tries))


def clone_each(facts: Facts) -> Verdict:
    """Clone into each kind of namespace, by clone and by clone3."""

    def clone(flag: int) -> str:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        number, flags = ctypes.c_long(facts["numbers"]["clone"]), ctypes.c_long(flag | signal.SIGCHLD)
        pid = libc.syscall(number, flags, *[ctypes.c_long(0)] * 4)
        if pid == 0:
            os._exit(0)
        if pid > 0:
            os.waitpid(pid, 0)
            return "ok"
        import errno

        return errno.errorcode[ctypes.get_errno()]

    tries = {
        kind: in_child(lambda flag=flag: clone(flag))  # type: ignore[misc]
        for kind, flag in CLONE_FLAGS.items()
        if kind != "time"  # clone reads that bit as part of the exit signal
    }
    third = in_child(lambda: syscall(facts, "clone3", None, 0))
    held = set(tries.values()) <= {"EPERM"} and third == "ENOSYS"
    return verdict(held, f"{summary(tries)}; clone3: {third}")


def enter_namespaces(facts: Facts) -> Verdict:
    """Enter the namespaces of init or one's own again, and compare all with the host's."""
    tries = {}
    for kind in facts["namespaces"]:
        tries[f"open init's {kind}"] = opened(f"/proc/1/ns/{kind}", os.O_RDONLY)

        def enter(kind: str = kind) -> str:
            descriptor = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
            return syscall(facts, "setns", descriptor, 0)

        tries[f"enter {kind}"] = in_child(enter)
    shared = [
        kind
        for kind, inode in facts["namespaces"].items()
        if os.stat(f"/proc/self/ns/{kind}").st_ino == inode
    ]
    held = set(tries.values()) <= {"EPERM", "EACCES"} and not shared
    return verdict(held, f"{summary(tries)}; shared with the host: {shared or 'none'}")


def mount_things(facts: Facts) -> Verdict:
    """Mount, unmount, and change roots, by the old calls and the new."""
    os.makedirs("/workspace/m", exist_ok=True)
    null = None
    tries = {
        "mount": in_child(lambda: syscall(facts, "mount", b"none", b"/workspace/m", b"tmpfs", 0, null)),
        "bind": in_child(lambda: syscall(facts, "mount", b"/usr", b"/workspace/m", null, 4096, null)),
        "umount2": in_child(lambda: syscall(facts, "umount2", b"/workspace/m", 0)),
        "chroot": in_child(lambda: syscall(facts, "chroot", b"/workspace")),
        "pivot_root": in_child(lambda: syscall(facts, "pivot_root", null, null)),
        "fsopen": in_child(lambda: syscall(facts, "fsopen", b"tmpfs", 0)),
        "open_tree": in_child(lambda: syscall(facts, "open_tree", -100, b"/usr", 1)),
        "move_mount": in_child(lambda: syscall(facts, "move_mount", -1, null, -1, null, 0)),
        "mount_setattr": in_child(lambda: syscall(facts, "mount_setattr", -100, null, 0, null, 0)),
        "fspick": in_child(lambda: syscall(facts, "fspick", -100, null, 0)),
    }
    return verdict(set(tries.values()) == {"EPERM"}, summary(tries))


SECCOMP_AND_CAPABILITIES = ("no-seccomp", "keep-capabilities")

ROWS = [
    Row(
        1,
        be_root_or_another,
        ("user namespace", "uid range"),
        ("one-uid",),
        first=own_ids,
        needs=("uid-range",),
        host=("uids",),
    ),
    Row(2, use_a_capability, ("capabilities",), ("keep-capabilities",)),
    Row(3, execute_setuid, ("no_new_privs", "nosuid", "user namespace"), ("gain-privileges", "no-seccomp")),
    Row(
        4,
        join_groups,
        ("user namespace", "seccomp"),
        ("no-seccomp", "keep-capabilities", "setgroups"),
        # Whoever may map no id but his own keeps his groups: user_namespaces(7).
        needs=("uid-range",),
    ),
    Row(5, widen_the_filter, ("seccomp",), ("no-seccomp",)),
    Row(
        6,
        unshare_each,
        ("seccomp", "user.max_user_namespaces", "capabilities"),
        (*SECCOMP_AND_CAPABILITIES, "nested-userns"),
    ),
    Row(
        7,
        clone_each,
        ("seccomp", "user.max_user_namespaces", "capabilities"),
        (*SECCOMP_AND_CAPABILITIES, "nested-userns"),
    ),
    Row(
        8,
        enter_namespaces,
        ("seccomp", "capabilities", "namespaces"),
        (*SECCOMP_AND_CAPABILITIES, "see-cgroups"),
    ),
    Row(
        9,
        mount_things,
        ("seccomp", "Landlock", "capabilities"),
        (*SECCOMP_AND_CAPABILITIES, "no-landlock"),
        host=("mounts",),
    ),
]
