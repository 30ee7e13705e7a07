"""The main job, end to end, on real processes: what ``make demo`` runs.

A root worker takes a folder of text, replicates children, and each child counts
words in a sandbox of its own. Then the contract says no, the kill switch stops
everything, and the audit trail shows all of it.

Usage: python examples/main_job.py [FOLDER]
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.probe import INDISPENSABLE, probe
from replication import (
    Controller,
    ReplicationContract,
    ReplicationDenied,
    ResourceSpec,
    SandboxOrchestrator,
    StopCondition,
    StructuredLogger,
    Worker,
)
from replication.testing import embedded

CHILDREN = 4
MAX_TEXT_BYTES = 4 * 1024 * 1024
SUFFIXES = frozenset({".py", ".md", ".proto", ".toml", ".txt"})
SKIPPED = frozenset({".venv", ".git", "node_modules"})
SMALL = ResourceSpec(cpu_limit=0.5, memory_limit_mb=128)


def main() -> int:
    """Run the whole demonstration; return the exit status."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    started = time.monotonic()
    degraded = missing_layers()
    for layer in degraded:
        print(f"! this machine lacks the layer {layer!r}; going on without it, and the record says so")
    with embedded(allow_degraded=degraded) as services:
        heading("Three services, each a process of its own")
        for name, pid in services.pids.items():
            print(f"  {name:<12} pid {pid:<7} {services.address(name)}")
        logger = StructuredLogger()
        count_words(folder, logger)
        say_no(logger)
        kill_everything(logger)
        show_trail(logger)
    print(
        f"\nEverything above took {time.monotonic() - started:.1f} s; nothing of it is left on this machine."
    )
    return 0


