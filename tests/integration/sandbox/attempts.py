"""What a worker may try; runs inside a sandbox and prints what became of each attempt, as JSON.

Standard library alone. The first argument is JSON: the numbers of the system
calls, and names that only the host knows.
"""

# A script of attempts, passed as text to an interpreter inside the sandbox.
# ruff: noqa: ANN001, ANN002, ANN201, PTH109, PTH123, PTH207, PTH208

import contextlib
import ctypes
import errno
import glob
import json
import mmap
import os
import platform
import resource
import signal
import socket
import stat
import sys

FACTS = json.loads(sys.argv[1])
NUMBERS = FACTS["numbers"]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
results = {}


def call(name, *arguments):
    """Make a system call; return 0 for success, or the name of the error."""
    ctypes.set_errno(0)
    values = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    outcome = libc.syscall(ctypes.c_long(NUMBERS[name]), *values)
    return 0 if outcome >= 0 else errno.errorcode[ctypes.get_errno()]


def attempt(name, function, *arguments):
    """Note what *function* returned, or the name of the error that it raised."""
    try:
        results[name] = function(*arguments)
    except OSError as error:
        results[name] = errno.errorcode[error.errno or errno.EIO]
    except ValueError:  # what resource.setrlimit makes of EPERM
        results[name] = "EPERM"


def in_child(function):
    """Run *function* in a child; return its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(function() or 0)
        except OSError as error:
            os._exit(error.errno)
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opened(path, flags):
    """Open and close a path; return 0."""
    os.close(os.open(path, flags))
    return 0


# --- namespaces and mounts
for flag in FACTS["namespace_flags"]:
    results[f"unshare {flag:#x}"] = call("unshare", flag)
    results[f"clone {flag:#x}"] = call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
results["clone3"] = call("clone3", 0, 0)
for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
    for pid in ("self", "1"):
        try:
            descriptor = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        except OSError as error:
            results[f"setns {pid} {kind}"] = errno.errorcode[error.errno]
        else:
            results[f"setns {pid} {kind}"] = call("setns", descriptor, 0)
            os.close(descriptor)
for name in FACTS["refused"]:
    if name in NUMBERS:
        results[f"refused {name}"] = call(name, 0, 0, 0, 0, 0, 0)
results["unknown"] = call("unknown", 0)

# --- files
for path in FACTS["hidden"]:
    attempt(f"hidden {path}", opened, path, os.O_RDONLY)
for directory in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/proc", "/etc/ssl", sys.prefix, sys.base_prefix):
    attempt(f"create in {directory}", opened, f"{directory}/planted", os.O_WRONLY | os.O_CREAT)
for path in ("/etc/passwd", "/usr/bin/env", sys.executable, "/proc/self/exe"):
    attempt(f"write {path}", opened, path, os.O_WRONLY)
    attempt(f"touch {path}", os.utime, path)
    attempt(f"chmod {path}", os.chmod, path, 0o777)
for name in os.listdir("/dev"):
    if stat.S_ISCHR(os.lstat(f"/dev/{name}").st_mode):
        attempt(f"touch device {name}", os.utime, f"/dev/{name}")
        attempt(f"chmod device {name}", os.chmod, f"/dev/{name}", 0o600)
for directory in ("/workspace", "/tmp", "/dev/shm"):
    attempt(f"own {directory}", opened, f"{directory}/mine", os.O_WRONLY | os.O_CREAT)
    for kind, device in ((stat.S_IFCHR, os.makedev(1, 1)), (stat.S_IFBLK, FACTS["root_device"])):
        attempt(f"device {kind} in {directory}", os.mknod, f"{directory}/{kind}", 0o666 | kind, device)
with open("/dev/null", "w") as null:
    attempt("null", null.write, "x")
attempt("tty", opened, "/dev/tty", os.O_RDWR)
attempt("chown", os.chown, "/tmp/mine", 0, 0)
results["devices"] = sorted(os.listdir("/dev"))
results["root"] = sorted(os.listdir("/"))
results["proc"] = sorted(name for name in os.listdir("/proc") if not name.isdigit())
results["pids"] = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
results["mine"] = [os.getpid(), os.getppid()]
results["usr nosuid"] = bool(os.statvfs("/usr").f_flag & os.ST_NOSUID)
results["cwd"], results["umask"] = os.getcwd(), os.umask(0o077)

# --- identity
attempt("setuid", os.setuid, 0)
attempt("setgid", os.setgid, 0)
attempt("setgroups", os.setgroups, [0])
results["ids"] = [*os.getresuid(), *os.getresgid(), *os.getgroups()]
for option, name in ((28, "securebits"), (35, "mm")):
    results[f"prctl {name}"] = call("prctl", option, 0, 0, 0, 0)
results["raise ambient"] = libc.prctl(47, 2, 21, 0, 0)
results["bounding"] = [number for number in range(64) if libc.prctl(23, number, 0, 0, 0) == 1]

# --- processes
for name in ("mem", "environ", "maps", "auxv", "syscall", "stack", "io"):
    attempt(f"pid 1 {name}", opened, f"/proc/1/{name}", os.O_RDONLY)
for name in ("root", "cwd", "exe"):
    attempt(f"pid 1 {name}", os.readlink, f"/proc/1/{name}")
for name in ("fd", "map_files"):
    attempt(f"pid 1 {name}", os.listdir, f"/proc/1/{name}")
results["ptrace 1"] = call("ptrace", 16, 1, 0, 0)
results["prlimit 1"] = call("prlimit64", 1, 7, ctypes.byref((ctypes.c_uint64 * 2)(8, 8)), 0)
attempt("raise nofile", resource.setrlimit, resource.RLIMIT_NOFILE, (100_000, 100_000))
attempt("raise core", resource.setrlimit, resource.RLIMIT_CORE, (1 << 20, 1 << 20))
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGSEGV):
    attempt(f"signal 1 {number.name}", os.kill, 1, number)
results["core"] = in_child(os.abort)
results["cores"] = glob.glob("/workspace/core*")

# --- sockets and IPC
families = {}
for family in range(46):
    try:
        socket.socket(family, socket.SOCK_STREAM).close()
        families[family] = 0
    except OSError as error:
        families[family] = errno.errorcode[error.errno]
results["families"] = families
results["vsock by high bits"] = call("socket", 1 << 32 | 40, 1, 0)
for kind, address in (("abstract", "\0" + FACTS["abstract"]), ("path", FACTS["path"])):
    with socket.socket(socket.AF_UNIX) as sock:
        attempt(f"connect {kind}", sock.connect, address)
with socket.socket(socket.AF_UNIX) as sock:
    attempt("own abstract", sock.bind, "\0own")
results["shm of another"] = call("shmget", FACTS["shm_key"], 0, 0)
results["own shm"] = call("shmget", FACTS["shm_key"], 4096, 0o1600)
results["fds"] = sorted(int(name) for name in os.listdir("/proc/self/fd"))
results["canaries"] = [name for name in os.environ if "CANARY" in name]
results["hostname"] = os.uname().nodename

# --- other instruction sets
if platform.machine() == "x86_64":

    def int80():
        """Getpid by the 32-bit gate: mov eax, 20; int 0x80; ret."""
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex("b814000000cd80c3"))
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

    results["int 0x80"] = in_child(int80)
    results["x32"] = in_child(lambda: libc.syscall(ctypes.c_long(0x40000000 | 39)))

# Last, for it may end much: everybody but init and this process itself.
with contextlib.suppress(OSError):
    os.kill(-1, signal.SIGURG)
json.dump(results, sys.stdout)
