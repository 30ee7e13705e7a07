"""What a worker must not be able to do: each wall's number and the promise in one line.

The numbers are names that never change, so that a result of years ago can be
compared with today's; a number that is missing was merged into another one.
"""

from __future__ import annotations

CHECKLIST: dict[int, str] = {
    # Identity and privilege
    1: "is an unprivileged user on the host, and never the same one as another live worker",
    2: "holds no capability in any of the five sets",
    3: "gains nothing by executing a set-user-id program",
    4: "has no supplementary group and cannot get one",
    5: "cannot loosen its system call filter, its secure bits or its memory map",
    6: "makes no namespace of any kind by unshare",
    7: "makes no namespace by clone, and clone3 looks absent",
    8: "enters no namespace; all seven of its own are not the host's",
    9: "changes no mount and no root",
    # File system
    10: "creates files in its workspace, /tmp and /dev/shm alone",
    11: "does not see the host's secrets nor the services' keys",
    12: "fills its own file systems at most, in bytes and in files",
    13: "makes no device node and opens no block device",
    14: "has the six harmless devices and no other",
    16: "plants no link that has a collector of its files read or write the host",
    18: "shares neither /tmp nor /dev/shm with another worker",
    19: "mounts nothing, and has no mount by which the host would see it",
    20: "starts inside its root and cannot write what it was started from",
    # /proc, /sys and the kernel's knobs
    21: "opens no kernel setting for writing",
    22: "reads no host-wide file of /proc",
    23: "sees no /sys and no control group file",
    24: "sees its own processes alone, and of its init nothing that init keeps to itself",
    26: "does not read the kernel's log",
    28: "leaves no core file when it crashes",
    # System calls
    29: "sets up no io_uring",
    30: "reaches no call that is about the whole machine",
    31: "uses no kernel keyring",
    32: "inspects no other process, not even its own child",
    33: "is ended when it calls by the 32-bit table",
    34: "is ended when it calls by x32 numbers",
    35: "finds calls that nobody listed absent, so that libraries fall back",
    37: "types into no terminal, by whatever bits the request is spelled",
    38: "is filtered in every thread",
    39: "makes itself no supervisor of system calls",
    40: "runs code from memory under the very same confinement",
    41: "opens sockets of the licensed families alone",
    44: "raises no limit and touches no other process's",
    # Network and IPC
    45: "reaches no port of the host's loopback",
    46: "reaches no abstract socket of the host",
    47: "reaches no socket, pipe or device in the host's file system",
    48: "reaches no metadata address and no resolver",
    49: "gets past the allow-list proxy by no spelling of a name",
    50: "hands a descriptor to nobody, neither its orchestrator nor another worker",
    51: "shares no System V or POSIX IPC with another worker",
    52: "speaks as itself alone",
    # Resources and lifecycle
    53: "is ended at its memory limit, said to be out of memory, and its neighbours are not",
    54: "stops forking at its limit while the host forks on",
    55: "gets its share of CPU; CPU time, wall time and signals are told apart",
    56: "is said to be out of memory also when the address space is what was limited",
    57: "leaves no daemon when it is stopped",
    58: "does not outlive its orchestrator",
    59: "does not end because a thread that had it launched ended",
    60: "is ended also when it is stopped or ignores SIGTERM",
    61: "floods its output to its limit at most",
    62: "inherits no descriptor",
    63: "inherits no environment",
    64: "shares no randomness with a worker from the same zygote",
    65: "does not start when a layer is missing",
    66: "gives a child no more than it has itself",
    67: "exceeds its contract nowhere, also when the controller says yes to everything",
    68: "is dead, with all its family, when the kill switch answers, by a receipt that proves it",
    69: "reads, alters and forges no record, nor floods it",
    70: "signals through the machine's load at a rate that we measured (no promise)",
    # What whoever read the source thought of
    71: "uses up nothing that the host counts as its own, or counts for nobody",
    72: "neither ends nor stops its init",
    73: "changes no file of the host by memory or descriptors that it shares with it",
    74: "wears its node down by nothing that it says to it",
}
