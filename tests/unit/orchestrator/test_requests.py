"""What is refused before anything happens, and with which reason."""

from __future__ import annotations

import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from hayflick.v1.orchestrator_pb2 import Command, PythonCallable, StopWorkerRequest, Task
from hayflick.v1.resources_pb2 import EndReason, Manifest, NetworkPolicy, Resources
from hayflick_orchestrator import requests
from hayflick_orchestrator.requests import PYTHON_VERSION, check_manifest, policy_of, stop_ask, task_spec
from hayflick_rpc.errors import HayflickError

MIB = 1024 * 1024
MANIFEST = Manifest(
    manifest_id="0" * 32,
    contract_id="a" * 16,
    worker_id="b" * 16,
    resources=Resources(cpu_millis=1_000, memory_limit_bytes=64 * MIB),
)


def refused(reason: str, field: str | None = None) -> pytest.RaisesExc[HayflickError]:
    """Expect a refusal for *reason*, about *field*."""
    return pytest.RaisesExc(
        HayflickError,
        check=lambda error: error.reason_name == reason and field in (None, error.metadata.get("field")),
    )


def test_a_manifest_in_form() -> None:
    """What the controller issues is accepted."""
    check_manifest(MANIFEST)


@pytest.mark.parametrize("field", ["manifest_id", "contract_id", "worker_id", "parent_id"])
@pytest.mark.parametrize("value", ["../../etc", "..", "A" * 16, "a" * 65, "a/b", "aaaaaaa\n"])
def test_ids_cannot_leave_their_path(field: str, value: str) -> None:
    """An identifier that could mean another place in the cgroup tree is refused."""
    manifest = Manifest()
    manifest.CopyFrom(MANIFEST)
    setattr(manifest, field, value)
    with refused("INVALID_FIELD", f"manifest.{field}"):
        check_manifest(manifest)


@given(st.text(max_size=70))
def test_no_text_leaves_its_path(text: str) -> None:
    """Whatever text comes as a worker id, it is refused or is one plain path component."""
    manifest = Manifest()
    manifest.CopyFrom(MANIFEST)
    manifest.worker_id = text
    try:
        check_manifest(manifest)
    except HayflickError:
        return
    assert set(text) <= set("0123456789abcdef")


def test_limits_arrive() -> None:
    """Each limit that is given reaches the policy; each that is not has the node's default."""
    policy = policy_of(
        Resources(
            cpu_millis=250,
            memory_limit_bytes=32 * MIB,
            pids_limit=7,
            cpu_time_limit=Duration(seconds=1, nanos=1),
            network=NetworkPolicy(allow_loopback=True),
        ),
        "b" * 16,
    )
    limits = policy.limits
    assert (limits.cpu_millis, limits.memory_bytes, limits.pids) == (250, 32 * MIB, 7)
    assert limits.cpu_time_seconds == 2  # a part of a second is allowed as a whole one
    assert policy.loopback
    assert limits.open_files == type(limits)().open_files


@pytest.mark.parametrize(
    "resources",
    [
        Resources(cpu_millis=0, memory_limit_bytes=64 * MIB),
        Resources(cpu_millis=1_000, memory_limit_bytes=1),
        Resources(cpu_millis=1_000, memory_limit_bytes=2**63),
        Resources(cpu_millis=1_000, memory_limit_bytes=64 * MIB, cpu_time_limit=Duration(seconds=-1)),
    ],
)
def test_limits_out_of_range(resources: Resources) -> None:
    """A limit that the kernel could not hold a worker to is refused by name."""
    with refused("INVALID_FIELD"):
        policy_of(resources, "b" * 16)


def test_the_outside_network_is_only_for_those_who_have_the_licence() -> None:
    """A namespace that somebody may connect to the world is made when the policy says so, and only then."""
    limits = {"cpu_millis": 1_000, "memory_limit_bytes": 64 * MIB}
    outside = policy_of(Resources(**limits, network=NetworkPolicy(allow_external=True)), "b" * 16)
    assert (outside.external, outside.inet, outside.loopback, outside.proxy) == (True, True, False, False)
    every_other = NetworkPolicy(allow_controller=True, allow_loopback=True, allowed_hosts=["a.example"])
    assert not policy_of(Resources(**limits, network=every_other), "b" * 16).external


