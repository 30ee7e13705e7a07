"""The record under verifiers that are not ours, and the ``hayflick`` command over it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hayflick.v1 import logger_pb2
from hayflick_rpc.audit import AuditClient
from hayflick_tlog.note import Signer, Verifier
from hayflick_tlog.tiles import Tile

VERIFIER = Path(__file__).parent / "verifier"
ENTRIES = 700

Start = Callable[..., Any]


async def append(logger: Any, count: int, first: int = 0) -> None:
    """Have *count* entries recorded, numbered from *first*."""
    client = AuditClient(logger.address, f"test/{first + 1}")
    await client.start()
    for number in range(first, first + count):
        event = logger_pb2.Event(event="audit", worker_id=f"w{number}", timestamp={"seconds": 1_800_000_000})
        event.details["number"] = number
        client.enqueue(event)
    await client.wait_acknowledged(count, 30)
    await client.close(1)


@pytest.fixture
async def logger(start_logger: Start) -> Any:
    """A logger with some entries."""
    process = start_logger()
    await append(process, ENTRIES)
    return process


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    arguments = [str(argument) for argument in command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=False, cwd=cwd)


def hayflick(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return run(sys.executable, "-m", "hayflick_cli", *arguments)


def flip(path: Path, offset: int) -> None:
    """Flip one bit of the byte at *offset*."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs the Go toolchain (package golang-go)")
async def test_the_go_projects_own_code_verifies_our_log(logger: Any, tmp_path: Path) -> None:
    """A verifier that shares no line with us accepts the log on disk, and refuses it with a flipped bit."""
    logger.end()
    program = tmp_path / "verifier"
    built = run("go", "build", "-o", program, ".", cwd=VERIFIER)
    if built.returncode and "dial tcp" in built.stderr:
        pytest.skip("the Go module proxy cannot be reached")
    assert built.returncode == 0, built.stderr
    log, key = logger.data_dir / "log", (logger.data_dir / "log.pub").read_text()
    done = run(program, log, key)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"intact: {ENTRIES} entries of hayflick/")
    flip(log / Tile(None, 1).path, 300)
    done = run(program, log, key)
    assert (done.returncode, done.stderr) == (1, "entry 257 is not the one that was recorded\n")


async def test_a_log_is_verified_offline_and_from_a_running_logger(logger: Any) -> None:
    """With the public key alone, the files and the service verify alike."""
    key = logger.data_dir / "log.pub"
    done = hayflick("audit", "verify", logger.address, "--key", key)
    assert (done.returncode, done.stdout.partition(" of ")[0]) == (0, f"intact: {ENTRIES} entries")
    logger.end()
    for where in (logger.data_dir, logger.data_dir / "log"):
        assert hayflick("audit", "verify", where, "--key", key.read_text().strip()).returncode == 0


async def test_the_first_bad_entry_is_named(logger: Any) -> None:
    """A flipped bit in the log ends the command with status 1 and the entry's index."""
    logger.end()
    flip(logger.data_dir / "log" / Tile(None, 1).path, 300)
    done = hayflick("audit", "verify", logger.data_dir, "--key", logger.data_dir / "log.pub")
    assert done.returncode == 1
    assert "entry 257 is bad" in done.stderr


