"""The controller's unary calls, as the orchestrator needs them."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from hayflick.v1 import controller_pb2, controller_pb2_grpc
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_rpc import wire
from hayflick_rpc.clock import boot_seconds
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.status import from_rpc_error

if TYPE_CHECKING:
    from hayflick.v1.resources_pb2 import Exit, Manifest, Usage, Worker

# Stop conditions may run predicates, each with its own time limit.
REGISTER_TIMEOUT_SECONDS = 60.0
CALL_TIMEOUT_SECONDS = 15.0
SESSION_TIMEOUT_SECONDS = 5.0
REGISTER_ATTEMPTS = 3
DEREGISTRATIONS_AT_ONCE = 128
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 2.0

# The call may or may not have been carried out; repeating it by the same
# request_id finds out.
_UNCERTAIN = frozenset({ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE, ErrorReason.ERROR_REASON_SHUTTING_DOWN})
# The same, or the controller's own fault, which may come after it decided.
_UNHEARD = _UNCERTAIN | {ErrorReason.ERROR_REASON_INTERNAL}
_ASK_AGAIN = _UNCERTAIN | {ErrorReason.ERROR_REASON_NODE_SESSION_INVALID}
# What may be said of one attempt alone: of what became of those before it says nothing.
_OF_THIS_ATTEMPT = frozenset(
    {ErrorReason.ERROR_REASON_NODE_SESSION_INVALID, ErrorReason.ERROR_REASON_AUDIT_UNAVAILABLE}
)
# There is nothing left to give back: the controller ended the worker itself
# meanwhile, or took an earlier report of its end.
_TAKEN = frozenset(
    {
        ErrorReason.ERROR_REASON_WORKER_UNKNOWN,
        ErrorReason.ERROR_REASON_WORKER_NOT_RUNNING,
        ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
    }
)

log = logging.getLogger(__name__)


class Session:
    """The secret that the controller gave this node in its last welcome."""

    def __init__(self) -> None:
        self._secret = ""
        self._open = asyncio.Event()

    def opened(self, secret: str) -> None:
        """Take the secret of a new stream."""
        self._secret = secret
        self._open.set()

    def lost(self) -> None:
        """Note that the stream ended."""
        self._open.clear()

    async def secret(self, timeout_seconds: float = SESSION_TIMEOUT_SECONDS) -> str:
        """Return the live secret, waiting for one if need be.

        Raises:
            HayflickError: SERVICE_UNAVAILABLE when the controller is not there.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._open.wait()
        except TimeoutError:
            raise HayflickError(
                ErrorReason.ERROR_REASON_SERVICE_UNAVAILABLE,
                "the node has no connection to its controller",
                metadata={"service": "controller"},
                retry_after_seconds=1.0,
            ) from None
        return self._secret


@dataclass(slots=True)
class Registration:
    """One request to commit a birth, which may have to be made several times.

    Attributes:
        unsure: Whether it may have been committed, for all that was heard.
        terms: What the worker must be held to; set by the controller's answer.
        asked_boot: Since when it may have been committed, by the clock of this boot.
        expire_boot: When the worker's life is over by the same clock; ``None`` without
            an end. Set by the controller's answer.
    """

    manifest: Manifest
    degraded_layers: tuple[str, ...]
    request_id: str = field(default_factory=lambda: f"register-{secrets.token_hex(16)}")
    unsure: bool = False
    terms: controller_pb2.ContractTerms = field(default_factory=controller_pb2.ContractTerms)
    asked_boot: float = 0.0
    expire_boot: float | None = None

    def committed(self, answer: controller_pb2.RegisterWorkerResponse) -> None:
        """Take the controller's answer.

        A life is measured by the controller's two stamps and counted from when the
        birth was first asked for: no worker outlives it, whatever wall clocks say.
        """
        self.terms = answer.terms
        if answer.worker.HasField("expire_time"):
            life = wire.instant(answer.worker.expire_time) - wire.instant(answer.worker.create_time)
            self.expire_boot = self.asked_boot + life.total_seconds()