def test_a_list_of_hosts_opens_the_proxys_door() -> None:
    """A worker with a list gets the proxy and the variables that lead to it; one without gets neither."""
    network = NetworkPolicy(allowed_hosts=["pypi.org"])
    policy = policy_of(Resources(cpu_millis=10, memory_limit_bytes=16 * MIB, network=network), "a" * 16)
    assert policy.proxy
    assert not policy.loopback
    assert policy.environment["https_proxy"] == policy.environment["HTTP_PROXY"] == "http://127.0.0.1:3128"
    assert policy.environment["NO_PROXY"] == ""
    plain = policy_of(Resources(cpu_millis=10, memory_limit_bytes=16 * MIB), "a" * 16)
    assert not plain.proxy
    assert not plain.environment


def test_a_list_that_is_none_is_refused() -> None:
    """What cannot be held to exactly is refused by its field."""
    network = NetworkPolicy(allowed_hosts=["0x7f.1"])
    with refused("INVALID_FIELD"):
        policy_of(Resources(cpu_millis=10, memory_limit_bytes=16 * MIB, network=network), "a" * 16)


def python(pickled: bytes = b"x", version: str = PYTHON_VERSION) -> Task:
    """Return a Python task."""
    return Task(python=PythonCallable(pickled=pickled, python_version=version))


def command(*argv: str, **environment: str) -> Task:
    """Return a command task."""
    return Task(command=Command(argv=argv, environment=environment))


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (Task(), "INVALID_FIELD"),
        (python(b""), "INVALID_FIELD"),
        (python(bytes(requests.MAX_PICKLED_BYTES + 1)), "TOO_LARGE"),
        (python(version="3.1"), "PYTHON_VERSION_MISMATCH"),
        (python(version=""), "PYTHON_VERSION_MISMATCH"),
        (command(), "INVALID_FIELD"),
        (command(""), "INVALID_FIELD"),
        (command("a\0b"), "INVALID_FIELD"),
        (command("true", **{"A=B": "c"}), "INVALID_FIELD"),
        (command("true", A="c\0d"), "INVALID_FIELD"),
        (command(*["x"] * (requests.MAX_ARGUMENTS + 1)), "INVALID_FIELD"),
        (command("true", "x" * requests.MAX_COMMAND_BYTES), "TOO_LARGE"),
        (Task(command=Command(argv=["true"]), timeout=Duration(seconds=0)), "INVALID_FIELD"),
        (Task(command=Command(argv=["true"]), timeout=Duration(seconds=-5)), "INVALID_FIELD"),
        (Task(command=Command(argv=["true"]), timeout=Duration(seconds=10**9)), "INVALID_FIELD"),
    ],
)
def test_tasks_refused(task: Task, reason: str) -> None:
    """A task that cannot be run as asked is refused before anything runs."""
    with refused(reason):
        task_spec(task, {})


def test_tasks_accepted() -> None:
    """A callable and a command become what init can start."""
    spec = task_spec(python(b"payload"), {"worker": {}})
    assert (spec.kind, spec.entry, spec.payload) == ("call", "replication._inside:run", b"payload")
    spec = task_spec(Task(command=Command(argv=["echo", "hi"]), timeout=Duration(nanos=500_000_000)), {})
    assert (spec.kind, spec.argv, spec.timeout_seconds) == ("exec", ("echo", "hi"), 0.5)


def test_stop_reasons() -> None:
    """A stop is completed or killed, by default completed, and nothing else."""
    assert stop_ask(StopWorkerRequest(detail="done"))[0].reason == EndReason.END_REASON_COMPLETED
    assert (
        stop_ask(StopWorkerRequest(reason=EndReason.END_REASON_KILLED))[0].reason
        == EndReason.END_REASON_KILLED
    )
    with refused("INVALID_FIELD", "reason"):
        stop_ask(StopWorkerRequest(reason=EndReason.END_REASON_OOM_KILLED))


@pytest.mark.parametrize("seconds", [-1, 61, math.inf])
def test_grace_is_bounded(seconds: float) -> None:
    """A grace is from nothing to a minute."""
    grace = Duration(seconds=315_576_000_000 if math.isinf(seconds) else int(seconds))
    with refused("INVALID_FIELD", "grace"):
        stop_ask(StopWorkerRequest(grace=grace))


def test_detail_is_bounded() -> None:
    """Words for the record are few."""
    with refused("INVALID_FIELD", "detail"):
        stop_ask(StopWorkerRequest(detail="x" * 257))
