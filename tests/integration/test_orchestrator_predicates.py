"""Python stop conditions: each in a sandbox of its own, failing closed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import cloudpickle
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hayflick.v1.orchestrator_pb2 import LaunchWorkerRequest
from hayflick.v1.resources_pb2 import PythonPredicate, StopCondition

from .conftest import PYTHON, Stack, duration, groups, request_id, until

if TYPE_CHECKING:
    from collections.abc import Callable


def condition(predicate: Callable[[Any], Any], timeout: float = 2.0) -> StopCondition:
    """Return a stop condition that asks *predicate*."""
    return StopCondition(
        name="asked",
        python=PythonPredicate(
            pickled=cloudpickle.dumps(predicate), python_version=PYTHON, timeout=duration(timeout)
        ),
    )


def sleepy(context: Any) -> bool:
    """Never answer."""
    import time

    time.sleep(60)
    return False


def crashing(context: Any) -> bool:
    """Die of a signal."""
    import os

    os.kill(os.getpid(), 11)
    return False


def greedy(context: Any) -> bool:
    """Take more memory than there is."""
    return len(bytearray(1024 * 1024 * 1024)) == 0


@pytest.mark.parametrize(
    ("predicate", "cause"),
    [
        (lambda context: True, "triggered"),
        (lambda context: 1, "not_boolean"),
        (lambda context: 1 / 0, "error"),
        ("sleepy", "timeout"),
        ("crashing", "error"),
        ("greedy", "error"),
    ],
)
def test_denials(stack: Stack, predicate: Any, cause: str) -> None:
    """A predicate that is true, errs, hangs, crashes or gives no boolean denies, and leaves nothing."""
    chosen = globals()[predicate] if isinstance(predicate, str) else predicate
    with _by_value():
        stop = condition(chosen, timeout=1.0)
    contract = stack.contract(stop_conditions=[stop])
    with pytest.raises(grpc.RpcError) as caught:
        stack.launch(contract)
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)  # type: ignore[arg-type,union-attr]
    assert (info.reason, info.metadata["cause"]) == ("STOP_CONDITION_TRIGGERED", cause)
    assert not groups(f"{stack.node_id}/predicates")


def test_consent(stack: Stack) -> None:
    """A predicate that is false lets a worker be born, and sees how many live."""
    with _by_value():
        stop = condition(lambda context: context.active_count >= 1)
    contract = stack.contract(stop_conditions=[stop])
    worker = stack.launch(contract)
    with pytest.raises(grpc.RpcError):
        stack.launch(contract)
    stack.stop(worker)


@pytest.mark.layers("pids")
def test_a_kill_ends_predicates_too(stack: Stack) -> None:
    """When the kill switch answers, no predicate of the contract still runs."""

    def running() -> list[str]:
        files = groups(f"{stack.node_id}/predicates/*/self/cgroup.procs")
        found: list[str] = []
        for file in files:
            with contextlib.suppress(OSError):  # it went away meanwhile
                found += file.read_text().split()
        return found

    with _by_value():
        stop = condition(sleepy, timeout=25.0)
    contract = stack.contract(stop_conditions=[stop])
    launch = stack.orchestrator.LaunchWorker.future(
        LaunchWorkerRequest(request_id=request_id(), manifest=stack.manifest(contract))
    )
    until(running)
    stack.kill(contract_id=contract)
    assert running() == []
    with pytest.raises(grpc.RpcError):
        launch.result()


def _by_value() -> Any:
    """Let this module's functions be pickled whole: the sandbox has no test modules."""
    import contextlib
    import sys

    @contextlib.contextmanager
    def registered() -> Any:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            yield
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    return registered()
