"""Is this sandbox what it should be? Asked inside it, by trying, before any user code runs.

Init runs :func:`examine` after the last step of its confinement and sends what it
found with its last word before it is ready; what the findings amount to is for the
orchestrator to judge. The steps say what was asked of the kernel, the checks what
the kernel now does: a step that did nothing, for whatever reason, is seen here.

No check has an effect when it unexpectedly succeeds, for that is how a missing
layer looks: files are opened and closed, names are unlinked that do not exist,
and calls get arguments that the kernel refuses by another errno than the wall does.
None makes a call that only an attack makes, since init would trip its own wire.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import prctl

from hayflick_sandbox import syscalls
from hayflick_sandbox.messages import MAX_SEEN_CHARS, Finding, Probed
from hayflick_sandbox.process import CHANNEL_FD
from hayflick_sandbox.template import DEVICE_LINKS, DEVICES, WORKER_UID

NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
WRITABLE_MOUNTS = frozenset({"/tmp", "/workspace", "/dev/shm", "/proc"})
SCOPES_ABI = 6

AF_NETLINK = 16
_CANARY_NAME = b"\0hayflick-canary"
_NO_SUCH_NAME = ".hayflick-no-such-name"
_MPOL_UNKNOWN = 0x7FFF
_NO_CAPABILITY = "0" * 16
# Those of the zygote, which it got by an environment of its own and hands to nobody.
_OWN_VARIABLES = frozenset({"LANG", "PATH", "LC_CTYPE"})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks compare with.

    Attributes:
        host_namespaces: Inode of each namespace that the orchestrator is in.
        filters: Seccomp filters that must be in force, those inherited included.
        inet: Whether the worker may make AF_INET sockets.
        rlimits: The greatest value that each may have.
        environment: What every task's environment begins with.
        variables: The names of variables that may be in it.
        landlock_abi: The kernel's.
        shown: The paths of the host that it sees.
    """

    host_namespaces: Mapping[str, int]
    filters: int
    inet: bool
    rlimits: Mapping[int, int]
    environment: Mapping[str, str]
    variables: frozenset[str]
    landlock_abi: int
    shown: tuple[str, ...] = ()


class View:
    """What several checks read, read once."""

    def __init__(self, facts: Facts, hostname: str, opened: Iterable[int]) -> None:
        self.facts = facts
        self.hostname = hostname
        self.opened = frozenset(opened)
        self._status = _read("/proc/self/status")
        self.mounts = [line.split(" ", 6) for line in _read("/proc/self/mountinfo").splitlines()]

    def status(self, name: str) -> str:
        """Return one field of proc_pid_status(5).

        Raises:
            ValueError: this kernel does not tell it.
        """
        begin = self._status.index(f"\n{name}:") + len(name) + 2
        return self._status[begin : self._status.index("\n", begin)].strip()


Answer = tuple[bool, str]


@dataclass(frozen=True, slots=True)
class Check:
    """One question to the kernel.

    Attributes:
        name: What it is called on record.
        layer: The layer of the sandbox that it proves; those of :mod:`~hayflick_sandbox.probe`
            keep their names.
        grade: The lowest grade that needs it: "C", "B" or "A".
        reason: What a worker could do if it did not hold.
        ask: Whether it held, and what was seen.
        landlock_abi: The first ABI of Landlock with which it can be asked.
    """

    name: str
    layer: str
    grade: str
    reason: str
    ask: Callable[[View], Answer]
    landlock_abi: int = 0


@dataclass(frozen=True, slots=True)
class PlantCanary:
    """Before Landlock: a socket of the time before it, which nothing after it may reach."""

    def describe(self) -> str:
        """Say it."""
        return "bind an abstract socket that Landlock must keep the self-probe from reaching"

    def apply(self) -> None:
        """Do it."""
        canary = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        canary.bind(_CANARY_NAME)
        _canaries.append(canary)


_canaries: list[socket.socket] = []


def examine(facts: Facts, hostname: str, opened: Iterable[int] = ()) -> Probed:
    """Ask every check that this kernel can answer, and return what came of it.

    Args:
        facts: What to compare with.
        hostname: What it must see as the name of its machine, which only its own init knows.
        opened: Descriptors that init is about to hand over, beside stdio and its channel.
    """
    begun = time.monotonic()
    view = View(facts, hostname, opened)
    findings = []
    for check in CHECKS:
        if check.landlock_abi > facts.landlock_abi:
            continue
        try:
            held, seen = check.ask(view)
        except Exception as error:  # noqa: BLE001 -- a question that fails was not answered well
            held, seen = False, _name(error)
        findings.append(Finding(check.name, held, seen[:MAX_SEEN_CHARS]))
    for canary in _canaries:
        canary.close()
    return Probed(tuple(findings), round((time.monotonic() - begun) * 1_000_000))


