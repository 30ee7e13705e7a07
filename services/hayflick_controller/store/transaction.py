"""One transaction in SQL, from its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hayflick_controller.store.answers import REMEMBER, Answers
from hayflick_controller.store.attestations import Attestations
from hayflick_controller.store.contracts import POPULATION, Contracts, changed
from hayflick_controller.store.driver import summed
from hayflick_controller.store.keys import Keys
from hayflick_controller.store.latches import Latches
from hayflick_controller.store.manifests import ADD_MANIFEST, SETTLE, Manifests
from hayflick_controller.store.nodes import Nodes
from hayflick_controller.store.outbox import ADD_EVENT, Outbox
from hayflick_controller.store.protocol import Commit, Notice
from hayflick_controller.store.workers import ADD_WORKER, SPAWNED, Workers

if TYPE_CHECKING:
    from hayflick_controller.store.driver import Later

LATER: Later = (
    (ADD_MANIFEST, None),
    (SETTLE, None),
    (ADD_WORKER, None),
    (SPAWNED, summed),
    (REMEMBER, None),
    (POPULATION, summed),
    (ADD_EVENT, None),
)
"""What waits to be written, in an order that any other comes to.

A row is added before it is changed or referred to, whoever asked for either. Only rows of one
statement can be about the same row then, and they keep their order.
"""


class SqlTx(Answers, Attestations, Contracts, Keys, Latches, Manifests, Workers, Nodes, Outbox):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def finish(self) -> Commit:
        """Write what was held back; the transaction may then be kept."""
        self._ended = {
            contract_id: changed(known, change)
            for contract_id, change in self._population.items()
            if (known := self._known.contracts.get(contract_id)) is not None
        }
        self._write_population()
        self._write_events()
        workers = {**self._heard, **self._changed}
        notice = Notice(tuple(self._changed), tuple(self._quarantines))
        return Commit(tuple(self._events), tuple(workers.values()), notice)

    def keep(self) -> None:
        """Let the commit's later transactions know what this one, which has ended well, has changed."""
        self._known.contracts.update(self._ended)
