"""Stop conditions: rules over the whole population, asked at each registration. Pure.

CEL is evaluated here; Python predicates are not (see
:mod:`~hayflick_controller.predicates`), but both see the same variables.

CEL holds the interpreter while it runs, so what can be written is bounded
instead of timed: source of at most 4 KiB and 1,000 tokens, brackets at most 32
deep (the recursive parser and evaluator overflow the C stack of a small thread
at a few thousand), no comprehension macros (they loop), no ``matches`` (compiling
one short pattern was measured at 40 ms). What remains takes milliseconds at worst.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import cel

from hayflick.v1.errors_pb2 import ErrorReason
from hayflick_controller.admission import Denial, Facts
from hayflick_controller.clock import rfc3339, seconds

if TYPE_CHECKING:
    from hayflick_controller.model import Manifest, StopCondition

MAX_SOURCE_BYTES = 4 * 1024
MAX_TOKENS = 1_000
MAX_NESTING = 32
REFUSED_FUNCTIONS = frozenset({"all", "exists", "exists_one", "map", "filter", "bind", "matches"})
COMPILED_CACHE_SIZE = 4_096

Variables = Mapping[str, Any]

# Strings and comments first, so that what they hold is never taken for code.
_TOKEN = re.compile(
    r"""
      (?P<comment>//[^\n]*)
    | (?P<raw>(?:[rR][bB]?|[bB][rR])(?:'''.*?'''|\"\"\".*?\"\"\"|'[^'\n]*'|"[^"\n]*"))
    | (?P<string>[bB]?(?:'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"
                      |'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"))
    | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>[0-9](?:[0-9A-Za-z_.])*)
    | (?P<symbol>&&|\|\||[=!<>]=|\S)
    """,
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Family:
    """How many workers of the new worker's own tree live, read with the facts."""

    root_id: str = ""
    live_count: int = 0
    sibling_count: int = 0


def check_source(source: str) -> None:
    """Refuse CEL that is malformed or that could run long.

    Raises:
        ValueError: with what is wrong, in words for whoever wrote it.
    """
    if len(source.encode()) > MAX_SOURCE_BYTES:
        raise ValueError(f"must be at most {MAX_SOURCE_BYTES} bytes")
    tokens = [match for match in _TOKEN.finditer(source) if match.lastgroup != "comment"]
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"must have at most {MAX_TOKENS} tokens")
    nesting = 0
    for token, following in zip_longest(tokens, tokens[1:]):
        text = token.group()
        if token.lastgroup == "symbol" and text in "([{":
            nesting += 1
            if nesting > MAX_NESTING:
                raise ValueError(f"must nest at most {MAX_NESTING} brackets")
        elif token.lastgroup == "symbol" and text in ")]}":
            nesting -= 1
        elif text in REFUSED_FUNCTIONS and following is not None and following.group() == "(":
            raise ValueError(f"must not call {text}(): its running time has no bound")
    try:
        functions = compiled(source).functions()
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:500]) from error
    # A second look, at what the parser understood; "@" marks what macros become.
    if refused := [name for name in functions if name in REFUSED_FUNCTIONS or name.startswith("@")]:
        raise ValueError(f"must not call {refused[0]}: its running time has no bound")


@functools.lru_cache(maxsize=COMPILED_CACHE_SIZE)
def compiled(source: str) -> cel.Program:
    """Return the program that *source* spells, compiled once.

    Raises:
        ValueError: It is not CEL.
    """
    try:
        return cel.compile(source)
    except ValueError:
        raise
    except BaseException as error:  # a panic in the Rust library derives from BaseException alone
        raise ValueError(f"cannot be compiled: {error}") from error


def variables(facts: Facts, manifest: Manifest, family: Family) -> dict[str, Any]:
    """Return what conditions see, as flat maps; docs/stop-conditions.md lists it."""
    contract, policy, parent = facts.contract, facts.contract.policy, facts.parent
    return {
        "active_count": contract.active_count,
        "manifest": {
            "manifest_id": manifest.manifest_id,
            "contract_id": manifest.contract_id,
            "worker_id": manifest.worker_id,
            "parent_id": manifest.parent_id,
            "depth": manifest.depth,
            "epoch": manifest.epoch,
            "issue_time": rfc3339(manifest.issue_us),
            "cpu_millis": manifest.resources.cpu_millis,
            "memory_limit_bytes": manifest.resources.memory_limit_bytes,
            "allow_controller": manifest.resources.network.allow_controller,
            "allow_external": manifest.resources.network.allow_external,
            "state_snapshot_bytes": len(manifest.state_snapshot_json.encode()),
        },
        "contract": {
            "contract_id": contract.contract_id,
            "display_name": policy.display_name,
            "max_depth": policy.max_depth,
            "max_replicas": policy.max_replicas,
            "cooldown_seconds": seconds(policy.cooldown_us),
            "expiration_seconds": seconds(policy.expiration_us or 0),
        },
        "parent": {
            "worker_id": parent.worker_id if parent else "",
            "depth": parent.depth if parent else 0,
            "age_seconds": seconds(facts.now_us - parent.create_us) if parent else 0.0,
            "live_child_count": family.sibling_count,
        },
        "lineage": {
            "root_id": family.root_id,
            "depth": facts.depth,
            "live_count": family.live_count,
        },
    }


def ask_cel(condition: StopCondition, seen: Variables) -> Denial | None:
    """Evaluate a CEL condition; anything but a plain ``false`` denies."""
    try:
        verdict = compiled(condition.cel).execute(dict(seen))
    except BaseException as error:  # noqa: BLE001 -- a Rust panic too must deny, not take the thread down
        return denial(condition.name, "error", type(error).__name__)
    if verdict is False:
        return None
    if verdict is True:
        return denial(condition.name, "triggered")
    return denial(condition.name, "not_boolean", type(verdict).__name__)


def denial(name: str, cause: str, note: str = "") -> Denial:
    """Return the denial that the condition *name* makes.

    Args:
        name: The condition's.
        cause: ``triggered``, ``error``, ``timeout``, ``not_boolean`` or ``no_node``.
        note: More about the cause; never what a predicate said, only its kind.
    """
    words = {
        "triggered": "is true",
        "error": "could not be evaluated",
        "timeout": "took too long",
        "not_boolean": "gave no boolean",
        "no_node": "needs a connected node to be evaluated, and there is none",
    }[cause]
    return Denial(
        ErrorReason.ERROR_REASON_STOP_CONDITION_TRIGGERED,
        "deny_stop_condition",
        f"stop condition {name!r} {words}" + (f": {note}" if note else ""),
        {"condition": name, "cause": cause},
    )
