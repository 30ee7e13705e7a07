"""Host uids: never two live workers with one, whoever asks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hayflick_sandbox.identities import (
    BLOCK_UIDS,
    BLOCKS,
    FIRST_UID,
    IdentitiesExhausted,
    UidRange,
    parse_range,
)


class Leases(RuleBasedStateMachine):
    """Any order of leases and releases over a small range."""

    def __init__(self) -> None:
        super().__init__()
        self.range = UidRange(100, 4)
        self.live: list[int] = []
        self.last_released: int | None = None

    @rule()
    def lease(self) -> None:
        try:
            uid = self.range.lease()
        except IdentitiesExhausted:
            assert len(self.live) == 4
            return
        assert uid in range(100, 104)
        assert uid not in self.live
        # An id that was just given back rests while any other is free.
        assert uid != self.last_released or len(self.live) == 3
        self.live.append(uid)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 3))
    def release(self, which: int) -> None:
        uid = self.live.pop(which % len(self.live))
        self.range.release(uid)
        self.last_released = uid

    @invariant()
    def distinct(self) -> None:
        assert len(set(self.live)) == len(self.live)


TestLeases = Leases.TestCase


def test_only_what_was_leased_comes_back() -> None:
    """An id that nobody leased, or that came back already, is refused."""
    uids = UidRange(100, 2)
    uid = uids.lease()
    uids.release(uid)
    for stranger in (uid, 101, 99):
        with pytest.raises(KeyError):
            uids.release(stranger)


@given(st.integers(1, 20))
def test_a_range_lends_each_of_its_ids(count: int) -> None:
    """A range of n lends n ids and then says that it has none."""
    uids = UidRange(7, count)
    assert {uids.lease() for _ in range(count)} == set(range(7, 7 + count))
    with pytest.raises(IdentitiesExhausted):
        uids.lease()


def test_the_range_is_nobody_elses() -> None:
    """All blocks lie where systemd's list says nobody is, and below the kernel's special ids."""
    assert FIRST_UID == 0x70000000
    assert FIRST_UID + BLOCKS * BLOCK_UIDS <= 0x7FFFFFFF


CLAIM = """
import sys
from pathlib import Path
from hayflick_sandbox.identities import UidRange
print(UidRange.claim(Path(sys.argv[1])).first, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def claimant(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that claimed a block and holds it."""
    with subprocess.Popen(
        [sys.executable, "-c", CLAIM, tmp_path / "uids.lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_two_processes_get_different_blocks(claimant: subprocess.Popen[str], tmp_path: Path) -> None:
    """A claim in another process gets another block, and the holder's death frees it."""
    lock = tmp_path / "uids.lock"
    assert claimant.stdout is not None
    theirs = int(claimant.stdout.readline())
    ours = UidRange.claim(lock)
    assert {theirs, ours.first} == {FIRST_UID, FIRST_UID + BLOCK_UIDS}
    claimant.kill()
    claimant.wait()
    again = UidRange.claim(lock)
    assert again.first == theirs
    ours.close()
    again.close()


def test_one_process_claims_twice(tmp_path: Path) -> None:
    """Two ranges within one process are different blocks too, and closing one gives it back."""
    lock = tmp_path / "new" / "uids.lock"
    first, second = UidRange.claim(lock), UidRange.claim(lock)
    assert first.first + BLOCK_UIDS == second.first
    first.close()
    first.close()
    third = UidRange.claim(lock)
    assert third.first == FIRST_UID
    second.close()
    third.close()


def test_blocks_run_out(tmp_path: Path) -> None:
    """A configured range is cut into blocks, the last one as large as it comes; then a claim is refused."""
    within = parse_range(f"200000-{200_000 + BLOCK_UIDS + 2}")
    held = [UidRange.claim(tmp_path / "lock", within) for _ in range(2)]
    assert [(one.first, one.count) for one in held] == [(200_000, BLOCK_UIDS), (200_000 + BLOCK_UIDS, 3)]
    with pytest.raises(IdentitiesExhausted):
        UidRange.claim(tmp_path / "lock", within)
    for one in held:
        one.close()


def test_ranges_that_overlap_share_no_id(tmp_path: Path) -> None:
    """Two orchestrators with different ranges never hold an id together."""
    first = UidRange.claim(tmp_path / "lock", parse_range("200000-200099"))
    with pytest.raises(IdentitiesExhausted):
        UidRange.claim(tmp_path / "lock", parse_range("200050-200149"))
    first.close()


@pytest.mark.parametrize(
    "text", ["", "5", "0-10", "99999-200000", "200000-100000", "100000-4294967295", "a-b"]
)
def test_a_range_that_workers_may_not_have_is_refused(text: str) -> None:
    """People's and daemons' ids, the kernel's special ones, and what is no range are refused."""
    with pytest.raises(ValueError, match=r"FIRST-LAST|is not a range"):
        parse_range(text)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """A lock that somebody planted as a link is not opened."""
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        UidRange.claim(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_root_never_lends_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The degraded range of an ordinary user is the user; root has no such range."""
    monkeypatch.setattr("os.getuid", lambda: 1234)
    own = UidRange.own()
    assert own.lease() == own.lease() == 1234
    own.release(1234)
    own.close()
    monkeypatch.setattr("os.getuid", lambda: 0)
    with pytest.raises(PermissionError):
        UidRange.own()
