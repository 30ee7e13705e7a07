"""Attacks by way of /proc, /sys and the kernel's knobs."""

from __future__ import annotations

import os

from ..table import Row
from ..tools import Facts, Verdict, attempt, opened, summary, syscall, verdict

# Read only, and only as far as one byte; sysrq-trigger is never even opened for reading.
HOST_WIDE = (
    *(
        "cmdline",
        "config.gz",
        "cpuinfo",
        "interrupts",
        "iomem",
        "kallsyms",
        "kcore",
        "key-users",
        "keys",
        "kmsg",
    ),
    *(
        "kpagecount",
        "loadavg",
        "meminfo",
        "modules",
        "partitions",
        "sched_debug",
        "slabinfo",
        "stat",
        "swaps",
    ),
    *("sysvipc/shm", "timer_list", "uptime", "version", "vmallocinfo", "vmstat", "pressure/cpu", "diskstats"),
)


def write_settings(facts: Facts) -> Verdict:
    """Open every kernel setting for writing, core_pattern first; write nothing."""
    tries = {"kernel/core_pattern": opened("/proc/sys/kernel/core_pattern", os.O_WRONLY)}
    for directory, _, names in os.walk("/proc/sys"):
        for name in names:
            path = f"{directory}/{name}"
            tries[path] = opened(path, os.O_WRONLY)
    for name in ("oom_score_adj",):
        tries[f"init's {name}"] = opened(f"/proc/1/{name}", os.O_WRONLY)
    writable = [path for path, answer in tries.items() if answer == "ok"]
    held = not writable and tries["kernel/core_pattern"] == "ENOENT"
    return verdict(held, f"{summary(tries)}; writable: {writable[:2] or 'none'}")


def read_host_wide(facts: Facts) -> Verdict:
    """Read what /proc tells about the whole machine."""
    tries = {name: opened(f"/proc/{name}", os.O_RDONLY) for name in HOST_WIDE}
    tries["sysrq-trigger"] = opened("/proc/sysrq-trigger", os.O_WRONLY)
    named = [name for name in os.listdir("/proc") if not name.isdecimal()]
    held = set(tries.values()) == {"ENOENT"} and set(named) <= {"self", "thread-self"}
    return verdict(held, f"{summary(tries)}; beside processes: {len(named)} entries")


def find_sys(facts: Facts) -> Verdict:
    """Find /sys, a control group, or a release agent."""
    tries = {
        path: attempt(os.listdir, path) for path in ("/sys", "/sys/firmware", "/sys/kernel", "/sys/fs/cgroup")
    }
    agents = []
    for directory, _, names in os.walk("/sys"):
        agents += [f"{directory}/{name}" for name in names if name in ("release_agent", "cgroup.procs")]
        if len(agents) > 20:
            break
    writable = [path for path in agents if opened(path, os.O_WRONLY) == "ok"]
    with open("/proc/self/cgroup") as file:
        above = [line.strip() for line in file if not line.strip().endswith(":/")]
    held = set(tries.values()) == {"ENOENT"} and not agents and not above
    return verdict(
        held,
        f"{summary(tries)}; {len(agents)} control files, {len(writable)} writable; paths {above or 'all /'}",
    )


def see_other_processes(facts: Facts) -> Verdict:
    """See a process of somebody else, or what init keeps to itself."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    secret = {
        name: opened(f"/proc/1/{name}", os.O_RDONLY)
        for name in ("environ", "mem", "maps", "auxv", "stack", "syscall")
    }
    secret |= {name: attempt(os.readlink, f"/proc/1/{name}") for name in ("root", "cwd", "exe")}
    secret["fd"] = attempt(os.listdir, "/proc/1/fd")
    held = len(pids) <= 8 and 1 in pids and set(secret.values()) <= {"EACCES", "EPERM"}
    return verdict(held, f"{len(pids)} processes; of init: {summary(secret)}")


def read_kernel_log(facts: Facts) -> Verdict:
    """Read the kernel's log by call, by device and by /proc."""
    tries = {
        "syslog": syscall(facts, "syslog", 10, None, 0),
        "/proc/kmsg": opened("/proc/kmsg", os.O_RDONLY),
        "/dev/kmsg": opened("/dev/kmsg", os.O_RDONLY),
    }
    held = tries == {"syslog": "EPERM", "/proc/kmsg": "ENOENT", "/dev/kmsg": "ENOENT"}
    return verdict(held, summary(tries))


def dump_core(facts: Facts) -> Verdict:
    """Crash, and leave a core file."""
    import resource

    os.makedirs("/workspace/crash", exist_ok=True)
    os.chdir("/workspace/crash")
    pid = os.fork()
    if pid == 0:
        # Without its wall a crash would start the host's handler; then the limit alone must tell.
        script = ":" if facts["weakened"] and facts["cores_are_piped"] else "kill -ABRT $$"
        os.execv("/bin/sh", ["sh", "-c", script])
    status = os.waitpid(pid, 0)[1]
    raised = "ok"
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
    except (OSError, ValueError):
        raised = "EPERM"
    left = os.listdir("/workspace/crash")
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    held = not os.WCOREDUMP(status) and not left and limit == (1, 1) and raised == "EPERM"
    return verdict(
        held,
        f"dumped {os.WCOREDUMP(status)}, files {left or 'none'}, RLIMIT_CORE {limit}, raising it {raised}",
    )


ROWS = [
    Row(
        21,
        write_settings,
        ("/proc without /proc/sys", "capabilities"),
        ("full-proc", "keep-capabilities"),
        host=("settings",),
    ),
    Row(22, read_host_wide, ("/proc with subset=pid",), ("full-proc",), host=("settings",)),
    Row(23, find_sys, ("mounts", "cgroup namespace"), ("show-sys",)),
    Row(24, see_other_processes, ("pid namespace", "non-dumpable init"), ("host-proc",)),
    Row(
        26,
        read_kernel_log,
        ("seccomp", "/proc with subset=pid", "mounts", "user namespace"),
        ("no-seccomp", "full-proc", "loose-dev"),
        hole=r"EACCES: /proc/kmsg;.*ok: .*/dev/kmsg",
        limits_of_it="weakened, /dev/kmsg is a stand-in and /proc/kmsg asks for a right over the host; "
        "with kernel.dmesg_restrict=1 the call fails whatever is weakened",
    ),
    Row(28, dump_core, ("RLIMIT_CORE", "seccomp"), ("dump-cores", "no-seccomp"), host=("cores",)),
]
