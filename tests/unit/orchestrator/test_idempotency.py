"""A request that is repeated does nothing more."""

from __future__ import annotations

import asyncio

import pytest

from hayflick.v1.orchestrator_pb2 import StopWorkerRequest, StopWorkerResponse
from hayflick.v1.resources_pb2 import Worker
from hayflick_orchestrator.idempotency import Once
from hayflick_rpc.errors import HayflickError, invalid_field

REQUEST = StopWorkerRequest(request_id="r1", worker_id="w")


class Counter:
    """Work that counts how often it is done."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = asyncio.Event()

    async def work(self) -> StopWorkerResponse:
        self.count += 1
        await self.gate.wait()
        return StopWorkerResponse(worker=Worker(worker_id=str(self.count)))


async def test_same_request_same_answer() -> None:
    """A repeated request gets the first answer, during the work and after it."""
    once, counter = Once(), Counter()
    calls = [asyncio.create_task(once.run("Stop", "r1", REQUEST, counter.work)) for _ in range(3)]
    counter.gate.set()
    answers = [await call for call in calls] + [await once.run("Stop", "r1", REQUEST, counter.work)]
    assert counter.count == 1
    assert {answer.worker.worker_id for answer in answers} == {"1"}


async def test_other_contents_are_refused() -> None:
    """A request_id never stands for two different requests."""
    once, counter = Once(), Counter()
    counter.gate.set()
    await once.run("Stop", "r1", REQUEST, counter.work)
    with pytest.raises(HayflickError) as caught:
        await once.run("Stop", "r1", StopWorkerRequest(request_id="r1", worker_id="x"), counter.work)
    assert caught.value.reason_name == "REQUEST_ID_REUSED"


async def test_hanging_up_leaves_nothing_half_done() -> None:
    """The work goes on without its caller, and who repeats the request gets its answer."""
    once, counter = Once(), Counter()
    call = asyncio.create_task(once.run("Stop", "r1", REQUEST, counter.work))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    counter.gate.set()
    assert (await once.run("Stop", "r1", REQUEST, counter.work)).worker.worker_id == "1"


async def test_refusals_are_not_remembered() -> None:
    """What was refused may be tried again by the same id."""
    once, counter = Once(), Counter()
    counter.gate.set()

    async def refuse() -> StopWorkerResponse:
        raise invalid_field("worker_id", "no")

    with pytest.raises(HayflickError):
        await once.run("Stop", "r1", REQUEST, refuse)
    assert (await once.run("Stop", "r1", REQUEST, counter.work)).worker.worker_id == "1"


async def test_memory_is_bounded() -> None:
    """Old answers make room for new ones."""
    once, counter = Once(max_answers=2), Counter()
    counter.gate.set()
    for number in range(5):
        await once.run("Stop", f"r{number}", REQUEST, counter.work)
    assert len(once._known) <= 2


async def test_large_answers_are_forgotten_first() -> None:
    """Answers together hold no more bytes than they may, and the newest is always known."""
    once = Once(max_answer_bytes=1_000)

    async def work() -> StopWorkerResponse:
        return StopWorkerResponse(worker=Worker(worker_id="x" * 400))

    for number in range(5):
        await once.run("Stop", f"r{number}", REQUEST, work)
    assert [request for _, request in once._known] == ["r3", "r4"]


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a b", "ä"])
async def test_bad_ids(request_id: str) -> None:
    """A request without a proper id does nothing."""
    counter = Counter()
    with pytest.raises(HayflickError):
        await Once().run("Stop", request_id, REQUEST, counter.work)
    assert counter.count == 0
