"""How an orchestrator asks its zygote."""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import select
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hayflick_sandbox import messages, seccomp, subordinate
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.identities import UidRange
from hayflick_sandbox.messages import Introduce
from hayflick_sandbox.policy import Policy

START_SECONDS = 30.0
END_SECONDS = 15.0
MAX_PACKET_BYTES = 128 * 1024
COMMAND = (sys.executable, "-I", "-m", "hayflick_sandbox.zygote")
NOBODY = "worker"  # the host name in what the zygote is told
PRELOAD = ("cloudpickle", "replication._inside")


class ZygoteDied(Exception):
    """The zygote is gone, and with it, by the kernel's doing, every sandbox."""


@dataclass(frozen=True, slots=True)
class Started:
    """The sandbox's init exists; on its channel it will say whether it is ready."""

    launch_id: str
    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class LaunchFailed:
    """There is no process: the fork, or what leads to it, failed."""

    launch_id: str
    step: str
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """Init is gone, and every process of its sandbox."""

    launch_id: str
    pid: int
    exit_code: int | None
    signal: int | None
    cpu_seconds: float
    max_rss_bytes: int
    lapsed: bool = False
    """Whether the zygote ended it because the node's lease was over."""


Event = Started | LaunchFailed | Exited


@dataclass(frozen=True, slots=True)
class Outside:
    """Whose the network namespace of a worker with a way out is, and where it does not lead.

    Attributes:
        owner: A host uid, or ``None`` for whoever runs this node.
        unreachable: IPv4 prefixes.
    """

    owner: int | None
    unreachable: tuple[str, ...]