def _name(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, str(error.errno))
    return type(error).__name__


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        # /proc gives at most a page at a time, and mounts may be many; a larger
        # buffer would be memory that this init never had.
        while part := os.read(descriptor, 4_096):
            parts.append(part)
        return b"".join(parts).decode(errors="replace")
    finally:
        os.close(descriptor)


def _refused(try_: Callable[[], object], *wanted: int) -> Answer:
    """Return whether the kernel answers with one of the errnos *wanted*."""
    try:
        try_()
    except OSError as error:
        return error.errno in wanted, _name(error)
    return False, "allowed"


def _opened(path: str, flags: int) -> None:
    os.close(os.open(path, flags | os.O_CLOEXEC))


def _status(name: str, wanted: str) -> Callable[[View], Answer]:
    def ask(view: View) -> Answer:
        seen = view.status(name)
        return seen == wanted, seen

    return ask


def _map(kind: str) -> Callable[[View], Answer]:
    def ask(_: View) -> Answer:
        lines = [line.split() for line in _read(f"/proc/self/{kind}_map").splitlines()]
        seen = "; ".join(" ".join(line) for line in lines)
        return len(lines) == 1 and lines[0][0] == str(WORKER_UID) and lines[0][2] == "1", seen

    return ask


def _identity(_: View) -> Answer:
    seen = (*os.getresuid(), *os.getresgid())
    return set(seen) == {WORKER_UID}, " ".join(map(str, seen))


def _setgroups(_: View) -> Answer:
    seen = _read("/proc/self/setgroups").strip()
    return seen == "deny", seen


def _groups(_: View) -> Answer:
    groups = os.getgroups()
    return not groups, " ".join(map(str, groups))


def _filters(view: View) -> Answer:
    seen = view.status("Seccomp_filters")
    return seen == str(view.facts.filters), seen


def _unlisted(name: str) -> Callable[[View], Answer]:
    # No structure, no descriptor: the kernel itself would say EINVAL or EBADF.
    return lambda _: _refused(lambda: syscalls.invalid(name, -1, 0, 0, 0), errno.ENOSYS)


def _listed_refusal(_: View) -> Answer:
    return _refused(lambda: syscalls.invalid("set_mempolicy", _MPOL_UNKNOWN, 0, 0), errno.EPERM)


def _families(view: View) -> Answer:
    seen = ""
    for family in (AF_NETLINK,) if view.facts.inet else (AF_NETLINK, socket.AF_INET, socket.AF_INET6):
        held, seen = _refused(partial(_socket, family), errno.EAFNOSUPPORT)
        if not held:
            return False, f"{seen}: family {int(family)}"
    return True, seen


def _socket(family: int) -> None:
    socket.socket(family, socket.SOCK_DGRAM).close()


def _namespace(kind: str) -> Callable[[View], Answer]:
    def ask(view: View) -> Answer:
        inode = os.stat(f"/proc/self/ns/{kind}").st_ino
        return inode != view.facts.host_namespaces[kind], str(inode)

    return ask


def _no_watches(_: View) -> Answer:
    return _refused(lambda: os.close(syscalls.inotify_init()), errno.EMFILE, errno.ENOSYS)


def _first(_: View) -> Answer:
    return os.getpid() == 1, str(os.getpid())


def _cgroups_hidden(_: View) -> Answer:
    paths = {line.split(":", 2)[2] for line in _read("/proc/self/cgroup").splitlines()}
    return paths <= {"/"}, " ".join(sorted(paths))


def _hostname(view: View) -> Answer:
    seen = os.uname().nodename
    return seen == view.hostname, seen


def _read_only(directory: str) -> Callable[[View], Answer]:
    # The kernel asks whether it may write there before it looks for the name
    # (fs/namei.c, do_unlinkat), which does not exist.
    path = os.path.join(directory, _NO_SUCH_NAME)
    return lambda _: _refused(lambda: os.unlink(path), errno.EROFS)


def _mounts_read_only(view: View) -> Answer:
    wrong = [
        mount[4]
        for mount in view.mounts
        if mount[4] not in WRITABLE_MOUNTS and "ro" not in mount[5].split(",")
    ]
    return not wrong, " ".join(wrong) or f"{len(view.mounts)} mounts"


