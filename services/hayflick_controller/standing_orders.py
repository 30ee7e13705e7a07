"""Orders that stand: freezes, thaws and narrowings, given again until their node says that they are in force.

A kill is pursued until its workers are seen dead (:mod:`~hayflick_controller.pursuit`).
These leave their workers alive, so it is the record that says what must be in
force, and the node that says what is. What a node confirmed counts for its
stream alone: a new one is told everything once more.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hayflick.v1 import controller_pb2
from hayflick_controller import render
from hayflick_controller.model import NetworkPolicy
from hayflick_rpc.errors import HayflickError

if TYPE_CHECKING:
    from hayflick_controller.links import Link, Result
    from hayflick_controller.roster import Roster

ORDER_TIMEOUT_SECONDS = 10.0
"""How long a node may take to confirm; after that an order is given again."""
TICK_SECONDS = 1.0
"""How often each duty looks for what is not in force."""

Answer = tuple[tuple[str, ...], str]
"""The workers that a node names as frozen, thawed or narrowed, and why it is not done; empty when it is."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Verb(enum.StrEnum):
    """What a node is to do."""

    FREEZE = "freeze"
    THAW = "thaw"
    NARROW = "narrow"


@dataclass(frozen=True, slots=True)
class Standing:
    """One order about one worker.

    Attributes:
        verb: What to do.
        worker_id: With whom; a freeze or thaw means its descendants too.
        version: The epoch of the latch that the order follows from, or the policy
            that is left: another one is another order.
    """

    verb: Verb
    worker_id: str
    version: int | NetworkPolicy


class StandingOrders:
    """Gives orders, and has those look that know which must stand.

    Args:
        links: The live streams, by node.
        roster: Who lives where.
    """

    def __init__(self, links: Mapping[str, Link], roster: Roster) -> None:
        self._links = links
        self._roster = roster
        self._given: dict[tuple[Link, Verb, str], tuple[Standing, float]] = {}
        self._in_force: dict[tuple[Link, Verb, str], Standing] = {}
        self._wakes: list[asyncio.Event] = []
        self._duties: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def link(self, node_id: str) -> Link | None:
        """Return the live stream to a node, if there is one."""
        link = self._links.get(node_id)
        return None if link is None or link.closed else link

    def in_force(self, link: Link, standing: Standing) -> bool:
        """Return whether a node confirmed an order on its present stream."""
        return self._in_force.get((link, standing.verb, standing.worker_id)) == standing

    def unconfirmed(self, verb: Verb) -> list[tuple[Link, Standing]]:
        """Return the orders of a kind that were given on a live stream, and are not in force."""
        self._forget()
        given = [(key[0], standing) for key, (standing, _) in self._given.items() if key[1] is verb]
        return [(link, standing) for link, standing in given if not self.in_force(link, standing)]

    def give(self, link: Link, standing: Standing) -> asyncio.Task[Answer]:
        """Send an order before this returns; the task returns what came of it.

        Sent in the very step in which its decision was read: the outcomes of
        transactions are told in the order of their commits, so no order overtakes
        one that follows from a later decision.
        """
        key = (link, standing.verb, standing.worker_id)
        self._in_force.pop(key, None)
        self._given[key] = (standing, asyncio.get_running_loop().time())
        return self._spawn(self._await(link, standing, link.order(_order(standing))))

    def pursue(
        self, link: Link, standing: Standing, settle: Callable[[Link, Answer], Awaitable[None]]
    ) -> None:
        """Give an order, unless it was given a short while ago; *settle* records what came of it."""
        given = self._given.get((link, standing.verb, standing.worker_id))
        now = asyncio.get_running_loop().time()
        if given is None or given[0] != standing or now - given[1] >= ORDER_TIMEOUT_SECONDS:
            self._spawn(_settle(link, self.give(link, standing), settle))

    def start(self, *duties: Callable[[], Awaitable[None]]) -> None:
        """Have each of *duties* look for what is not in force, every second and when kicked."""
        for duty in duties:
            wake = asyncio.Event()
            self._wakes.append(wake)
            self._duties.append(asyncio.create_task(self._repeat(duty, wake), name=duty.__name__))

    def kick(self) -> None:
        """Look now rather than at the next tick."""
        for wake in self._wakes:
            wake.set()

    async def close(self) -> None:
        """Stop; what is not in force is in the record, for the next start."""
        tasks: list[asyncio.Task[Any]] = [*self._duties, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _repeat(self, duty: Callable[[], Awaitable[None]], wake: asyncio.Event) -> None:
        while True:
            self._forget()
            try:
                await duty()
            except HayflickError as error:
                log.warning("standing orders pause: %s", error.message)
            except Exception:
                log.exception("standing orders were not looked at")
            try:
                async with asyncio.timeout(TICK_SECONDS):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()

    def _forget(self) -> None:
        """Forget what was said on streams that ended, and about workers that did."""
        for known in (self._given, self._in_force):
            for key in tuple(known):
                link, _, worker_id = key
                if link.closed or self._roster.place(worker_id)[0] != link.node_id:
                    del known[key]

    async def _await(self, link: Link, standing: Standing, future: asyncio.Future[Result]) -> Answer:
        try:
            async with asyncio.timeout(ORDER_TIMEOUT_SECONDS):
                result = await future
        except (TimeoutError, HayflickError) as error:
            text = str(error) or f"node {link.node_id} did not answer in time"
            log.warning("node %s did not confirm: %s %s", link.node_id, standing.verb, standing.worker_id)
            return (), text
        if not result.error and not result.unconfirmed_worker_ids:
            self._in_force[link, standing.verb, standing.worker_id] = standing
        return tuple(result.worker_ids), result.error


async def _settle(
    link: Link, answer: Awaitable[Answer], settle: Callable[[Link, Answer], Awaitable[None]]
) -> None:
    try:
        await settle(link, await answer)
    except HayflickError as error:
        log.warning("what node %s confirmed is not on record yet: %s", link.node_id, error.message)


def _order(standing: Standing) -> controller_pb2.Order:
    worker_id = standing.worker_id
    match standing.verb, standing.version:
        case Verb.NARROW, NetworkPolicy() as network:
            narrow = controller_pb2.NarrowNetworkOrder(worker_id=worker_id, network=render.network(network))
            return controller_pb2.Order(narrow_network=narrow)
        case Verb.FREEZE, _:
            return controller_pb2.Order(freeze=controller_pb2.FreezeOrder(worker_id=worker_id))
        case _:
            return controller_pb2.Order(thaw=controller_pb2.ThawOrder(worker_id=worker_id))
