# ruff: noqa: ARG002, D102, N802 -- gRPC fixes the methods' shape; the proto names and documents them
"""The wire's side of ControllerService: checks, translates, and decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, TypeAlias

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import controller_pb2_grpc
from hayflick_controller import nodes, parse, parse_resources, render
from hayflick_controller.deaths import Report
from hayflick_controller.decisions import Request
from hayflick_controller.registrations import Registration
from hayflick_controller.tripwires import parse_report
from hayflick_controller.wishes import Wish
from hayflick_rpc import wire
from hayflick_rpc.errors import HayflickError, invalid_field

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message

    from hayflick.v1 import resources_pb2
    from hayflick_controller.controller import Controller
    from hayflick_controller.links import Link
    from hayflick_controller.model import State

    Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
    Incoming: TypeAlias = AsyncIterator[pb.ConnectNodeRequest]


class ControllerServicer(controller_pb2_grpc.ControllerServiceServicer):
    """Serves a :class:`~hayflick_controller.controller.Controller`."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def CreateContract(
        self, request: pb.CreateContractRequest, context: Context
    ) -> pb.CreateContractResponse:
        policy = parse.policy(request.contract)
        secret = parse.secret(request.secret)
        return await self._controller.contracts.create(_identify(request), policy, secret)

    async def GetContract(self, request: pb.GetContractRequest, context: Context) -> pb.GetContractResponse:
        contract_id = wire.require_id("contract_id", request.contract_id)
        return pb.GetContractResponse(contract=await self._controller.contracts.get(contract_id))

    async def ListContracts(
        self, request: pb.ListContractsRequest, context: Context
    ) -> pb.ListContractsResponse:
        return await self._controller.contracts.page(request.page_size, request.page_token)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.RotateKeyResponse:
        return await self._controller.keys.rotate(
            _identify(request),
            wire.require_id("contract_id", request.contract_id),
            parse.secret(request.secret),
            parse.required("reason", request.reason),
        )

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        return await self._controller.keys.revoke(
            _identify(request),
            wire.require_id("key_id", request.key_id),
            parse.required("reason", request.reason),
        )

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        contract_id = _optional_id("contract_id", request.contract_id)
        return await self._controller.keys.page(contract_id, request.page_size, request.page_token)

    async def IssueManifest(
        self, request: pb.IssueManifestRequest, context: Context
    ) -> pb.IssueManifestResponse:
        resources = None
        if request.HasField("resources"):
            resources = parse.resources("resources", request.resources)
        elif not request.parent_id:
            raise invalid_field("resources", "is required for a root")
        wish = Wish(
            contract_id=wire.require_id("contract_id", request.contract_id),
            parent_id=_optional_id("parent_id", request.parent_id),
            depth=request.depth if request.HasField("depth") else None,
            state_snapshot_json=parse.snapshot(request.state_snapshot_json),
            resources=resources,
            reason=parse.text("reason", request.reason, parse.MAX_REASON_CHARS),
        )
        return await self._controller.births.issue(_identify(request), wish)

    async def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, context: Context
    ) -> pb.RegisterWorkerResponse:
        if not request.HasField("manifest"):
            raise invalid_field("manifest", "is required")
        if len(request.degraded_layers) > parse.MAX_LAYERS:
            raise invalid_field("degraded_layers", f"must be at most {parse.MAX_LAYERS}")
        try:
            manifest = parse.manifest(request.manifest)
        except parse.MalformedManifest as error:
            raise parse.bad_manifest(error) from None
        registration = Registration(
            manifest=manifest,
            node_id=wire.require_id("node_id", request.node_id),
            session=parse.required("session", request.session),
            degraded_layers=tuple(
                wire.require_id("degraded_layers", layer) for layer in request.degraded_layers
            ),
        )
        return await self._controller.births.register(_identify(request), registration)

    async def DeregisterWorker(
        self, request: pb.DeregisterWorkerRequest, context: Context
    ) -> pb.DeregisterWorkerResponse:
        if not request.HasField("exit"):
            raise invalid_field("exit", "is required")
        report = Report(
            worker_id=wire.require_id("worker_id", request.worker_id),
            node_id=wire.require_id("node_id", request.node_id),
            session=parse.required("session", request.session),
            exit=parse.exit_(request.exit, self._controller.clock()),
            usage=parse.usage("usage", request.usage) if request.HasField("usage") else None,
        )
        return await self._controller.deaths.deregister(_identify(request), report)

    async def ConnectNode(
        self, request_iterator: Incoming, context: Context
    ) -> AsyncIterator[pb.ConnectNodeResponse]:
        controller = self._controller
        welcome = await controller.nodes.connect(await _hello(request_iterator))
        link = welcome.link
        reader = asyncio.create_task(_read(controller, link, request_iterator))
        try:
            yield pb.ConnectNodeResponse(
                welcome=pb.NodeWelcome(
                    session=welcome.session,
                    beat_interval=wire.duration(controller.config.beat_interval_seconds),
                    lease=wire.duration(controller.config.lease_seconds),
                    stop_worker_ids=welcome.stop_worker_ids,
                )
            )
            controller.welcomed()
            async with contextlib.aclosing(link.outgoing()) as outgoing:
                async for message in outgoing:
                    yield message
        finally:
            reader.cancel()
            controller.left(link)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        return self._controller.nodes.page(request.page_size, request.page_token)

    async def GetWorker(self, request: pb.GetWorkerRequest, context: Context) -> pb.GetWorkerResponse:
        worker_id = wire.require_id("worker_id", request.worker_id)
        return pb.GetWorkerResponse(worker=await self._controller.registry.get(worker_id))

    async def ListWorkers(self, request: pb.ListWorkersRequest, context: Context) -> pb.ListWorkersResponse:
        return await self._controller.registry.page(
            _optional_id("contract_id", request.contract_id),
            sorted({_state(number) for number in request.states}),
            request.page_size,
            request.page_token,
        )

    async def WatchWorkers(
        self, request: pb.WatchWorkersRequest, context: Context
    ) -> AsyncIterator[pb.WatchWorkersResponse]:
        contract_id = _optional_id("contract_id", request.contract_id)
        async with contextlib.aclosing(self._controller.registry.watch(contract_id)) as workers:
            async for worker in workers:
                yield pb.WatchWorkersResponse(worker=worker)

    async def GetLineage(self, request: pb.GetLineageRequest, context: Context) -> pb.GetLineageResponse:
        return await self._controller.registry.family(wire.require_id("worker_id", request.worker_id))

    async def QuarantineWorker(
        self, request: pb.QuarantineWorkerRequest, context: Context
    ) -> pb.QuarantineWorkerResponse:
        worker_id = wire.require_id("worker_id", request.worker_id)
        reason = parse.required("reason", request.reason)
        return await self._controller.quarantine.engage(_identify(request), worker_id, reason)

    async def ReleaseQuarantine(
        self, request: pb.ReleaseQuarantineRequest, context: Context
    ) -> pb.ReleaseQuarantineResponse:
        worker_id = wire.require_id("worker_id", request.worker_id)
        reason = parse.required("reason", request.reason)
        return await self._controller.quarantine.release(_identify(request), worker_id, reason)

    async def NarrowNetwork(
        self, request: pb.NarrowNetworkRequest, context: Context
    ) -> pb.NarrowNetworkResponse:
        worker_id = wire.require_id("worker_id", request.worker_id)
        if not request.HasField("network"):
            raise invalid_field("network", "is required; an empty one leaves nothing")
        network = parse_resources.network("network", request.network)
        reason = parse.required("reason", request.reason)
        return await self._controller.narrowing.narrow(_identify(request), worker_id, network, reason)

    async def EngageKillSwitch(
        self, request: pb.EngageKillSwitchRequest, context: Context
    ) -> pb.EngageKillSwitchResponse:
        scope = parse.scope(request.scope)
        reason = parse.required("reason", request.reason)
        timeout_us = parse.DEFAULT_KILL_TIMEOUT_US
        if request.HasField("timeout"):
            timeout_us = parse.length_us("timeout", request.timeout, maximum_us=parse.MAX_KILL_TIMEOUT_US)
        grace_us = 0
        if request.HasField("grace"):
            grace_us = parse.length_us("grace", request.grace, maximum_us=parse.MAX_KILL_TIMEOUT_US)
        return await self._controller.kill_switch.engage(
            _identify(request), scope, reason, timeout_us, grace_us
        )

    async def ReleaseKillSwitch(
        self, request: pb.ReleaseKillSwitchRequest, context: Context
    ) -> pb.ReleaseKillSwitchResponse:
        scope = parse.scope(request.scope)
        reason = parse.required("reason", request.reason)
        return await self._controller.kill_switch.release(_identify(request), scope, reason)

    async def ReapStaleWorkers(
        self, request: pb.ReapStaleWorkersRequest, context: Context
    ) -> pb.ReapStaleWorkersResponse:
        if not request.HasField("timeout"):
            raise invalid_field("timeout", "is required")
        return await self._controller.deaths.reap(
            _identify(request),
            _optional_id("contract_id", request.contract_id),
            parse.length_us("timeout", request.timeout),
        )