async def test_a_log_cannot_go_back_behind_a_checkpoint_that_was_kept(
    logger: Any, start_logger: Start, tmp_path: Path
) -> None:
    """A log that was written anew with the same key verifies by itself, and not against what was kept."""
    kept = tmp_path / "kept"
    kept.write_text(hayflick("audit", "checkpoint", logger.address).stdout)
    key = tmp_path / "log.pub"
    shutil.copy(logger.data_dir / "log.pub", key)
    logger.end()
    verify = ("audit", "verify", logger.data_dir, "--key", key)
    assert hayflick(*verify, "--checkpoint", kept).returncode == 0
    for path in logger.data_dir.iterdir():
        if path.name not in ("log.key", "log.pub"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = start_logger()
    await append(again, ENTRIES, first=1)
    again.end()
    assert hayflick(*verify).returncode == 0
    done = hayflick(*verify, "--checkpoint", kept)
    assert (done.returncode, "not the one whose checkpoint was kept" in done.stderr) == (1, True)


async def test_a_log_that_grew_holds_to_an_older_checkpoint(
    logger: Any, start_logger: Start, tmp_path: Path
) -> None:
    """What was kept of a smaller log still verifies when partial tiles were replaced by wider ones."""
    kept = tmp_path / "kept"
    kept.write_text(hayflick("audit", "checkpoint", logger.address).stdout)
    await append(logger, 30, first=ENTRIES)
    logger.end()
    for level in (None, 0):
        (logger.data_dir / "log" / Tile(level, 2, ENTRIES - 512).path).unlink(missing_ok=True)
    key = logger.data_dir / "log.pub"
    done = hayflick("audit", "verify", logger.data_dir, "--key", key, "--checkpoint", kept)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"intact: {ENTRIES + 30} entries" in done.stdout


@pytest.mark.parametrize("offset", [3, 40, -1])
async def test_a_flipped_byte_in_the_newest_entries_is_found(
    logger: Any, start_logger: Start, offset: int
) -> None:
    """The files that hold the newest entries are checked too, and the bad entry is named."""
    logger.end()
    (newest,) = logger.data_dir.glob("wal-*")
    flip(newest, offset)
    done = hayflick("audit", "verify", logger.data_dir, "--key", logger.data_dir / "log.pub")
    assert done.returncode == 1
    assert "is bad: in the write-ahead files" in done.stderr


async def test_entries_beyond_the_checkpoint_are_counted(
    logger: Any, start_logger: Start, tmp_path: Path
) -> None:
    """A log whose checkpoint stayed behind is intact, and says how many entries that does not cover."""
    logger.end()
    behind = (logger.data_dir / "log" / "checkpoint").read_text()
    again = start_logger()
    await append(again, 30, first=ENTRIES)
    again.end()
    (logger.data_dir / "log" / "checkpoint").write_text(behind)
    done = hayflick("audit", "verify", logger.data_dir, "--key", logger.data_dir / "log.pub")
    assert done.returncode == 0, done.stderr
    assert f"intact: {ENTRIES} entries" in done.stdout
    assert "30 newer ones" in done.stdout


async def test_one_entry_is_proved_without_the_log(logger: Any, tmp_path: Path) -> None:
    """An entry with its proof holds offline; another entry with the same proof does not."""
    key = logger.data_dir / "log.pub"
    assert hayflick("audit", "prove", logger.address, 600, "-o", tmp_path / "it").returncode == 0
    logger.end()
    proof, entry = tmp_path / "it.proof", tmp_path / "it.entry"
    assert json.loads(entry.read_bytes())["event"]["details"]["number"] == 600
    done = hayflick("audit", "verify-entry", proof, entry, "--key", key)
    assert (done.returncode, done.stdout[:17]) == (0, "proved: entry 600")
    entry.write_bytes(entry.read_bytes().replace(b'"number":600', b'"number":601'))
    assert hayflick("audit", "verify-entry", proof, entry, "--key", key).returncode == 1


async def test_another_key_is_refused(logger: Any) -> None:
    """A log is not verified by a key that did not sign it, nor by what is no key."""
    name = Verifier.parse((logger.data_dir / "log.pub").read_text()).name
    other = Signer(name, Ed25519PrivateKey.generate()).verifier
    done = hayflick("audit", "verify", logger.address, "--key", other)
    assert (done.returncode, "not signed by this key" in done.stderr) == (1, True)
    assert hayflick("audit", "verify", logger.address, "--key", "nonsense").returncode == 2


async def test_entries_are_exported(logger: Any, tmp_path: Path) -> None:
    """JSON Lines has each entry as it is; Parquet, where pyarrow is installed, has each as a row."""
    key = logger.data_dir / "log.pub"
    logger.end()
    lines = tmp_path / "log.jsonl"
    assert hayflick("audit", "export", logger.data_dir, "--key", key, "-o", lines).returncode == 0
    numbers = [json.loads(line)["event"]["details"]["number"] for line in lines.read_text().splitlines()]
    assert numbers == list(range(ENTRIES))
    pq = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "log.parquet"
    command = ("audit", "export", logger.data_dir, "--key", key, "-o", table, "--format", "parquet")
    assert hayflick(*command).returncode == 0
    assert pq.read_table(table)["worker_id"].to_pylist() == [f"w{number}" for number in range(ENTRIES)]


async def test_the_index_is_built_anew_from_the_log(logger: Any) -> None:
    """Reindex needs nothing but the log, and refuses while a logger runs."""
    assert hayflick("audit", "reindex", logger.data_dir).returncode == 2
    logger.end()
    (logger.data_dir / "index.sqlite").write_bytes(b"garbage")
    done = hayflick("audit", "reindex", logger.data_dir)
    assert (done.returncode, done.stdout) == (0, f"indexed {ENTRIES} entries\n")


async def test_a_log_is_judged_by_what_it_tells(logger: Any) -> None:
    """A log that keeps its promises is judged so; one entry that breaks one is named, with status 1."""
    key = logger.data_dir / "log.pub"
    done = hayflick("audit", "judge", logger.address, "--key", key)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{ENTRIES} entries: 0 contracts, 0 births, 0 ends, 0 alive" in done.stdout
    client = AuditClient(logger.address, "controller/c/1")
    await client.start()
    event = logger_pb2.Event(
        event="worker_registered", worker_id="w", contract_id="k", timestamp={"seconds": 1}
    )
    event.details.update({"manifest_id": "m", "depth": 0, "epoch": 0, "node_id": "n"})
    await client.record(event, 20)
    await client.close(1)
    done = hayflick("audit", "judge", logger.address, "--key", key, "--tree")
    assert done.returncode == 1
    assert f"entry {ENTRIES} breaks manifest: no manifest m was issued before" in done.stderr
    assert done.stderr.endswith(f"entry {ENTRIES} is the first that breaks a promise\n")
    assert f"w on n, entry {ENTRIES}: alive" in done.stdout
    logger.end()
    flip(logger.data_dir / "log" / Tile(None, 1).path, 300)
    done = hayflick("audit", "judge", logger.data_dir, "--key", key)
    assert (done.returncode, "entry 257 is bad" in done.stderr) == (1, True)
    assert hayflick("audit", "judge", logger.data_dir / "nothing", "--key", key).returncode == 2
