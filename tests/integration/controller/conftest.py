"""A real controller on a real socket, a real logger in a process of its own, and a node that is a peer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import controller_pb2_grpc, logger_pb2, logger_pb2_grpc, resources_pb2
from hayflick_controller.config import Config
from hayflick_controller.controller import Controller
from hayflick_controller.servicer import ControllerServicer
from hayflick_rpc import wire
from hayflick_rpc.channel import OPTIONS, connect
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.interceptors import chain
from hayflick_rpc.status import from_rpc_error

WAIT_SECONDS = 10.0
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

RESOURCES = resources_pb2.Resources(cpu_millis=500, memory_limit_bytes=64 * 1024 * 1024)

_numbers = itertools.count(1)


def request_id() -> str:
    """Return a request_id that no other request of this run has."""
    return f"request-{os.getpid()}-{next(_numbers)}"


class LoggerProcess:
    """``python -m hayflick_logger``, which can be stopped and started again."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix://{directory}/logger.sock"
        self._arguments = ["--listen", self.address, "--data-dir", str(directory / "logger")]
        self._arguments += ["--drain-seconds", "0.1"]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start if need be; return when it listens."""
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hayflick_logger", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        assert "listening" in self._process.stdout.readline()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop its time: it keeps its connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop; return when it is gone."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=WAIT_SECONDS)
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


class Node:
    """A node that runs nothing but answers every order as one that does: honestly, about its own list."""

    def __init__(self, stub: controller_pb2_grpc.ControllerServiceAsyncStub, node_id: str) -> None:
        self.stub = stub
        self.node_id = node_id
        self.workers: set[str] = set()
        self.births: set[str] = set()
        self.frozen: set[str] = set()
        self.orders: list[pb.Order] = []
        self.ordered = asyncio.Condition()
        self.welcome = pb.NodeWelcome()
        self.obedient = True
        self.evaluate: Callable[[pb.EvaluateOrder], pb.OrderResult] = lambda _: pb.OrderResult(value=False)
        self._sequence = 0
        self._writing = asyncio.Lock()
        self.terms: dict[str, pb.ContractTerms] = {}
        self._acks: asyncio.Queue[int] = asyncio.Queue()
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def connect(
        self,
        *,
        python_version: str = PYTHON,
        public_key: bytes = b"",
        worker_ids: Sequence[str] = (),
        birth_worker_ids: Sequence[str] = (),
    ) -> None:
        """Open the stream and wait for the welcome; of the ids given it runs, or launches, them too."""
        self.workers |= set(worker_ids)
        self.births |= set(birth_worker_ids)
        self._call = self.stub.ConnectNode()
        hello = pb.NodeHello(
            node_id=self.node_id,
            worker_ids=sorted(self.workers),
            birth_worker_ids=sorted(self.births),
            python_version=python_version,
            attestation_public_key=public_key,
        )
        await self._call.write(pb.ConnectNodeRequest(hello=hello))
        try:
            first = await self._call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        assert first is not grpc.aio.EOF, await self._call.details()
        self.welcome = first.welcome
        self.workers -= set(self.welcome.stop_worker_ids)
        self._sequence = 0
        self._reader = asyncio.create_task(self._read())

    async def hang_up(self) -> None:
        """End the stream, as a crash would."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    async def register(self, manifest: resources_pb2.Manifest, request: str = "") -> resources_pb2.Worker:
        """Register a manifest and count its worker as run."""
        asked = pb.RegisterWorkerRequest(
            request_id=request or request_id(),
            manifest=manifest,
            node_id=self.node_id,
            session=self.welcome.session,
        )
        response = await ask(self.stub.RegisterWorker(asked))
        worker: resources_pb2.Worker = response.worker
        self.terms[worker.worker_id] = response.terms
        self.workers.add(worker.worker_id)
        return worker

    async def deregister(
        self,
        worker_id: str,
        reason: str = "COMPLETED",
        detail: str = "",
        usage: Any = None,
        request: str = "",
    ) -> resources_pb2.Worker:
        """Report a worker as dead."""
        self.workers.discard(worker_id)
        asked = pb.DeregisterWorkerRequest(
            request_id=request or request_id(),
            worker_id=worker_id,
            node_id=self.node_id,
            session=self.welcome.session,
            exit=resources_pb2.Exit(
                reason=resources_pb2.EndReason.Value(f"END_REASON_{reason}"), detail=detail
            ),
            usage=usage,
        )
        response = await ask(self.stub.DeregisterWorker(asked))
        worker: resources_pb2.Worker = response.worker
        return worker

    async def beat(
        self, state: str = "RUNNING", usage: Any = None, workers: Any = None, attested: Any = None
    ) -> None:
        """Beat for every worker, with what was *attested* of some, and wait for the acknowledgement."""
        self._sequence += 1
        beats = [
            pb.WorkerBeat(
                worker_id=worker_id,
                state=resources_pb2.State.Value(f"STATE_{state}"),
                usage=usage,
                attestation=(attested or {}).get(worker_id),
            )
            for worker_id in (sorted(self.workers) if workers is None else workers)
        ]
        await self.send(pb.ConnectNodeRequest(beat=pb.NodeBeat(sequence=self._sequence, workers=beats)))
        async with asyncio.timeout(WAIT_SECONDS):
            assert await self._acks.get() == self._sequence

    async def send(self, message: pb.ConnectNodeRequest) -> None:
        """Say something on the stream, which takes one message at a time."""
        async with self._writing:
            await self._call.write(message)

    async def wait_closed(self) -> None:
        """Wait until the controller ended the stream."""
        assert self._reader is not None
        async with asyncio.timeout(WAIT_SECONDS):
            await self._reader

    async def wait_order(self, kind: str, count: int = 1) -> list[pb.Order]:
        """Wait until *count* orders of a kind have come; return them."""

        def found() -> list[pb.Order]:
            return [order for order in self.orders if order.WhichOneof("order") == kind]

        async with self.ordered, asyncio.timeout(WAIT_SECONDS):
            await self.ordered.wait_for(lambda: len(found()) >= count)
            return found()

    async def _read(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.CancelledError):
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.WhichOneof("message") == "ack":
                    self._acks.put_nowait(message.ack.sequence)
                    continue
                async with self.ordered:
                    self.orders.append(message.order)
                    self.ordered.notify_all()
                if self.obedient:
                    await self.answer(message.order)

    async def answer(self, order: pb.Order, ends: Sequence[pb.WorkerEnd] = ()) -> None:
        """Carry an order out and say what came of it."""
        result = self.carry_out(order)
        result.ends.extend(ends)
        result.order_id = order.order_id
        await self.send(pb.ConnectNodeRequest(result=result))

    def carry_out(self, order: pb.Order) -> pb.OrderResult:
        """Do what an order says."""
        match order.WhichOneof("order"):
            case "kill":
                scope = order.kill.scope
                dead = set(order.kill.worker_ids)
                if scope.everything:
                    dead |= self.workers
                self.workers -= dead
                return pb.OrderResult(worker_ids=sorted(dead))
            case "freeze":
                self.frozen |= self.workers
                return pb.OrderResult(worker_ids=sorted(self.workers))
            case "thaw":
                thawed, self.frozen = self.frozen, set()
                return pb.OrderResult(worker_ids=sorted(thawed))
            case _:
                return self.evaluate(order.evaluate)


