"""What attacks have in common. Travels into the sandbox by value: standard library alone."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Facts = dict[str, Any]
Verdict = dict[str, Any]

REFUSED = ("EPERM", "ENOSYS", "EACCES")


def verdict(held: bool, seen: object) -> Verdict:
    """Return what an attack found: whether the wall held, and what the kernel said."""
    return {"held": bool(held), "seen": seen if isinstance(seen, str) else repr(seen)}


def syscall(facts: Facts, name: str | int, *arguments: Any) -> str:
    """Make a system call; return "ok", or the name of the error."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = name if isinstance(name, int) else facts["numbers"][name]
    values = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    ctypes.set_errno(0)
    outcome = libc.syscall(ctypes.c_long(number), *values)
    return "ok" if outcome >= 0 else errno.errorcode[ctypes.get_errno()]


def attempt(function: Callable[..., Any], *arguments: Any) -> str:
    """Call; return "ok", or the name of the error."""
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


def opened(path: str, flags: int) -> str:
    """Open and close; return "ok", or the name of the error. Writes nothing."""
    try:
        os.close(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def in_child(function: Callable[[], object]) -> str:
    """Run in a child; return "ok", the name of the error it raised, or the signal that ended it."""
    import signal

    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            answer = function()
            status = 0 if answer in (None, "ok") else getattr(errno, str(answer), 254)
        except OSError as error:
            status = error.errno or 253
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code < 0:
        return signal.Signals(-code).name
    return "ok" if code == 0 else errno.errorcode.get(code, f"exit {code}")


def status_of(pid: int | str = "self") -> dict[str, str]:
    """Return the fields of a process's status."""
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def summary(answers: dict[str, str]) -> str:
    """Return what was answered, each error with what met it."""
    kinds: dict[str, list[str]] = {}
    for name, answer in answers.items():
        kinds.setdefault(answer, []).append(name)
    return "; ".join(f"{answer}: {_few(names)}" for answer, names in sorted(kinds.items()))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed) if len(listed) <= 4 else f"{', '.join(listed[:3])} and {len(listed) - 3} more"
