"""``hayflick doctor``: what this machine can enforce."""

from __future__ import annotations

import typer

from hayflick_cli.failure import EXIT_FAILED


def doctor() -> None:
    """Say of each layer of the sandbox whether it holds on this machine, why, and what mends it."""
    from hayflick_sandbox.__main__ import main as sandbox  # the only verb that needs it

    raise typer.Exit(min(sandbox(["--doctor"]), EXIT_FAILED))
