"""One function per system call, with the kernel's own name; failure is OSError.

Only what neither the standard library nor python-prctl offers. Numbers and
constants are the kernel's UAPI headers': asm/unistd_64.h, linux/sched.h,
linux/mount.h, linux/landlock.h, linux/seccomp.h, linux/keyctl.h.
"""

from __future__ import annotations

import ctypes
import os
from typing import NoReturn

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_PIDFD = 0x00001000
CLONE_INTO_CGROUP = 0x200000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 0x1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000

# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_GET_NOTIF_SIZES = 3
SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
KEYCTL_JOIN_SESSION_KEYRING = 1

_X86_64 = {
    "seccomp": 317,
    "keyctl": 250,
    "pivot_root": 155,
    "capset": 126,
    "vmsplice": 278,
    "set_mempolicy": 238,
}
_AARCH64 = {
    "seccomp": 277,
    "keyctl": 219,
    "pivot_root": 41,
    "capset": 91,
    "vmsplice": 75,
    "set_mempolicy": 237,
}
# From 424 on, every architecture has the same numbers.
_NR = {
    "open_tree": 428,
    "move_mount": 429,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
    **{"x86_64": _X86_64, "aarch64": _AARCH64}.get(os.uname().machine, {}),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
_libc.mount.argtypes = (
    *(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong),
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.sethostname.argtypes = (ctypes.c_char_p, ctypes.c_size_t)


def _fail(path: str | None = None) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def _syscall(name: str, *arguments: object) -> int:
    number = _NR.get(name)
    if number is None:
        raise OSError(38, f"{name}: no system call number is known for {os.uname().machine}")
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        _fail()
    return result


class _CloneArgs(ctypes.Structure):
    """struct clone_args, up to the cgroup field (kernel 5.7)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls"),
            *("set_tid", "set_tid_size", "cgroup"),
        )
    )


def clone3(flags: int, exit_signal: int, cgroup_fd: int | None = None) -> tuple[int, int]:
    """Fork into new namespaces; return (pid, pidfd), or (0, -1) in the child.

    The caller must be single-threaded: the interpreter is told of the fork as
    ``os.fork`` would tell it, around a call that libc does not know.
    """
    pidfd = ctypes.c_int(-1)
    arguments = _CloneArgs(
        flags=flags | CLONE_PIDFD | (0 if cgroup_fd is None else CLONE_INTO_CGROUP),
        pidfd=ctypes.addressof(pidfd),
        exit_signal=exit_signal,
        cgroup=0 if cgroup_fd is None else cgroup_fd,
    )
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _libc.syscall(ctypes.c_long(_NR["clone3"]), ctypes.byref(arguments), size)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number), "clone3")
    return int(pid), pidfd.value


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    if _libc.unshare(flags) < 0:
        _fail("unshare")


def setns(descriptor: int, kind: int) -> None:
    """Move this process into the namespace of *kind* that *descriptor* refers to."""
    if _libc.setns(descriptor, kind) < 0:
        _fail("setns")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount *source* at *target*."""
    result = _libc.mount(
        _bytes(source),
        _bytes(target),
        None if kind is None else kind.encode(),
        flags,
        None if data is None else data.encode(),
    )
    if result < 0:
        _fail(target)


def _bytes(path: str) -> bytes:
    # What os.fsencode does, without what it looks up: this runs in every birth.
    return path.encode("utf-8", "surrogateescape")


def umount2(target: str, flags: int) -> None:
    """Unmount *target*."""
    if _libc.umount2(_bytes(target), flags) < 0:
        _fail(target)


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def mount_setattr(path: str, attr_set: int, *, recursive: bool) -> None:
    """Add attributes to the mount at *path*, and with *recursive* to all below it."""
    attributes = _MountAttr(attr_set=attr_set)
    try:
        _syscall(
            "mount_setattr",
            ctypes.c_int(AT_FDCWD),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.c_uint(AT_RECURSIVE if recursive else 0),
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def mount_setattr_of(tree: int, attr_set: int, *, userns_fd: int = 0) -> None:
    """Add attributes to the mount *tree* and to all below it.

    Args:
        tree: A descriptor from :func:`open_tree`.
        attr_set: What to add.
        userns_fd: With ``MOUNT_ATTR_IDMAP``, the user namespace whose maps the mount gets.
    """
    attributes = _MountAttr(attr_set=attr_set, userns_fd=userns_fd)
    _syscall(
        "mount_setattr",
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_uint(AT_EMPTY_PATH | AT_RECURSIVE),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def open_tree(source: int, flags: int) -> int:
    """Return a descriptor of the mount at the descriptor *source*, or of a detached copy of it."""
    all_flags = ctypes.c_uint(flags | AT_EMPTY_PATH | os.O_CLOEXEC)
    return _syscall("open_tree", ctypes.c_int(source), ctypes.c_char_p(b""), all_flags)


def move_mount(tree: int, target: str) -> None:
    """Attach the detached mount *tree* at *target*."""
    try:
        _syscall(
            "move_mount",
            ctypes.c_int(tree),
            ctypes.c_char_p(b""),
            ctypes.c_int(AT_FDCWD),
            ctypes.c_char_p(os.fsencode(target)),
            ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from None


def pivot_root(new_root: str, put_old: str) -> None:
    """Make *new_root* the root of this mount namespace; the old one goes to *put_old*."""
    _syscall("pivot_root", os.fsencode(new_root), os.fsencode(put_old))


def sethostname(name: str) -> None:
    """Set the host name of this UTS namespace."""
    raw = name.encode()
    if _libc.sethostname(raw, len(raw)) < 0:
        _fail("sethostname")


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    """Close every descriptor from *first* to *last*."""
    _syscall("close_range", ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(0))


class _OpenHow(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("flags", "mode", "resolve"))


def openat2(directory: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """Open *path* below the descriptor *directory*, resolved as *resolve* allows."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    try:
        return _syscall(
            "openat2",
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def inotify_init() -> int:
    """Return a descriptor, closed on exec, of a new inotify instance."""
    descriptor = int(_libc.inotify_init1(os.O_CLOEXEC))
    if descriptor < 0:
        _fail("inotify_init1")
    return descriptor


def keyctl_join_session_keyring() -> None:
    """Leave the inherited session keyring for a new, anonymous one."""
    _syscall("keyctl", ctypes.c_int(KEYCTL_JOIN_SESSION_KEYRING), ctypes.c_void_p(None))


PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
# linux/securebits.h, each with its lock: NOROOT, NO_SETUID_FIXUP, no KEEP_CAPS,
# NO_CAP_AMBIENT_RAISE.
SECBITS_LOCKED_DOWN = 0b01 | 0b10 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80


def prctl_capbset_drop(capability: int) -> None:
    """Drop one capability from the bounding set; python-prctl knows only the older ones."""
    if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
        _fail("PR_CAPBSET_DROP")


def prctl_set_securebits(bits: int) -> None:
    """Set the secure bits; python-prctl refuses those of ambient capabilities."""
    if _libc.prctl(PR_SET_SECUREBITS, bits, 0, 0, 0) < 0:
        _fail("PR_SET_SECUREBITS")


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_LINUX_CAPABILITY_VERSION_3 = 0x20080522


def capset_none() -> None:
    """Give up every capability of this thread: effective, permitted, inheritable."""
    header = _CapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    _syscall("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def seccomp_set_mode_filter(program: bytes, *, listener: bool = False) -> int:
    """Install a compiled BPF *program* (8 bytes an instruction) over this process.

    Returns:
        A descriptor, closed on exec, of the new listener when one was asked for; else 0.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // 8, ctypes.addressof(buffer))
    flags = ctypes.c_uint(SECCOMP_FILTER_FLAG_NEW_LISTENER if listener else 0)
    return _syscall("seccomp", ctypes.c_uint(SECCOMP_SET_MODE_FILTER), flags, ctypes.byref(fprog))


def seccomp_get_notif_sizes() -> tuple[int, int, int]:
    """Return the kernel's sizes of a notification, of its response, and of the data in the former."""
    sizes = (ctypes.c_uint16 * 3)()
    _syscall("seccomp", ctypes.c_uint(SECCOMP_GET_NOTIF_SIZES), ctypes.c_uint(0), ctypes.byref(sizes))
    return sizes[0], sizes[1], sizes[2]


class _RulesetAttr(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_RULE_NET_PORT = 2


def landlock_abi() -> int:
    """Return the kernel's Landlock ABI version.

    Raises:
        OSError: ENOSYS or EOPNOTSUPP where Landlock is absent or off.
    """
    return _syscall(
        "landlock_create_ruleset",
        ctypes.c_void_p(None),
        ctypes.c_size_t(0),
        ctypes.c_uint(LANDLOCK_CREATE_RULESET_VERSION),
    )


def landlock_create_ruleset(handled_fs: int, handled_net: int, scoped: int, *, size: int) -> int:
    """Return a descriptor of a new ruleset; *size* is how much of the struct this ABI knows."""
    attributes = _RulesetAttr(handled_fs, handled_net, scoped)
    return _syscall(
        "landlock_create_ruleset", ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint(0)
    )


def landlock_add_rule(ruleset_fd: int, path_fd: int, allowed: int) -> None:
    """Allow *allowed* at and below the directory or file *path_fd*."""
    attributes = _PathBeneathAttr(allowed, path_fd)
    _syscall(
        "landlock_add_rule",
        ctypes.c_int(ruleset_fd),
        ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH),
        ctypes.byref(attributes),
        ctypes.c_uint(0),
    )


class _NetPortAttr(ctypes.Structure):
    _fields_ = (("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def landlock_add_port_rule(ruleset_fd: int, port: int, allowed: int) -> None:
    """Allow *allowed* at the TCP *port* (ABI 4)."""
    attributes = _NetPortAttr(allowed, port)
    _syscall(
        "landlock_add_rule",
        ctypes.c_int(ruleset_fd),
        ctypes.c_int(LANDLOCK_RULE_NET_PORT),
        ctypes.byref(attributes),
        ctypes.c_uint(0),
    )


def landlock_restrict_self(ruleset_fd: int) -> None:
    """Confine this process and all it forks by the ruleset."""
    _syscall("landlock_restrict_self", ctypes.c_int(ruleset_fd), ctypes.c_uint(0))


def invalid(name: str, *arguments: int) -> int:
    """Make a system call whose arguments no kernel accepts, to learn what it answers first."""
    return _syscall(name, *(ctypes.c_long(argument) for argument in arguments))
