"""One frozen dataclass per process, filled from defaults, file, environment and flags, in that order."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    env_prefix: str,
    environ: Mapping[str, str] | None = None,
) -> T:
    """Return *cls* filled from a TOML file, the environment and *argv*; the last one wins.

    Each field is a flag (``data_dir`` → ``--data-dir``), a key of the file named
    by ``--config``, and a variable (``<env_prefix>DATA_DIR``). Fields may be
    ``str``, ``int``, ``float``, ``bool``, ``Path``, ``tuple[str, ...]``, or one of
    these ``| None``; ``metadata={"help": …}`` describes them.

    Raises:
        SystemExit: with status 2 and a message that names the field.
    """
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog=prog, description=(cls.__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="a TOML file with any of these settings")
    # A frozen dataclass is what cls is by contract; the type system has no bound for it.
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        note = field.metadata.get("help", "")
        parser.add_argument(
            flag,
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar=field.name.rsplit("_", 1)[-1].upper(),
            help=f"{note} [{env_prefix}{field.name.upper()}]".replace("%", "%%"),
        )
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    path = given.pop("config", None)
    if path is not None:
        try:
            values.update(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"--config: {error}")
    unknown = values.keys() - {field.name for field in fields}
    if unknown:
        parser.error(f"--config: unknown setting {min(unknown)!r}")
    for field in fields:
        if (text := environ.get(env_prefix + field.name.upper())) is not None:
            values[field.name] = text
    values.update(given)
    try:
        converted = {name: _convert(hints[name], name, value) for name, value in values.items()}
        return cls(**converted)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SCALARS: Mapping[object, Callable[[Any], Any]] = {str: str, int: int, float: float, Path: Path}


def _convert(hint: Any, name: str, value: Any) -> Any:  # noqa: ANN401 -- values of any declared type
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    try:
        if hint is bool:
            return value if isinstance(value, bool) else _BOOLEANS[str(value).lower()]
        if typing.get_origin(hint) is tuple:
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(item).strip() for item in items if str(item).strip())
        return _SCALARS[hint](value)
    except (ValueError, TypeError, KeyError):
        kind = getattr(hint, "__name__", str(hint))
        raise ValueError(f"{name}: {value!r} is not a valid {kind}") from None
