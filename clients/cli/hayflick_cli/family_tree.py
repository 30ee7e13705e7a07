"""Histories and judgements as text. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hayflick_cli.history import History, Life
from hayflick_cli.judgement import ALL, Judgement


def table(judgement: Judgement) -> Iterator[str]:
    """Yield the lines of a table: each promise, how often it was asked after, how often broken."""
    broken = dict.fromkeys((promise.name for promise in ALL), 0)
    for violation in judgement.violations:
        broken[violation.promise] = broken.get(violation.promise, 0) + 1
    words = {promise.name: promise.statement for promise in ALL}
    wide = max(len(_label(name, words)) for name in broken)
    yield f"{'promise':<{wide}}  {'checked':>9}  violations"
    for name, violations in broken.items():
        yield f"{_label(name, words):<{wide}}  {judgement.checked[name]:>9,}  {violations:>10,}"


def _label(name: str, words: dict[str, str]) -> str:
    return f"{name}: {words[name]}" if name in words else name


def summary(judgement: Judgement) -> str:
    """Return what was judged, in one line."""
    lives = [life for history in judgement.histories.values() for life in history.lives.values()]
    alive = sum(life.end is None for life in lives)
    contracts = sum(len(history.contracts) for history in judgement.histories.values())
    return (
        f"{judgement.entry_count:,} entries: {contracts:,} contracts, {len(lives):,} births, "
        f"{len(lives) - alive:,} ends, {alive:,} alive"
    )


def tree(history: History) -> Iterator[str]:
    """Yield the lines of every family tree, by contract."""
    roots: dict[str, list[Life]] = {contract_id: [] for contract_id in history.contracts}
    for life in history.lives.values():
        if life.parent is None:
            roots.setdefault(life.born.contract_id, []).append(life)
    for contract_id, families in roots.items():
        contract = history.contracts.get(contract_id)
        limits = (
            "not on record"
            if contract is None
            else f"max_replicas {contract.max_replicas}, max_depth {contract.max_depth}"
        )
        yield f"contract {contract_id} ({limits})"
        yield from _branches(families)


def _branches(lives: list[Life]) -> Iterator[str]:
    # Not recursive: a line may be as long as a contract allows.
    waiting = [(life, "", place == 0) for place, life in enumerate(reversed(lives))]
    while waiting:
        life, indent, last = waiting.pop()
        yield f"{indent}{'└─' if last else '├─'} {_words(life)}"
        below = f"{indent}{'  ' if last else '│ '} "
        waiting += [(child, below, place == 0) for place, child in enumerate(reversed(life.children))]


def _words(life: Life) -> str:
    words = f"{life.worker_id} on {life.node_id}, entry {life.born.index}"
    if life.end is None:
        return f"{words}: alive"
    seconds = (life.end.timestamp_us - life.born.timestamp_us) / 1e6
    return f"{words}: {life.end_reason} after {seconds:.3f} s, entry {life.end.index}"
