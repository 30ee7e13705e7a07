"""Workers with the whole outside network: one pasta(1) each, and where it must not lead.

pasta translates between the worker's network namespace and ordinary sockets of
a user that nobody else is. Nothing is forwarded to the worker. The host's
loopback is never reached, as no address leads there; the host's other
addresses and the link-local ones are fenced off inside the namespace, where the
worker has no power over routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator.sandboxes import SandboxError
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox.outside_network import NEVER, owner_of
from hayflick_sandbox.template import RESOLVER
from hayflick_sandbox.zygote_client import Outside

if TYPE_CHECKING:
    from collections.abc import Callable

    from hayflick.v1.resources_pb2 import NetworkPolicy
    from hayflick_orchestrator.sandboxes import Sandbox

START_SECONDS = 5.0
INTERFACE = "outside"
TUN = Path("/dev/net/tun")

# Nothing is forwarded in or past it; the namespace is configured once, and asks for nothing.
ARGUMENTS = (
    *("--foreground", "--quiet", "--stderr", "--ipv4-only", "--config-net", "--no-map-gw"),
    *("--no-dhcp", "--no-dhcpv6", "--no-ndp", "--no-ra"),
    *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"),
    *("--ns-ifname", INTERFACE, "--dns-forward", RESOLVER),
)

log = logging.getLogger(__name__)


class WaysOut:
    """Connects sandboxes to the world.

    Args:
        lease_uid: Returns a host uid that nobody else has, or ``None`` where an
            ordinary user runs this node.
    """

    def __init__(self, lease_uid: Callable[[], int | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._lease_uid = lease_uid
        self._uid: int | None = None
        self._leased = False
        self._doors: dict[str, WayOut] = {}

    def require(self) -> None:
        """Return when this machine can give a worker the outside network.

        Raises:
            HayflickError: LIMIT_NOT_ENFORCEABLE where this machine has no pasta,
                or lets this user have no tap device.
        """
        if shutil.which("pasta") is None:
            raise _missing("pasta is not installed", "apt-get install passt")
        if not TUN.exists() or (os.geteuid() != 0 and not os.access(TUN, os.R_OK | os.W_OK)):
            raise _missing(f"{TUN} cannot be opened", f"modprobe tun; chmod 0666 {TUN}")

    def outside(self) -> Outside:
        """Return what the zygote must know to make the namespace of a worker with a way out."""
        if not self._leased:
            # One for all of them: it owns the namespaces, and runs what connects them.
            self._uid, self._leased = self._lease_uid(), True
        return Outside(self._uid, (*NEVER, *(f"{address}/32" for address in own_addresses())))

    async def connect(self, sandbox: Sandbox) -> None:
        """Connect *sandbox*, whose init handed over its network; :meth:`of` has its door then.

        Raises:
            SandboxError: pasta did not get ready; its log says why.
        """
        network = sandbox.descriptors.pop("network")
        try:
            ready = self._start(sandbox, network)
        finally:
            os.close(network)
        try:
            await self._ready(ready)
        finally:
            os.close(ready)

    def _start(self, sandbox: Sandbox, network: int) -> int:
        """Start pasta on *network*; return a pipe on which it says that it is ready."""
        owner = owner_of(network)
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        try:
            if self._uid is not None:
                os.fchown(ready_write, self._uid, -1)  # it is opened again, by its name
            # No preexec_fn: this process has threads.
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "hayflick_orchestrator.pasta"),
                    "" if self._uid is None else str(self._uid),
                    shutil.which("pasta") or "pasta",
                    *ARGUMENTS,
                    *("--pid", f"/proc/self/fd/{ready_write}"),
                    *("--userns", f"/proc/self/fd/{owner}", "--netns", f"/proc/self/fd/{network}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                cwd="/",
                pass_fds=(ready_write, owner, network),
                start_new_session=True,
            )
        except BaseException:
            os.close(ready_read)
            raise
        finally:
            os.close(ready_write)
            os.close(owner)
        self._doors[sandbox.launch_id] = WayOut(process)
        sandbox.dead.add_done_callback(lambda _: self._end(sandbox))
        return ready_read

    def of(self, sandbox: Sandbox) -> WayOut | None:
        """Return the door of *sandbox*, if it has one."""
        return self._doors.get(sandbox.launch_id)

    def _end(self, sandbox: Sandbox) -> None:
        self._doors.pop(sandbox.launch_id).close()

    async def _ready(self, descriptor: int) -> None:
        """Wait for pasta's word, its pid, which it writes when all is in place."""
        told: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(descriptor, _resolve, told)
        try:
            async with asyncio.timeout(START_SECONDS):
                await told
        except TimeoutError:
            raise SandboxError("connect", 0, f"pasta was not ready within {START_SECONDS:g} s") from None
        finally:
            self._loop.remove_reader(descriptor)
        if not os.read(descriptor, 64):
            raise SandboxError("connect", 0, "pasta ended; the orchestrator's standard error has its words")


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class WayOut:
    """One worker's way out; it ends with the worker, whoever ends it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def hold(self) -> None:
        """Let nothing more through, and lose nothing, until :meth:`release`."""
        self._signal(signal.SIGSTOP)

    def release(self) -> None:
        """Let through again."""
        self._signal(signal.SIGCONT)

    async def narrow(self, network: NetworkPolicy) -> None:
        """Shut it, unless *network* still gives the worker the outside network."""
        if not network.allow_external:
            self.close()

    def close(self) -> None:
        """Shut it for good, and cut whoever is in it. Idempotent."""
        self._signal(signal.SIGKILL)
        # It is dead the moment it is scheduled; nothing that it could wait for keeps it.
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


def own_addresses(table: str | None = None) -> tuple[str, ...]:
    """Return the IPv4 addresses of this host but its loopback's, from /proc/net/fib_trie."""
    text = Path("/proc/net/fib_trie").read_text(encoding="ascii") if table is None else table
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", text)
    return tuple(dict.fromkeys(address for address in found if not address.startswith("127.")))


def _missing(detail: str, remedy: str) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_LIMIT_NOT_ENFORCEABLE,
        f"resources.network.allow_external: {detail}",
        metadata={"layer": "network", "remedy": remedy, "field": "resources.network.allow_external"},
    )
