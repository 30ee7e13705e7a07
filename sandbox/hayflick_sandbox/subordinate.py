"""Subordinate ids: host users that an ordinary user may hand to workers.

An administrator grants them in ``/etc/subuid`` and ``/etc/subgid``, and
``newuidmap`` and ``newgidmap`` write them into the id maps of a user namespace
that the user made; see subuid(5), newuidmap(1) and user_namespaces(7).
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass

UIDS_PATH, GIDS_PATH = "/etc/subuid", "/etc/subgid"
# Below it are people, daemons and nobody, whatever a file says.
FIRST_USABLE = 65_536
# The kernel's own "no such user", (uid_t)-1, is above.
LAST_USABLE = 4_294_967_294
# What a node takes for itself: as many workers can live on it.
BLOCK_IDS = 1_024
# The maps' programs answer in milliseconds.
MAP_SECONDS = 10.0
_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Ids:
    """A range of host ids."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What a user may hand out, and the programs that do it."""

    uids: Ids
    gids: Ids
    newuidmap: str
    newgidmap: str

    @property
    def count(self) -> int:
        """How many workers can have a uid and a gid of their own."""
        return min(self.uids.count, self.gids.count)


@dataclass(frozen=True, slots=True)
class Found:
    """What was read of this machine, as it stands there."""

    name: str
    uid: int
    subuid: str
    subgid: str
    newuidmap: str | None
    newgidmap: str | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no grant, and what an administrator does about it."""

    detail: str
    remedy: str


class MapFailed(Exception):
    """``newuidmap`` or ``newgidmap`` refused; the text is what it said."""


def find() -> Found:
    """Read what this user is granted; nothing is judged and nothing tried."""
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = ""
    return Found(
        name,
        uid,
        _text(UIDS_PATH),
        _text(GIDS_PATH),
        shutil.which("newuidmap", path=_SEARCH),
        shutil.which("newgidmap", path=_SEARCH),
    )


def judge(found: Found) -> Grant | Refusal:
    """Return what *found* amounts to."""
    if not found.name:
        return Refusal(
            f"uid {found.uid} has no entry in the user database, and newuidmap wants one",
            f"useradd --uid {found.uid} NAME, and subordinate ids for it",
        )
    uids, gids = (widest(text, found.name, found.uid) for text in (found.subuid, found.subgid))
    lines = f"usermod --add-subuids 231072-296607 --add-subgids 231072-296607 {found.name}"
    for path, ids in ((UIDS_PATH, uids), (GIDS_PATH, gids)):
        if ids is None or ids.count < BLOCK_IDS:
            few = "no" if ids is None else f"only {ids.count}"
            return Refusal(
                f"{path} grants {found.name} {few} subordinate ids from {FIRST_USABLE} on, "
                f"so workers share uid {found.uid} on the host",
                f'as root, add the line "{found.name}:231072:65536" (or another range that is free) '
                f"to {UIDS_PATH} and {GIDS_PATH}: {lines}",
            )
    if found.newuidmap is None or found.newgidmap is None:
        return Refusal(
            f"newuidmap and newgidmap are not installed, so workers share uid {found.uid} on the host",
            "apt-get install uidmap (shadow-utils elsewhere)",
        )
    assert uids is not None
    assert gids is not None
    return Grant(uids, gids, found.newuidmap, found.newgidmap)


def widest(text: str, name: str, uid: int) -> Ids | None:
    """Return the largest usable range that a file of subuid(5) grants to a user, or ``None``.

    Lines that are not well formed are passed over, as newuidmap passes them over.
    """
    best: Ids | None = None
    for line in text.splitlines():
        owner, *numbers = line.strip().split(":")
        if owner not in (name, str(uid)) or len(numbers) != 2:
            continue
        if not all(number.isascii() and number.isdecimal() for number in numbers):
            continue
        start, count = map(int, numbers)
        first, end = max(start, FIRST_USABLE), min(start + count, LAST_USABLE + 1)
        if end > first and (best is None or end - first > best.count):
            best = Ids(first, end - first)
    return best


def blocks(grant: Grant) -> list[tuple[int, int]]:
    """Return the first uid and the first gid of each block that a node can take, from the top down.

    Rootless containers count from the bottom, so that the two meet as late as can be.
    """
    whole = grant.count // BLOCK_IDS
    return [
        (grant.uids.first + number * BLOCK_IDS, grant.gids.first + number * BLOCK_IDS)
        for number in reversed(range(whole))
    ]


def write_maps(pid: int, grant: Grant, uids: Ids, gids: Ids) -> None:
    """Map, in the user namespace of *pid*, root to this user and 1 … to *uids* and *gids*.

    Raises:
        MapFailed: one of the two programs refused, or did not answer.
    """
    maps = ((grant.newuidmap, os.getuid(), uids), (grant.newgidmap, os.getgid(), gids))
    for program, own, ids in maps:
        numbers = (pid, 0, own, 1, 1, ids.first, ids.count)
        try:
            subprocess.run(
                [program, *map(str, numbers)],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={"LANG": "C.UTF-8"},
                timeout=MAP_SECONDS,
            )
        except subprocess.CalledProcessError as error:
            said = str(error.stderr).strip() or f"exit status {error.returncode}"
            raise MapFailed(f"{program}: {said}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MapFailed(f"{program}: {error}") from None


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
