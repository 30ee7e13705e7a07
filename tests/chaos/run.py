"""One run: a fleet under load while faults come and go, then the verdict, from the log alone."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from hayflick.v1 import controller_pb2 as pb
from hayflick.v1.resources_pb2 import STATE_ENDED
from hayflick_cli import family_tree
from hayflick_cli.entries import Entry, parse
from hayflick_cli.judgement import Judgement, judge
from hayflick_cli.log_source import load_key, open_source
from hayflick_tlog.verify import verify_log

from ..integration.conftest import duration, request_id
from .faults import FAULTS, Heal
from .fleet import Fleet
from .kernel import processes
from .ledger import Ledger
from .workload import Workload, insist

SETTLE_SECONDS = 60.0


@dataclass
class Report:
    """What came of a run.

    Attributes:
        name: Which run.
        seed: Of its choices.
        faults: How often each kind was injected.
        judgement: What the log says.
        ledger: What the driver was told.
        wrong: Everything that broke a promise, in words; empty when all is well.
        kept: Where the log is kept, when something is wrong.
        notes: What else was measured.
    """

    name: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    judgement: Judgement = field(default_factory=Judgement)
    ledger: Ledger = field(default_factory=Ledger)
    wrong: list[str] = field(default_factory=list)
    kept: Path | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the summary, as it is printed."""
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        refused: Counter[str] = Counter()
        for what, count in self.ledger.refusals.items():
            refused[what.partition(": ")[2]] += count
        return [
            f"{self.name}, seed {self.seed}: {sum(self.faults.values())} faults injected: {faults}",
            f"  acknowledged: {len(self.ledger.births)} births, {len(self.ledger.ends)} ends",
            f"  acknowledged: {len(self.ledger.kills)} kills; given up: {sum(self.ledger.unknown.values())}",
            f"  refused: {', '.join(f'{name} {count}' for name, count in refused.most_common())}",
            *(f"  {note}" for note in self.notes),
            f"  {family_tree.summary(self.judgement)}",
            *(f"  {line}" for line in family_tree.table(self.judgement)),
            *(f"  WRONG: {words}" for words in self.wrong),
            *([f"  the log is kept in {self.kept}"] if self.kept else []),
        ]


def storm(fleet: Fleet, report: Report, seconds: float) -> None:
    """Inject faults under load for *seconds*, then let everything settle and judge."""
    chance = random.Random(report.seed)
    workload = Workload(fleet, report.ledger, report.seed)
    fleet.wait_ready()
    try:
        workload.start()
        _inject(fleet, report, chance, seconds)
    finally:
        workload.stop()
    report.wrong += workload.errors
    settle(fleet, report)


def settle(fleet: Fleet, report: Report) -> None:
    """End everyone, hear what the log says, and end the services."""
    fleet.mend()
    fleet.wait_ready()
    _kill_everything(fleet, report)
    _wait_recorded(fleet, report)
    for node_id in fleet.node_ids:
        if left := processes(node_id):
            report.wrong.append(f"the kernel shows {len(left)} processes of {node_id} after the last kill")
    report.wrong += [
        f"a service of ours failed: {what}"
        for what in report.ledger.refusals
        if what.split(": ")[1] in ("INTERNAL", "UNKNOWN")
    ]
    statuses = fleet.end()
    report.wrong += [f"{name} ended with status {status}" for name, status in statuses.items() if status]
    _judge_files(fleet, report)


def _inject(fleet: Fleet, report: Report, chance: random.Random, seconds: float) -> None:
    """Let one fault follow the other, now and then two at once."""
    possible = [fault for fault in FAULTS if fault.possible(fleet)]
    lasting, deadline = threading.Event(), time.monotonic() + seconds
    bag: list[int] = []
    heals: list[Heal] = []
    try:
        while time.monotonic() < deadline:
            for _ in range(chance.choice([1, 1, 1, 2])):
                if not bag:  # each kind comes before any comes again
                    bag = chance.sample(range(len(possible)), len(possible))
                fault = possible[bag.pop()]
                heals.append(fault.begin(fleet, chance))
                report.faults[fault.name] += 1
            lasting.wait(chance.choice([0.02, 0.1, 0.3, 1.0, fleet.size.lease_seconds * 1.7]))
            # What was stopped goes on before anything is started: a start may wait for it.
            for heal in reversed(heals):
                heal()
            heals.clear()
            fleet.mend()
            lasting.wait(chance.uniform(0.05, 1.0))
    finally:
        for heal in reversed(heals):
            heal()


