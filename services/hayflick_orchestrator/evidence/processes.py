"""What the processes of a sandbox look like from outside, by /proc.

Each is read through one descriptor of its directory, which stays with that
process: should it end and its number go to another, reading fails (ESRCH), and
never tells of the other. Environments are not read: they may hold secrets.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hayflick_orchestrator.evidence.budget import Budget

TEXT_BYTES = 16 * 1024
COMMAND_BYTES = 4 * 1024

Json = dict[str, Any]


def processes(pids: Iterable[int], budget: Budget) -> list[Json]:
    """Return what can be seen of each of *pids*; of one that is gone, that it is."""
    found: list[Json] = []
    for pid in pids:
        if len(found) >= budget.caps.processes_per_worker or not budget.timely:
            budget.omit("processes")
            continue
        try:
            directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            found.append({"pid": pid, "unreadable": _name(error)})
            continue
        try:
            found.append({"pid": pid, **_process(directory, budget)})
        finally:
            os.close(directory)
    return found


def _process(directory: int, budget: Budget) -> Json:
    refused: dict[str, str] = {}

    def attempt(name: str, read: Callable[[], Any]) -> Any:  # noqa: ANN401 -- whatever *read* gives
        try:
            return read()
        except OSError as error:
            # Rootless: who made itself unreadable to its own user stays so.
            refused[name] = _name(error)
            return None

    status = attempt("status", lambda: _status(_text(directory, "status")))
    found: Json = {
        "status": status,
        "stat": attempt("stat", lambda: stat_fields(_text(directory, "stat"))),
        "cmdline": attempt("cmdline", lambda: _arguments(directory)),
        "exe": attempt("exe", lambda: os.readlink("exe", dir_fd=directory)),
        "cwd": attempt("cwd", lambda: os.readlink("cwd", dir_fd=directory)),
        "wchan": attempt("wchan", lambda: _text(directory, "wchan")),
        "cgroup": attempt("cgroup", lambda: _text(directory, "cgroup").splitlines()),
        "namespaces": attempt("namespaces", lambda: _links(directory, "ns", 32)[0]),
        "descriptors": attempt("descriptors", lambda: _descriptors(directory, budget)),
        "maps": attempt("maps", lambda: _maps(directory, budget)),
    }
    if refused:
        found["unreadable_parts"] = refused
        budget.omit("unreadable_process_parts", len(refused))
    return found


def _status(text: str) -> Json:
    """Return the fields of proc_pid_status(5), in the kernel's own names."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip().replace("\t", " ") for name, _, value in pairs}


def stat_fields(text: str) -> Json:
    """Return what is of use here of proc_pid_stat(5)."""
    comm, _, rest = text.partition("(")[2].rpartition(")")
    # The first of these is the third of the line: state.
    fields = rest.split()
    return {
        "comm": comm,
        "state": fields[0],
        "ppid": int(fields[1]),
        "utime_ticks": int(fields[11]),
        "stime_ticks": int(fields[12]),
        "num_threads": int(fields[17]),
        "starttime_ticks": int(fields[19]),
    }


def _arguments(directory: int) -> list[str]:
    words = _read(directory, "cmdline", COMMAND_BYTES).rstrip(b"\0").split(b"\0")
    return [os.fsdecode(word) for word in words]


def _links(directory: int, name: str, limit: int) -> tuple[dict[str, str], int]:
    """Return the links in the directory *name*, at most *limit*, and how many more there are."""
    links: dict[str, str] = {}
    more = 0
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(inner) as entries:
            for entry in entries:
                if len(links) >= limit:
                    more += 1
                    continue
                try:
                    links[entry.name] = os.readlink(entry.name, dir_fd=inner)
                except OSError as error:
                    links[entry.name] = f"unreadable: {_name(error)}"
    finally:
        os.close(inner)
    return links, more


def _descriptors(directory: int, budget: Budget) -> list[Json]:
    links, more = _links(directory, "fd", budget.caps.descriptors_per_process)
    budget.omit("descriptors", more)
    found: list[Json] = []
    for number, target in sorted(links.items(), key=lambda link: int(link[0])):
        one: Json = {"fd": int(number), "target": target}
        try:
            info = _status(_text(directory, f"fdinfo/{number}"))
            one |= {"position": info.get("pos", ""), "flags": info.get("flags", "")}
        except OSError as error:
            one["unreadable"] = _name(error)
        found.append(one)
    return found


def _maps(directory: int, budget: Budget) -> list[str]:
    limit = budget.caps.maps_bytes_per_process
    data = _read(directory, "maps", limit + 1)
    if len(data) > limit:
        budget.omit("memory_maps_cut_short")
        data = data[:limit].rpartition(b"\n")[0]
    return os.fsdecode(data).splitlines()


def _text(directory: int, name: str) -> str:
    return os.fsdecode(_read(directory, name, TEXT_BYTES))


def _read(directory: int, name: str, limit: int) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        data = b""
        # A file of /proc gives what fits a page or so at each read.
        while len(data) < limit and (piece := os.read(descriptor, limit - len(data))):
            data += piece
        return data
    finally:
        os.close(descriptor)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "EIO")
