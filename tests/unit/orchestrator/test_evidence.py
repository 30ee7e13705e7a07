"""Evidence: what is listed of a directory that an attacker filled, what a bundle is, what is kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import stat
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_orchestrator.evidence import files
from hayflick_orchestrator.evidence.budget import Budget, Caps
from hayflick_orchestrator.evidence.bundle import Bundle, encode, pack
from hayflick_orchestrator.evidence.processes import processes, stat_fields
from hayflick_orchestrator.evidence.store import Store, StoreFull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Json = dict[str, Any]


def unpack(data: bytes) -> dict[str, Json]:
    """Return the documents of a bundle, in its order."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        return {entry.name: json.loads(tar.extractfile(entry).read()) for entry in tar}  # type: ignore[union-attr]


# Files


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with the directories that are listed."""
    for name in files.DIRECTORIES:
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def listed(root: Path, caps: Caps | None = None) -> tuple[dict[str, Json], Budget]:
    """Return what is listed of the workspace, by path, and the budget that was used."""
    budget = Budget(caps or Caps())
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY)
    try:
        found = files.listing(descriptor, budget)
    finally:
        os.close(descriptor)
    return {entry["path"]: entry for entry in found["directories"]["workspace"]["entries"]}, budget


def test_a_regular_file(root: Path) -> None:
    """A file is listed with its mode, size and time, and the hash of its bytes."""
    file = root / "workspace/a/b"
    file.parent.mkdir()
    file.write_bytes(b"x" * 1_000_000)
    file.chmod(0o640)
    os.utime(file, ns=(1, 2))
    found, budget = listed(root)
    assert list(found) == ["a", "a/b"]
    assert found["a/b"] | {"uid": 0} == {
        "path": "a/b",
        "kind": "file",
        "mode": "0640",
        "uid": 0,
        "size_bytes": 1_000_000,
        "mtime_ns": 2,
        "links": 1,
        "sha256": hashlib.sha256(b"x" * 1_000_000).hexdigest(),
    }
    assert not +budget.left_out


def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    """A link is listed with its text; where it leads, out of the root or in a ring, is not looked at."""
    workspace = root / "workspace"
    for name, target in {
        "passwd": "/etc/passwd",
        "etc": "/etc",
        "up": "../../..",
        "self": "self",
        "magic": "/proc/self/root/etc",
    }.items():
        (workspace / name).symlink_to(target)
    found, _ = listed(root)
    assert set(found) == {"passwd", "etc", "up", "self", "magic"}
    assert {entry["kind"] for entry in found.values()} == {"link"}
    assert not any("sha256" in entry for entry in found.values())
    assert found["etc"]["target"] == "/etc"


def test_a_listed_directory_that_is_a_link(root: Path) -> None:
    """Where a whole directory is replaced by a link, it is refused and not followed."""
    (root / "workspace").rmdir()
    (root / "workspace").symlink_to("/etc")
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY)
    found = files.listing(descriptor, Budget(Caps()))
    os.close(descriptor)
    assert found["directories"]["workspace"] == {"unreadable": "ENOTDIR"}


def test_what_is_no_file_is_not_opened(root: Path) -> None:
    """FIFOs, sockets and devices are listed; none is opened, so none can hold the reader."""
    workspace = root / "workspace"
    os.mkfifo(workspace / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(workspace / "socket"))
    if os.getuid() == 0:
        os.mknod(workspace / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    found, _ = listed(root)
    kinds = {name: entry["kind"] for name, entry in found.items()}
    assert kinds.pop("null", "character device") == "character device"
    assert kinds == {"fifo": "fifo", "socket": "socket"}
    assert not any("sha256" in entry or "unreadable" in entry for entry in found.values())


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_a_file_that_is_exchanged_while_it_is_looked_at(root: Path, kind: str) -> None:
    """What takes a file's place between the look and the open is neither read nor waited for."""
    file = root / "workspace/file"
    file.write_bytes(b"1234")
    before = file.stat()
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "link":
        file.symlink_to("/etc/passwd")
    else:
        file.mkdir()
    descriptor = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    entry: Json = {"path": "file"}
    walk = files._Walk(Budget(Caps()))
    try:
        if kind == "link":
            with pytest.raises(OSError, match="symbolic links"):
                walk._hash(descriptor, "file", before, entry)
        else:
            walk._hash(descriptor, "file", before, entry)
    finally:
        os.close(descriptor)
    assert "sha256" not in entry


