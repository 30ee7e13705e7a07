"""Entries as files that other tools read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hayflick_cli.failure import Failure

BATCH_ENTRIES = 10_000


def jsonl(entries: Iterable[tuple[int, bytes]], output: Path) -> int:
    """Write *entries* one a line, as they are; return how many.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0
    with sys.stdout.buffer if str(output) == "-" else output.open("wb") as file:
        for _, entry in entries:
            file.write(entry + b"\n")
            count += 1
    return count


def parquet(entries: Iterable[tuple[int, bytes]], output: Path) -> int:
    """Write *entries* as a Parquet table, details as JSON text; return how many.

    Raises:
        Failure: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Failure("Parquet needs pyarrow: pip install 'hayflick[parquet]'") from None
    schema = pa.schema(
        [
            ("index", pa.uint64()),
            ("source", pa.string()),
            ("sequence", pa.uint64()),
            ("event", pa.string()),
            ("timestamp", pa.string()),
            ("contract_id", pa.string()),
            ("worker_id", pa.string()),
            ("parent_id", pa.string()),
            ("root_id", pa.string()),
            ("details", pa.string()),
        ]
    )
    count = 0
    with pq.ParquetWriter(output, schema) as writer:
        for batch in _batches(entries):
            writer.write_table(pa.Table.from_pylist([_row(entry) for _, entry in batch], schema))
            count += len(batch)
    return count


def _row(entry: bytes) -> dict[str, Any]:
    fields = json.loads(entry)
    event = fields.pop("event")
    details = json.dumps(event.pop("details", {}), sort_keys=True)
    return {**fields, **event, "details": details}


def _batches(entries: Iterable[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    iterator = iter(entries)
    while batch := list(islice(iterator, BATCH_ENTRIES)):
        yield batch