class Bench:
    """A controller that serves, a client of it, and what a test needs to talk to both."""

    def __init__(self, directory: Path, logger: LoggerProcess, **settings: Any) -> None:
        self.directory = directory
        self.logger = logger
        self.settings = settings
        self.address = f"unix://{directory}/controller.sock"
        self.nodes: list[Node] = []
        self.now_us: Callable[[], int] | None = None

    async def start(self) -> None:
        """Start the controller, on what an earlier start left."""
        config = Config(
            listen=self.address,
            data_dir=self.directory / "controller",
            logger=self.logger.address,
            **self.settings,
        )
        clock = {} if self.now_us is None else {"clock": self.now_us}
        self.controller = await Controller.start(config, **clock)
        self.server = grpc.aio.server(interceptors=chain(), options=OPTIONS)
        controller_pb2_grpc.add_ControllerServiceServicer_to_server(
            ControllerServicer(self.controller), self.server
        )
        self.server.add_insecure_port(self.address)
        await self.server.start()
        self.use(connect(self.address))
        self.logger_channel = connect(self.logger.address)
        self.records: Any = logger_pb2_grpc.LoggerServiceStub(self.logger_channel)

    def use(self, channel: grpc.aio.Channel) -> None:
        """Talk to the controller at the other end of *channel*."""
        self.channel = channel
        self.stub: Any = controller_pb2_grpc.ControllerServiceStub(channel)

    async def hang_up(self) -> None:
        """End what a client holds."""
        for node in self.nodes:
            await node.hang_up()
        await self.channel.close()

    async def contract_when_ready(self, **fields: Any) -> resources_pb2.Contract:
        """Create a contract as soon as the controller has found its logger."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                try:
                    return await self.contract(**fields)
                except HayflickError as error:
                    if error.reason_name != "AUDIT_UNAVAILABLE":
                        raise

    async def wait_audit(self) -> None:
        """Wait until the logger answers the controller."""
        async with asyncio.timeout(WAIT_SECONDS):
            await self.controller.wait_ready()

    async def wait_audit_down(self) -> None:
        """Wait until the controller knows that the logger is away."""
        async with asyncio.timeout(WAIT_SECONDS):
            while self.controller.audit_up:  # noqa: ASYNC110 -- each turn of the loop may bring the news
                await asyncio.sleep(0)

    async def recorded(self, contract_id: str, decision: str) -> bool:
        """Wait until the logger has a decision about a contract; say so."""
        filter_ = logger_pb2.EventFilter(contract_id=contract_id, events=["audit"])
        call = self.records.TailEvents(logger_pb2.TailEventsRequest(filter=filter_, start_index=0))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                async for response in call:
                    if response.event.event.details["decision"] == decision:
                        return True
        finally:
            call.cancel()
        return False

    async def ask(self, call: Any) -> Any:
        """Await a call; raise its error as a program sees it."""
        return await ask(call)

    async def stop(self) -> None:
        """Stop the controller as SIGTERM does."""
        for node in self.nodes:
            await node.hang_up()
        await self.controller.drain()
        await self.channel.close()
        await self.logger_channel.close()
        await self.server.stop(1.0)
        await self.controller.close()

    async def node(self, node_id: str = "", **hello: Any) -> Node:
        """Connect a node."""
        node = Node(self.stub, node_id or f"node-{next(_numbers)}")
        self.nodes.append(node)
        await node.connect(**hello)
        return node

    async def contract(self, **fields: Any) -> resources_pb2.Contract:
        """Create a contract; lengths of time are given in seconds."""
        for name in ("cooldown", "expiration", "manifest_ttl"):
            if name in fields:
                fields[name] = wire.duration(fields[name])
        policy = {"max_depth": 3, "max_replicas": 10, "cooldown": wire.duration(0), **fields}
        request = pb.CreateContractRequest(
            request_id=request_id(), contract=resources_pb2.Contract(**policy), secret="my-secret-key"
        )
        response = await ask(self.stub.CreateContract(request))
        contract: resources_pb2.Contract = response.contract
        return contract

    async def issue(self, contract_id: str, parent_id: str = "", **fields: Any) -> resources_pb2.Manifest:
        """Ask for a manifest."""
        if not parent_id:
            fields.setdefault("resources", RESOURCES)
        fields.setdefault("request_id", request_id())
        request = pb.IssueManifestRequest(contract_id=contract_id, parent_id=parent_id, **fields)
        response = await ask(self.stub.IssueManifest(request))
        manifest: resources_pb2.Manifest = response.manifest
        return manifest

    async def born(self, node: Node, contract_id: str, parent_id: str = "") -> resources_pb2.Worker:
        """Issue and register."""
        return await node.register(await self.issue(contract_id, parent_id))

    async def worker(self, worker_id: str) -> resources_pb2.Worker:
        """Read a worker."""
        response = await ask(self.stub.GetWorker(pb.GetWorkerRequest(worker_id=worker_id)))
        worker: resources_pb2.Worker = response.worker
        return worker

    async def events(self, **filters: Any) -> list[logger_pb2.Event]:
        """Read events from the logger."""
        request = logger_pb2.ListEventsRequest(filter=logger_pb2.EventFilter(**filters), page_size=1_000)
        response = await self.records.ListEvents(request)
        return [recorded.event for recorded in response.events]

    async def decisions(self, contract_id: str) -> list[str]:
        """Read the decisions that were recorded about a contract, in order."""
        found = await self.events(contract_id=contract_id, events=["audit"])
        return [event.details["decision"] for event in found]

    async def ended(self, worker_id: str) -> resources_pb2.Worker:
        """Wait until a worker is recorded as ended."""
        call = self.stub.WatchWorkers(pb.WatchWorkersRequest())
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                worker = await self.worker(worker_id)
                if worker.state == resources_pb2.STATE_ENDED:
                    return worker
                async for change in call:
                    worker = change.worker
                    if worker.worker_id == worker_id and worker.state == resources_pb2.STATE_ENDED:
                        return worker
        finally:
            call.cancel()
        raise AssertionError("the watch ended")


async def ask(call: Any) -> Any:
    """Await a call; raise its error as a program sees it."""
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


async def denied(call: Any) -> HayflickError:
    """Await something that must be refused; return the refusal."""
    with pytest.raises(HayflickError) as caught:
        await call
    return caught.value


@pytest.fixture(scope="module")
def logger() -> Iterator[LoggerProcess]:
    """A logger that runs for the whole module."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        process = LoggerProcess(Path(directory))
        process.start()
        yield process
        process.stop()


