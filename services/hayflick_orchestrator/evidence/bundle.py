"""A bundle of evidence: JSON documents in a gzip-compressed tar archive; no I/O.

The same documents make the same bytes, so a bundle's hash in the audit log
speaks of what is in it and of nothing else.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FORMAT = 1
SUMMARY = "bundle.json"
# Before compression. A full capture of 32 workers has a few MiB.
MAX_DOCUMENTS_BYTES = 64 * 1024 * 1024
# Level 6 of zlib packs such text at tens of MiB a second.
_LEVEL = 6

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle.

    Attributes:
        data: The archive.
        sha256: Of the archive, in hexadecimal.
        summary: Its first document.
    """

    data: bytes
    sha256: str
    summary: Json


def pack(
    summary: Mapping[str, Any],
    documents: Iterable[tuple[str, Json]],
    *,
    max_bytes: int = MAX_DOCUMENTS_BYTES,
) -> Bundle:
    """Return a bundle of *documents*, each under its name, after a summary of them.

    Args:
        summary: What the bundle is about. The names of documents that had no
            room are added to it, as ``documents_left_out``.
        documents: In the order of their worth: who comes late may find no room.
        max_bytes: What they may have in all, before compression.
    """
    kept: list[tuple[str, bytes]] = []
    left_out: list[str] = []
    room = max_bytes
    for name, document in documents:
        encoded = encode(document)
        if len(encoded) > room:
            left_out.append(name)
            continue
        room -= len(encoded)
        kept.append((name, encoded))
    head: Json = {"format": FORMAT, **summary, "documents_left_out": left_out}
    archive = io.BytesIO()
    # No name and no time in either header.
    with (
        gzip.GzipFile(fileobj=archive, mode="wb", compresslevel=_LEVEL, filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, encoded in ((SUMMARY, encode(head)), *kept):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(encoded), 0o600
            tar.addfile(entry, io.BytesIO(encoded))
    data = archive.getvalue()
    return Bundle(data, hashlib.sha256(data).hexdigest(), head)


def encode(document: Mapping[str, Any]) -> bytes:
    r"""Return *document* as JSON in ASCII, keys in order.

    A byte of a name that is not UTF-8 appears as the escape of a lone surrogate
    (``\udc80`` to ``\udcff``, PEP 383), so no name is lost or changed.
    """
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True).encode("ascii") + b"\n"
