"""Workers through the SDK: real services, real sandboxes, one set for the whole module."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from replication import (
    Controller,
    EndReason,
    ManifestSigner,
    NetworkPolicy,
    NotAllowed,
    NotFound,
    ReplicationContext,
    ReplicationContract,
    ReplicationDenied,
    ResourceSpec,
    SandboxOrchestrator,
    Stage,
    StopCondition,
    StructuredLogger,
    TaskError,
    TaskKilled,
    TaskTimeout,
    Worker,
    WorkerEnded,
)
from replication.testing import Services, embedded
from tests.integration.conftest import until

SECRET = "only-for-tests"
RESOURCES = ResourceSpec(cpu_limit=1.0, memory_limit_mb=128)


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    """Run one set of services for all tests here."""
    with embedded() as running:
        yield running


class Farm:
    """A contract with what is needed to live under it."""

    def __init__(self, **terms: Any) -> None:
        self.contract = ReplicationContract(
            **{"max_depth": 3, "max_replicas": 10, "cooldown_seconds": 0, **terms}
        )
        self.logger = StructuredLogger()
        self.controller = Controller(self.contract, SECRET, self.logger)
        self.orchestrator = SandboxOrchestrator(self.logger)

    def root(self, resources: ResourceSpec = RESOURCES, **snapshot: Any) -> Worker:
        """Start a root."""
        manifest = self.controller.issue_manifest(None, 0, snapshot, resources)
        return Worker(manifest, self.contract, self.controller, self.orchestrator, self.logger)

    def end_reason(self, worker: Worker) -> EndReason | None:
        """Return why a worker ended, once the controller knows."""
        end = self.controller.worker(worker.worker_id).exit
        return end.reason if end else None


@pytest.fixture
def farm(services: Services) -> Iterator[Callable[..., Farm]]:
    """Return a maker of contracts; whatever lives under them at the end of the test is killed."""
    made: list[Farm] = []

    def make(**terms: Any) -> Farm:
        made.append(Farm(**terms))
        return made[-1]

    yield make
    for one in made:
        one.controller.kill_switch(one.orchestrator)
        assert not one.controller.registry


def test_a_worker_shows_what_its_sandbox_was_measured_to_hold(farm: Callable[..., Farm]) -> None:
    """Under a contract that demands a grade, a worker that runs has it, and its record says so."""
    one = farm(min_grade="C")
    worker = one.root()
    assert worker.perform_task(lambda _: "ran") == "ran"
    # Its node tells the controller with the first beat.
    grade = until(lambda: one.controller.worker(worker.worker_id).isolation_grade)
    assert grade in ("A", "B", "C")


def test_a_task_returns_its_value_and_prints_where_its_caller_prints(
    farm: Callable[..., Farm], capfd: pytest.CaptureFixture[str]
) -> None:
    """The value is JSON, the output is the caller's, and the process is another one."""

    def task(worker: Worker) -> Any:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        return {
            "id": worker.manifest.worker_id,
            "snapshot": worker.manifest.state_snapshot,
            "pid": os.getpid(),
        }

    root = farm().root(job="crawl")
    value = root.perform_task(task)
    assert value["id"] == root.worker_id
    assert value["snapshot"] == {"job": "crawl"}
    assert value["pid"] != os.getpid()
    assert capfd.readouterr() == ("to stdout\n", "to stderr\n")


def test_output_arrives_while_the_task_still_runs(farm: Callable[..., Farm]) -> None:
    """A line is seen before the task that printed it goes on."""

    class Listener:
        encoding = "utf-8"

        def __init__(self) -> None:
            self.heard = threading.Event()

        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            if "working" in text:
                self.heard.set()

        def flush(self) -> None:
            """Nothing is held back."""

    def task(worker: Worker) -> None:
        print("working")
        signal.pause()

    def perform() -> None:
        with pytest.raises(WorkerEnded):
            root.perform_task(task)

    root = farm().root()
    listener = Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", listener)
        running = threading.Thread(target=perform)
        running.start()
        assert listener.heard.wait(20)
    root.shutdown()
    running.join(20)
    assert not running.is_alive()