class ControllerClient:
    """Asks the controller for births and tells it of ends."""

    def __init__(self, channel: grpc.aio.Channel, node_id: str, session: Session) -> None:
        self._stub: controller_pb2_grpc.ControllerServiceAsyncStub = (
            controller_pb2_grpc.ControllerServiceStub(channel)
        )
        self._node_id = node_id
        self._session = session
        self._gate = asyncio.Semaphore(DEREGISTRATIONS_AT_ONCE)

    async def issue(self, request: controller_pb2.IssueManifestRequest) -> Manifest:
        """Return a manifest for the birth that *request* asks for.

        Raises:
            HayflickError: as the controller decided.
        """
        try:
            answer = await self._stub.IssueManifest(request, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return answer.manifest

    async def register(self, registration: Registration) -> Worker:
        """Commit the birth that the manifest of *registration* allows.

        Raises:
            HayflickError: as the controller decided. When *registration* is
                ``unsure`` then, it may have been committed all the same.
        """
        for attempt in range(1, REGISTER_ATTEMPTS + 1):
            try:
                return await self._register(registration)
            except HayflickError as refusal:
                if refusal.reason not in _ASK_AGAIN or attempt == REGISTER_ATTEMPTS:
                    raise
                await asyncio.sleep(_backoff(attempt))
        raise AssertionError("the last attempt raises")

    async def settle(self, registration: Registration) -> Worker | None:
        """Ask until it is certain what became of *registration*; return the worker that it committed.

        Until the controller has said so, nothing that the manifest says is
        believed: it may name somebody else's worker.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._register(registration)
            except HayflickError as refusal:
                if refusal.reason not in _ASK_AGAIN | _OF_THIS_ATTEMPT:
                    return None
                await asyncio.sleep(_backoff(attempt))

    async def _register(self, registration: Registration) -> Worker:
        request = controller_pb2.RegisterWorkerRequest(
            request_id=registration.request_id,
            manifest=registration.manifest,
            node_id=self._node_id,
            session=await self._session.secret(),
            degraded_layers=registration.degraded_layers,
        )
        before, registration.unsure = registration.unsure, True
        if not before:
            registration.asked_boot = boot_seconds()
        try:
            answer = await self._stub.RegisterWorker(request, timeout=REGISTER_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            refusal = from_rpc_error(error)
            if refusal.reason in _OF_THIS_ATTEMPT:
                registration.unsure = before
            else:
                registration.unsure = refusal.reason in _UNHEARD
            raise refusal from error
        registration.committed(answer)
        return answer.worker

    async def deregister(self, worker_id: str, exit_: Exit, usage: Usage | None) -> None:
        """Give back the slot of a worker that is seen dead; try until the controller took it."""
        attempt = 0
        while True:
            attempt += 1
            try:
                async with self._gate:
                    await self._deregister(worker_id, exit_, usage)
            except HayflickError as refusal:
                if refusal.reason in _TAKEN:
                    log.info("worker %s needs no deregistration: %s", worker_id, refusal.reason_name)
                    return
                if attempt == 1:
                    log.warning("worker %s cannot be deregistered yet: %r", worker_id, refusal)
                await asyncio.sleep(_backoff(attempt))
            else:
                return

    async def _deregister(self, worker_id: str, exit_: Exit, usage: Usage | None) -> None:
        request = controller_pb2.DeregisterWorkerRequest(
            request_id=f"end-{worker_id}"[:64],
            worker_id=worker_id,
            node_id=self._node_id,
            session=await self._session.secret(),
            exit=exit_,
            usage=usage,
        )
        try:
            await self._stub.DeregisterWorker(request, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def _backoff(attempt: int) -> float:
    # Jitter, so that a thousand workers of one node do not ask in step.
    longest = min(MAX_BACKOFF_SECONDS, MIN_BACKOFF_SECONDS * 2.0 ** min(attempt, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 -- no secret