@pytest.fixture
async def bench(logger: LoggerProcess) -> AsyncIterator[Bench]:
    """A controller that serves, with an audit log that answers."""
    async with open_bench(logger) as made:
        yield made


@contextlib.asynccontextmanager
async def open_bench(logger: LoggerProcess, **settings: Any) -> AsyncIterator[Bench]:
    """Start a bench with other settings than usual; stop it in any case."""
    with tempfile.TemporaryDirectory(prefix="hf-") as directory:
        bench = Bench(Path(directory), logger, **settings)
        await bench.start()
        try:
            await bench.wait_audit()
            yield bench
        finally:
            await bench.stop()


@pytest.fixture(name="open_bench")
def open_bench_fixture(logger: LoggerProcess) -> Callable[..., Any]:
    """The maker of benches with settings of their own."""
    return lambda **settings: open_bench(logger, **settings)


@pytest.fixture(name="denied")
def denied_fixture() -> Callable[[Any], Any]:
    """Awaits what must be refused."""
    return denied


@pytest.fixture(name="ask")
def ask_fixture() -> Callable[[Any], Any]:
    """Awaits a call, its errors as a program sees them."""
    return ask


@pytest.fixture(name="request_id")
def request_id_fixture() -> Callable[[], str]:
    """Names requests."""
    return request_id


@pytest.fixture(scope="session", name="logger_process")
def logger_process_fixture() -> type[LoggerProcess]:
    """The maker of loggers that can be stopped."""
    return LoggerProcess


@pytest.fixture(scope="session", name="bench_class")
def bench_class_fixture() -> type[Bench]:
    """Clients of a controller that runs elsewhere."""
    return Bench
