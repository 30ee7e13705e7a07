"""Python stop conditions: evaluated by a node, in a sandbox of their own, never here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick.v1 import controller_pb2
from hayflick_controller import conditions, render
from hayflick_controller.clock import seconds
from hayflick_rpc.errors import HayflickError
from hayflick_rpc.wire import seconds as wire_seconds

if TYPE_CHECKING:
    from hayflick_controller.admission import Denial
    from hayflick_controller.links import Link
    from hayflick_controller.model import StopCondition

MARGIN_SECONDS = 2.0
"""How much longer than the predicate may run its answer may take: a sandbox must be built for it."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What predicates said of a birth, and of which population they said it."""

    population_version: int
    by_name: Mapping[str, Denial | None]


async def ask(
    links: Sequence[Link],
    prefer: str,
    stop_conditions: Sequence[StopCondition],
    context: Mapping[str, object],
    population_version: int,
) -> Verdicts:
    """Have the predicates among *stop_conditions* evaluated, one after the other until one denies.

    Args:
        links: The connected nodes.
        prefer: The node to ask if it can: the one that will run the worker.
        stop_conditions: The contract's.
        context: What the predicates see, JSON-able.
        population_version: Of the population that *context* describes.
    """
    context_json = json.dumps(context)
    verdicts: dict[str, Denial | None] = {}
    for condition in stop_conditions:
        if condition.predicate is None:
            continue
        verdicts[condition.name] = await _ask_one(links, prefer, condition, context_json)
        if verdicts[condition.name] is not None:
            break
    return Verdicts(population_version, verdicts)


async def _ask_one(
    links: Sequence[Link], prefer: str, condition: StopCondition, context_json: str
) -> Denial | None:
    predicate = condition.predicate
    assert predicate is not None
    # A pickle of one Python is not to be read by another.
    able = [link for link in links if link.python_version in ("", predicate.python_version)]
    able.sort(key=lambda link: link.node_id != prefer)
    if not able:
        note = "" if not links else f"none runs Python {predicate.python_version}"
        return conditions.denial(condition.name, "no_node", note)
    order = controller_pb2.Order(
        evaluate=controller_pb2.EvaluateOrder(
            predicate=render.predicate(predicate), context_json=context_json
        )
    )
    limit_seconds = seconds(predicate.timeout_us)
    try:
        async with asyncio.timeout(limit_seconds + MARGIN_SECONDS):
            result = await able[0].order(order)
    except TimeoutError:
        return conditions.denial(condition.name, "timeout")
    except HayflickError:
        return conditions.denial(condition.name, "no_node")
    if result.error:
        timed_out = wire_seconds(result.elapsed) >= limit_seconds
        return conditions.denial(condition.name, "timeout" if timed_out else "error")
    if not result.HasField("value"):
        return conditions.denial(condition.name, "not_boolean")
    return conditions.denial(condition.name, "triggered") if result.value else None