def test_a_directory_that_is_exchanged_while_it_is_looked_at(root: Path) -> None:
    """A link that takes a directory's place between the look and the open leads nowhere."""
    (root / "workspace/d").symlink_to("/etc")
    descriptor = os.open(root / "workspace", os.O_RDONLY | os.O_DIRECTORY)
    entries: list[Json] = []
    walk = files._Walk(Budget(Caps()))
    walk.left = 100
    try:
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            walk._descend(descriptor, "d", {"path": "d"}, 0, entries)
    finally:
        os.close(descriptor)
    assert entries == []


def test_a_huge_sparse_file(root: Path) -> None:
    """A file that is larger than what is read of one is listed, not hashed, and the bundle says so."""
    with (root / "workspace/huge").open("wb") as file:
        file.truncate(1 << 40)
    found, budget = listed(root)
    assert found["huge"]["size_bytes"] == 1 << 40
    assert found["huge"]["not_hashed"] == "too large"
    assert budget.left_out["files_not_hashed"] == 1


def test_many_large_files(root: Path) -> None:
    """All hashed files of a worker together are bounded too."""
    for number in range(5):
        (root / f"workspace/{number}").write_bytes(b"x" * 100)
    found, budget = listed(root, Caps(hashed_bytes_per_worker=250))
    assert ["sha256" in found[str(number)] for number in range(5)] == [True, True, False, False, False]
    assert budget.left_out["files_not_hashed"] == 3


def test_a_great_many_files(root: Path) -> None:
    """Of a hundred thousand files as many are listed as there is room for; those of other directories too."""
    (root / "tmp/other").write_bytes(b"here")
    workspace = os.open(root / "workspace", os.O_RDONLY | os.O_DIRECTORY)
    for number in range(100_000):
        if number % 50_000 == 0:  # a file has so many links at most
            os.close(os.open(f"{number}", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=workspace))
        else:
            first = number - number % 50_000
            os.link(f"{first}", f"{number}", src_dir_fd=workspace, dst_dir_fd=workspace)
    os.close(workspace)
    budget = Budget(Caps())
    descriptor = os.open(root, os.O_PATH | os.O_DIRECTORY)
    found = files.listing(descriptor, budget)
    os.close(descriptor)
    assert len(found["directories"]["workspace"]["entries"]) == Caps().entries_per_tree
    assert [entry["path"] for entry in found["directories"]["tmp"]["entries"]] == ["other"]
    assert budget.left_out["directories_cut_short"] >= 1


def test_a_deep_tree(root: Path) -> None:
    """A tree is followed to a depth, with as many descriptors at most, and what is deeper is left out."""
    directory = os.open(root / "workspace", os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(400):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    before = len(list(Path("/proc/self/fd").iterdir()))
    found, budget = listed(root)
    assert len(found) == Caps().depth + 1
    assert budget.left_out["directories_too_deep"] == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_names_that_are_no_text(root: Path) -> None:
    """Any name that a file system takes is listed, told apart from any other, and can be had back."""
    names = [b"\xff\xfe", b"new\nline", b"\xe2\x80\xae", b"back\\slash", b'quo"te']
    for name in names:
        os.close(os.open(os.fsencode(root / "workspace") + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o600))
    found, _ = listed(root)
    again = json.loads(encode({"names": list(found)}))["names"]
    assert {os.fsencode(name) for name in again} == set(names)


def test_no_time_left(root: Path) -> None:
    """When the time is over nothing more is read."""
    (root / "workspace/file").write_bytes(b"x")
    found, budget = listed(root, Caps(seconds=0))
    assert found == {}
    assert budget.left_out["directories_cut_short"] == 1


def test_a_root_whose_process_ended(tmp_path: Path) -> None:
    """Nothing is opened by the number of a process that is gone, whoever has it now."""
    import subprocess

    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        pidfd = os.pidfd_open(process.pid)
    try:
        # The pidfd's process is dead; the number now stands for another, here ourselves.
        with pytest.raises(ProcessLookupError), files.root_of(os.getpid(), pidfd):
            pytest.fail("it was opened")
    finally:
        os.close(pidfd)


# Processes


def test_a_process() -> None:
    """A process is shown with its memory, descriptors and state, and never with its environment."""
    os.environ["EVIDENCE_CANARY"] = "evidence-canary"
    (found,) = processes([os.getpid()], Budget(Caps()))
    assert found["stat"]["ppid"] == os.getppid()
    assert found["status"]["NSpid"].endswith(str(os.getpid()))
    assert found["maps"]
    assert any(one["fd"] == 0 and "position" in one for one in found["descriptors"])
    assert b"evidence-canary" not in encode(found)


def test_a_process_that_is_gone() -> None:
    """One that ended is noted as gone; those beyond the cap are counted."""
    budget = Budget(Caps(processes_per_worker=1))
    (found,) = processes([2**22 + 1, os.getpid()], budget)
    assert found == {"pid": 2**22 + 1, "unreadable": "ENOENT"}
    assert budget.left_out["processes"] == 1


def test_a_name_that_looks_like_fields() -> None:
    """A process's name is taken whole, whatever it holds."""
    fields = "S 7 7 7 0 -1 0 0 0 0 0 3 4 0 0 20 0 5 0 99 0"
    assert stat_fields(f"12 (a) R 1 (b) {fields}") == {
        "comm": "a) R 1 (b",
        "state": "S",
        "ppid": 7,
        "utime_ticks": 3,
        "stime_ticks": 4,
        "num_threads": 5,
        "starttime_ticks": 99,
    }


# Bundles

DOCUMENTS = st.lists(
    st.tuples(
        st.text("abc/", min_size=1, max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=50))
    ),
    max_size=8,
    unique_by=lambda document: document[0],
)


