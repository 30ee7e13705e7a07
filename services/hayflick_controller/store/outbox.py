"""Events that wait for the logger, each with the controller that recorded it."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import bindparam, delete, insert, select

from hayflick_controller import render
from hayflick_controller.model import Event
from hayflick_controller.store import schema
from hayflick_controller.store.part import Part
from hayflick_controller.store.protocol import Queued

outbox = schema.outbox

ADD_EVENT = insert(outbox)
QUEUED = (
    select(outbox.c.position, outbox.c.body)
    .where(outbox.c.controller_id == bindparam("whose"), outbox.c.position > bindparam("after"))
    .order_by(outbox.c.position)
    .limit(bindparam("limit"))
)
WAITING = select(outbox.c.position).where(outbox.c.position == bindparam("position"))
DELIVERED = delete(outbox).where(
    outbox.c.controller_id == bindparam("whose"), outbox.c.position <= bindparam("upto")
)
OTHERS = select(outbox.c.controller_id).where(outbox.c.controller_id != bindparam("whose")).distinct()


class Outbox(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    @property
    def position(self) -> int:  # noqa: D102
        return Queued.position_of(self._identity.boot, self.sequence)

    def record(self, event: Event) -> None:  # noqa: D102
        self.sequence += 1
        if self._turn:
            event = replace(event, details={**event.details, "turn": self._turn})
        self._events.append(Queued(self.position, render.event(event).SerializeToString()))

    def queued(self, after: int, limit: int, controller_id: str = "") -> list[Queued]:  # noqa: D102
        whose = controller_id or self._identity.controller_id
        found = self._driver.all(QUEUED, {"whose": whose, "after": after, "limit": limit})
        return [Queued(row.position, row.body) for row in found]

    def waits(self, position: int) -> bool:  # noqa: D102
        return self._driver.one(WAITING, {"position": position}) is not None

    def delivered(self, position: int, controller_id: str = "") -> None:  # noqa: D102
        whose = controller_id or self._identity.controller_id
        self._driver.run(DELIVERED, {"whose": whose, "upto": position})

    def left_over(self) -> list[str]:  # noqa: D102
        others = [
            row.controller_id for row in self._driver.all(OTHERS, {"whose": self._identity.controller_id})
        ]
        return [controller_id for controller_id in others if not self._is_alive(controller_id)]

    def alive(self, controller_id: str) -> bool:  # noqa: D102
        return controller_id == self._identity.controller_id or self._is_alive(controller_id)

    def _write_events(self) -> None:
        # At the end: what a rollback undoes is never written.
        for event in self._events:
            self._driver.later(
                ADD_EVENT,
                {
                    "position": event.position,
                    "body": event.body,
                    "controller_id": self._identity.controller_id,
                },
            )
