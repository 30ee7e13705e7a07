"""What /etc/subuid grants, and that no two nodes of a user take the same of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import identities, subordinate
from hayflick_sandbox.identities import IdentitiesExhausted, UidRange
from hayflick_sandbox.subordinate import BLOCK_IDS, FIRST_USABLE, Found, Grant, Ids, Refusal, widest

LINE = "ada:231072:65536\n"
FOUND = Found("ada", 1000, LINE, LINE, "/usr/bin/newuidmap", "/usr/bin/newgidmap")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINE, Ids(231072, 65536)),
        ("1000:231072:65536\n", Ids(231072, 65536)),
        ("bob:231072:65536\n", None),
        ("ada:100000:1000\nada:231072:65536\nada:600000:10\n", Ids(231072, 65536)),
        ("# a comment\n\nada:231072\nada:a:b\nada:-1:5\nada:1:2:3\n", None),
        ("adalbert:231072:65536\n", None),
        # What belongs to people, daemons and nobody is left to them.
        ("ada:1000:65536\n", Ids(FIRST_USABLE, 1000)),
        ("ada:0:1000\n", None),
        ("ada:4294967290:100\n", Ids(4294967290, 5)),
    ],
)
def test_the_widest_usable_range(text: str, expected: Ids | None) -> None:
    """Of a user's lines, by name or number, the widest counts, above all that is somebody's already."""
    assert widest(text, "ada", 1000) == expected


@given(st.text(alphabet="ada:0123456789-\n#", max_size=60))
def test_any_text_is_read(text: str) -> None:
    """No file, however mangled, makes it fail, nor grants an id of a person."""
    found = widest(text, "ada", 1000)
    assert found is None or (found.first >= FIRST_USABLE and found.count > 0)


@pytest.mark.parametrize(
    ("changes", "told", "remedy"),
    [
        ({"subuid": ""}, "/etc/subuid grants ada no subordinate ids", "ada:231072:65536"),
        ({"subgid": ""}, "/etc/subgid grants ada no subordinate ids", "usermod --add-subuids"),
        ({"subuid": "ada:231072:9"}, "only 9", "/etc/subuid"),
        ({"newuidmap": None}, "not installed", "apt-get install uidmap"),
        ({"newgidmap": None}, "not installed", "apt-get install uidmap"),
        ({"name": ""}, "no entry in the user database", "useradd --uid 1000"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, str | None], told: str, remedy: str) -> None:
    """Without a line, enough ids, the programs or a name there is no grant, and it is said which."""
    values = {name: getattr(FOUND, name) for name in FOUND.__slots__}
    judged = subordinate.judge(Found(**{**values, **changes}))
    assert isinstance(judged, Refusal)
    assert told in judged.detail
    assert remedy in judged.remedy


def test_a_grant() -> None:
    """Both lines and both programs make a grant, as large as the smaller of the two."""
    judged = subordinate.judge(Found("ada", 1000, LINE, "ada:500000:2048", "u", "g"))
    assert judged == Grant(Ids(231072, 65536), Ids(500000, 2048), "u", "g")
    assert isinstance(judged, Grant)
    assert judged.count == 2048


GRANT = Grant(Ids(231072, 3 * BLOCK_IDS + 5), Ids(500000, 3 * BLOCK_IDS), "u", "g")


def test_blocks_lie_within_the_grant() -> None:
    """Blocks neither overlap nor leave the grant, and uids keep step with gids."""
    found = subordinate.blocks(GRANT)
    assert len(found) == 3
    assert {uid - GRANT.uids.first for uid, _ in found} == {gid - GRANT.gids.first for _, gid in found}
    assert min(uid for uid, _ in found) == GRANT.uids.first
    assert max(uid for uid, _ in found) + BLOCK_IDS <= GRANT.uids.first + GRANT.uids.count


def test_nodes_of_one_user_take_different_blocks(tmp_path: Path) -> None:
    """Each claim gets a block of its own until there are none, and a closed one comes back."""
    held = [UidRange.claim_subordinate(GRANT, [tmp_path / "a"]) for _ in range(3)]
    assert len({one.first for one in held}) == 3
    assert all(one.gids == Ids(one.first - 231072 + 500000, BLOCK_IDS) for one in held)
    with pytest.raises(IdentitiesExhausted):
        UidRange.claim_subordinate(GRANT, [tmp_path / "a"])
    freed = held[1].first
    held[1].close()
    again = UidRange.claim_subordinate(GRANT, [tmp_path / "a"])
    assert again.first == freed
    for one in (held[0], held[2], again):
        one.close()


def test_one_common_directory_is_enough(tmp_path: Path) -> None:
    """Two sessions that share only one of their lock directories still get different blocks."""
    first = UidRange.claim_subordinate(GRANT, [tmp_path / "mine", tmp_path / "common"])
    second = UidRange.claim_subordinate(GRANT, [tmp_path / "yours", tmp_path / "common"])
    third = UidRange.claim_subordinate(GRANT, [tmp_path / "mine", tmp_path / "elsewhere"])
    assert first.first not in (second.first, third.first)
    for one in (first, second, third):
        one.close()


def test_a_lock_lies_where_nobody_else_writes(tmp_path: Path) -> None:
    """A directory that others may enter, a file, or a link in its place is no place for the lock."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    for name in ("open", "file", "link"):
        with pytest.raises(PermissionError, match="private directory"):
            UidRange.claim_subordinate(GRANT, [tmp_path / name])


def test_a_strict_umask_locks_nobody_out(tmp_path: Path) -> None:
    """The lock of a process with the strictest umask can be taken by the next one."""
    before = os.umask(0o777)
    try:
        UidRange.claim_subordinate(GRANT, [tmp_path / "locks"]).close()
    finally:
        os.umask(before)
    UidRange.claim_subordinate(GRANT, [tmp_path / "locks"]).close()


def test_every_session_of_a_user_has_one_directory_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a session's environment says, its locks are where those of all others are."""
    before = identities.lock_directories()
    for name in ("XDG_RUNTIME_DIR", "TMPDIR", "HOME"):
        monkeypatch.setenv(name, "/nowhere")
    assert identities.lock_directories() == before
    assert before