def _mounts_nosuid(view: View) -> Answer:
    wrong = [mount[4] for mount in view.mounts if "nosuid" not in mount[5].split(",")]
    return not wrong, " ".join(wrong) or f"{len(view.mounts)} mounts"


def _mounts_private(view: View) -> Answer:
    # Optional fields: a mount that is shared could send what is mounted here to a peer outside.
    wrong = [mount[4] for mount in view.mounts if "shared:" in mount[6].partition(" - ")[0]]
    return not wrong, " ".join(wrong) or f"{len(view.mounts)} mounts"


def _mounts_idmapped(view: View) -> Answer:
    mapped = {mount[4]: "idmapped" in mount[5].split(",") for mount in view.mounts}
    # A path that is no mount of its own is a wall whose place nobody knows.
    wrong = [path for path in view.facts.shown if not mapped.pop(path, False)]
    below = tuple(f"{path}/" for path in view.facts.shown)
    wrong += [
        point
        for point, held in mapped.items()
        if not held and point.startswith(below) and point not in WRITABLE_MOUNTS
    ]
    return not wrong, " ".join(sorted(wrong)) or f"{len(view.facts.shown)} paths"


def _absent(path: str) -> Callable[[View], Answer]:
    return lambda _: _refused(lambda: os.stat(path), errno.ENOENT)


def _processes(_: View) -> Answer:
    names = set(os.listdir("/proc"))
    strange = names - {"1", "self", "thread-self"}
    return not strange and "1" in names, " ".join(sorted(strange)) or "1"


def _devices(_: View) -> Answer:
    strange = set(os.listdir("/dev")) - {*DEVICES, *DEVICE_LINKS, "shm"}
    strange |= {name for name in DEVICES if not stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode)}
    return not strange, " ".join(sorted(strange)) or " ".join(DEVICES)


def _descriptors(view: View) -> Answer:
    directory = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = set(map(int, os.listdir(directory))) - {directory}
    finally:
        os.close(directory)
    ours = {0, 1, 2, CHANNEL_FD, *view.opened, *(canary.fileno() for canary in _canaries)}
    # What listing by descriptor opened for itself is closed again.
    strange = {number for number in found - ours if _is_open(number)}
    return not strange, " ".join(map(str, sorted(strange or found)))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _stdio(_: View) -> Answer:
    null = os.makedev(1, 3)
    wrong = [number for number in (0, 1, 2) if os.fstat(number).st_rdev != null]
    return not wrong, " ".join(map(str, wrong)) or "/dev/null"


def _environment(view: View) -> Answer:
    strange = (set(os.environ) - _OWN_VARIABLES) | (set(view.facts.environment) - view.facts.variables)
    return not strange, " ".join(sorted(strange)) or " ".join(sorted(view.facts.environment))


def _dumpable(_: View) -> Answer:
    seen = prctl.get_dumpable()
    return not seen, str(int(seen))


def _opaque(file: str) -> Callable[[View], Answer]:
    return lambda _: _refused(lambda: _opened(f"/proc/1/{file}", os.O_RDONLY), errno.EACCES)


def _session(_: View) -> Answer:
    seen = os.getsid(0)
    return seen == os.getpid(), str(seen)


def _no_core(_: View) -> Answer:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    return 0 <= soft <= 1 and 0 <= hard <= 1, f"{soft} {hard}"


def _rlimits(view: View) -> Answer:
    wrong = []
    for kind, most in view.facts.rlimits.items():
        soft, hard = resource.getrlimit(kind)
        if not (0 <= soft <= most and 0 <= hard <= most):
            wrong.append(f"{kind}={soft}/{hard}")
    return not wrong, " ".join(wrong) or f"{len(view.facts.rlimits)} limits"


def _landlock_files(_: View) -> Answer:
    # Mounts and modes let the worker make files in /tmp. Landlock, which is asked
    # first, lets nobody make a block device; without it the kernel itself says
    # EPERM, for want of CAP_MKNOD (fs/namei.c, do_mknodat, vfs_mknod).
    path = f"/tmp/{_NO_SUCH_NAME}"
    try:
        return _refused(lambda: os.mknod(path, stat.S_IFBLK | 0o600, 0), errno.EACCES)
    finally:
        with contextlib.suppress(OSError):  # it was never made, but better none than a hole in the proof
            os.unlink(path)


def _landlock_scopes(_: View) -> Answer:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outgoing:
        # Connecting a datagram socket sends nothing.
        return _refused(lambda: outgoing.connect(_CANARY_NAME), errno.EPERM)


