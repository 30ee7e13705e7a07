"""Stop conditions in CEL: what may be written, and what each outcome does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_controller import conditions
from hayflick_controller.admission import Facts
from hayflick_controller.conditions import Family
from hayflick_controller.model import Contract, Manifest, Policy, Resources, StopCondition

CONTRACT = Contract("contract", Policy(max_depth=3, max_replicas=10), "key", 0, active_count=5)
MANIFEST = Manifest("manifest", "contract", "root", "", 0, 0, "{}", Resources(100, 2**25), 0, 1, "key")
SEEN = conditions.variables(Facts(0, CONTRACT), MANIFEST, Family("root", 0, 0))


def cause(source: str, seen: Any = SEEN) -> str:
    """Evaluate *source*; return why it denies, or ""."""
    denial = conditions.ask_cel(StopCondition("rule", cel=source), seen)
    return denial.metadata["cause"] if denial else ""


def test_true_denies_and_false_allows() -> None:
    """A condition that is true denies the birth, by its name; one that is false does not."""
    assert cause("active_count >= 5") == "triggered"
    assert cause("active_count >= 6") == ""
    denial = conditions.ask_cel(StopCondition("my rule", cel="true"), SEEN)
    assert denial is not None
    assert denial.metadata["condition"] == "my rule"
    assert denial.error().reason_name == "STOP_CONDITION_TRIGGERED"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nonsense > 1", "error"),
        ("manifest.nonsense", "error"),
        ("1 / 0 == 1", "error"),
        ("9223372036854775807 + 1 > 0", "error"),
        ("active_count", "not_boolean"),
        ("'true'", "not_boolean"),
        ("null", "not_boolean"),
    ],
)
def test_anything_but_a_boolean_denies(source: str, expected: str) -> None:
    """A condition that errs, or is no boolean, denies."""
    assert cause(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "manifest.depth == 0 && manifest.parent_id == ''",
        "contract.max_replicas == 10 && contract.cooldown_seconds < 1.0",
        "parent.worker_id == '' && parent.live_child_count == 0 && parent.age_seconds == 0.0",
        "lineage.root_id == 'root' && lineage.live_count == 0 && lineage.depth == 0",
        "manifest.issue_time == '1970-01-01T00:00:00.000000Z'",
        "manifest.memory_limit_bytes == 33554432 && manifest.state_snapshot_bytes == 2",
    ],
)
def test_what_is_documented_is_there(source: str) -> None:
    """Every documented variable can be read, for a root too."""
    assert cause(source) == "triggered"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("", "parse"),
        ("1 +", "parse"),
        ("'" + "x" * 4_095 + "'", "bytes"),
        ("[1].all(x, x > 0)", "all"),
        ("[1] . exists\n(x, true)", "exists"),
        ("[1].exists_one(x, true)", "exists_one"),
        ("[1].map(x, x) == [1]", "map"),
        ("[1].filter(x, true) == [1]", "filter"),
        ("cel.bind(x, 1, x == 1)", "bind"),
        ("'a'.matches('(a+)+$')", "matches"),
        ("matches('a', 'a')", "matches"),
        ("r'\\' == '' || [1].map(x, x) == [1] || '' == ''", "map"),
        ('r"""\\""" == "" || [1].filter(x, true) == [1] || "" == ""', "filter"),
        ("[1].exists// a comment\n(x, true)", "exists"),
        ("(" * 33 + "true" + ")" * 33, "nest"),
        ("1" + "+1" * 1_000, "tokens"),
    ],
)
def test_what_could_run_long_is_refused(source: str, complaint: str) -> None:
    """Source that does not parse, loops, or is too large is refused with the reason."""
    with pytest.raises(ValueError, match=f"(?i){complaint}"):
        conditions.check_source(source)


@pytest.mark.parametrize(
    "source", ["'all(x)' == 'map('", "true // matches(", "size('a') == 1", "(" * 32 + "true" + ")" * 32]
)
def test_what_only_looks_so_is_not(source: str) -> None:
    """Words in strings and comments are no calls."""
    conditions.check_source(source)


DEEP = """
import threading
from hayflick_controller import conditions
sources = [
    "1" + "+1" * 499, "-" * 998 + "1", "!" * 998 + "true", "true" + "&&true" * 499, "a" + ".b" * 499,
    "a" + "[0]" * 249, "true?1:" * 249 + "1", "(" * 32 + "1" + ")" * 32, "[" * 32 + "1" + "]" * 32,
    "1 in " * 400 + "[1]", "{1:" * 32 + "1" + "}" * 32, "size([" * 16 + "1" + "])" * 16,
]
def probe():
    for source in sources:
        try:
            conditions.check_source(source)
        except ValueError:
            continue
        try:
            conditions.compiled(source).execute({})
        except Exception:
            pass
    print("alive")
from hayflick_controller.store.thread import STACK_BYTES
threading.stack_size(STACK_BYTES)
thread = threading.Thread(target=probe)
thread.start()
thread.join()
"""


def test_nothing_that_is_accepted_overflows_the_stack() -> None:
    """The deepest source that the checks let pass neither crashes the parser nor the evaluator."""
    done = subprocess.run([sys.executable, "-c", DEEP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-500:]


@given(st.text(max_size=60))
def test_any_text_is_refused_or_evaluated(source: str) -> None:
    """No text makes the check or the evaluation fail in any other way than by refusing or denying."""
    try:
        conditions.check_source(source)
    except ValueError:
        return
    assert cause(source) in ("", "triggered", "error", "not_boolean")
