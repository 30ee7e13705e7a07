"""Attacks by system calls that no worker needs."""

from __future__ import annotations

import ctypes
import os
import signal

from ..table import Row
from ..tools import Facts, Verdict, in_child, status_of, summary, syscall, verdict

WHOLE_MACHINE = {
    # Each with arguments that do nothing, should the kernel ever read them.
    "bpf": (0, None, 0),
    "perf_event_open": (None, 0, -1, -1, 0),
    "userfaultfd": (1,),
    "init_module": (None, 0, None),
    "finit_module": (-1, None, 0),
    "delete_module": (None, 0),
    "acct": (b"",),
    "swapon": (b"", 0),
    "swapoff": (b"",),
    "quotactl": (0, None, 0, None),
    "fanotify_init": (0, 0),
    "lookup_dcookie": (0, None, 0),
    "iopl": (0,),
    "ioperm": (0, 0, 0),
    "clock_settime": (0, None),
    "settimeofday": (None, None),
    "sethostname": (b"", 0),
    "vhangup": (),
    "name_to_handle_at": (-1, None, None, None, 0),
    "open_by_handle_at": (-1, None, 0),
    "modify_ldt": (0, None, 0),
}
# Asked for only while the filter is in force.
NEVER_WEAKENED = {
    "reboot": (0, 0, 0, None),
    "kexec_load": (0, 0, None, 0),
    "kexec_file_load": (-1, -1, 0, None, 0),
}
MAY_BE_WEAKENED_AWAY = ("vhangup", "acct", "swapon", "swapoff")

FAMILIES = {
    "INET": 2, "AX25": 3, "IPX": 4, "APPLETALK": 5, "INET6": 10, "KEY": 15, "NETLINK": 16, "PACKET": 17,
    "RDS": 21, "PPPOX": 24, "CAN": 29, "TIPC": 30, "BLUETOOTH": 31, "ALG": 38, "NFC": 39, "VSOCK": 40,
    "KCM": 41, "QIPCRTR": 42, "SMC": 43, "XDP": 44, "MCTP": 45,
}  # fmt: skip


def set_up_io_uring(facts: Facts) -> Verdict:
    """Set up an io_uring, whose operations no filter sees."""
    tries = {
        "setup": syscall(facts, "io_uring_setup", 1, None),
        "enter": syscall(facts, "io_uring_enter", -1, 0, 0, 0, None, 0),
        "register": syscall(facts, "io_uring_register", -1, 0, None, 0),
    }
    return verdict(set(tries.values()) <= {"EPERM", "ENOSYS"}, summary(tries))


def touch_the_machine(facts: Facts) -> Verdict:
    """Call what is about the whole machine: bpf, modules, perf, quotas, clocks, reboot."""
    calls = dict(WHOLE_MACHINE)
    if facts["weakened"]:
        for name in MAY_BE_WEAKENED_AWAY:
            del calls[name]
    else:
        calls |= NEVER_WEAKENED
    tries = {
        name: in_child(lambda name=name, arguments=arguments: syscall(facts, name, *arguments))  # type: ignore[misc]
        for name, arguments in calls.items()
        if name in facts["numbers"]
    }
    return verdict(set(tries.values()) <= {"EPERM", "ENOSYS"}, summary(tries))


def use_keyrings(facts: Facts) -> Verdict:
    """Add a key to one's own keyring, request one, and list the session's."""
    tries = {
        "add_key": syscall(facts, "add_key", b"user", b"escape", b"x", 1, -2),
        "request_key": syscall(facts, "request_key", b"user", b"escape", None, 0),
        "keyctl": syscall(facts, "keyctl", 0, -3, 0),
    }
    return verdict(set(tries.values()) <= {"EPERM", "ENOSYS"}, summary(tries))


