"""The orchestrator's end of the allow-list proxy: started when first needed, told whom to serve."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hayflick.v1.resources_pb2 import NetworkPolicy
    from hayflick_orchestrator.records import Records
    from hayflick_orchestrator.workers import Worker

MAX_PACKET_BYTES = 64 * 1024
PACKETS_AT_ONCE = 64
NARROW_SECONDS = 5.0
END_SECONDS = 3.0

log = logging.getLogger(__name__)


class Egress:
    """Starts the proxy and speaks to it.

    Args:
        records: Where connections go on record.
        lease_uid: Returns a host uid that nobody else has, or ``None`` where an
            ordinary user runs this node.
    """

    def __init__(self, records: Records, lease_uid: Callable[[], int | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._records = records
        self._lease_uid = lease_uid
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._uid: int | None = None
        self._workers: dict[str, Worker] = {}
        self._idle = asyncio.Event()
        self._narrowings: dict[str, asyncio.Future[None]] = {}

    def open(self, worker: Worker, listener: int) -> EgressDoor:
        """Have *listener*, which the init of *worker* opened, served; it is ours from now on."""
        network = worker.record.resources.network
        try:
            if self._control is None:
                self._start()
            self._workers[worker.worker_id] = worker
            self._idle.clear()
            self._say(
                worker.worker_id,
                "open",
                [listener],
                **_terms(network.allowed_hosts, network.egress_limit_bytes),
            )
        except OSError as error:
            # Its door stays shut: what it may not reach is the least that must hold.
            log.warning("worker %s gets no proxy: %s", worker.worker_id, error)
        finally:
            os.close(listener)
        return EgressDoor(self, worker.worker_id)

    def _start(self) -> None:
        if self._uid is None:
            self._uid = self._lease_uid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            # No preexec_fn: this process has threads. It drops its privileges by itself.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "hayflick_orchestrator.egress"),
                    *([] if self._uid is None else [str(self._uid)]),
                ],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"},
                cwd="/",
                start_new_session=True,
            )
        ours.setblocking(False)
        self._control = ours
        self._loop.add_reader(ours, self._readable)

    def _say(self, worker_id: str, order: str, rights: Sequence[int] = (), **terms: object) -> None:
        if self._control is None:
            return  # it is gone, and with it every connection
        packet = json.dumps({"order": order, "worker_id": worker_id, **terms}).encode()
        socket.send_fds(self._control, [packet], list(rights))

    def order(self, worker_id: str, order: str) -> None:
        """Tell the proxy something about one worker."""
        try:
            self._say(worker_id, order)
        except OSError as error:
            # A proxy that does not listen cannot be held to anything.
            log.warning("the proxy takes no order (%s): it is ended", error)
            self._end()

    async def narrow(self, worker_id: str, allowed_hosts: Sequence[str], limit_bytes: int) -> None:
        """Allow a worker this and no more; return once it is in force."""
        future = self._narrowings.setdefault(worker_id, self._loop.create_future())
        try:
            self._say(worker_id, "narrow", **_terms(allowed_hosts, limit_bytes))
            if self._control is not None:
                async with asyncio.timeout(NARROW_SECONDS):
                    await asyncio.shield(future)
        except (OSError, TimeoutError) as error:
            log.warning("the proxy did not narrow a worker (%s): it is ended", error)
            self._end()
        finally:
            self._narrowings.pop(worker_id, None)

    def _readable(self) -> None:
        for _ in range(PACKETS_AT_ONCE):
            try:
                packet = self._control.recv(MAX_PACKET_BYTES) if self._control is not None else b""
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                if self._control is not None:
                    log.error("the proxy died: its workers reach nothing any more")
                    self._end()
                return
            self._take(json.loads(packet))

    def _take(self, said: dict[str, Any]) -> None:
        worker = self._workers.get(said["worker_id"])
        match said["told"]:
            case "egress" if worker is not None:
                self._records.egress(worker.record, said["event"])
            case "narrowed":
                future = self._narrowings.get(said["worker_id"])
                if future is not None and not future.done():
                    future.set_result(None)
            case "closed":
                self._workers.pop(said["worker_id"], None)
                if not self._workers:
                    self._idle.set()

    def _end(self) -> None:
        """Let go of the proxy: it ends with its socket, and so does all that it serves."""
        if self._control is not None:
            self._loop.remove_reader(self._control)
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._workers.clear()
        self._idle.set()
        for future in self._narrowings.values():
            if not future.done():
                future.set_result(None)  # nothing passes now, which is narrower than anything

    async def stop(self) -> None:
        """End the proxy once it told of what it cut."""
        if self._workers:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await self._idle.wait()
        self._end()


class EgressDoor:
    """One worker's door to the proxy."""

    def __init__(self, egress: Egress, worker_id: str) -> None:
        self._egress = egress
        self._worker_id = worker_id

    def hold(self) -> None:
        """Let nothing more through, and lose nothing, until :meth:`release`."""
        self._egress.order(self._worker_id, "hold")

    def release(self) -> None:
        """Let through again."""
        self._egress.order(self._worker_id, "release")

    def close(self) -> None:
        """Shut it for good, and cut whoever is in it. Idempotent."""
        self._egress.order(self._worker_id, "close")

    async def narrow(self, network: NetworkPolicy) -> None:
        """Allow the hosts and bytes of *network* and no more; return once it is in force."""
        await self._egress.narrow(self._worker_id, network.allowed_hosts, network.egress_limit_bytes)


def _terms(allowed_hosts: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    return {"hosts": list(allowed_hosts), "limit_bytes": limit_bytes or None}
