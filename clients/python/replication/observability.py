"""The memory: what was decided and done, and what was used."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeAlias

from google.protobuf.json_format import MessageToDict

from hayflick.v1 import logger_pb2, logger_pb2_grpc
from replication import _embedded, _rpc

__all__ = ["JournalCheck", "Metric", "StructuredLogger"]

PAGE_SIZE = 1_000
VERIFY_SECONDS = 600.0

# The order in which an event is told; the rest follows by name.
_LEAD = ("event", "worker_id", "depth", "reason", "parent_id")
_LEAD_AUDIT = ("event", "decision", "worker_id", "parent_id", "depth", "reason")
_LAST = ("root_id", "contract_id")

_Line: TypeAlias = "tuple[_rpc.Connection, logger_pb2_grpc.LoggerServiceStub]"


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        name: ``memory_bytes``, ``memory_peak_bytes``, ``cpu_seconds``, ``pids``, …
        value: How much.
        timestamp: When, in UTC.
        labels: What it is about: ``worker_id`` and ``contract_id``.
    """

    name: str
    value: float
    timestamp: datetime
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JournalCheck:
    """What a check of the whole record found.

    Attributes:
        intact: Whether every entry follows from the one before it.
        entry_count: How many entries were checked.
        head_hash: The hash of the last entry, in hex.
        first_bad_index: The first entry that does not follow; ``None`` when intact.
    """

    intact: bool
    entry_count: int
    head_hash: str
    first_bad_index: int | None


