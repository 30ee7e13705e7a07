"""Workers that act from inside: on themselves and their descendants, and on nobody else."""

from __future__ import annotations

import json
from typing import Any

from hayflick.v1.resources_pb2 import NetworkPolicy

from .conftest import Stack, call, duration, until


def test_a_task_that_replicates(stack: Stack) -> None:
    """From inside, a worker gets a child, runs a task in it, reads its output, and ends it."""
    root = stack.launch()

    def task(me: Any) -> str:
        child = me.replicate("split", {"part": 1})
        child.perform_task(
            lambda it: print("child", it.manifest.state_snapshot["part"], "depth", it.manifest.depth)
        )
        child.shutdown("done")
        return str(child.worker_id)

    ran = stack.run(root, call(task))
    assert (ran.stdout, ran.outcome) == (b"child 1 depth 1\n", "SUCCEEDED"), ran.result
    child = json.loads(ran.result.value_json)
    assert stack.end_reason(child) == "COMPLETED"
    assert stack.worker(child).parent_id == root.worker_id
    stack.stop(root)


def test_denials_reach_the_inside(stack: Stack) -> None:
    """A worker is told by reason why it may not replicate."""
    root = stack.launch(stack.contract(max_replicas=2, max_depth=1, cooldown=duration(60)))

    def task(me: Any) -> list[str]:
        from replication import ReplicationDenied

        reasons = []
        first = me.replicate("one", {})
        first.shutdown("done")
        for _ in range(2):
            try:
                me.replicate("more", {})
            except ReplicationDenied as error:
                reasons.append(str(error.reason))
        return reasons

    ran = stack.run(root, call(task))
    assert set(json.loads(ran.result.value_json)) == {"COOLDOWN_NOT_SATISFIED"}, ran.result
    stack.stop(root)


def test_without_permission(stack: Stack) -> None:
    """A worker whose policy does not allow it cannot replicate, but knows itself and may end itself."""
    root = stack.launch(network=NetworkPolicy())

    def refused(me: Any) -> list[str]:
        answers = [me._channel.call("GetSelf", {})["worker"]["workerId"]]
        for method, request in (
            ("Replicate", {"requestId": "r1"}),
            ("RunDescendantTask", {"workerId": "0" * 16}),
            ("Shutdown", {"requestId": "r2", "workerId": "0" * 16}),
        ):
            try:
                me._channel.call(method, request)
            except me._channel.CallError as error:
                answers.append(error.reason)
        return answers

    ran = stack.run(root, call(refused))
    assert json.loads(ran.result.value_json) == [root.worker_id, *["CONTROLLER_NOT_ALLOWED"] * 3], ran.result
    stack.run(root, call(lambda me: me.shutdown("enough")))
    assert stack.end_reason(root.worker_id) == "COMPLETED"
    assert stack.worker(root.worker_id).exit.detail == "enough"


def test_only_descendants(stack: Stack) -> None:
    """A worker cannot touch its sibling, its parent or a stranger, and learns nothing of them."""
    contract = stack.contract()
    root = stack.launch(contract)
    left, right = stack.launch(contract, root.worker_id), stack.launch(contract, root.worker_id)
    stranger = stack.launch()
    targets = [right.worker_id, root.worker_id, stranger.worker_id, "f" * 16]

    def task(me: Any) -> list[str]:
        answers = []
        for target in targets:
            for method, request in (
                ("RunDescendantTask", {"workerId": target, "task": {"command": {"argv": ["true"]}}}),
                ("Shutdown", {"requestId": "r", "workerId": target}),
            ):
                try:
                    me._channel.call(method, request)
                    answers.append("done")
                except me._channel.CallError as error:
                    answers.append(error.reason)
        return answers

    ran = stack.run(left, call(task))
    assert json.loads(ran.result.value_json) == ["NOT_A_DESCENDANT"] * 8, ran.result
    assert {right.worker_id, root.worker_id, stranger.worker_id} <= set(stack.sandboxes())
    stack.stop(root)
    stack.stop(stranger)


def test_bad_calls(stack: Stack) -> None:
    """A call that makes no sense is refused by field; the worker goes on."""
    root = stack.launch()

    def task(me: Any) -> list[str]:
        answers = []
        for method, request in (
            ("DropTables", {}),
            ("Replicate", {}),
            ("Replicate", {"requestId": "r", "unheardOf": 1}),
            ("Replicate", {"requestId": "r", "stateSnapshotJson": "no json"}),
            ("Shutdown", {"requestId": "a b"}),
        ):
            try:
                me._channel.call(method, request)
                answers.append("done")
            except me._channel.CallError as error:
                answers.append(error.reason)
        return answers

    ran = stack.run(root, call(task))
    assert json.loads(ran.result.value_json) == ["INVALID_FIELD"] * 5, ran.result
    stack.stop(root)


def test_a_family_ends_with_its_root(stack: Stack) -> None:
    """Children that a worker made from inside end when it does."""
    root = stack.launch()

    def task(me: Any) -> list[str]:
        child = me.replicate("one", {})
        return [child.worker_id, me.replicate("two", {}).worker_id]

    children = json.loads(stack.run(root, call(task)).result.value_json)
    assert set(children) <= set(stack.sandboxes())
    stack.stop(root)
    assert not set(children) & set(stack.sandboxes())
    assert {stack.end_reason(child) for child in children} == {"KILLED"}


def test_hanging_up_reaches_the_descendants(stack: Stack) -> None:
    """When a caller hangs up on a task, what that task runs in its children ends too."""
    root = stack.launch()

    def task(me: Any) -> None:
        child = me.replicate("one", {})
        import time

        child.perform_task(lambda it: (print("child runs", flush=True), time.sleep(300)))

    stream = stack.begin(root, call(task))
    (child,) = [name for name, it in stack.sandboxes().items() if it.worker.parent_id == root.worker_id]
    stream.cancel()
    until(lambda: "task_finished" in stack.events(child))
    stack.stop(root)