def _kill_everything(fleet: Fleet, report: Report) -> None:
    request = pb.EngageKillSwitchRequest(
        request_id=request_id(), scope=pb.Scope(everything=True), reason="the end", timeout=duration(10)
    )
    chance = random.Random(report.seed)
    answer = insist(
        "the last kill",
        lambda: chance.choice(fleet.stubs).EngageKillSwitch(request, timeout=20),
        report.ledger,
        SETTLE_SECONDS,
    )
    report.ledger.killed("everything", answer)
    deadline = time.monotonic() + SETTLE_SECONDS
    pause = threading.Event()
    while living := _living(fleet):
        if time.monotonic() > deadline:
            report.wrong.append(f"{len(living)} workers live on after the last kill, among them {living[0]}")
            return
        pause.wait(0.2)


def _living(fleet: Fleet) -> list[str]:
    living, token = [], ""
    while True:
        try:
            page = fleet.stubs[0].ListWorkers(
                pb.ListWorkersRequest(page_size=1_000, page_token=token), timeout=10
            )
        except grpc.RpcError:
            return ["somebody, as far as is known"]
        living += [worker.worker_id for worker in page.workers if worker.state != STATE_ENDED]
        token = page.next_page_token
        if not token:
            return living


def _wait_recorded(fleet: Fleet, report: Report) -> None:
    """Judge the log of the running logger until nothing is under way to it, or it is too late."""
    deadline = time.monotonic() + SETTLE_SECONDS / 2
    pause = threading.Event()
    while True:
        log = read(f"unix://{fleet.socket('logger')}", fleet)
        judgement = judge(log)
        alive = any(
            life.end is None for history in judgement.histories.values() for life in history.lives.values()
        )
        if judgement.kept and not alive and not any(report.ledger.missing(log, judgement)):
            return
        if time.monotonic() > deadline:
            return  # what is wrong is said when the files are judged
        pause.wait(1.0)


def read(where: str, fleet: Fleet) -> list[Entry]:
    """Return the entries of a log that was signed by the logger's key."""
    entries: list[Entry] = []
    with open_source(where) as source:
        finding = verify_log(
            source.read,
            source.checkpoint,
            load_key(str(fleet.logger_directory / "log.pub")),
            on_entry=lambda _, data: entries.append(parse(data)),
        )
    assert finding.intact, finding.detail
    return entries


def _judge_files(fleet: Fleet, report: Report) -> None:
    """Judge the files alone, as anybody may who has them and the key, with nothing running."""
    where = fleet.logger_directory
    log = read(str(where), fleet)
    report.judgement = judge(log)
    report.wrong += [
        f"entry {violation.index} breaks {violation.promise}: {violation.detail}"
        for violation in report.judgement.violations
    ]
    report.wrong += report.ledger.missing(log, report.judgement)
    alive = [
        worker_id
        for history in report.judgement.histories.values()
        for worker_id, life in history.lives.items()
        if life.end is None
    ]
    report.wrong += [f"worker {worker_id} has no end on record" for worker_id in alive]
    command = [
        sys.executable,
        "-m",
        "hayflick_cli",
        "audit",
        "judge",
        str(where),
        "--key",
        f"{where}/log.pub",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if (done.returncode == 0) != report.judgement.kept:
        report.wrong.append(f"`hayflick audit judge` ends with {done.returncode}: {done.stderr[:500]}")
    if report.wrong:
        report.kept = keep(fleet)


def keep(fleet: Fleet, sources: Sequence[str] = ("*.log",)) -> Path:
    """Copy the log, and what the services wrote, to where it outlives the run; return where."""
    kept = Path(tempfile.mkdtemp(prefix="hf-chaos-kept-"))
    shutil.copytree(fleet.logger_directory, kept / "logger", ignore=shutil.ignore_patterns("filler", "*.key"))
    for pattern in sources:
        for path in fleet.directory.glob(pattern):
            shutil.copy(path, kept)
    return kept
