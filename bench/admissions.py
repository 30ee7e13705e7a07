"""How many admissions of one hot contract a store takes, and a controller with its log on top of it.

An admission is a manifest issued and a worker registered by it. Beside it, on the
same disk and in the same minute: a bare program that updates one row and commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import postgres
import psycopg
from cluster import in_parallel
from report import Report

from hayflick.v1 import controller_pb2, controller_pb2_grpc, resources_pb2
from hayflick_controller import parse
from hayflick_controller.births import Births
from hayflick_controller.decisions import Decisions, Request
from hayflick_controller.model import Contract, Node, Policy, Resources
from hayflick_controller.nodes import digest
from hayflick_controller.registrations import Registration
from hayflick_controller.store import Store
from hayflick_controller.store.sql import postgres_store, sqlite_store
from hayflick_controller.wishes import Wish
from hayflick_rpc.channel import connect

ROUNDS = 3
COMMITS = 200
WIDTHS = (16, 64)
"""How many admissions are under way at once."""
NODE, SESSION, CONTRACT = "bench-node", "bench-session", "bench-contract"
MANIFEST_TTL_US = 600_000_000
BEAT_SECONDS = 1.0
MEMORY_BYTES = 64 * 1024 * 1024

Row = Callable[[str, str, str], None]


class Recorded:
    """Stands in for the outbox: whatever is committed counts as recorded."""

    up = True

    async def durable(self, position: int, timeout_seconds: float) -> None:
        """Return at once."""


def now_us() -> int:
    """Return the time."""
    return time.time_ns() // 1_000


def measure(report: Report, workers: int) -> None:
    """Admit *workers* some times at each store, and through a controller on each."""
    with tempfile.TemporaryDirectory(prefix="hayflick-bench-", dir="/var/tmp") as directory:
        path = Path(directory)
        commits = sqlite_commits(path / "peer.db")
        report.row("peer: one row and COMMIT, sqlite3", f"{commits:,.0f} /s", "synchronous = NORMAL, as ours")
        for width in WIDTHS:
            store = sqlite_store(path / f"store-{width}" / "controller.db")
            asyncio.run(_at_store(report.row, "SQLite", store, workers, width))
            with controller(path / f"sqlite-{width}") as address:
                asyncio.run(_through_grpc(report.row, "SQLite", address, workers, width))
        found = postgres.binaries()
        if found is None:
            report.row("PostgreSQL", "not measured", f"apt-get install {postgres.PACKAGE}")
            return
        with postgres.server(found) as server:
            commits = postgres_commits(server.new_database())
            report.row("peer: one row and COMMIT, psycopg", f"{commits:,.0f} /s", "on the disk, as ours")
            for width in WIDTHS:
                shared = postgres_store(server.new_database(), "bench")
                asyncio.run(_at_store(report.row, "PostgreSQL", shared, workers, width))
                with controller(path / f"postgres-{width}", "--database", server.new_database()) as address:
                    asyncio.run(_through_grpc(report.row, "PostgreSQL", address, workers, width))


def sqlite_commits(path: Path) -> float:
    """Return how often a second a bare program commits one row."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, number INTEGER)")
        connection.execute("INSERT INTO rows VALUES (1, 0)")
        began = time.perf_counter()
        for _ in range(COMMITS):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE rows SET number = number + 1 WHERE id = 1")
            connection.execute("COMMIT")
        return COMMITS / (time.perf_counter() - began)


def postgres_commits(url: str) -> float:
    """Return how often a second a bare program commits one row."""
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE rows (id integer PRIMARY KEY, number integer)")
        connection.execute("INSERT INTO rows VALUES (1, 0)")
        connection.commit()
        began = time.perf_counter()
        for _ in range(COMMITS):
            connection.execute("UPDATE rows SET number = number + 1 WHERE id = 1")
            connection.commit()
        return COMMITS / (time.perf_counter() - began)


