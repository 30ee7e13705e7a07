"""``hayflick``: the verbs, and how their errors become exit statuses.

0: done, and what was asked for holds. 1: it does not hold. 2: it could not be done.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from hayflick_cli import audit, doctor, keys
from hayflick_cli.failure import EXIT_FAILED, Failure

app = typer.Typer(
    name="hayflick",
    help="Contracts, workers and their record, from a terminal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(audit.app, name="audit")
app.add_typer(keys.app, name="keys")
app.command("doctor")(doctor.doctor)


def main() -> NoReturn:
    """Run the command line and leave with its status."""
    try:
        app(prog_name="hayflick")  # also when started as a module
    except Failure as failure:
        print(f"hayflick: {failure}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except BrokenPipeError:
        sys.exit(EXIT_FAILED)  # whoever read our output has left
    sys.exit(0)


if __name__ == "__main__":
    main()
