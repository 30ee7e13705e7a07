"""Python stop conditions: asked of a node, denied whenever in doubt."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1 import resources_pb2
from hayflick_rpc import wire

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def rule(version: str = PYTHON, timeout_seconds: float = 2.0) -> resources_pb2.StopCondition:
    """Make a condition; what it does is up to the node in the test."""
    predicate = resources_pb2.PythonPredicate(
        pickled=b"a function", python_version=version, timeout=wire.duration(timeout_seconds)
    )
    return resources_pb2.StopCondition(name="judge", python=predicate)


async def test_a_predicate_decides(bench: Any, denied: Any) -> None:
    """A predicate sees the population and the snapshot; false lets the birth pass and true denies it."""
    contract = await bench.contract(stop_conditions=[rule()])
    node = await bench.node()
    seen: list[dict[str, Any]] = []

    def judge(order: pb.EvaluateOrder) -> pb.OrderResult:
        assert order.predicate.pickled == b"a function"
        seen.append(json.loads(order.context_json))
        return pb.OrderResult(value=seen[-1]["active_count"] >= 1)

    node.evaluate = judge
    manifest = await bench.issue(contract.contract_id, state_snapshot_json='{"a": 1}')
    await node.register(manifest)
    assert seen[0]["manifest"]["state_snapshot_json"] == '{"a": 1}'
    assert seen[0]["manifest"]["issue_time"][:-4] in manifest.issue_time.ToJsonString()
    assert seen[0]["contract"]["max_replicas"] == 10
    refusal = await denied(bench.born(node, contract.contract_id))
    assert refusal.reason_name == "STOP_CONDITION_TRIGGERED"
    assert refusal.metadata == {"condition": "judge", "cause": "triggered"}


async def test_predicates_see_every_birth(bench: Any) -> None:
    """Concurrent registrations cannot slip past a predicate together: a stale verdict is asked for anew."""
    contract = await bench.contract(max_replicas=30, stop_conditions=[rule()])
    node = await bench.node()
    node.evaluate = lambda order: pb.OrderResult(value=json.loads(order.context_json)["active_count"] >= 3)
    births = [bench.born(node, contract.contract_id) for _ in range(30)]
    outcomes = await asyncio.gather(*births, return_exceptions=True)
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 3


@pytest.mark.parametrize(
    ("result", "cause"),
    [
        (pb.OrderResult(error="it raised"), "error"),
        (pb.OrderResult(error="too long", elapsed=wire.duration(2.5)), "timeout"),
        (pb.OrderResult(), "not_boolean"),
    ],
)
async def test_doubt_denies(bench: Any, denied: Any, result: pb.OrderResult, cause: str) -> None:
    """A predicate that raised, ran out of time, or gave nothing denies, and says which."""
    contract = await bench.contract(stop_conditions=[rule()])
    node = await bench.node()
    node.evaluate = lambda _: result
    refusal = await denied(bench.born(node, contract.contract_id))
    assert refusal.metadata == {"condition": "judge", "cause": cause}
    assert (await bench.decisions(contract.contract_id))[-1] == "deny_stop_condition"


async def test_a_silent_node_denies(bench: Any, denied: Any) -> None:
    """A predicate whose node never answers denies when its time is over."""
    contract = await bench.contract(stop_conditions=[rule(timeout_seconds=0.01)])
    node = await bench.node()
    node.obedient = False
    refusal = await denied(bench.born(node, contract.contract_id))
    assert refusal.metadata["cause"] == "timeout"


async def test_a_node_that_hangs_up_denies(bench: Any, denied: Any) -> None:
    """A predicate whose node is gone before it answered denies."""
    contract = await bench.contract(stop_conditions=[rule(timeout_seconds=30)])
    judge = await bench.node()
    judge.obedient = False
    node = await bench.node(python_version="2.7")  # runs the worker, and cannot judge
    birth = asyncio.create_task(denied(bench.born(node, contract.contract_id)))
    await judge.wait_order("evaluate")
    await judge.hang_up()
    assert (await birth).metadata["cause"] == "no_node"


async def test_another_python_denies(bench: Any, denied: Any) -> None:
    """A predicate that no connected node's Python can read denies."""
    contract = await bench.contract(stop_conditions=[rule(version="2.7")])
    node = await bench.node()
    refusal = await denied(bench.born(node, contract.contract_id))
    assert refusal.metadata["cause"] == "no_node"


async def test_a_verdict_about_another_population_is_asked_again(bench: Any, denied: Any) -> None:
    """When the population changes while a predicate runs, it is asked again about the new one."""
    contract = await bench.contract(stop_conditions=[rule()])
    node = await bench.node()
    first = await bench.born(node, contract.contract_id)
    counts: list[int] = []

    def judge(order: pb.EvaluateOrder) -> pb.OrderResult:
        counts.append(json.loads(order.context_json)["active_count"])
        return pb.OrderResult(value=False)

    node.evaluate = judge
    node.obedient = False
    birth = asyncio.create_task(bench.born(node, contract.contract_id))
    (order,) = (await node.wait_order("evaluate", 2))[1:]
    await node.deregister(first.worker_id)
    node.obedient = True
    await node.answer(order)
    await birth
    assert counts == [1, 0]
