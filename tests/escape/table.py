"""A row of the table: one wall, the attack on it, and what takes the wall away to see it succeed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from .tools import Facts, Verdict

    Inside = Callable[[Facts], Verdict]


@dataclass(frozen=True)
class Row:
    """One wall.

    Attributes:
        number: Its name in the checklist; several rows may attack one wall.
        attack: Runs inside a worker and returns a verdict; or, where a whole
            life is needed, outside and with the arena (``where``).
        refused_by: The layers, in the order in which they would refuse.
        weakened_by: Words of ``weak/zygote.py`` and ``weak/orchestrator.py``
            that take all these layers away, and nothing else.
        first: Runs in another worker before; its answer is ``facts["first"]``.
        resources: What the manifest asks for beside the arena's own.
        needs: Layers without which the row says "degraded" instead of passing.
        host: Names of facts of the host, in host.py, that must not change.
        where: Where ``attack`` runs.
        faults: Words in force also when the wall must hold: what it must cope with.
        informational: Whether it measures, and promises nothing.
        hole: A pattern that what it saw must match when the wall is gone.
        limits_of_it: What the row does not show, said in the report.
    """

    number: int
    attack: Callable[..., Verdict]
    refused_by: tuple[str, ...]
    weakened_by: tuple[str, ...]
    first: Inside | None = None
    resources: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    where: Literal["inside", "outside"] = "inside"
    faults: tuple[str, ...] = ()
    informational: bool = False
    hole: str = ""
    limits_of_it: str = ""

    @property
    def weakening_needs_root(self) -> bool:
        """Whether an ordinary user could not take these walls away."""
        return "host-net" in self.weakened_by

    @property
    def name(self) -> str:
        """Return what it is called in reports."""
        return f"{self.number:02}-{self.attack.__name__}"

    @property
    def intent(self) -> str:
        """Return the attack in one line."""
        return (self.attack.__doc__ or "").strip().splitlines()[0]
