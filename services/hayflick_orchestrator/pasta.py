"""``python -m hayflick_orchestrator.pasta UID ARGUMENT…``: becomes pasta(1), as little as it can be.

pasta opens /dev/net/tun by its name, which on some systems only root may, and
makes of itself an ordinary user too late to be one for the namespaces it joins.
So root gives it a device of its own, in a mount namespace of its own, becomes
that user, and only then pasta. It dies with the orchestrator.
"""

from __future__ import annotations

import os
import signal
import stat
import sys

import prctl

from hayflick_sandbox import syscalls

TUN = os.makedev(10, 200)  # Documentation/admin-guide/devices.txt


def main() -> None:
    """Become pasta."""
    uid, program, *arguments = sys.argv[1:]
    if uid:
        _give_device()
        number = int(uid)
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
    prctl.set_no_new_privs(1)
    # pasta's later changes of identity stay within what this user owns, and keep it.
    prctl.set_pdeathsig(signal.SIGKILL)
    # pasta takes it for an error that they were ignored, as Python has it.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    os.execv(program, ["pasta", *arguments])  # noqa: S606 -- without a shell is what we want


def _give_device() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tun", "/dev/net", "tmpfs", syscalls.MS_NOSUID, "mode=755,size=4k,nr_inodes=8")
    os.mknod("/dev/net/tun", stat.S_IFCHR | 0o666, TUN)
    os.chmod("/dev/net/tun", 0o666)  # noqa: PTH101, S103 -- the umask took some of it


if __name__ == "__main__":
    main()
