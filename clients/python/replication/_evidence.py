"""Evidence of a quarantined worker, as the node captured it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """A bundle of evidence.

    Attributes:
        worker_id: Whom it was asked for.
        data: A gzip-compressed tar archive of JSON documents.
        sha256: Its hash; the ``evidence_captured`` event has the same.
    """

    worker_id: str
    data: bytes = field(repr=False)
    sha256: str

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the bundle shows, and what was left out of it."""
        return next(self._documents())[1]

    @property
    def documents(self) -> Mapping[str, Mapping[str, Any]]:
        """Each document by its name, such as ``workers/<id>/processes.json``.

        What they say of files and output was made by the worker: it is data,
        and no text of it is fit for a terminal as it is.
        """
        return dict(self._documents())

    def _documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with tarfile.open(fileobj=io.BytesIO(self.data), mode="r:gz") as tar:
            for entry in tar:
                file = tar.extractfile(entry)
                if file is not None:
                    yield entry.name, json.loads(file.read())
