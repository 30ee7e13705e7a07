"""The arenas, the verdicts, and the table of what was found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from . import host
from .arena import Arena, group, running_arena
from .rows import ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .table import Row
    from .tools import Verdict

MIN_TERMINAL_COLUMNS = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that `make escape` gives."""
    parser.addoption("--escape-table", action="store_true", help="print what each wall answered")


@dataclass
class Findings:
    """What was found so far, whole and weakened, by the row's name."""

    whole: dict[str, Verdict] = field(default_factory=dict)
    weakened: dict[str, Verdict] = field(default_factory=dict)
    host_changed: dict[str, list[str]] = field(default_factory=dict)
    degraded: dict[str, str] = field(default_factory=dict)


FINDINGS = Findings()


class Trials:
    """Runs rows, those that can go together in one worker, and remembers what they said."""

    def __init__(self, whole: Arena, weakened: Arena) -> None:
        self.whole, self.weakened = whole, weakened
        layers = whole.stack.orchestrator.GetNode(_get_node()).layers
        self.missing = {layer.name for layer in layers if not layer.enforced}

    def verdict(self, row: Row, *, weakened: bool) -> Verdict:
        """Return the verdict of *row*, which is run once."""
        found = FINDINGS.weakened if weakened else FINDINGS.whole
        if row.name not in found:
            arena = self.weakened if weakened or row.faults else self.whole
            try:
                if row.where == "outside":
                    words = row.weakened_by if weakened else row.faults
                    found[row.name] = self._watched([row], lambda: {row.name: row.attack(arena, words)})[
                        row.name
                    ]
                else:
                    found |= self._inside(row, arena, weakened=weakened)
            finally:
                arena.clear()
        return found[row.name]

    def unweakened(self) -> dict[str, Verdict]:
        """Return what the rows that run inside say in the weak arena when nothing is taken away."""
        found: dict[str, Verdict] = {}
        try:
            for (words, *_), rows in group(ROWS, weakened=False).items():
                if words:
                    continue  # it would be asked of another sandbox than a whole one
                found |= self._together(rows, (), self.weakened, weakened=False)
        finally:
            self.weakened.clear()
        return found

    def _inside(self, row: Row, arena: Arena, *, weakened: bool) -> dict[str, Verdict]:
        groups = group(ROWS, weakened=weakened)
        key, rows = next((key, rows) for key, rows in groups.items() if row in rows)
        return self._together(rows, key[0], arena, weakened=weakened)

    def _together(
        self, rows: list[Row], words: tuple[str, ...], arena: Arena, *, weakened: bool
    ) -> dict[str, Verdict]:
        """Run rows that one worker, or one pair, can try in one go."""
        row = rows[0]

        def run() -> dict[str, Verdict]:
            first: dict[str, Verdict] = {}
            more = {"weakened": weakened}
            if row.first is not None:
                sister = arena.launch(words, **row.resources)
                first = arena.attack(sister, {one.name: one.first for one in rows if one.first}, more)
            worker = arena.launch(words, **row.resources)
            if not first:
                return arena.attack(worker, {one.name: one.attack for one in rows}, more)
            return {
                one.name: arena.attack(worker, {one.name: one.attack}, {**more, "first": first[one.name]})[
                    one.name
                ]
                for one in rows
            }

        return self._watched(rows, run)

    @staticmethod
    def _watched(rows: list[Row], run: Any) -> dict[str, Verdict]:
        """Run, and note which of the host's facts changed meanwhile."""
        names = {name for row in rows for name in row.host} | {"mounts", "settings"}
        before = host.look(names)
        verdicts: dict[str, Verdict] = run()
        changed = host.changed(before, host.look(names))
        for row in rows:
            FINDINGS.host_changed.setdefault(row.name, []).extend(changed)
        return verdicts


def _get_node() -> Any:
    from hayflick.v1 import orchestrator_pb2

    return orchestrator_pb2.GetNodeRequest()


@pytest.fixture(scope="session")
def trials() -> Iterator[Trials]:
    """Both arenas."""
    with running_arena(weak=False) as whole, running_arena(weak=True) as weakened:
        yield Trials(whole, weakened)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    if not config.getoption("--escape-table", default=False) or not FINDINGS.whole:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"walls, as {'root' if os.geteuid() == 0 else 'an ordinary user'}")
    for row in sorted(ROWS, key=lambda row: row.name):
        found = FINDINGS.whole.get(row.name)
        if row.name in FINDINGS.degraded:
            write(f"{row.number:3} degraded  {row.intent}  ({FINDINGS.degraded[row.name]})")
            continue
        if found is None:
            continue
        state = "measured" if row.informational else "held" if found.get("held") else "HOLE"
        write(f"{row.number:3} {state:9} {row.intent}")
        write(f"      refused by   {', '.join(row.refused_by) or '-'}")
        write(f"      seen         {found.get('seen', found.get('error'))}")
        hole = FINDINGS.weakened.get(row.name)
        if hole is not None:
            write(f"      weakened     {' '.join(row.weakened_by)}: {hole.get('seen', hole.get('error'))}")
        changed = FINDINGS.host_changed.get(row.name)
        write(f"      host         {f'CHANGED: {changed}' if changed else 'unchanged'}")
        if row.limits_of_it:
            write(f"      note         {row.limits_of_it}")