async def _at_store(row: Row, name: str, store: Store, workers: int, width: int) -> None:
    """Issue and register as the controller does, in this process, without a log."""
    await store.open(lambda _: None)
    policy = Policy(max_depth=1, max_replicas=ROUNDS * workers, manifest_ttl_us=MANIFEST_TTL_US)
    node = Node(NODE, digest(SESSION), "", "", now_us(), now_us(), controller_id=store.identity.controller_id)
    await store.transact(lambda tx: tx.add_contract(Contract(CONTRACT, policy, "bench-key", 1), b"s" * 32))
    await store.transact(lambda tx: tx.put_node(node), durable=True)
    decisions = Decisions(store, Recorded(), now_us, 1.0)  # type: ignore[arg-type]  # all that is asked of it
    births = Births(decisions, None, now_us)  # type: ignore[arg-type]  # no predicates are asked
    wish = Wish(CONTRACT, "", None, "{}", Resources(1_000, MEMORY_BYTES), "")

    async def admit() -> None:
        issued = await births.issue(_request("IssueManifest"), wish)
        registration = Registration(parse.manifest(issued.manifest), NODE, SESSION, ())
        await births.register(_request("RegisterWorker"), registration)

    gc.collect()
    gc.freeze()  # as the service does
    began_cpu = time.process_time()
    rates = [await in_parallel(workers, width, admit) for _ in range(ROUNDS)]
    cpu_ms = (time.process_time() - began_cpu) / (ROUNDS * workers) * 1_000
    gc.unfreeze()
    contract = await store.transact(lambda tx: tx.contract(CONTRACT))
    assert contract is not None
    assert (contract.active_count, contract.reserved_count) == (ROUNDS * workers, 0)
    await store.close()
    _print(row, f"{name}: at the store, {width} at once", rates, f"{cpu_ms:.2f} ms of CPU here each")


async def _through_grpc(row: Row, name: str, address: str, workers: int, width: int) -> None:
    """Issue and register by RPC; both are durable in the log when they are answered."""
    async with connect(address) as channel:
        stub = controller_pb2_grpc.ControllerServiceStub(channel)
        wanted = resources_pb2.Contract(max_depth=1, max_replicas=ROUNDS * workers, cooldown={"seconds": 0})
        request = controller_pb2.CreateContractRequest(request_id=secrets.token_hex(8), contract=wanted)
        contract_id = (await stub.CreateContract(request)).contract.contract_id
        stream = stub.ConnectNode()
        hello = controller_pb2.NodeHello(node_id=NODE, address="unix:///nowhere", python_version="0.0")
        await stream.write(controller_pb2.ConnectNodeRequest(hello=hello))
        session = (await stream.read()).welcome.session
        beats = asyncio.create_task(_beat(stream))

        async def admit() -> None:
            issue = controller_pb2.IssueManifestRequest(
                request_id=secrets.token_hex(8),
                contract_id=contract_id,
                state_snapshot_json="{}",
                resources=resources_pb2.Resources(cpu_millis=1_000, memory_limit_bytes=MEMORY_BYTES),
            )
            manifest = (await stub.IssueManifest(issue)).manifest
            await stub.RegisterWorker(
                controller_pb2.RegisterWorkerRequest(
                    request_id=secrets.token_hex(8), manifest=manifest, node_id=NODE, session=session
                )
            )

        rates = [await in_parallel(workers, width, admit) for _ in range(ROUNDS)]
        beats.cancel()
        await asyncio.gather(beats, return_exceptions=True)
        stream.cancel()
    _print(row, f"{name}: by gRPC, {width} at once", rates, "and durable in the log")


async def _beat(stream: object) -> None:
    """Keep the node's lease; what is acknowledged is not read."""
    sequence = 0
    while True:
        sequence += 1
        beat = controller_pb2.NodeBeat(sequence=sequence)
        await stream.write(controller_pb2.ConnectNodeRequest(beat=beat))  # type: ignore[attr-defined]
        await asyncio.sleep(BEAT_SECONDS)


@contextlib.contextmanager
def controller(directory: Path, *options: str) -> Iterator[str]:
    """Run a controller and its logger, each a process; yield the controller's address."""
    directory.mkdir(mode=0o700)
    addresses = {name: f"unix://{directory}/{name}.sock" for name in ("logger", "controller")}
    more = {"logger": (), "controller": ("--logger", addresses["logger"], *options)}
    with contextlib.ExitStack() as stack:
        for name, address in addresses.items():
            command = [sys.executable, "-m", f"hayflick_{name}", "--listen", address]
            command += ["--data-dir", str(directory / name), *more[name]]
            process = stack.enter_context(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            process.stdout.readline()  # it listens
        yield addresses["controller"]


def _request(method: str) -> Request:
    return Request(secrets.token_hex(8), method, secrets.token_hex(32))


def _print(row: Row, what: str, rates: list[float], note: str) -> None:
    row(what, f"{statistics.median(rates):,.0f} /s", f"best of {len(rates)} {max(rates):,.0f}; {note}")
