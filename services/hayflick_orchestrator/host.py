"""The sandboxes of this node and what they stand on: zygote, control groups, host user ids.

Everything that makes, kills, freezes or clears away processes goes through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_orchestrator import kernel_facts
from hayflick_orchestrator.sandboxes import Sandbox, SandboxError
from hayflick_rpc.errors import HayflickError
from hayflick_sandbox.bounds import HeldByKernel
from hayflick_sandbox.identities import IdentitiesExhausted, UidRange
from hayflick_sandbox.outside import Sight, observe
from hayflick_sandbox.zygote_client import Exited, LaunchFailed, Started, Zygote, ZygoteDied

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from hayflick_orchestrator.attestation import Attestor
    from hayflick_orchestrator.narrowing import KernelFacts
    from hayflick_orchestrator.tripwires import Tripwires
    from hayflick_orchestrator.ways_out import WaysOut
    from hayflick_sandbox.bounds import Bounds
    from hayflick_sandbox.cgroups import Tree, Usage
    from hayflick_sandbox.messages import Finding
    from hayflick_sandbox.policy import Limits, Policy
    from hayflick_sandbox.probe import Layer

# How long the zygote may take to answer one request; it answers in milliseconds.
ZYGOTE_ANSWER_SECONDS = 10.0
# How long a cgroup may stay busy after its last process was reaped.
REMOVE_SECONDS = 5.0
FREEZE_SECONDS = 5.0
POLL_SECONDS = 0.005

log = logging.getLogger(__name__)


class Host:
    """Makes and clears away sandboxes."""

    def __init__(
        self,
        zygote: Zygote,
        tree: Tree,
        uids: UidRange,
        *,
        attestor: Attestor,
        missing: Sequence[Layer],
        tripwires: Tripwires,
        launches_at_once: int,
        on_zygote_death: Callable[[], None],
    ) -> None:
        self._zygote = zygote
        self._tree = tree
        self._uids = uids
        self._attestor = attestor
        self._missing = tuple(missing)
        self._tripwires = tripwires
        self._on_zygote_death = on_zygote_death
        self._sandboxes: dict[str, Sandbox] = {}
        self._gate = asyncio.Semaphore(launches_at_once)
        self._loop = asyncio.get_running_loop()
        self._alive = True
        # A kill must never wait behind the clearing of what died before it.
        self._killer = ThreadPoolExecutor(2, "killer")
        self._sweeper = ThreadPoolExecutor(1, "sweeper")
        self._loop.add_reader(zygote.socket, self._readable)

    @property
    def alive(self) -> bool:
        """Whether the zygote still serves."""
        return self._alive

    @property
    def tree(self) -> Tree:
        """This node's control groups, to look at."""
        return self._tree

    @property
    def sandboxes(self) -> tuple[Sandbox, ...]:
        """Those whose processes live, or may."""
        return tuple(self._sandboxes.values())

    def _readable(self) -> None:
        try:
            while (said := self._zygote.receive()) is not None:
                self._take(said)
        except ZygoteDied:
            self._loop.remove_reader(self._zygote.socket)
            self._alive = False
            # Death signals end those that had set theirs; one forked just now had not.
            with contextlib.suppress(OSError):
                self._tree.kill("")
            for sandbox in self.sandboxes:
                self._kill_one(sandbox)
                # One that was never forked never will be; the others' pidfds tell.
                if not sandbox.forked.done():
                    sandbox.stillborn("zygote", 0, "the zygote died")
            self._on_zygote_death()

    def _take(self, said: Started | LaunchFailed | Exited) -> None:
        sandbox = self._sandboxes.get(said.launch_id)
        if sandbox is None:
            # Given up for dead already. What begins now must not run, watched by nobody.
            if isinstance(said, Started):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(said.pidfd, signal.SIGKILL)
                os.close(said.pidfd)
            return
        match said:
            case Started(_, pid, pidfd):
                sandbox.born(pid, pidfd)
                if sandbox.doomed:
                    # It was killed before it existed; make that true.
                    self._kill_one(sandbox)
            case LaunchFailed(_, step, errno_, message):
                sandbox.stillborn(step, errno_, message)
            case Exited(_, _, exit_code, signal_, cpu_seconds, max_rss_bytes, lapsed):
                sandbox.exited(exit_code, signal_, cpu_seconds, max_rss_bytes, lapsed)

    def require_enforceable(self) -> None:
        """Return when this machine can hold a sandbox to all that it promises.

        Raises:
            HayflickError: LIMIT_NOT_ENFORCEABLE, naming the first layer that is
                missing and that nobody let go by name.
        """
        for layer in self._missing:
            raise HayflickError(
                ErrorReason.ERROR_REASON_LIMIT_NOT_ENFORCEABLE,
                f"this node cannot enforce {layer.name}: {layer.detail}",
                metadata={"layer": layer.name, "remedy": layer.remedy},
            )

    async def launch(
        self,
        cgroup_path: str,
        policy: Policy,
        *,
        bounds: Bounds | None = None,
        ready_timeout_seconds: float,
        still_wanted: Callable[[], None] = lambda: None,
        approve: Callable[[tuple[Finding, ...]], None] | None = None,
        way_out: WaysOut | None = None,
    ) -> Sandbox:
        """Build a sandbox and return it when its init is ready and it was found to hold.

        On failure nothing of it is left: no process, no control group, no uid.

        Args:
            cgroup_path: Where its processes will be.
            policy: Its confinement.
            bounds: What the kernel holds its contract and its family to; ``None`` for what is no worker.
            ready_timeout_seconds: How long building it may take.
            still_wanted: Asked just before anything is made; raises when not.
            approve: Judges what was found of the sandbox, inside and outside, and
                raises when it must not run; by default, that it holds the least grade.
            way_out: For a policy with the outside network: what connects it, once it was found to hold.

        Raises:
            HayflickError: LIMIT_NOT_ENFORCEABLE; NODE_FULL without a free host user id;
                HELD_BY_KERNEL when the contract's control group is full; SANDBOX_FAILED, naming
                the step, when it could not be built; ISOLATION_INSUFFICIENT, naming the
                check, when it does not hold; whatever *approve* raises.
        """
        async with self._gate:
            self.require_enforceable()
            still_wanted()
            try:
                uid = self._uids.lease()
            except IdentitiesExhausted as error:
                raise HayflickError(
                    ErrorReason.ERROR_REASON_NODE_FULL, str(error), metadata={"limit": "host_uids"}
                ) from error
            sandbox: Sandbox | None = None
            try:
                await self._make_place(cgroup_path, policy.limits, bounds)
                launch_id = secrets.token_hex(8)
                outside = None if way_out is None else way_out.outside()
                channel = self._zygote.launch(launch_id, policy, cgroup_path, uid, outside=outside)
                sandbox = Sandbox(launch_id, cgroup_path, uid, channel)
                self._sandboxes[launch_id] = sandbox
                async with asyncio.timeout(ready_timeout_seconds):
                    await sandbox.ready
                    # Init may be heard before the zygote: who is looked at must be known.
                    await asyncio.shield(sandbox.forked)
                findings = self._examine(sandbox, policy.limits)
                (approve or self._attestor.require)(findings)
                self._tripwires.watch(sandbox)
                if way_out is not None:
                    await way_out.connect(sandbox)
            except BaseException as error:
                # Also when cancelled: what was begun is undone before we leave.
                await _finish(self._abandon(sandbox, cgroup_path, uid))
                if isinstance(error, TimeoutError):
                    error = SandboxError("ready", 0, f"not ready within {ready_timeout_seconds} s")
                if isinstance(error, HeldByKernel):
                    raise _held(error) from error
                if isinstance(error, SandboxError | ZygoteDied | OSError | ValueError):
                    raise _failed(error) from error
                raise
            return sandbox

    async def _make_place(self, cgroup_path: str, limits: Limits, bounds: Bounds | None) -> None:
        """Make the control groups of a sandbox, once what the dead of its contract left is out of the way.

        Raises:
            HeldByKernel: the contract's control group is full of the living.
            OSError: the kernel refused.
        """
        contract = cgroup_path.partition("/")[0]
        deadline = self._loop.time() + REMOVE_SECONDS
        while True:
            try:
                self._tree.add(cgroup_path, limits, bounds)
            except HeldByKernel:
                # A kill answers before it cleared up, so a slot can be free before its place is.
                leaving = any(
                    one.dead.done() and _within(one.cgroup_path, contract) for one in self._sandboxes.values()
                )
                if not leaving or self._loop.time() > deadline:
                    raise
                await asyncio.sleep(POLL_SECONDS)
            else:
                return

    def _examine(self, sandbox: Sandbox, limits: Limits) -> tuple[Finding, ...]:
        """Return what was found of *sandbox* from inside, and what is seen of it from here."""
        listener = sandbox.descriptors.get("tripwire")
        sight = Sight(self._tree, sandbox.cgroup_path, sandbox.pid or 0, sandbox.uid, limits, listener)
        return (*sandbox.findings, *observe(sight))

    async def _abandon(self, sandbox: Sandbox | None, cgroup_path: str, uid: int) -> None:
        if sandbox is None:
            await self._remove(cgroup_path)
            self._uids.release(uid)
            return
        sandbox.doomed = True
        # Never called dead before it is seen dead: whoever waits for this birth
        # to settle, a kill switch for one, is told that it is not.
        while not sandbox.dead.done():
            self._kill_one(sandbox)
            await asyncio.wait({sandbox.dead}, timeout=ZYGOTE_ANSWER_SECONDS)
            if not sandbox.dead.done():
                log.warning("%r was killed and is not seen dead yet", sandbox)
        await self.clear(sandbox)

    async def undo(self, sandbox: Sandbox) -> None:
        """Kill *sandbox*, and leave nothing of it."""
        await _finish(self._abandon(sandbox, sandbox.cgroup_path, sandbox.uid))

    def _kill_one(self, sandbox: Sandbox) -> None:
        with contextlib.suppress(OSError):
            self._tree.kill(sandbox.cgroup_path)
        if sandbox.pidfd is not None and not sandbox.dead.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(sandbox.pidfd, signal.SIGKILL)

    async def kill(self, cgroup_path: str) -> None:
        """Kill every process at and below *cgroup_path*, and any that is just being made there.

        One write to ``cgroup.kill``, however many they are.
        """
        below = [one for one in self._sandboxes.values() if _within(one.cgroup_path, cgroup_path)]
        for sandbox in below:
            sandbox.doomed = True
        try:
            done = await self._loop.run_in_executor(self._killer, self._tree.kill, cgroup_path)
        except OSError as error:
            log.warning("cgroup.kill of %s failed, killing one by one: %s", cgroup_path, error)
            done = False
        if not done:
            for sandbox in below:
                self._kill_one(sandbox)

    async def freeze(self, cgroup_path: str) -> bool:
        """Freeze everything at and below *cgroup_path*; return whether the kernel confirmed it.

        Raises:
            HayflickError: LIMIT_NOT_ENFORCEABLE where the kernel offers no freezer.
        """
        try:
            self._tree.freeze(cgroup_path)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise HayflickError(
                ErrorReason.ERROR_REASON_LIMIT_NOT_ENFORCEABLE,
                f"this node cannot freeze workers: {error}",
                metadata={"layer": "cgroup-freeze", "remedy": "mount a cgroup2 hierarchy"},
            ) from error
        return await self._until(lambda: self._tree.frozen(cgroup_path), FREEZE_SECONDS)

    def renew_lease(self, seconds: float) -> None:
        """Let every sandbox go on for *seconds*, also when this process does nothing more."""
        with contextlib.suppress(ZygoteDied):  # its socket tells that in a moment
            self._zygote.renew(seconds)

    async def unpopulated(self, cgroup_paths: Iterable[str], deadline_monotonic: float) -> bool:
        """Return whether the kernel says, before the deadline, that no process is left at or below the paths.

        Without a version 2 hierarchy nobody says so, and the answer is no.
        """
        paths = tuple(cgroup_paths)

        def empty() -> bool:
            try:
                return not any(map(self._tree.populated, paths))
            except OSError:
                return False

        while not await self._loop.run_in_executor(self._killer, empty):
            if time.monotonic() > deadline_monotonic:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    def hold(self, cgroup_path: str) -> None:
        """Order a freeze and do not wait for it: a kill comes next."""
        with contextlib.suppress(OSError):
            self._tree.freeze(cgroup_path)

    def thaw(self, cgroup_path: str) -> None:
        """Let everything at and below *cgroup_path* go on, but what is frozen by itself."""
        self._tree.thaw(cgroup_path)

    async def usage(self, sandbox: Sandbox) -> Usage:
        """Return what *sandbox* uses now."""
        return await self._loop.run_in_executor(self._sweeper, self._tree.usage, sandbox.cgroup_path)

    async def usages(self, sandboxes: list[Sandbox]) -> list[tuple[Usage, int]]:
        """Return what each of *sandboxes* uses, and its count of memory kills, in one trip."""
        paths = [sandbox.cgroup_path for sandbox in sandboxes]

        def read() -> list[tuple[Usage, int]]:
            return [(self._tree.usage(path), self._tree.oom_kills(path)) for path in paths]

        return await self._loop.run_in_executor(self._sweeper, read)

    def members(self, cgroup_path: str) -> list[int]:
        """Return the host pids of the processes at *cgroup_path*, descendants' not among them.

        Raises:
            OSError: there is no such place any more.
        """
        return self._tree.members(cgroup_path)

    def oom_kills(self, sandbox: Sandbox) -> int:
        """Return how many processes of *sandbox* the kernel killed for want of memory."""
        try:
            return self._tree.oom_kills(sandbox.cgroup_path)
        except OSError:
            return 0

    def kernel_facts(self, sandbox: Sandbox, policy: Policy) -> KernelFacts:
        """Return what the kernel holds *sandbox*, built from *policy*, to.

        Raises:
            OSError: it is gone.
        """
        if sandbox.pid is None or sandbox.pidfd is None:
            raise ProcessLookupError(errno.ESRCH, "the sandbox has no process")
        return kernel_facts.read(self._tree, sandbox.cgroup_path, sandbox.pid, sandbox.pidfd, policy)

    def memory_reached(self, sandbox: Sandbox) -> tuple[bool, bool]:
        """Return whether *sandbox* ever reached its own memory limit, and its family the budget."""
        try:
            return self._tree.memory_reached(sandbox.cgroup_path)
        except OSError:
            return False, False

    async def clear(self, sandbox: Sandbox) -> None:
        """Remove all that is left of a dead sandbox, and lease its uid to others again.

        A sandbox that is not seen dead keeps its uid: better one lost than two
        workers with the same.
        """
        sandbox.close()
        removed = await self._remove(sandbox.cgroup_path)
        self._tripwires.forget(sandbox)
        self._sandboxes.pop(sandbox.launch_id, None)
        if removed and sandbox.dead.done():
            self._uids.release(sandbox.uid)
        else:
            log.warning("%r could not be cleared; its uid %d is kept", sandbox, sandbox.uid)

    async def _remove(self, cgroup_path: str) -> bool:
        # A cgroup can stay populated for a moment after its last process was
        # reaped, and rmdir then says EBUSY.
        def gone() -> bool:
            try:
                self._tree.remove(cgroup_path)
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                    return False
                raise
            return True

        deadline = self._loop.time() + REMOVE_SECONDS
        try:
            while not await self._loop.run_in_executor(self._sweeper, gone):
                if self._loop.time() > deadline:
                    log.warning("control group %s is still busy", cgroup_path)
                    return False
                await asyncio.sleep(POLL_SECONDS)
        except OSError as error:
            log.warning("control group %s cannot be removed: %s", cgroup_path, error)
            return False
        return True

    def forget_contract(self, contract_id: str) -> None:
        """Remove a contract's own control group when nobody is in it."""
        if any(_within(one.cgroup_path, contract_id) for one in self._sandboxes.values()):
            return
        with contextlib.suppress(OSError):
            # Not in the sweeper: no launch can come between, it makes its
            # groups on this thread.
            self._tree.remove(contract_id)

    async def _until(self, condition: Callable[[], bool], limit_seconds: float) -> bool:
        deadline = self._loop.time() + limit_seconds
        while not condition():
            if self._loop.time() > deadline:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    async def close(self) -> None:
        """End the zygote and with it every sandbox; remove the node's control groups."""
        if self._alive:
            self._loop.remove_reader(self._zygote.socket)
        await self._loop.run_in_executor(self._killer, self._close_zygote)
        for sandbox in self.sandboxes:
            sandbox.close()
        self._tripwires.close()
        try:
            await self._until(self._closed_tree, REMOVE_SECONDS)
        finally:
            self._uids.close()
            self._killer.shutdown()
            self._sweeper.shutdown()

    def _close_zygote(self) -> None:
        self._zygote.close()
        self._zygote.wait_closed()

    def _closed_tree(self) -> bool:
        try:
            self._tree.close()
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            log.warning("the node's control groups cannot be removed: %s", error)
        return True


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")


def _held(error: HeldByKernel) -> HayflickError:
    return HayflickError(
        ErrorReason.ERROR_REASON_HELD_BY_KERNEL,
        f"the kernel refused the worker a place: {error}",
        metadata={"limit": error.limit},
    )


def _failed(error: SandboxError | ZygoteDied | OSError | ValueError) -> HayflickError:
    step = error.step if isinstance(error, SandboxError) else "launch"
    number = getattr(error, "errno", None) or 0
    return HayflickError(
        ErrorReason.ERROR_REASON_SANDBOX_FAILED,
        f"the sandbox could not be built: {error}",
        metadata={"step": step, "errno": errno.errorcode.get(number, str(number))},
    )


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """See *work* to its end even if the caller is cancelled meanwhile."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if (error := task.exception()) is not None:
        log.warning("clearing up failed", exc_info=error)
    if cancelled:
        raise asyncio.CancelledError
