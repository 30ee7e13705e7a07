"""JSON that goes in, and JSON that is refused."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication import _checks

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_json_comes_back_as_it_went_in(value: dict[str, object]) -> None:
    """A dict of JSON values survives the way there and back."""
    assert json.loads(_checks.json_object("state_snapshot", value, 2**20)) == value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ([], r"state_snapshot: "),
        ({"a": {1: 2}}, r"state_snapshot\['a'\]: "),
        ({"a": [0, {"b": {1, 2}}]}, r"state_snapshot\['a'\]\[1\]\['b'\]: "),
        ({"a": math.nan}, r"state_snapshot\['a'\]: "),
        ({"a": b"x"}, r"state_snapshot\['a'\]: "),
        ({"a": "\ud800"}, r"state_snapshot\['a'\]: "),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(value: object, where: str) -> None:
    """The message says where in the value the fault lies."""
    with pytest.raises(ValueError, match=f"^{where}"):
        _checks.json_object("state_snapshot", value, 2**20)


def test_a_value_that_holds_itself_is_refused() -> None:
    """Endless nesting is an error, not a crash."""
    endless: dict[str, object] = {}
    endless["again"] = endless
    with pytest.raises(ValueError, match="nested more than"):
        _checks.json_object("state_snapshot", endless, 2**20)


def test_the_size_limit_counts_bytes_and_not_characters() -> None:
    """A value is measured as UTF-8, which is what travels."""
    value = {"k": "é" * 100}
    assert _checks.json_object("x", value, 208)
    with pytest.raises(ValueError, match=r"^x: is 208 bytes"):
        _checks.json_object("x", value, 207)


def test_a_refused_text_is_not_shown() -> None:
    """A secret that is refused does not end up in a traceback."""
    with pytest.raises(ValueError) as refused:
        _checks.text("secret", "hunter2", 1_024, min_chars=8)
    assert "hunter2" not in str(refused.value)
