"""What holds before the orchestrator serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hayflick_orchestrator.__main__ import judge
from hayflick_orchestrator.config import Config
from hayflick_sandbox.probe import Layer

THERE = Layer("seccomp", True, "filters")
GONE = Layer("landlock", False, "off", "boot with lsm=landlock")
NEEDED = Layer("memory", False, "no controller", "mount it")


def test_grpc_is_not_imported_before_the_zygote() -> None:
    """All that the entry point imports before it starts the zygote brings neither gRPC nor a thread."""
    program = (
        "import sys, threading, hayflick_orchestrator.__main__;"
        "sys.exit(any(name.split('.')[0] == 'grpc' for name in sys.modules) or threading.active_count() != 1)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd="/").returncode == 0


def test_a_missing_layer_forbids_launches() -> None:
    """A layer that is missing and was not let go by name stands in the way of every launch."""
    assert judge((THERE, GONE, NEEDED), ("landlock",)) == ((NEEDED,), ("landlock",))


def test_a_layer_that_was_let_go() -> None:
    """A layer that was let go by name is done without, and named."""
    assert judge((THERE, GONE), ("landlock",)) == ((), ("landlock",))


def test_a_layer_that_nobody_knows() -> None:
    """Letting go what does not exist is an error, not a no-op."""
    with pytest.raises(ValueError, match="allow_degraded"):
        judge((THERE, GONE), ("landlok",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node_id", ""),
        ("node_id", ".."),
        ("node_id", "a/b"),
        ("ready_timeout_seconds", 0.0),
        ("heartbeat_timeout_seconds", float("nan")),
        ("drain_seconds", float("inf")),
        ("launches_at_once", 0),
    ],
)
def test_settings_are_checked(field: str, value: object) -> None:
    """A setting that makes no sense is refused by name."""
    given: dict[str, object] = {
        "listen": "unix:///x",
        "controller": "unix:///y",
        "logger": "unix:///z",
        "node_id": "node",
        "data_dir": Path("/nowhere"),
        field: value,
    }
    with pytest.raises(ValueError, match=field):
        Config(**given)  # type: ignore[arg-type]
