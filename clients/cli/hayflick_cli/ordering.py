"""In which order controllers decided what the log holds. Pure.

The log has entries in the order in which they arrived. One controller numbers
its events, and its starts, in the order of its commits. Several on one database
take turns, and each event states the turn that recorded it; docs/controllers.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from hayflick_cli.entries import Entry

_CONTROLLER = re.compile(r"controller/([^/]+)/([0-9]+)")
TURNS = "turns"
"""The name of the database whose controllers take turns; one log serves one such database."""


def boot_of(entry: Entry) -> tuple[str, int] | None:
    """Return which controller, and which of its starts, sent *entry*; ``None`` where it was none."""
    found = _CONTROLLER.fullmatch(entry.source)
    return None if found is None else (found[1], int(found[2]))


def decisions(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return what controllers decided, in order, by the database that they share.

    What shares no database shares no contract and no latch.
    """
    shared = set()
    by_controller: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if (boot := boot_of(entry)) is not None:
            by_controller[boot[0]].append(entry)
            if "turn" in entry.details:
                shared.add(boot[0])
    by_database: defaultdict[str, list[Entry]] = defaultdict(list)
    for controller_id, sent in by_controller.items():
        by_database[TURNS if controller_id in shared else controller_id] += sent
    return {name: sorted(sent, key=_place) for name, sent in by_database.items()}


def _place(entry: Entry) -> tuple[float, int, int]:
    boot = boot_of(entry)
    assert boot is not None
    turn = entry.number("turn") if "turn" in entry.details else 0.0
    return turn, boot[1], entry.sequence
