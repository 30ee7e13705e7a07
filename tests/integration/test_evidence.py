"""Evidence of quarantined workers, captured from outside while they do their worst inside."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import logger_pb2
from hayflick.v1.orchestrator_pb2 import GetEvidenceRequest

from .conftest import Stack, call, refused, running_stack, shell, until
from .test_quarantine import quarantine, release

if TYPE_CHECKING:
    from hayflick.v1.resources_pb2 import Worker

pytestmark = pytest.mark.layers("kill")  # evidence is of a freeze

Json = dict[str, Any]


def bundle(stack: Stack, worker_id: str) -> tuple[bytes, dict[str, Json]]:
    """Return the newest bundle that shows a worker: its bytes, and its documents."""
    data, summary = b"", None
    for response in stack.orchestrator.GetEvidence(GetEvidenceRequest(worker_id=worker_id)):
        assert len(response.data) <= 1024 * 1024
        data += response.data
        summary = response.summary if response.HasField("summary") else summary
    assert summary is not None
    assert (summary.size_bytes, summary.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return data, {entry.name: json.loads(tar.extractfile(entry).read()) for entry in tar}  # type: ignore[union-attr]


def captured(stack: Stack, worker: Worker) -> Json:
    """Return the newest event about a capture."""

    def find() -> Json | None:
        request = logger_pb2.ListEventsRequest(
            filter=logger_pb2.EventFilter(worker_id=worker.worker_id), page_size=1_000
        )
        events = [recorded.event for recorded in stack.logger.ListEvents(request).events]
        found = [event for event in events if event.event.startswith("evidence_")]
        return {"event": found[-1].event, **dict(found[-1].details)} if found else None

    found: Json = until(find)
    return found


def entries(documents: dict[str, Json], worker: Worker, directory: str = "workspace") -> dict[str, Json]:
    """Return what a bundle lists of a worker's directory, by path."""
    found = documents[f"workers/{worker.worker_id}/files.json"]["directories"][directory]["entries"]
    return {entry["path"]: entry for entry in found}


@pytest.mark.root
def test_what_a_bundle_shows(stack: Stack) -> None:
    """A bundle shows each worker's record, processes, files and last output, and its hash is on record."""
    root = stack.launch()
    child = stack.launch(root.contract_id, root.worker_id)
    script = (
        "echo evidence > kept; mkdir d; echo deep > d/file; echo t > /tmp/t; exec 7< kept; "
        "echo said; echo more >&2; SECRET=canary-canary exec sleep 1000"
    )
    stream = stack.begin(child, shell(script))
    pid = stack.sandboxes()[child.worker_id].host_pid
    until(lambda: b"sleep" in _processes_of(stack, child))
    quarantine(stack, root)
    data, documents = bundle(stack, root.worker_id)
    summary = documents["bundle.json"]
    assert summary["worker_id"] == root.worker_id
    assert set(summary["worker_ids"]) == {root.worker_id, child.worker_id}
    assert summary["left_out"] == {}
    listed = entries(documents, child)
    assert listed["kept"]["sha256"] == hashlib.sha256(b"evidence\n").hexdigest()
    assert listed["d/file"]["sha256"] == hashlib.sha256(b"deep\n").hexdigest()
    assert "t" in entries(documents, child, "tmp")
    assert entries(documents, root) == {}
    processes = documents[f"workers/{child.worker_id}/processes.json"]["processes"]
    init, task = processes
    assert init["pid"] == pid
    assert init["stat"]["comm"] == "hayflick-init"
    assert init["status"]["NSpid"].split()[-1] == "1"
    assert task["cmdline"] == ["sleep", "1000"]
    assert task["exe"].endswith("/sleep")
    assert task["status"]["CapBnd"] == "0000000000000000"
    assert task["status"]["Seccomp"] == "2"
    assert any("sleep" in line for line in task["maps"])
    (kept,) = [one for one in task["descriptors"] if one["fd"] == 7]
    assert kept["target"].endswith("/workspace/kept")
    assert kept["position"] == "0"
    output = documents[f"workers/{child.worker_id}/output.json"]
    said = "".join(one["text"] for one in output["printed"] + output["held"] if one["stream"] == "stdout")
    assert said == "said\n"
    record = documents[f"workers/{child.worker_id}/worker.json"]["worker"]
    assert record["state"] == "STATE_QUARANTINED"
    assert "state_snapshot_json" not in record["manifest"]
    assert record["attestation"]["probes"]
    assert not any(b"canary" in json.dumps(document).encode() for document in documents.values())
    event = captured(stack, root)
    assert event["event"] == "evidence_captured"
    assert event["sha256"] == hashlib.sha256(data).hexdigest()
    assert event["size_bytes"] == len(data)
    assert event["worker_count"] == 2
    assert event["process_count"] == 3
    # A descendant's newest evidence is the same bundle, and outlives both.
    assert bundle(stack, child.worker_id)[0] == data
    stack.kill(worker_id=root.worker_id)
    assert bundle(stack, child.worker_id)[0] == data
    list(stream)