def test_a_function_of_the_users_own_module_runs_in_the_sandbox(
    farm: Callable[..., Farm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sandbox cannot import goes along."""
    (tmp_path / "my_agent.py").write_text(
        "FACTOR = 2\ndef twice(x): return FACTOR * x\ndef work(worker): return twice(21)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_agent  # type: ignore[import-not-found]

    try:
        assert farm().root().perform_task(my_agent.work) == 42
    finally:
        del sys.modules["my_agent"]


def test_an_exception_comes_back_as_data_and_ends_the_worker(farm: Callable[..., Farm]) -> None:
    """Type, message and traceback arrive; the worker is on record as task_error."""

    def task(worker: Worker) -> None:
        raise KeyError("missing")

    one = farm()
    root = one.root()
    with pytest.raises(TaskError) as raised:
        root.perform_task(task)
    assert (raised.value.type, raised.value.message) == ("builtins.KeyError", "'missing'")
    assert "in task" in raised.value.traceback
    assert one.end_reason(root) is EndReason.TASK_ERROR
    with pytest.raises(WorkerEnded):
        root.perform_task(lambda worker: None)


def test_a_worker_can_be_kept_when_its_task_fails(farm: Callable[..., Farm]) -> None:
    """keep_worker_on_error leaves the worker for another task."""
    root = farm().root()
    with pytest.raises(TaskError):
        root.perform_task(lambda worker: 1 / 0, keep_worker_on_error=True)
    assert root.perform_task(lambda worker: "alive") == "alive"


def test_a_value_that_is_no_json_is_the_tasks_error(farm: Callable[..., Farm]) -> None:
    """What JSON cannot say is refused, and named."""
    with pytest.raises(TaskError) as raised:
        farm().root().perform_task(lambda worker: {1, 2})
    assert raised.value.type == "replication.TaskResultError"


def test_a_task_that_runs_too_long_is_killed(farm: Callable[..., Farm]) -> None:
    """The deadline holds for a task that does not listen."""

    def task(worker: Worker) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()

    with pytest.raises(TaskTimeout):
        farm().root().perform_task(task, timeout_seconds=0.3)


@pytest.mark.layers("memory")
def test_a_worker_that_takes_too_much_memory_ends_as_such(farm: Callable[..., Farm]) -> None:
    """Want of memory is not taken for any other SIGKILL."""

    def task(worker: Worker) -> int:
        return len(bytearray(512 * 1024 * 1024))

    one = farm()
    root = one.root(ResourceSpec(cpu_limit=1.0, memory_limit_mb=64))
    with pytest.raises(TaskKilled) as killed:
        root.perform_task(task)
    assert killed.value.reason == "OOM_KILLED"
    assert one.end_reason(root) is EndReason.OOM_KILLED


def test_a_command_runs_and_its_exit_code_is_told(
    farm: Callable[..., Farm], capfd: pytest.CaptureFixture[str]
) -> None:
    """A program's output and environment are its own; a code other than 0 is an error."""
    root = farm().root()
    root.perform_command(["/bin/sh", "-c", 'echo "$GREETING"'], environment={"GREETING": "hello"})
    assert capfd.readouterr().out == "hello\n"
    with pytest.raises(TaskError) as failed:
        root.perform_command(["/bin/sh", "-c", "exit 3"])
    assert failed.value.exit_code == 3


def test_a_worker_replicates_from_outside_and_the_family_is_on_record(farm: Callable[..., Farm]) -> None:
    """A child is one deeper, inherits what it is not given, and its lineage says so."""
    one = farm(max_depth=2)
    root = one.root(task="all")
    child = root.maybe_replicate("half", {"task": "half"}, ResourceSpec(0.5, 64))
    assert child is not None
    assert (child.manifest.depth, child.manifest.parent_id) == (1, root.worker_id)
    grandchild = child.replicate("quarter")
    assert grandchild.manifest.state_snapshot == {"task": "half"}
    assert grandchild.manifest.resources.memory_limit_mb == 64
    with pytest.raises(ReplicationDenied) as denied:
        grandchild.replicate("too deep")
    assert denied.value.reason == "DEPTH_EXCEEDED"
    lineage = one.controller.lineage(child.worker_id)
    assert [entry.manifest.worker_id for entry in lineage.ancestors] == [root.worker_id]
    assert [entry.manifest.worker_id for entry in lineage.descendants] == [grandchild.worker_id]
    child.shutdown("done")
    assert list(one.controller.registry) == [root.worker_id]
    assert one.controller.lineage(root.worker_id).descendants[1].exit is not None


def test_a_denial_is_none_or_an_exception_with_the_rule(farm: Callable[..., Farm]) -> None:
    """maybe_replicate says None where replicate says why and how long to wait."""
    root = farm(cooldown_seconds=3_600, max_replicas=3).root()
    assert root.maybe_replicate("first") is not None
    assert root.maybe_replicate("too soon") is None
    with pytest.raises(ReplicationDenied) as denied:
        root.replicate("too soon")
    assert denied.value.reason == "COOLDOWN_NOT_SATISFIED"
    assert denied.value.retry_after_seconds is not None
    assert 3_500 < denied.value.retry_after_seconds <= 3_600


def test_a_task_replicates_from_inside(farm: Callable[..., Farm], capfd: pytest.CaptureFixture[str]) -> None:
    """Inside, the same worker object makes children, gives them tasks, hears them and ends them."""

    def task(worker: Worker) -> Any:
        child = worker.maybe_replicate("inside", {"half": 1})
        assert child is not None
        assert isinstance(child, Worker)

        def work(own: Worker) -> Any:
            print("child speaks")
            return [
                own.manifest.state_snapshot["half"],
                own.manifest.depth,
                own.maybe_replicate("deeper") is None,
            ]

        value = child.perform_task(work)
        try:
            child.perform_task(lambda own: 1 / 0, keep_worker_on_error=True)
        except TaskError as error:
            value.append(error.type)
        child.shutdown("done")
        child.shutdown("done again")
        return value

    one = farm(max_depth=1)
    assert one.root().perform_task(task) == [1, 1, True, "builtins.ZeroDivisionError"]
    assert capfd.readouterr().out == "child speaks\n"
    assert len(one.controller.registry) == 1


def test_a_worker_acts_on_its_own_descendants_only(farm: Callable[..., Farm]) -> None:
    """From inside, a worker that is not its descendant is not there for it."""
    one = farm()
    stranger = one.root()

    def task(worker: Any, other: str) -> str:
        from replication.errors import NotAllowed as Refused

        child = worker.replicate("a way in")
        object.__setattr__(child.manifest, "worker_id", other)
        try:
            child.perform_task(lambda own: None)
        except Refused as refusal:
            return refusal.reason
        return "got in"

    other = stranger.worker_id
    assert one.root().perform_task(lambda worker: task(worker, other)) == "NOT_A_DESCENDANT"
    assert issubclass(NotAllowed, PermissionError)
    assert stranger.state.alive


def test_a_worker_ends_itself_from_inside(farm: Callable[..., Farm]) -> None:
    """A task that shuts its own worker down does not live to return."""
    one = farm()
    root = one.root()
    with pytest.raises(WorkerEnded):
        root.perform_task(lambda worker: worker.shutdown("had enough"))
    end = one.controller.worker(root.worker_id).exit
    assert end is not None
    assert (end.reason, end.detail) == (EndReason.COMPLETED, "had enough")


def test_an_expired_worker_is_denied_its_task(farm: Callable[..., Farm]) -> None:
    """Expiry ends a task that runs, and the next is denied for the same reason."""
    one = farm(expiration_seconds=0.5)
    root = one.root()
    with pytest.raises(ReplicationDenied) as denied:
        root.perform_task(lambda worker: signal.pause())
    assert denied.value.reason == "WORKER_EXPIRED"
    with pytest.raises(ReplicationDenied) as denied:
        root.perform_task(lambda worker: None)
    assert denied.value.reason == "WORKER_EXPIRED"
    assert one.end_reason(root) is EndReason.EXPIRED
    root.shutdown()


def test_the_kill_switch_ends_all_and_lets_none_be_born(farm: Callable[..., Farm]) -> None:
    """After the switch answers nothing lives, nothing is born, and each is told why."""
    one = farm()
    root = one.root()
    child = root.replicate("more")
    early = one.controller.issue_manifest(None, 0, {}, RESOURCES)
    done = one.controller.kill_switch(one.orchestrator)
    assert set(done.worker_ids) == {root.worker_id, child.worker_id}
    assert done.unconfirmed_worker_ids == ()
    assert done.count == 2
    assert one.controller.kill_switch_engaged
    assert not one.controller.registry
    for action in (
        lambda: root.perform_task(lambda worker: None),
        one.root,
        lambda: Worker(early, one.contract, one.controller, one.orchestrator),
    ):
        with pytest.raises(ReplicationDenied) as denied:
            action()
        assert denied.value.reason == "KILL_SWITCH_ENGAGED"
    assert root.maybe_replicate("again") is None
    root.shutdown()  # what has ended stays as it is
    one.controller.release_kill_switch("tested")
    assert not one.controller.kill_switch_engaged
    with one.root() as again:
        assert again.perform_task(lambda worker: 1) == 1
    with pytest.raises(ReplicationDenied) as denied:
        Worker(early, one.contract, one.controller, one.orchestrator)
    assert denied.value.reason == "KILL_SWITCH_ENGAGED"


def test_the_kill_switch_over_a_subtree_spares_the_rest(farm: Callable[..., Farm]) -> None:
    """Only the worker named and its descendants end."""
    one = farm()
    root = one.root()
    child = root.replicate("more")
    grandchild = child.replicate("more")
    done = one.controller.kill_switch(subtree_of=child.worker_id)
    assert set(done.worker_ids) == {child.worker_id, grandchild.worker_id}
    assert list(one.controller.registry) == [root.worker_id]
    assert not one.controller.kill_switch_engaged


def test_a_manifest_is_good_once_and_only_as_it_was_issued(farm: Callable[..., Farm]) -> None:
    """Edited, forged, signed with another secret, or used before: each is denied by its own name."""
    one = farm()
    manifest = one.controller.issue_manifest(None, 0, {"x": 1.5e-7, "é": [1.0]}, RESOURCES)
    assert ManifestSigner(SECRET).verify(manifest)

    def launch(changed: Any) -> str:
        with pytest.raises(ReplicationDenied) as denied:
            Worker(changed, one.contract, one.controller, one.orchestrator)
        return denied.value.reason

    for change in (
        {"resources": ResourceSpec(2.0, 256)},
        {"state_snapshot": {"x": 2}},
        {"signature": "00" * 32},
        {"signature": "forged"},
        {"expires_at": datetime(2200, 1, 1, tzinfo=UTC)},
    ):
        assert launch(dataclasses.replace(manifest, **change)) == "MANIFEST_SIGNATURE_INVALID"  # type: ignore[arg-type]
    assert launch(ManifestSigner("another-secret").sign(manifest)) == "MANIFEST_SIGNATURE_INVALID"
    Worker(manifest, one.contract, one.controller, one.orchestrator).shutdown()
    assert launch(manifest) == "MANIFEST_ALREADY_USED"


def too_many(context: ReplicationContext) -> bool:
    """Block the third worker."""
    return context.active_count >= 2 or context.manifest.state_snapshot.get("bad", False)


@pytest.mark.parametrize(
    "condition",
    [
        StopCondition("limit", "at most two", too_many),
        StopCondition("limit", "at most two", cel="active_count >= 2"),
    ],
    ids=["python", "cel"],
)
def test_a_stop_condition_denies_the_birth_it_is_about(
    farm: Callable[..., Farm], condition: StopCondition
) -> None:
    """A rule in Python, or in CEL, holds when a worker registers, and is named."""
    one = farm(stop_conditions=[condition])
    root = one.root()
    assert root.maybe_replicate("second") is not None
    with pytest.raises(ReplicationDenied) as denied:
        root.replicate("third")
    assert denied.value.reason == "STOP_CONDITION_TRIGGERED"
    assert denied.value.details["condition"] == "limit"
    assert denied.value.details["cause"] == "triggered"


@pytest.mark.parametrize(
    "predicate",
    [lambda context: 1 / 0, lambda context: 1, lambda context: signal.pause(), lambda context: os._exit(0)],
    ids=["raises", "no_bool", "hangs", "exits"],
)
def test_a_predicate_that_gives_no_answer_denies(farm: Callable[..., Farm], predicate: Any) -> None:
    """Whatever keeps a rule from saying no says no."""
    one = farm(stop_conditions=[StopCondition("broken", predicate=predicate, timeout_seconds=0.5)])
    with pytest.raises(ReplicationDenied) as denied:
        one.root()
    assert denied.value.reason == "STOP_CONDITION_TRIGGERED"
    assert denied.value.details["cause"] != "triggered"


@pytest.mark.layers("kill")
def test_a_quarantined_worker_stands_still_until_released(farm: Callable[..., Farm]) -> None:
    """Frozen, a worker neither works nor replicates; thawed, it does both."""
    one = farm()
    root = one.root()
    child = root.replicate("more")
    assert set(one.controller.mark_quarantined(root.worker_id, "looks odd")) == {
        root.worker_id,
        child.worker_id,
    }
    assert one.controller.is_quarantined(root.worker_id)
    evidence = one.orchestrator.evidence(root.worker_id)
    assert set(evidence.summary["worker_ids"]) == {root.worker_id, child.worker_id}
    assert f"workers/{child.worker_id}/processes.json" in evidence.documents
    recorded = [event for event in one.logger.events if event["event"] == "evidence_captured"]
    assert recorded[-1]["sha256"] == evidence.sha256
    for action in (lambda: root.replicate("more"), lambda: root.perform_task(lambda worker: None)):
        with pytest.raises(ReplicationDenied) as denied:
            action()
        assert denied.value.reason == "QUARANTINED"
    one.controller.clear_quarantine(root.worker_id)
    assert not one.controller.is_quarantined(root.worker_id)
    assert root.perform_task(lambda worker: "thawed") == "thawed"


@pytest.mark.layers("memory")
def test_a_container_tells_what_the_kernel_holds(farm: Callable[..., Farm]) -> None:
    """A record's process is there, with the record's own user and control group; an ended one says why."""
    one = farm()
    root = one.root()
    record = one.orchestrator.containers[root.worker_id]
    assert record.status is Stage.RUNNING
    assert record.resources == root.manifest.resources
    status = Path(f"/proc/{record.host_pid}/status").read_text()
    assert f"Uid:\t{record.host_uid}\t" in status
    assert record.host_uid not in (0, os.getuid())
    assert record.cgroup_path in Path(f"/proc/{record.host_pid}/cgroup").read_text()
    one.orchestrator.kill_worker(root.worker_id, "enough")
    assert not Path(f"/proc/{record.host_pid}").exists()
    ended = one.orchestrator.containers[root.worker_id]
    assert (ended.status, ended.reason, ended.host_pid) == (Stage.ENDED, "killed", 0)
    one.orchestrator.kill_worker(root.worker_id, "again")
    with pytest.raises(NotFound):
        one.orchestrator.kill_worker("feed", "never there")


def test_the_record_of_a_contract_is_shown_whole_and_alone(farm: Callable[..., Farm]) -> None:
    """A logger shows its own contract's events, in order, and the record checks out."""
    one, other = farm(), farm()
    root = one.root()
    root.perform_task(lambda worker: None)
    other.root().shutdown("other")
    before = len(one.logger.events)
    root.shutdown("my words")
    events = one.logger.events
    assert len(events) > before
    names = [(event["event"], event.get("decision")) for event in events if event["event"] != "heartbeat"]
    assert names[:2] == [("audit", "contract_created"), ("audit", "replication_requested")]
    assert ("worker_started", None) in names
    shutdown = next(event for event in events if event["event"] == "worker_shutdown")
    assert (shutdown["worker_id"], shutdown["reason"], shutdown["depth"]) == (root.worker_id, "my words", 0)
    assert {event["contract_id"] for event in events} == {one.controller.contract_id}
    assert all(event["timestamp"].tzinfo is UTC for event in events)
    assert {metric.name for metric in one.logger.metrics} >= {"memory_peak_bytes", "cpu_seconds"}
    assert {metric.labels["worker_id"] for metric in one.logger.metrics} == {root.worker_id}
    check = one.logger.verify()
    assert check.intact
    assert check.entry_count >= len(events)


def test_a_logger_follows_what_happens(farm: Callable[..., Farm]) -> None:
    """Tail yields each event of the contract as it is recorded."""
    one = farm()
    seen: list[dict[str, Any]] = []
    ended = threading.Event()

    def follow() -> None:
        for event in one.logger.tail():
            seen.append(event)
            if event["event"] == "worker_shutdown":
                ended.set()
                return

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    while not ended.wait(0.2):
        one.root().shutdown()
    following.join(20)
    assert {event["contract_id"] for event in seen} == {one.controller.contract_id}


def test_no_worker_that_is_alive_is_reaped(farm: Callable[..., Farm]) -> None:
    """A worker that beats is not stale."""
    one = farm()
    root = one.root()
    assert one.controller.reap_stale_workers(30.0, one.orchestrator) == []
    assert root.state.alive


@pytest.mark.layers("uid-range", "memory", "cpu", "pids", "kill")
def test_a_registry_entry_is_what_the_controller_knows(farm: Callable[..., Farm]) -> None:
    """An entry has the manifest as issued, and times that make sense."""
    one = farm(expiration_seconds=60)
    root = one.root()
    entry = one.controller.registry[root.worker_id]
    assert entry.manifest == root.manifest
    assert entry.stage in (Stage.STARTING, Stage.RUNNING)  # until its node's next beat
    assert entry.created_at is not None
    assert entry.expires_at is not None
    assert (entry.expires_at - entry.created_at).total_seconds() == 60
    assert entry.node_id.startswith("embedded-")
    assert entry.degraded_layers == ()
    assert root.state.manifest == root.manifest


INTERRUPTED = """
import signal, sys
from replication import *
contract = ReplicationContract(1, 2, 0)
controller = Controller(contract, "only-for-tests")
orchestrator = SandboxOrchestrator()
manifest = controller.issue_manifest(None, 0, {}, ResourceSpec(1, 128))
root = Worker(manifest, contract, controller, orchestrator)
try:
    root.perform_task(lambda worker: (print("running"), signal.pause()))
except KeyboardInterrupt:
    print("interrupted", root.perform_task(lambda worker: "alive"))
"""


def test_an_interrupt_ends_the_task_and_not_the_program(tmp_path: Path) -> None:
    """Ctrl-C while a task runs is a KeyboardInterrupt, the task is gone, and the worker can go on."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-u", "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "running\n"
        os.killpg(program.pid, signal.SIGINT)
        assert program.communicate(timeout=60)[0] == "interrupted alive\n"
    assert program.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_policy_is_narrowed_and_never_widened(farm: Callable[..., Farm]) -> None:
    """Licences are taken from a living worker by one call; asking for more is refused by class and reason."""
    one = farm()
    policy = NetworkPolicy(allow_controller=True, allowed_hosts=["a.example", "b.example"], egress_limit_mb=1)
    worker = one.root(ResourceSpec(cpu_limit=1.0, memory_limit_mb=128, network_policy=policy))
    assert worker.perform_task(lambda it: __import__("os").environ["https_proxy"]) == "http://127.0.0.1:3128"
    left = NetworkPolicy(allow_controller=False, allowed_hosts=["a.example"], egress_limit_mb=1)
    one.controller.narrow_network(worker.worker_id, left, "only this one")
    child = worker.replicate("it gets what is left to its parent", {})
    assert child.manifest.resources.network_policy == left
    with pytest.raises(NotAllowed) as caught:
        one.controller.narrow_network(worker.worker_id, policy)
    assert caught.value.reason == "NOT_NARROWER"
    one.controller.narrow_network(worker.worker_id, NetworkPolicy(allow_controller=False))
    with pytest.raises(NotAllowed):
        one.controller.narrow_network(worker.worker_id, left)
