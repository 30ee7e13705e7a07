"""LoggerService on the wire: checks every field, translates, decides nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_logger import proofs
from hayflick_logger.entries import MAX_SEQUENCE
from hayflick_logger.metrics import MetricFilter
from hayflick_logger.planning import OWN_SOURCE
from hayflick_logger.recorder import Batch, Recorder
from hayflick_logger.rows import Filter
from hayflick_logger.tail import Growth, follow
from hayflick_rpc import events, wire
from hayflick_rpc.errors import HayflickError, invalid_field

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hayflick_logger.record import Record

MAX_BATCH_EVENTS = 1_000
MAX_BATCH_METRICS = 1_000
MAX_EVENT_NAMES = 100

Context = grpc.aio.ServicerContext[Any, Any]


class LoggerServicer(logger_pb2_grpc.LoggerServiceServicer):
    """Serves one record."""

    def __init__(self, record: Record, recorder: Recorder, growth: Growth) -> None:
        self._record = record
        self._recorder = recorder
        self._growth = growth
        self._verifying = asyncio.Lock()

    async def Append(  # noqa: N802, D102 -- the proto names and describes it
        self, request_iterator: AsyncIterator[logger_pb2.AppendRequest], context: Context
    ) -> AsyncIterator[logger_pb2.AppendResponse]:
        del context
        async for request in request_iterator:
            sequence = await self._recorder.record(_batch(request))
            yield logger_pb2.AppendResponse(sequence=sequence)

    async def ListEvents(  # noqa: N802, D102
        self, request: logger_pb2.ListEventsRequest, context: Context
    ) -> logger_pb2.ListEventsResponse:
        del context
        wanted = _filter(request.filter)
        limit = wire.page_size(request.page_size)
        mark = wire.fingerprint("events", wanted, request.start_index)
        start_index = _position(request.page_token, mark, request.start_index)
        end_index = self._growth.next_index
        if start_index >= end_index:
            return logger_pb2.ListEventsResponse()
        found, go_on = await asyncio.to_thread(self._record.events, wanted, start_index, end_index, limit)
        token = wire.encode_page_token(mark, go_on) if go_on < end_index else ""
        return logger_pb2.ListEventsResponse(events=found, next_page_token=token)

    async def TailEvents(  # noqa: N802, D102
        self, request: logger_pb2.TailEventsRequest, context: Context
    ) -> AsyncIterator[logger_pb2.TailEventsResponse]:
        wanted = _filter(request.filter)
        start = request.start_index if request.HasField("start_index") else self._growth.next_index
        # Now the caller knows that it will see whatever is recorded next.
        await context.send_initial_metadata(())
        async for entry in follow(self._record, self._growth, wanted, start):
            yield logger_pb2.TailEventsResponse(event=entry)
        raise HayflickError(ErrorReason.ERROR_REASON_SHUTTING_DOWN, "the logger is shutting down")

    async def ListMetrics(  # noqa: N802, D102
        self, request: logger_pb2.ListMetricsRequest, context: Context
    ) -> logger_pb2.ListMetricsResponse:
        del context
        wanted = MetricFilter(
            _optional_id("contract_id", request.contract_id),
            _optional_id("worker_id", request.worker_id),
            events.require_name("name", request.name) if request.name else "",
        )
        limit = wire.page_size(request.page_size)
        mark = wire.fingerprint("metrics", wanted)
        after_id = _position(request.page_token, mark, 0)
        found = await asyncio.to_thread(self._record.metrics, wanted, after_id, limit + 1)
        token = wire.encode_page_token(mark, found[limit - 1][0]) if len(found) > limit else ""
        return logger_pb2.ListMetricsResponse(
            metrics=[sample for _, sample in found[:limit]], next_page_token=token
        )

    async def VerifyJournal(  # noqa: N802, D102
        self, request: logger_pb2.VerifyJournalRequest, context: Context
    ) -> logger_pb2.VerifyJournalResponse:
        del request, context
        async with self._verifying:  # it reads the whole disk; two at once help nobody
            found = await asyncio.to_thread(self._record.verify)
        return logger_pb2.VerifyJournalResponse(
            entry_count=found.checkpoint.size,
            head_hash=found.checkpoint.root,
            intact=found.intact,
            first_bad_index=found.first_bad_index or 0,
        )

    async def GetCheckpoint(  # noqa: N802, D102
        self, request: logger_pb2.GetCheckpointRequest, context: Context
    ) -> logger_pb2.GetCheckpointResponse:
        del request, context
        edge = self._record.journal.edge
        return logger_pb2.GetCheckpointResponse(
            checkpoint=self._record.journal.sign(edge),
            tree_size=edge.size,
            root_hash=edge.root,
            verifier_key=str(self._record.journal.signer.verifier),
        )

    async def GetInclusionProof(  # noqa: N802, D102
        self, request: logger_pb2.GetInclusionProofRequest, context: Context
    ) -> logger_pb2.GetInclusionProofResponse:
        del context
        return await asyncio.to_thread(proofs.inclusion, self._record.journal, request)

    async def GetConsistencyProof(  # noqa: N802, D102
        self, request: logger_pb2.GetConsistencyProofRequest, context: Context
    ) -> logger_pb2.GetConsistencyProofResponse:
        del context
        return await asyncio.to_thread(proofs.consistency, self._record.journal, request)

    async def GetTile(  # noqa: N802, D102
        self, request: logger_pb2.GetTileRequest, context: Context
    ) -> logger_pb2.GetTileResponse:
        del context
        return await asyncio.to_thread(proofs.tile, self._record.journal, request)


def _batch(request: logger_pb2.AppendRequest) -> Batch:
    source = events.require_source(request.source)
    if source == OWN_SOURCE:
        raise invalid_field("source", f"{OWN_SOURCE!r} is the logger's own")
    if len(request.events) > MAX_BATCH_EVENTS:
        raise invalid_field("events", f"must be at most {MAX_BATCH_EVENTS} in a batch")
    if len(request.metrics) > MAX_BATCH_METRICS:
        raise invalid_field("metrics", f"must be at most {MAX_BATCH_METRICS} in a batch")
    pairs: list[tuple[int, bytes]] = []
    last = 0
    for item in request.events:
        if not last < item.sequence <= MAX_SEQUENCE:
            raise invalid_field("events.sequence", f"must ascend, from 1 to {MAX_SEQUENCE}")
        last = item.sequence
        pairs.append((item.sequence, events.to_json(item.event)))
    return Batch(source, pairs, [events.require_metric(sample) for sample in request.metrics])


def _filter(wanted: logger_pb2.EventFilter) -> Filter:
    if len(wanted.events) > MAX_EVENT_NAMES:
        raise invalid_field("filter.events", f"must be at most {MAX_EVENT_NAMES} names")
    return Filter(
        contract_id=_optional_id("filter.contract_id", wanted.contract_id),
        worker_id=_optional_id("filter.worker_id", wanted.worker_id),
        root_id=_optional_id("filter.root_id", wanted.root_id),
        events=tuple(events.require_name("filter.events", name) for name in wanted.events),
        start=(wanted.start_time.seconds, wanted.start_time.nanos) if wanted.HasField("start_time") else None,
        end=(wanted.end_time.seconds, wanted.end_time.nanos) if wanted.HasField("end_time") else None,
    )


def _optional_id(field: str, value: str) -> str:
    return wire.require_id(field, value) if value else ""


def _position(token: str, mark: str, first: int) -> int:
    match wire.decode_page_token(token, mark):
        case None:
            return first
        case (int(position),):
            return position
        case _:
            raise HayflickError(
                ErrorReason.ERROR_REASON_PAGE_TOKEN_INVALID,
                "page_token: start again without one",
                metadata={"field": "page_token"},
            )
