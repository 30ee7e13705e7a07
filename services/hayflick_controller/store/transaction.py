"""One transaction in SQL, from its parts."""

from __future__ import annotations

from hayflick_controller.store.answers import Answers
from hayflick_controller.store.attestations import Attestations
from hayflick_controller.store.contracts import Contracts
from hayflick_controller.store.keys import Keys
from hayflick_controller.store.latches import Latches
from hayflick_controller.store.manifests import Manifests
from hayflick_controller.store.nodes import Nodes
from hayflick_controller.store.outbox import Outbox
from hayflick_controller.store.protocol import Commit, Notice
from hayflick_controller.store.workers import Workers


class SqlTx(Answers, Attestations, Contracts, Keys, Latches, Manifests, Workers, Nodes, Outbox):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def finish(self) -> Commit:
        """Write what was held back; the transaction may then be committed."""
        self._write_population()
        self._write_events()
        workers = {**self._heard, **self._changed}
        notice = Notice(tuple(self._changed), tuple(self._quarantines))
        return Commit(tuple(self._events), tuple(workers.values()), notice)