def _identify(request: Message) -> Request:
    """Return what makes *request* the same request when it comes again."""
    request_id = wire.require_request_id(request.request_id)  # type: ignore[attr-defined]
    # A node that connected again has another session, and asks for the same. Put back
    # rather than copied: a request may be a megabyte.
    session = getattr(request, "session", "")
    if session:
        request.ClearField("session")
    contents = request.SerializeToString(deterministic=True)
    if session:
        request.session = session  # type: ignore[attr-defined]
    return Request(request_id, request.DESCRIPTOR.name, hashlib.sha256(contents).hexdigest())


def _optional_id(field: str, value: str) -> str:
    return wire.require_id(field, value) if value else ""


def _state(number: resources_pb2.State.ValueType) -> State:
    state = render.state_from_wire(number)
    if state is None:
        raise invalid_field("states", f"{number} is not a state")
    return state


async def _hello(incoming: Incoming) -> nodes.Hello:
    try:
        async with asyncio.timeout(nodes.HELLO_TIMEOUT_SECONDS):
            first = await anext(incoming)
    except (StopAsyncIteration, TimeoutError):
        raise invalid_field("hello", "must be the first message") from None
    if first.WhichOneof("message") != "hello":
        raise invalid_field("hello", "must be the first message")
    return nodes.parse_hello(first.hello)


async def _read(controller: Controller, link: Link, incoming: Incoming) -> None:
    """Take what a node sends until it hangs up; a node that breaks the protocol is cut off."""
    try:
        async for message in incoming:
            match message.WhichOneof("message"):
                case "beat":
                    controller.nodes.beat(link, message.beat)
                case "result":
                    link.result(message.result)
                case "tripped":
                    controller.tripped(link, parse_report(message.tripped))
                case _:
                    raise invalid_field("message", "must be a beat, a result or a report after the hello")
    except HayflickError as error:
        link.close(error)
    finally:
        link.close()
