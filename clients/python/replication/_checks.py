"""Refusals of bad values, each naming the field at fault.

Every value that users hand to this package passes here before anything is
done with it. Imports the standard library alone: it runs in the sandbox too.
"""

# ruff: noqa: TRY004 -- users are promised one kind of error for every bad value

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any

MAX_JSON_DEPTH = 64


def number(field: str, value: object, minimum: float, maximum: float) -> float:
    """Return *value* as a float from *minimum* to *maximum*.

    Raises:
        ValueError: It is not a number, is a bool, NaN or infinite, or is out of
            range; the message begins with *field*.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{field}: must be a number, not {value!r}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not minimum <= result <= maximum:  # also false for NaN
        raise ValueError(f"{field}: must be from {minimum:,} to {maximum:,}, not {_shown(value)}")
    return result


def integer(field: str, value: object, minimum: int, maximum: int) -> int:
    """Return *value* as an int from *minimum* to *maximum*.

    Raises:
        ValueError: It is not an integer, is a bool, or is out of range; the
            message begins with *field*.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{field}: must be an integer, not {value!r}")
    result = int(value)
    if not minimum <= result <= maximum:
        raise ValueError(f"{field}: must be from {minimum:,} to {maximum:,}, not {_shown(value)}")
    return result


def flag(field: str, value: object) -> bool:
    """Return *value*, a bool.

    Raises:
        ValueError: It is anything else; ``"no"`` would be true.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{field}: must be True or False, not {value!r}")
    return value


def text(field: str, value: object, max_chars: int, *, min_chars: int = 0) -> str:
    """Return *value*, a string of *min_chars* to *max_chars* characters.

    Raises:
        ValueError: It is no string, too short, too long, or holds half a
            surrogate pair, which has no UTF-8. The value itself is not shown:
            it may be a secret.
    """
    if not isinstance(value, str):
        raise ValueError(f"{field}: must be a string, not {type(value).__name__}")
    if not min_chars <= len(value) <= max_chars:
        raise ValueError(f"{field}: must have {min_chars:,} to {max_chars:,} characters, not {len(value):,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field}: has half a surrogate pair, which UTF-8 cannot carry") from None
    return value


def json_object(field: str, value: object, max_bytes: int) -> str:
    """Return *value*, a dict of JSON values, as JSON text of at most *max_bytes* in UTF-8.

    Raises:
        ValueError: It is not a dict, or something in it is not JSON (the
            message says where), or it is too large.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{field}: must be a dict of JSON values, not {type(value).__name__}")
    _require_json(field, value, MAX_JSON_DEPTH)
    # Tuples become lists and subclasses of dict become objects; nothing else changes.
    result = json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    size = len(result.encode())
    if size > max_bytes:
        raise ValueError(f"{field}: is {size:,} bytes as JSON; at most {max_bytes:,} are allowed")
    return result


def _plain(value: Any) -> Any:  # noqa: ANN401 -- JSON has no narrower type
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _require_json(where: str, value: object, depth_left: int) -> None:
    if depth_left == 0:
        raise ValueError(f"{where}: is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: has the key {key!r}; JSON keys are strings")
            text(f"{where}[{key!r}]", key, len(key))
            _require_json(f"{where}[{key!r}]", item, depth_left - 1)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _require_json(f"{where}[{position}]", item, depth_left - 1)
    elif isinstance(value, str):
        text(where, value, len(value))
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: is {value!r}, which JSON cannot carry")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError(f"{where}: is a {type(value).__name__}, which is not JSON")


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an int beyond sys.get_int_max_str_digits()
        return "something huge"
    return shown if len(shown) <= 40 else shown[:37] + "..."
