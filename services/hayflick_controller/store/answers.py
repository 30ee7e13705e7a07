"""Requests and what they were answered with."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, insert, select, update

from hayflick_controller.model import Answer, ManifestStatus
from hayflick_controller.store import schema
from hayflick_controller.store.part import Part

answers, manifests = schema.answers, schema.manifests

ANSWER = select(answers).where(answers.c.request_id == bindparam("request_id"))
REMEMBER = insert(answers)
COMPLETE = (
    update(answers)
    .where(answers.c.request_id == bindparam("key"))
    .values(body=bindparam("new_body"), position=bindparam("new_position"))
)
FORGET = delete(answers).where(answers.c.request_id == bindparam("request_id"))
FORGET_ANSWERS = delete(answers).where(answers.c.create_us < bindparam("before_us"))
FORGET_MANIFESTS = delete(manifests).where(
    manifests.c.status == ManifestStatus.RETURNED.value, manifests.c.expire_us < bindparam("before_us")
)


class Answers(Part):
    """See :class:`~hayflick_controller.store.protocol.Tx`, as for all parts."""

    def answer(self, request_id: str) -> Answer | None:  # noqa: D102 -- the protocol documents these
        if request_id in self._known.answers:
            return self._known.answers[request_id]
        row = self._driver.one(ANSWER, {"request_id": request_id})
        return None if row is None else Answer(*row)

    def remember(self, answer: Answer) -> None:  # noqa: D102
        self._known.answers.pop(answer.request_id, None)
        self._driver.later(
            REMEMBER,
            {
                "request_id": answer.request_id,
                "method": answer.method,
                "digest": answer.digest,
                "body": answer.body,
                "position": answer.position,
                "create_us": answer.create_us,
            },
        )

    def complete(self, request_id: str, body: bytes, position: int) -> None:  # noqa: D102
        self._known.answers.pop(request_id, None)
        self._driver.run(COMPLETE, {"key": request_id, "new_body": body, "new_position": position})

    def forget(self, request_id: str) -> None:  # noqa: D102
        self._known.answers.pop(request_id, None)
        self._driver.run(FORGET, {"request_id": request_id})

    def forget_before(self, create_us: int) -> int:  # noqa: D102
        before = {"before_us": create_us}
        self._known.answers.clear()
        self._known.statuses.clear()
        return self._driver.run(FORGET_ANSWERS, before) + self._driver.run(FORGET_MANIFESTS, before)