class StructuredLogger:
    """A view of the record that the logger service keeps.

    It shows the contracts of the controllers that were made with it. With an
    address and no controller it shows everything. Nothing can be written here:
    the services record what they do themselves.

    Args:
        address: The service's ``unix:///…`` target; ``None``: what
            ``HAYFLICK_LOGGER`` says, or the one started for this program.

    Raises:
        ValueError: *address* is not a Unix socket.
    """

    def __init__(self, address: str | None = None) -> None:
        if address is not None:
            _embedded.require_address("address", address)
        self._address = address
        self._lock = threading.Lock()
        self._line: _Line | None = None
        self._views: dict[str, _View] = {}
        self._everything = _View("")

    def __repr__(self) -> str:
        return f"<StructuredLogger contracts={list(self._views)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a StructuredLogger stays outside; what a task does is recorded by itself")

    def follow(self, contract_id: str) -> None:
        """Show the events and metrics of this contract too."""
        with self._lock:
            self._views.setdefault(contract_id, _View(contract_id))

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was recorded until now, in order: ``event``, ``timestamp`` and whatever else each has.

        Only what is new since the last time is fetched.

        Raises:
            ServiceUnavailable: The service is not there.
        """
        with self._lock:
            entries = [entry for view in self._shown() for entry in view.events(self._connect())]
        entries.sort(key=lambda entry: entry[0])
        return [dict(event) for _, event in entries]

    @property
    def metrics(self) -> list[Metric]:
        """What was measured until now, in order.

        Raises:
            ServiceUnavailable: The service is not there.
        """
        with self._lock:
            metrics = [metric for view in self._shown() for metric in view.metrics(self._connect())]
        metrics.sort(key=lambda metric: metric.timestamp)
        return metrics

    def tail(self) -> Iterator[dict[str, Any]]:
        """Yield each event that is recorded from now on, for as long as you ask for the next.

        Raises:
            ServiceUnavailable: The service is not there, or went away.
        """
        with self._lock:
            contracts = {view.contract_id for view in self._shown()}
            connection, stub = self._connect()
        only = next(iter(contracts)) if len(contracts) == 1 else ""
        request = logger_pb2.TailEventsRequest(filter=logger_pb2.EventFilter(contract_id=only))
        with connection.stream(stub.TailEvents, request) as responses:
            for response in responses:
                event = response.event.event
                if "" in contracts or event.contract_id in contracts:
                    yield _event(event)

    def verify(self) -> JournalCheck:
        """Have the service recompute the hash tree over its whole record.

        Raises:
            ServiceUnavailable: The service is not there.
        """
        with self._lock:
            connection, stub = self._connect()
        answer = connection.call(stub.VerifyJournal, logger_pb2.VerifyJournalRequest(), VERIFY_SECONDS)
        return JournalCheck(
            intact=answer.intact,
            entry_count=answer.entry_count,
            head_hash=answer.head_hash.hex(),
            first_bad_index=None if answer.intact else answer.first_bad_index,
        )

    def _shown(self) -> list[_View]:
        if self._views:
            return list(self._views.values())
        # Embedded, other contracts are other controllers' business; at an
        # address that somebody gave, everything is what they asked to see.
        given = self._address is not None or _embedded.is_given("logger")
        return [self._everything] if given else []

    def _connect(self) -> _Line:
        if self._line is None:
            connection = _rpc.connect(_embedded.resolve("logger", self._address))
            self._line = connection, logger_pb2_grpc.LoggerServiceStub(connection.channel)
        return self._line


class _View:
    """One contract's events and metrics, as far as they were fetched; "" for every contract's."""

    def __init__(self, contract_id: str) -> None:
        self.contract_id = contract_id
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._metrics: list[Metric] = []
        self._metrics_token = ""

    def events(self, line: _Line) -> list[tuple[int, dict[str, Any]]]:
        """Fetch what is new; return each event with its place in the record."""
        connection, stub = line
        more = True
        while more:
            request = logger_pb2.ListEventsRequest(
                filter=logger_pb2.EventFilter(contract_id=self.contract_id),
                start_index=self._events[-1][0] + 1 if self._events else 0,
                page_size=PAGE_SIZE,
            )
            answer = connection.call(stub.ListEvents, request)
            self._events += ((recorded.index, _event(recorded.event)) for recorded in answer.events)
            more = bool(answer.next_page_token)
        return self._events

    def metrics(self, line: _Line) -> list[Metric]:
        """Fetch what is new; return all. The last page may have grown, and is fetched again."""
        connection, stub = line
        while True:
            request = logger_pb2.ListMetricsRequest(
                contract_id=self.contract_id, page_size=PAGE_SIZE, page_token=self._metrics_token
            )
            answer = connection.call(stub.ListMetrics, request)
            page = [_metric(sample) for sample in answer.metrics]
            if not answer.next_page_token:
                return self._metrics + page
            self._metrics += page
            self._metrics_token = answer.next_page_token


def _event(event: logger_pb2.Event) -> dict[str, Any]:
    """Return *event* flat, with the fields that are empty left out."""
    details = {name: _number(name, value) for name, value in MessageToDict(event.details).items()}
    fields = details | {
        "event": event.event,
        "worker_id": event.worker_id,
        "parent_id": event.parent_id,
        "root_id": event.root_id,
        "contract_id": event.contract_id,
    }
    lead = _LEAD_AUDIT if event.event == "audit" else _LEAD
    names = [*lead, *sorted(fields.keys() - {*lead, *_LAST}), *_LAST]
    told = {name: fields[name] for name in names if fields.get(name) not in (None, "", [], {})}
    return {**told, "timestamp": event.timestamp.ToDatetime(UTC)}


def _number(name: str, value: Any) -> Any:  # noqa: ANN401 -- any JSON value
    """Return a whole number as an int again; a Struct knows floats alone."""
    if isinstance(value, float) and value.is_integer() and not name.endswith("_seconds"):
        return int(value)
    return value


def _metric(sample: logger_pb2.MetricSample) -> Metric:
    labels = {"worker_id": sample.worker_id, "contract_id": sample.contract_id}
    return Metric(
        name=sample.name,
        value=sample.value,
        timestamp=sample.timestamp.ToDatetime(UTC),
        labels={name: value for name, value in labels.items() if value},
    )