CHECKS = (
    Check("uid-map", "namespaces", "C", "be somebody else's user on the host", _map("uid")),
    Check("gid-map", "namespaces", "C", "be in somebody else's group on the host", _map("gid")),
    Check("identity", "namespaces", "C", "be root inside, with root's rights over its namespaces", _identity),
    Check("setgroups", "namespaces", "C", "leave a group that a file is closed to", _setgroups),
    Check("groups", "uid-range", "A", "read what the orchestrator's groups may read", _groups),
    *(
        Check(f"capabilities-{word}", "capabilities", "C", why, _status(field, _NO_CAPABILITY))
        for word, field, why in (
            ("inheritable", "CapInh", "pass a capability to a program"),
            ("permitted", "CapPrm", "take up a capability"),
            ("effective", "CapEff", "use a capability"),
            ("bounding", "CapBnd", "get a capability back by an exec"),
            ("ambient", "CapAmb", "keep a capability across an exec"),
        )
    ),
    Check(
        "no-new-privileges",
        "capabilities",
        "C",
        "gain rights by a set-user-id file",
        _status("NoNewPrivs", "1"),
    ),
    Check("seccomp-mode", "seccomp", "C", "call all of the kernel", _status("Seccomp", "2")),
    Check("seccomp-filters", "seccomp", "C", "run under a part of the policy", _filters),
    Check("clone3", "seccomp", "C", "ask for namespaces behind a pointer", _unlisted("clone3")),
    Check("unlisted-call", "seccomp", "C", "make a call that nobody listed", _unlisted("vmsplice")),
    Check("refused-call", "seccomp", "C", "make a call that is refused by name", _listed_refusal),
    Check("socket-families", "seccomp", "C", "speak protocols it has no licence for", _families),
    *(
        Check(f"namespace-{kind}", "namespaces", "C", f"share the host's {kind} namespace", _namespace(kind))
        for kind in NAMESPACES
    ),
    Check("no-watches", "namespaces", "C", "use up the host's inotify instances", _no_watches),
    Check("first-process", "namespaces", "C", "outlive its init", _first),
    Check("cgroups-hidden", "namespaces", "C", "learn its place in the lineage's tree", _cgroups_hidden),
    Check("hostname", "namespaces", "C", "learn the host's name", _hostname),
    *(
        Check(f"read-only{path}", "files", "C", f"change {path} for itself and others", _read_only(path))
        for path in ("/", "/etc", "/usr", "/dev")
    ),
    Check("mounts-read-only", "files", "C", "write where it only should read", _mounts_read_only),
    Check("mounts-nosuid", "files", "C", "gain rights by a set-user-id file", _mounts_nosuid),
    Check("mounts-private", "files", "C", "have a mount appear outside", _mounts_private),
    Check(
        *("mounts-idmapped", "idmapped-mounts", "A", "call the host by sockets below what it sees"),
        _mounts_idmapped,
    ),
    Check("no-sys", "files", "C", "turn the host's knobs by /sys", _absent("/sys")),
    Check("no-proc-sys", "files", "C", "turn the host's knobs by /proc/sys", _absent("/proc/sys")),
    Check("no-template", "files", "C", "reach what sandboxes are cut from", _absent("/.hayflick")),
    Check("own-processes", "files", "C", "see processes that are not its own", _processes),
    Check("devices", "files", "C", "speak to a driver of the host", _devices),
    Check("descriptors", "descriptors", "C", "use what the orchestrator had open", _descriptors),
    Check("stdio", "descriptors", "C", "read or write the orchestrator's terminal", _stdio),
    Check("environment", "environment", "C", "read secrets of whoever started the node", _environment),
    Check("not-dumpable", "process", "C", "trace its init, or dump it", _dumpable),
    Check("init-environment", "process", "C", "read its init's environment", _opaque("environ")),
    Check("init-memory", "process", "C", "read its init's memory", _opaque("mem")),
    Check("session", "process", "C", "type into a terminal of the host", _session),
    Check("umask", "process", "C", "leave files to others by accident", _status("Umask", "0077")),
    Check("no-core", "process", "C", "have the host store or pipe its core", _no_core),
    Check("rlimits", "process", "B", "open, write or lock without bound", _rlimits),
    Check("landlock-files", "landlock", "A", "use a hole in the mounts", _landlock_files, landlock_abi=0),
    Check(
        *("landlock-scopes", "landlock", "A", "reach sockets and processes beyond its domain"),
        _landlock_scopes,
        landlock_abi=SCOPES_ABI,
    ),
)
