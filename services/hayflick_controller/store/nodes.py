"""Nodes that connected once."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import bindparam, insert, select, update

from hayflick_controller.model import Node
from hayflick_controller.store import rows, schema
from hayflick_controller.store.part import Part, new

nodes = schema.nodes

NODE = select(nodes).where(nodes.c.node_id == bindparam("node_id"))
NODES = select(nodes).order_by(nodes.c.node_id)
CHANGE_NODE = (
    update(nodes)
    .where(nodes.c.node_id == bindparam("key"))
    .values({name: bindparam(f"new_{name}") for name in nodes.c.keys() if name != "node_id"})  # noqa: SIM118
)
ADD_NODE = insert(nodes)
NODE_ACK = update(nodes).where(nodes.c.node_id == bindparam("key")).values(last_ack_us=bindparam("ack_us"))


class Nodes(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`."""

    def node(self, node_id: str) -> Node | None:  # noqa: D102
        if node_id in self._known.nodes:
            return self._known.nodes[node_id]
        row = self._driver.one(NODE, {"node_id": node_id})
        return None if row is None else rows.node(row)

    def put_node(self, node: Node) -> None:  # noqa: D102
        values = rows.node_values(node)
        self._known.nodes.pop(node.node_id, None)
        if not self._driver.run(CHANGE_NODE, {"key": node.node_id, **new(values)}):
            self._driver.run(ADD_NODE, values)

    def nodes(self) -> list[Node]:  # noqa: D102
        return [rows.node(row) for row in self._driver.all(NODES)]

    def touch_nodes(self, acks: Sequence[tuple[str, int]]) -> None:  # noqa: D102
        for node_id, _ in acks:
            self._known.nodes.pop(node_id, None)
        self._driver.run_many(NODE_ACK, [{"key": node_id, "ack_us": ack_us} for node_id, ack_us in acks])
