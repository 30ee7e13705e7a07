"""What each source sent, and what of it is missing. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hayflick_cli.entries import Entry


@dataclass(slots=True)
class _Gap:
    """Sequences *first* to *last* were left out when *revealed* arrived."""

    first: int
    last: int
    revealed: Entry


@dataclass(slots=True)
class _Source:
    highest: int = 0
    gaps: list[_Gap] = field(default_factory=list)


@dataclass(slots=True)
class Sources:
    """The sequences of every source. A late one closes the gap that it left."""

    _sources: dict[str, _Source] = field(default_factory=dict)

    def take(self, entry: Entry) -> str:
        """Take the next entry; return what is wrong with its sequence, or ""."""
        source = self._sources.setdefault(entry.source, _Source())
        sequence = entry.sequence
        if sequence < 1:
            return f"{entry.source} counts from 1, and not {sequence}"
        if sequence > source.highest:
            if sequence > source.highest + 1:
                source.gaps.append(_Gap(source.highest + 1, sequence - 1, entry))
            source.highest = sequence
            return ""
        for gap in source.gaps:
            if gap.first <= sequence <= gap.last:
                source.gaps.remove(gap)
                source.gaps += [
                    part
                    for part in (
                        _Gap(gap.first, sequence - 1, gap.revealed),
                        _Gap(sequence + 1, gap.last, gap.revealed),
                    )
                    if part.first <= part.last
                ]
                return ""
        return f"event {sequence} of {entry.source} is recorded twice"

    def lost(self) -> Iterator[tuple[Entry, str]]:
        """Yield each gap that nothing closed: the entry that revealed it, and what is missing."""
        for name, source in self._sources.items():
            for gap in source.gaps:
                several = (
                    f"events {gap.first} to {gap.last}" if gap.last > gap.first else f"event {gap.first}"
                )
                yield gap.revealed, f"{several} of {name} missing"