def _processes_of(stack: Stack, worker: Worker) -> bytes:
    pid = stack.sandboxes()[worker.worker_id].host_pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return b"".join(Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read it all")
def test_what_an_ordinary_user_may_not_read(stack: Stack) -> None:
    """Without root a bundle shows what may be read, and names what may not."""
    worker = stack.launch()
    stream = stack.begin(worker, shell("echo evidence > kept; echo said; exec sleep 1000"))
    quarantine(stack, worker)
    _, documents = bundle(stack, worker.worker_id)
    assert documents[f"workers/{worker.worker_id}/files.json"] == {"unreadable": "EACCES"}
    init, task = documents[f"workers/{worker.worker_id}/processes.json"]["processes"]
    assert init["unreadable_parts"]["maps"] == "EACCES"
    assert init["status"]["Name"] == "hayflick-init"
    assert task["status"]["Seccomp"] == "2"
    left_out = documents["bundle.json"]["left_out"]
    assert left_out["unreadable_roots"] == 1
    assert left_out["unreadable_process_parts"] >= len(init["unreadable_parts"])
    stack.kill(worker_id=worker.worker_id)
    list(stream)


def test_held_output_is_shown_and_still_delivered(stack: Stack) -> None:
    """Output that waits in quarantine is in the bundle, and then reaches its reader, each byte once."""
    worker = stack.launch()
    count = 40_000
    stream = stack.orchestrator.RunTask(_request(worker, f"seq 1 {count}; sleep 0.1"))
    assert next(stream).HasField("started")
    quarantine(stack, worker)
    _, documents = bundle(stack, worker.worker_id)
    output = documents[f"workers/{worker.worker_id}/output.json"]
    assert output["running_task_ids"]
    release(stack, worker)
    printed = b"".join(response.output.data for response in stream)
    assert printed == b"".join(b"%d\n" % number for number in range(1, count + 1))
    for one in output["held"]:
        assert one["text"].encode() in printed
    stack.stop(worker)


def _request(worker: Worker, script: str) -> Any:
    from hayflick.v1.orchestrator_pb2 import RunTaskRequest

    return RunTaskRequest(worker_id=worker.worker_id, task=shell(script))


def plant(worker: Any) -> None:
    """Fill the workspace with what should harm whoever looks at it from outside."""
    import os
    import socket
    import time
    from pathlib import Path

    for name, target in {
        "passwd": "/etc/passwd",
        "root": "/",
        "up": "../../../../../../etc",
        "magic": "/proc/self/root/etc/shadow",
        "descriptor": "/proc/1/fd/0",
    }.items():
        Path(name).symlink_to(target)
        Path("/tmp", name).symlink_to(target)
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
    with Path("sparse").open("wb") as file:
        file.truncate(8 * 1024 * 1024)
    Path("deep/" + "d/" * 100).mkdir(parents=True)
    os.close(os.open(b"\xff\xfe\n", os.O_CREAT | os.O_WRONLY))
    try:
        for number in range(100_000):
            Path(f"flood-{number}").mkdir()
    except OSError:
        pass  # the workspace takes so many
    print("planted", flush=True)
    time.sleep(1_000)


@pytest.mark.root
def test_what_a_worker_planted_harms_nobody(stack: Stack) -> None:
    """Links, FIFOs, sparse files, deep trees and floods are listed within bounds, and no file of the host."""
    worker = stack.launch(workspace_limit_bytes=16 * 1024 * 1024)
    stream = stack.begin(worker, call(plant))
    quarantine(stack, worker)
    data, documents = bundle(stack, worker.worker_id)
    event = captured(stack, worker)
    found = entries(documents, worker)
    for path, kind in (("fifo", "fifo"), ("socket", "socket"), ("passwd", "link"), ("root", "link")):
        assert found.get(path, {"kind": kind})["kind"] == kind
    temporary = entries(documents, worker, "tmp")
    assert {entry["kind"] for entry in temporary.values()} == {"link"}
    assert set(temporary) == {"passwd", "root", "up", "magic", "descriptor"}
    assert hashlib.sha256(Path("/etc/passwd").read_bytes()).hexdigest() not in json.dumps(documents)
    assert not any(name.startswith(("root/", "up/")) for name in found)
    assert len(found) <= 1_000
    assert event["left_out"]["directories_cut_short"] >= 1
    assert len(data) < 1024 * 1024
    assert event["elapsed_seconds"] < 10
    stack.kill(worker_id=worker.worker_id)
    list(stream)


def test_evidence_of_nobody(stack: Stack) -> None:
    """A worker that was never quarantined has no evidence, and neither has one that never was."""
    worker = stack.launch()
    for worker_id in (worker.worker_id, "nobody"):
        with refused("EVIDENCE_UNKNOWN"):
            bundle(stack, worker_id)
    stack.stop(worker)


def test_a_large_family() -> None:
    """Of a large family the first are captured in full; the bundle names all, and counts the rest."""
    with running_stack() as stack:
        contract = stack.contract(max_replicas=50)
        root = stack.launch(contract)
        for _ in range(40):
            stack.launch(contract, root.worker_id)
        quarantine(stack, root)
        _, documents = bundle(stack, root.worker_id)
        summary = documents["bundle.json"]
        assert len(summary["worker_ids"]) == 41
        assert len(summary["captured_worker_ids"]) == 32
        assert summary["captured_worker_ids"][0] == root.worker_id
        assert captured(stack, root)["left_out"]["workers"] == 9
        # It lies where the operator said, for this user alone, and a successor still has it.
        (file,) = (stack.directory / "orchestrator/evidence").iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        stack.kill(contract_id=contract)
        stack.end("orchestrator")
        stack.start("orchestrator")
        until(lambda: bundle(stack, root.worker_id)[1]["bundle.json"] == summary)


def test_a_second_quarantine_is_new_evidence(stack: Stack) -> None:
    """Each freeze is captured anew; an order that changes nothing is not."""
    worker = stack.launch()
    quarantine(stack, worker)
    first, _ = bundle(stack, worker.worker_id)
    quarantine(stack, worker)
    assert bundle(stack, worker.worker_id)[0] == first
    release(stack, worker)
    stack.run(worker, shell("echo new"))
    quarantine(stack, worker)
    second, documents = bundle(stack, worker.worker_id)
    assert second != first
    output = documents[f"workers/{worker.worker_id}/output.json"]
    assert [piece["text"] for piece in output["printed"]] == ["new\n"]
    stack.kill(worker_id=worker.worker_id)
