"""Events that wait for the logger."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, insert, select

from hayflick_controller import render
from hayflick_controller.model import Event
from hayflick_controller.store import schema
from hayflick_controller.store.part import Part
from hayflick_controller.store.protocol import Queued

outbox = schema.outbox

ADD_EVENT = insert(outbox)
QUEUED = (
    select(outbox)
    .where(outbox.c.position > bindparam("after"))
    .order_by(outbox.c.position)
    .limit(bindparam("limit"))
)
DELIVERED = delete(outbox).where(outbox.c.position <= bindparam("upto"))


class Outbox(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    @property
    def position(self) -> int:  # noqa: D102
        return Queued.position_of(self._boot, self.sequence)

    def record(self, event: Event) -> None:  # noqa: D102
        self.sequence += 1
        self._events.append(Queued(self.position, render.event(event).SerializeToString()))

    def queued(self, after: int, limit: int) -> list[Queued]:  # noqa: D102
        found = self._driver.all(QUEUED, {"after": after, "limit": limit})
        return [Queued(row.position, row.body) for row in found]

    def delivered(self, position: int) -> None:  # noqa: D102
        self._driver.run(DELIVERED, {"upto": position})

    def _write_events(self) -> None:
        # At the end, in one statement: what a rollback undoes is never written.
        self._driver.run_many(
            ADD_EVENT, [{"position": event.position, "body": event.body} for event in self._events]
        )
