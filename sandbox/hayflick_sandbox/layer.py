"""One layer of the sandbox, as it is on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the sandbox on this machine.

    Attributes:
        name: As an operator names it to let it go.
        enforced: Whether it holds here.
        detail: What was found.
        remedy: What mends it; empty when it is enforced.
    """

    name: str
    enforced: bool
    detail: str
    remedy: str = ""


class LimitNotEnforceable(Exception):
    """This machine lacks a layer, and nobody let it go by name."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(f"{layer.name}: {layer.detail}; {layer.remedy}")
        self.layer = layer