class Zygote:
    """A running zygote.

    Attributes:
        process: Itself.
        socket: Our end of the line to it.
        seccomp_sha256: Of the filters that it installs, in their order, by whether AF_INET is licensed.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, tree: Tree) -> None:
        self.process = process
        self.socket = sock
        self._tree = tree
        # The zygote knows its children by their pids alone.
        self._launch_ids: dict[int, str] = {}
        self.seccomp_sha256: dict[bool, str] = {}

    @classmethod
    def start(
        cls,
        *,
        tree: Tree,
        uids: UidRange | None = None,
        degraded: Sequence[str] = (),
        preload: Sequence[str] = PRELOAD,
        readable: Sequence[str] = (),
    ) -> Zygote:
        """Start a zygote and wait until it is ready. Call this before importing gRPC.

        Args:
            tree: The node's cgroups, which the zygote removes when it ends.
            uids: What workers' uids are leased from. The zygote holds their lock too, as
                workers may live for a moment after whoever asked for them died; and an
                ordinary user's subordinate ids are mapped into its user namespace.
            degraded: Layers that this machine lacks and the operator let go.
            preload: Modules to import before any fork; they cost every worker nothing.
            readable: Further host paths that every worker may read.

        Raises:
            ZygoteDied: it could not prepare; the text says why.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            process = subprocess.Popen(
                COMMAND,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"},
                cwd="/",
                pass_fds=() if uids is None else uids.locks,
                # A terminal's Ctrl-C must reach the orchestrator, which then ends us in order.
                start_new_session=True,
            )
        zygote = cls(process, ours, tree)
        listener = "tripwire" not in degraded
        # Compiled here, so that the compiler is not in the zygote's memory.
        programs = {inet: [seccomp.compile_filter(inet=inet, listener=listener)] for inet in (False, True)}
        zygote.seccomp_sha256 = {
            inet: hashlib.sha256(b"".join(filters)).hexdigest() for inet, filters in programs.items()
        }
        unified = [str(tree.roots[one.root]) for one in tree.hierarchies if one.version == 2]
        setup = {
            "preload": list(preload),
            "readable": list(readable),
            "degraded": list(degraded),
            "unified": unified[0] if unified else None,
            "legacy": [str(tree.roots[one.root]) for one in tree.hierarchies if one.version == 1],
            "filters": [program.hex() for program in programs[False]],
            "inet_filters": [program.hex() for program in programs[True]],
            "first_uid": None if uids is None or uids.grant is None else uids.first,
        }
        try:
            ours.send(json.dumps(setup).encode())
            zygote._await_ready(uids)
        except BaseException:
            zygote.close()
            zygote.wait_closed()
            raise
        ours.setblocking(False)
        return zygote

    def _await_ready(self, uids: UidRange | None) -> None:
        event = self._hear_start()
        if event.get("event") == "map" and uids is not None and uids.grant is not None:
            own = subordinate.Ids(uids.first, uids.count)
            try:
                subordinate.write_maps(self.process.pid, uids.grant, own, uids.gids or own)
            except subordinate.MapFailed as error:
                raise ZygoteDied(f"the zygote could not start: {error}") from None
            self.socket.send(b"mapped")
            event = self._hear_start()
        if event.get("event") != "ready":
            raise ZygoteDied(f"the zygote could not start: {event['message']}")

    def _hear_start(self) -> dict[str, Any]:
        if not readable(self.socket, START_SECONDS):
            raise ZygoteDied(f"the zygote did not start within {START_SECONDS:.0f} s")
        try:
            packet = self.socket.recv(MAX_PACKET_BYTES)
        except ConnectionError:
            packet = b""  # it ended before it read what it was told
        if not packet:
            return {"message": "it ended while starting; see its standard error"}
        event: dict[str, Any] = json.loads(packet)
        return event

    def launch(
        self,
        launch_id: str,
        policy: Policy,
        cgroup_path: str,
        uid: int,
        *,
        beat_seconds: float = 1.0,
        outside: Outside | None = None,
    ) -> socket.socket:
        """Ask for a sandbox; return our end of its init's channel, non-blocking.

        The answer comes as an event, and then on the channel. The cgroups at
        *cgroup_path* must exist, with their limits.

        Raises:
            ZygoteDied: there is nobody to ask.
            BlockingIOError: too many requests wait; read events, then try again.
            OSError: there are no such cgroups.
            ValueError: the request is larger than a packet.
        """
        # The zygote's memory is in every worker's. So what one worker alone may
        # know goes past it, on the channel that only that worker's init reads, and
        # its cgroups, which have its lineage in their names, go as descriptors.
        own = messages.encode(Introduce(policy.hostname, dict(policy.environment)))
        request = {
            "launch_id": launch_id,
            "policy": {**policy.to_json(), "environment": {}, "hostname": NOBODY},
            "uid": uid,
            "beat_seconds": beat_seconds,
        }
        if policy.external:
            if outside is None:
                raise ValueError("external: nobody said whose the network namespace would be")
            request["outside"] = dataclasses.asdict(outside)
        packet = json.dumps(request).encode()
        if len(packet) > MAX_PACKET_BYTES:
            raise ValueError(f"a launch request of {len(packet)} bytes is over {MAX_PACKET_BYTES}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            try:
                ours.send(own)
                with self._tree.leaves(cgroup_path) as leaves:
                    socket.send_fds(self.socket, [packet], [theirs.fileno(), *leaves])
            except ConnectionError:
                ours.close()
                raise ZygoteDied("the zygote is gone") from None
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return ours

    def renew(self, lease_seconds: float) -> None:
        """Let the sandboxes go on for *lease_seconds* from now without another word.

        Until the first time they go on for ever. When the time is over the zygote
        kills them, however this process fares: stopped, it could not.

        Raises:
            ZygoteDied: there is nobody to tell.
        """
        try:
            self.socket.send(json.dumps({"lease_seconds": lease_seconds}).encode())
        except BlockingIOError:
            return  # many requests wait to be read; the next renewal comes in a moment
        except ConnectionError:
            raise ZygoteDied("the zygote is gone") from None

    def receive(self) -> Event | None:
        """Return the next event, or ``None`` when there is none now.

        Raises:
            ZygoteDied: there will be none any more.
        """
        space = socket.CMSG_SPACE(array.array("i").itemsize)
        try:
            packet, ancillary, _, _ = self.socket.recvmsg(MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except ConnectionError:
            packet, ancillary = b"", []
        if not packet:
            raise ZygoteDied("the zygote is gone")
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data)
        fields: dict[str, Any] = json.loads(packet)
        kind = fields.pop("event")
        if kind == "started":
            started = Started(**fields, pidfd=descriptors[0])
            self._launch_ids[started.pid] = started.launch_id
            return started
        if kind == "failed":
            return LaunchFailed(**fields)
        return Exited(self._launch_ids.pop(fields["pid"]), **fields)

    def close(self) -> None:
        """Hang up: the zygote kills every sandbox, removes the cgroups and ends. Idempotent."""
        self.socket.close()

    def wait_closed(self) -> None:
        """Wait until the zygote ended, and end it where it does not.

        Its sandboxes die with it, by their death signal.
        """
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def readable(sock: socket.socket, seconds: float) -> bool:
    """Wait until *sock* has something to read, or hung up; select(2) ends at descriptor 1,023."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1_000))


def kill(pidfd: int) -> None:
    """Kill the sandbox whose init is *pidfd*: the kernel ends its whole pid namespace."""
    import signal  # needed only where there is no cgroup.kill

    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


__all__ = ["Event", "Exited", "LaunchFailed", "Started", "Zygote", "ZygoteDied", "kill"]