def inspect_processes(facts: Facts) -> Verdict:
    """Trace, read, write and steal from one's own child and from init."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)

    class Span(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    try:
        buffer = ctypes.create_string_buffer(8)
        span = Span(ctypes.addressof(buffer), 8)
        pidfd = os.pidfd_open(pid)
        tries = {}
        for name, target in (("child", pid), ("init", 1)):
            here, there = ctypes.byref(span), ctypes.byref(span)
            tries[f"ptrace {name}"] = in_child(
                lambda target=target: syscall(facts, "ptrace", 0x4206, target, 0, 0)
            )  # type: ignore[misc]
            tries[f"read {name}"] = syscall(facts, "process_vm_readv", target, here, 1, there, 1, 0)
            tries[f"write {name}"] = syscall(facts, "process_vm_writev", target, here, 0, there, 0, 0)
            tries[f"kcmp {name}"] = syscall(facts, "kcmp", target, os.getpid(), 1, 0, 0)
        tries["pidfd_getfd"] = syscall(facts, "pidfd_getfd", pidfd, 0, 0)
        tries["process_madvise"] = syscall(facts, "process_madvise", pidfd, there, 0, 20, 0)
    finally:
        os.close(write_end)
        os.waitpid(pid, 0)
    return verdict(set(tries.values()) <= {"EPERM", "ENOSYS"}, summary(tries))


def call_32_bit(facts: Facts) -> Verdict:
    """Call getpid by int 0x80, whose numbers mean other calls."""
    import mmap

    def int80() -> object:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret
        pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        return "ok" if pid == os.getpid() else "ENOSYS"

    answer = in_child(int80)
    return verdict(answer == "SIGSYS", answer)


def call_x32(facts: Facts) -> Verdict:
    """Call getpid with the x32 bit, whose numbers a careless filter does not know."""
    answer = in_child(lambda: syscall(facts, 0x4000_0000 | facts["numbers"]["getpid"]))
    return verdict(answer == "SIGSYS", answer)


def call_unlisted(facts: Facts) -> Verdict:
    """Call numbers that do not exist, and new ones that nobody listed."""
    tries = {
        "999": syscall(facts, 999, 0, 0),
        "100000": syscall(facts, 100_000, 0, 0),
        # cachestat, map_shadow_stack, statmount, lsm_get_self_attr
        **{str(number): syscall(facts, number, -1, None, None, 0) for number in (451, 453, 457, 459)},
    }
    return verdict(set(tries.values()) == {"ENOSYS"}, summary(tries))


def type_into_a_terminal(facts: Facts) -> Verdict:
    """Push a character into a terminal's input, by the request's number with and without high bits."""
    character = ctypes.create_string_buffer(b"#")
    descriptor = os.open("/dev/null", os.O_RDWR)
    high = 1 << 32
    tries = {
        name: syscall(facts, "ioctl", descriptor, request, character)
        for name, request in (
            ("TIOCSTI", 0x5412),
            ("TIOCSTI with high bits", high | 0x5412),
            ("TIOCLINUX", 0x541C),
            ("TIOCLINUX with high bits", high | 0x541C),
            ("TIOCCONS", 0x541D),
        )
    }
    with open("/proc/self/stat") as file:
        terminal = file.read().rpartition(")")[2].split()[4]
    return verdict(
        set(tries.values()) == {"EPERM"} and terminal == "0", f"{summary(tries)}; terminal {terminal}"
    )


def find_an_unfiltered_thread(facts: Facts) -> Verdict:
    """Find a thread of one's own without the filter."""
    import threading

    done = threading.Event()
    threads = [threading.Thread(target=done.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    tasks = os.listdir("/proc/self/task")
    modes = sorted({status_of(f"self/task/{task}")["Seccomp"] for task in tasks})
    caps = {status_of(f"self/task/{task}")["NoNewPrivs"] for task in tasks}
    done.set()
    for thread in threads:
        thread.join()
    return verdict(
        len(tasks) >= 4 and modes == ["2"] and caps == {"1"}, f"{len(tasks)} threads, modes {modes}"
    )


def supervise_calls(facts: Facts) -> Verdict:
    """Install a filter with a listener, and answer system calls oneself."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    def listen() -> str:
        allow_all = ctypes.create_string_buffer(bytes.fromhex("060000000000ff7f"), 8)
        return syscall(facts, "seccomp", 1, 8, ctypes.byref(Program(1, ctypes.addressof(allow_all))))

    answer = in_child(listen)
    return verdict(answer == "EPERM", answer)


def run_from_memory(facts: Facts) -> Verdict:
    """Execute a program from a memory file, and find it less confined."""
    descriptor = os.memfd_create("program")
    with open("/bin/sh", "rb") as file:
        os.write(descriptor, file.read())
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write_end, 1)
        script = 'while read -r l; do echo "$l"; done < /proc/self/status'
        os.execve(descriptor, ["sh", "-c", script], {})
    os.close(write_end)
    with open(read_end) as file:
        status = {name: value.strip() for name, _, value in (line.partition(":") for line in file)}
    os.waitpid(pid, 0)
    seen = {name: status.get(name, "?") for name in ("Seccomp", "NoNewPrivs", "CapBnd")}
    return verdict(seen == {"Seccomp": "2", "NoNewPrivs": "1", "CapBnd": "0" * 16}, seen)


def open_sockets(facts: Facts) -> Verdict:
    """Open a socket of every family but the local one, also with high bits set."""
    tries = {
        name: syscall(facts, "socket", number, 3 if name == "NETLINK" else 1, 0)
        for name, number in FAMILIES.items()
    }
    tries |= {
        f"{name} datagram": syscall(facts, "socket", FAMILIES[name], 2, 0)
        for name in ("INET", "VSOCK", "NETLINK")
    }
    tries["VSOCK with high bits"] = syscall(facts, "socket", 1 << 32 | 40, 1, 0)
    tries["pair of INET"] = syscall(facts, "socketpair", 2, 1, 0, (ctypes.c_int * 2)())
    return verdict(set(tries.values()) <= {"EAFNOSUPPORT", "EPERM"}, summary(tries))


def change_limits(facts: Facts) -> Verdict:
    """Raise a hard limit, and change one of another process."""
    import resource

    two = ctypes.c_uint64 * 2
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        tries = {"a child's": syscall(facts, "prlimit64", pid, 7, ctypes.byref(two(8, 8)), None)}
        tries["init's"] = syscall(facts, "prlimit64", 1, 7, ctypes.byref(two(8, 8)), None)
        for name in ("NOFILE", "NPROC", "CORE", "MEMLOCK"):
            kind = getattr(resource, f"RLIMIT_{name}")
            tries[f"raise {name}"] = syscall(
                facts, "prlimit64", 0, kind, ctypes.byref(two(1 << 30, 1 << 30)), None
            )
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return verdict(set(tries.values()) == {"EPERM"}, summary(tries))


ONE = ("seccomp",)
OFF = ("no-seccomp",)

ROWS = [
    Row(29, set_up_io_uring, ONE, OFF),
    Row(
        30,
        touch_the_machine,
        ("seccomp", "user namespace"),
        OFF,
        host=("settings",),
        limits_of_it="weakened, reboot, kexec, swap and accounting are not tried",
    ),
    Row(31, use_keyrings, ONE, OFF),
    Row(32, inspect_processes, ("seccomp", "non-dumpable init"), OFF),
    Row(33, call_32_bit, ONE, OFF),
    Row(
        34,
        call_x32,
        ONE,
        OFF,
        limits_of_it="on a kernel without x32 the weakened worker is answered ENOSYS instead of ended",
    ),
    Row(35, call_unlisted, ONE, OFF),
    Row(37, type_into_a_terminal, ("seccomp", "no terminal", "Landlock"), ("no-seccomp", "no-landlock")),
    Row(38, find_an_unfiltered_thread, ONE, OFF),
    Row(39, supervise_calls, ONE, OFF),
    Row(
        40,
        run_from_memory,
        ("seccomp", "capabilities", "no_new_privs"),
        OFF,
        limits_of_it="running code from memory is allowed; what it runs under is what counts",
    ),
    Row(41, open_sockets, ONE, OFF),
    Row(44, change_limits, ("seccomp", "user namespace"), OFF),
]