def missing_layers() -> tuple[str, ...]:
    """Return the layers of the sandbox that this machine lacks and one can do without."""
    tree = Tree.create(f"demo-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        layers = probe(tree)
    finally:
        tree.close()
    return tuple(layer.name for layer in layers if not layer.enforced and layer.name not in INDISPENSABLE)


def count_words(folder: Path, logger: StructuredLogger) -> None:
    """The job: a root splits *folder* among children that it replicates."""
    heading(f"Counting the words of {folder}")
    contract = ReplicationContract(
        max_depth=2, max_replicas=CHILDREN + 1, cooldown_seconds=0.2, expiration_seconds=60.0
    )
    controller = Controller(contract, secret=secrets.token_hex(16), logger=logger)
    orchestrator = SandboxOrchestrator(logger=logger)
    texts = read_texts(folder)
    print(f"  {len(texts)} files, {sum(map(len, texts.values())):,} characters, {CHILDREN} children\n")
    manifest = controller.issue_manifest(None, 0, {"job": "count words"}, SMALL)
    with Worker(manifest, contract, controller, orchestrator, logger) as root:
        result = root.perform_task(job_for(texts, CHILDREN))
        lineage = controller.lineage(root.worker_id)
    print(f"\n  {result['words']:,} words; most frequent: {result['most_frequent']}\n")
    states = {entry.manifest.worker_id: entry for entry in lineage.descendants}
    print("  worker                       cpu s   peak MiB  outcome")
    root_entry = controller.worker(root.worker_id)
    for indent, entry in [("", root_entry), *(("└─ ", entry) for entry in states.values())]:
        usage, ending = entry.usage, entry.exit
        assert usage is not None
        assert ending is not None
        name = f"{indent}{entry.manifest.worker_id}"
        peak = usage.memory_peak_bytes / 2**20
        print(f"  {name:<26} {usage.cpu_seconds:>7.3f}  {peak:>8.1f}  {ending.reason}: {ending.detail}")


def read_texts(folder: Path) -> dict[str, str]:
    """Return the text files below *folder*, by relative path, up to a total size."""
    texts: dict[str, str] = {}
    left = MAX_TEXT_BYTES
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.suffix not in SUFFIXES or SKIPPED.intersection(relative.parts) or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        left -= len(text)
        if left < 0:
            break
        texts[str(relative)] = text
    return texts


def job_for(texts: dict[str, str], children: int) -> Callable[[Worker], dict[str, object]]:
    """Return the root's task. It travels into the sandbox with the texts in it."""

    def count(names: list[str]) -> Callable[[Worker], dict[str, int]]:
        share = {name: texts[name] for name in names}

        def task(worker: Worker) -> dict[str, int]:
            import re

            words = Counter(
                word for text in share.values() for word in re.findall(r"[a-z]{4,}", text.lower())
            )
            print(f"  {worker.worker_id} (depth {worker.manifest.depth}) counted {len(share)} files")
            return dict(words)

        return task

    def split(root: Worker) -> dict[str, object]:
        print(f"  {root.worker_id} (depth 0) splits {len(texts)} files")
        names = sorted(texts)
        total: Counter[str] = Counter()
        for number in range(children):
            while True:
                try:
                    child = root.replicate("a share of the files", {"share": number})
                    break
                except ReplicationDenied as denied:
                    # The contract lets us have a child every 0.2 s; it says when to ask again.
                    if denied.reason != "COOLDOWN_NOT_SATISFIED" or denied.retry_after_seconds is None:
                        raise
                    time.sleep(denied.retry_after_seconds)
            total.update(child.perform_task(count(names[number::children])))
            child.shutdown("counted its share")
        top = ", ".join(f"{word} ({count:,})" for word, count in total.most_common(5))
        return {"words": sum(total.values()), "most_frequent": top}

    return split


def say_no(logger: StructuredLogger) -> None:
    """The contract refuses: depth, quota, cooldown, a stop condition; by reason, not by message."""
    heading("The contract says no")
    with family(logger, max_depth=0, max_replicas=9) as root:
        attempt("a child below max_depth=0", lambda: root.replicate("too deep"))
    with family(logger, max_depth=3, max_replicas=1) as root:
        attempt("a second worker under max_replicas=1", lambda: root.replicate("too many"))
    with family(logger, max_depth=3, max_replicas=9, cooldown_seconds=30.0) as root:
        root.replicate("the first child may come at once")
        attempt("two children within cooldown=30 s", lambda: root.replicate("too soon"))
    conditions = [StopCondition(name="two_are_enough", description="", cel="active_count >= 2")]
    with family(logger, max_depth=3, max_replicas=9, stop_conditions=conditions) as root:
        root.replicate("the second worker")
        attempt("a third worker, against a stop condition", lambda: root.replicate("too crowded"))


@contextmanager
def family(
    logger: StructuredLogger,
    *,
    max_depth: int,
    max_replicas: int,
    cooldown_seconds: float = 0.0,
    stop_conditions: list[StopCondition] | None = None,
) -> Iterator[Worker]:
    """Yield a fresh root under a contract of its own; it ends, with its children, afterwards."""
    contract = ReplicationContract(
        max_depth=max_depth,
        max_replicas=max_replicas,
        cooldown_seconds=cooldown_seconds,
        stop_conditions=stop_conditions or [],
    )
    controller = Controller(contract, secret=secrets.token_hex(16), logger=logger)
    manifest = controller.issue_manifest(None, 0, {}, SMALL)
    with Worker(manifest, contract, controller, SandboxOrchestrator(logger=logger), logger) as root:
        yield root


def attempt(what: str, birth: Callable[[], Worker]) -> None:
    """Show what becomes of a birth that must be refused."""
    try:
        worker = birth()
    except ReplicationDenied as denied:
        print(f"  {what:<42} → {denied.reason}")
    else:
        raise SystemExit(f"{what} was allowed: {worker}")


def kill_everything(logger: StructuredLogger) -> None:
    """Workers that hang and fork, and a switch that stops them all."""
    heading("The kill switch")
    contract = ReplicationContract(max_depth=1, max_replicas=12, cooldown_seconds=0.0)
    controller = Controller(contract, secret=secrets.token_hex(16), logger=logger)
    orchestrator = SandboxOrchestrator(logger=logger)
    for _ in range(10):
        manifest = controller.issue_manifest(None, 0, {}, SMALL)
        root = Worker(manifest, contract, controller, orchestrator, logger)
        # Daemons that left their session and ignore what they can.
        root.perform_command(
            [
                "/bin/sh",
                "-c",
                "for i in 1 2 3; do (trap '' TERM HUP INT; setsid sleep 600 >/dev/null 2>&1 &) done",
            ]
        )
    late = controller.issue_manifest(None, 0, {"issued": "before the switch"}, SMALL)
    result = controller.kill_switch(orchestrator, reason="demonstration")
    print(
        f"  {len(result.worker_ids)} workers of 40 processes seen dead after {result.seconds * 1_000:.0f} ms"
    )
    print(
        f"  not confirmed: {len(result.unconfirmed_worker_ids)}; still registered: {len(controller.registry)}"
    )
    attempt(
        "a manifest issued before the switch",
        lambda: Worker(late, contract, controller, orchestrator, logger),
    )


def show_trail(logger: StructuredLogger) -> None:
    """What the logger remembers, and that it was not changed."""
    heading("The audit trail")
    events = list(logger.events)
    kinds = Counter(
        f"{event['event']}: {event['decision']}" if "decision" in event else event["event"]
        for event in events
    )
    for kind, number in kinds.most_common():
        print(f"  {number:>4}  {kind}")
    check = logger.verify()
    print(f"  {check.entry_count} entries in the record, {'intact' if check.intact else 'CHANGED'}")
    print(f"  {len(logger.metrics)} metric samples beside it")


def heading(text: str) -> None:
    """Begin a section."""
    print(f"\n── {text} " + "─" * max(0, 72 - len(text)))


if __name__ == "__main__":
    sys.exit(main())