@given(DOCUMENTS, st.integers(0, 500))
def test_what_is_in_a_bundle(documents: list[tuple[str, Json]], max_bytes: int) -> None:
    """A bundle has its summary first and each document that has room, and names those that have none."""
    bundle = pack({"worker_id": "w"}, documents, max_bytes=max_bytes)
    found = unpack(bundle.data)
    assert next(iter(found)) == "bundle.json"
    summary = found.pop("bundle.json")
    assert set(found) | set(summary["documents_left_out"]) == {name for name, _ in documents}
    assert all(found[name] == document for name, document in documents if name in found)
    assert sum(len(encode(document)) for document in found.values()) <= max_bytes
    assert bundle.sha256 == hashlib.sha256(bundle.data).hexdigest()
    assert pack({"worker_id": "w"}, documents, max_bytes=max_bytes) == bundle


# The store


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Open the store of one directory, again and again."""
    stores: list[Store] = []

    def open_(total_bytes: int = 1_000_000) -> Store:
        stores.append(Store(tmp_path / "data/evidence", total_bytes))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def bundle_of(*worker_ids: str, size: int = 100) -> Bundle:
    """Return a bundle that shows workers, of about *size* bytes."""
    noise = os.urandom(size // 2).hex()
    return pack({"worker_ids": worker_ids}, [("noise", {"noise": noise})])


def content(store: Store, worker_id: str) -> bytes | None:
    """Return the newest bundle of a worker."""
    descriptor = store.open(worker_id)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_a_store_keeps_to_its_user(opened: Callable[..., Store], tmp_path: Path) -> None:
    """What is kept can be read by this user alone, is found by whom it shows, and outlives the process."""
    store = opened()
    first, second = bundle_of("a", "b"), bundle_of("b")
    store.put("a", ("a", "b"), first)
    store.put("b", ("b",), second)
    directory = tmp_path / "data/evidence"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    for one in (store, opened()):
        assert content(one, "a") == first.data
        assert content(one, "b") == second.data
        assert content(one, "c") is None


def test_the_oldest_go_first(opened: Callable[..., Store], tmp_path: Path) -> None:
    """All bundles together stay within the total; the oldest make room, also across restarts."""
    bundles = [bundle_of(f"w{number}", size=20_000) for number in range(6)]
    store = opened(60_000)
    for number, bundle in enumerate(bundles):
        if number == 3:
            store = opened(60_000)
        store.put(f"w{number}", (f"w{number}",), bundle)
        assert sum(file.stat().st_size for file in (tmp_path / "data/evidence").iterdir()) <= 60_000
    kept = [number for number in range(6) if content(store, f"w{number}") is not None]
    assert kept == list(range(6))[-len(kept) :]
    assert kept


def test_a_bundle_over_the_total(opened: Callable[..., Store], tmp_path: Path) -> None:
    """One that is larger than all that may be kept is refused, and costs no other its place."""
    store = opened(5_000)
    small = bundle_of("a")
    store.put("a", ("a",), small)
    with pytest.raises(StoreFull):
        store.put("b", ("b",), bundle_of("b", size=50_000))
    assert content(store, "a") == small.data


def test_what_is_not_ours_in_the_directory(opened: Callable[..., Store], tmp_path: Path) -> None:
    """A broken bundle shows nobody, a half-written one is removed, a link is not followed."""
    directory = tmp_path / "data/evidence"
    directory.mkdir(parents=True)
    (directory / f"{1:020d}-a.tar.gz").write_bytes(b"broken")
    (directory / f"{2:020d}-b.tar.gz").symlink_to("/etc/passwd")
    (directory / "x.part").write_bytes(b"half")
    (directory / "notes.txt").write_bytes(b"mine")
    store = opened()
    assert content(store, "a") is None
    assert not (directory / "x.part").exists()
    assert (directory / "notes.txt").exists()
