"""``hayflick audit``: verify, judge, prove, export and reindex the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hayflick_cli import export as exporting
from hayflick_cli import family_tree
from hayflick_cli.entries import BadEntry, Entry, parse
from hayflick_cli.failure import EXIT_BAD, Failure
from hayflick_cli.judgement import judge as judge_entries
from hayflick_cli.log_source import LogSource, load_key, open_source, read_text
from hayflick_tlog.checkpoint import Checkpoint
from hayflick_tlog.merkle import BadProof, leaf_hash
from hayflick_tlog.note import BadNote, Verifier
from hayflick_tlog.proof import Proof
from hayflick_tlog.tiles import BadTile
from hayflick_tlog.verify import entries_of, verify_log

NEWEST_ENTRIES = 100_000
"""How many of the last entries are held against the write-ahead files: more than a logger keeps there."""

app = typer.Typer(
    help="The record: verify it, judge what it tells, prove an entry, export it.", no_args_is_help=True
)

Where = Annotated[str, typer.Argument(help="the log's directory, or unix:… of a running logger")]
Kept = Annotated[Path | None, typer.Option(help="a checkpoint that you kept, to hold it to")]
Key = Annotated[
    str,
    typer.Option("--key", help="the log's public key (log.pub), or a file with it; from a source you trust"),
]

MAX_NAMED = 20
"""How many entries that break a promise are named; the table counts them all."""


class Format(StrEnum):
    """What an export is written as."""

    JSONL = "jsonl"
    PARQUET = "parquet"


@app.command()
def verify(where: Where, key: Key, checkpoint: Kept = None) -> None:
    """Recompute the whole tree and compare it with what was signed; name the first bad entry."""
    head, beside = _verified(where, key, checkpoint)
    typer.echo(f"intact: {head.size} entries of {head.origin}{beside}")


@app.command()
def judge(
    where: Where,
    key: Key,
    checkpoint: Kept = None,
    tree: Annotated[bool, typer.Option("--tree", help="also print every family")] = False,
) -> None:
    """Rebuild the whole history from the log alone; say which promises it keeps, and name what breaks one."""
    entries: list[Entry] = []
    _verified(where, key, checkpoint, entries.append)
    judgement = judge_entries(entries)
    if tree:
        for history in judgement.histories.values():
            for line in family_tree.tree(history):
                typer.echo(line)
    for line in family_tree.table(judgement):
        typer.echo(line)
    typer.echo(family_tree.summary(judgement))
    if judgement.kept:
        return
    for violation in judgement.violations[:MAX_NAMED]:
        typer.echo(f"entry {violation.index} breaks {violation.promise}: {violation.detail}", err=True)
    _bad(f"entry {judgement.violations[0].index} is the first that breaks a promise")


@app.command("verify-entry")
def verify_entry(
    proof: Annotated[Path, typer.Argument(help="a proof, as `hayflick audit prove` writes it")],
    entry: Annotated[Path, typer.Argument(help="the entry's bytes, as `hayflick audit prove` writes them")],
    key: Key,
) -> None:
    """Check one entry against a signed checkpoint, offline."""
    try:
        kept = Proof.parse(proof.read_text(encoding="utf-8"))
        checkpoint = kept.verify(entry.read_bytes(), load_key(key))
    except OSError as error:
        raise Failure(str(error)) from None
    except (BadProof, BadNote, UnicodeDecodeError) as error:
        _bad(f"the entry is not proved: {error}")
    typer.echo(f"proved: entry {kept.index} of the {checkpoint.size} of {checkpoint.origin}")


@app.command()
def prove(
    where: Annotated[str, typer.Argument(help="unix:… of a running logger")],
    index: Annotated[int, typer.Argument(min=0, help="which entry")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where to: FILE.entry and FILE.proof")],
) -> None:
    """Write an entry and the proof that it is in the log, to be kept and shown."""
    with open_source(where) as source:
        if source.prove is None:
            raise Failure("a proof is made by a running logger: unix:///…/logger.sock")
        try:
            size = int(source.checkpoint.split("\n")[1])
            hashes = source.prove(index, size)
            (entry,) = [data for at, data in entries_of(source.read, index + 1, index) if at == index]
        except (OSError, BadTile, ValueError, IndexError) as error:
            raise Failure(f"no proof: {error}") from None
    kept = Proof(index, hashes, source.checkpoint)
    output.with_name(output.name + ".entry").write_bytes(entry)
    output.with_name(output.name + ".proof").write_text(str(kept), encoding="utf-8")
    typer.echo(f"wrote {output}.entry and {output}.proof")


@app.command()
def checkpoint(where: Where) -> None:
    """Print the signed checkpoint, to be kept elsewhere: nothing that it covers can change unseen."""
    with open_source(where) as source:
        sys.stdout.write(source.checkpoint)


@app.command()
def export(
    where: Where,
    key: Key,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write; - for standard output")],
    format_: Annotated[Format, typer.Option("--format", help="of the file")] = Format.JSONL,
) -> None:
    """Write every entry of a log that was signed by KEY as JSON Lines or Parquet."""
    with open_source(where) as source:
        try:
            signed = Checkpoint.open(source.checkpoint, load_key(key))
            entries = entries_of(source.read, signed.size)
            count = (
                exporting.jsonl(entries, output)
                if format_ is Format.JSONL
                else exporting.parquet(entries, output)
            )
        except BadNote as error:
            _bad(f"the checkpoint is not signed by this key: {error}")
        except (OSError, BadTile) as error:
            raise Failure(str(error)) from None
    typer.echo(f"wrote {count} entries", err=True)


@app.command()
def reindex(
    data_dir: Annotated[Path, typer.Argument(help="a logger's data directory; the logger must not run")],
) -> None:
    """Build the index of a record anew from the log alone."""
    from hayflick_logger.maintenance import reindex as rebuild  # the rest needs no logger
    from hayflick_rpc.errors import HayflickError

    try:
        count = rebuild(data_dir)
    except (OSError, HayflickError) as error:
        raise Failure(str(error)) from None
    typer.echo(f"indexed {count} entries")


def _verified(
    where: str, key: str, checkpoint: Path | None, take: Callable[[Entry], object] | None = None
) -> tuple[Checkpoint, str]:
    """Verify a log, and give *take* each entry; leave with a bad status where it is not what was signed.

    Returns:
        The log's head, and what is to be said of what lies beside the log.
    """
    verifier = load_key(key)
    newest: dict[int, bytes] = {}

    def seen(index: int, entry: bytes) -> None:
        _require_place(index, entry)
        newest[index] = leaf_hash(entry)
        newest.pop(index - NEWEST_ENTRIES, None)
        if take is not None:
            take(parse(entry))

    with open_source(where) as source:
        head = _verify(source, source.checkpoint, verifier, seen)
        if checkpoint is not None:
            kept = read_text(checkpoint)
            _verify(source, kept, verifier, None, "the log is not the one whose checkpoint was kept: ")
    return head, "" if source.data_dir is None else _look_beside(source.data_dir, head.size, newest)


def _verify(
    source: LogSource,
    note: str,
    verifier: Verifier,
    on_entry: Callable[[int, bytes], None] | None,
    words: str = "",
) -> Checkpoint:
    """Return the checkpoint in *note* when the whole log before it is the one that was signed; else exit."""
    try:
        finding = verify_log(source.read, note, verifier, on_entry=on_entry)
    except BadNote as error:
        _bad(f"the checkpoint is not signed by this key: {error}")
    except _OutOfPlace as error:
        _bad(str(error))
    except BadEntry as error:
        _bad(f"an entry is bad: {error}")
    if not finding.intact:
        _bad(f"{words}entry {finding.first_bad_index} is bad: {finding.detail}")
    if finding.detail:
        _bad(finding.detail)
    return finding.checkpoint


def _look_beside(data_dir: Path, size: int, leaves: dict[int, bytes]) -> str:
    """Check what lies beside the log in a logger's directory; return what is to be said of it."""
    from hayflick_logger import newest, wal  # only a logger's own directory has these files

    try:
        found = newest.check(data_dir, size, leaves)
        changed = next(newest.changed_partials(data_dir / "log"), "")
    except wal.Broken as broken:
        _bad(f"entry {broken.index} is bad: in the write-ahead files, {broken}")
    except OSError as error:
        raise Failure(f"the newest entries cannot be read: {error}") from None
    if changed:
        _bad(f"the log is intact; {changed}, which it no longer needs, was changed")
    words = f", and {found.beyond} newer ones that no checkpoint on disk covers yet" if found.beyond else ""
    return words + ("; the last write was not finished" if found.torn else "")


class _OutOfPlace(Exception):
    """An entry states another index than its place."""


def _require_place(index: int, entry: bytes) -> None:
    try:
        stated = json.loads(entry)["index"]
    except (ValueError, KeyError, TypeError):
        raise _OutOfPlace(f"entry {index} is bad: it is not an entry of this log's kind") from None
    if stated != index:
        raise _OutOfPlace(f"entry {index} is bad: it states index {stated}")


def _bad(message: str) -> NoReturn:
    typer.echo(f"hayflick: {message}", err=True)
    raise typer.Exit(EXIT_BAD)
