"""A controller that was turned: it signs and registers every birth, whatever its contract says.

Run as a program by the tests that ask what is left of a contract then. Nothing in
the product can do this.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import sys

from hayflick_controller import admission
from hayflick_controller.__main__ import main
from hayflick_controller.admission import Facts, Grant


def yes(facts: Facts, _: object = None) -> Grant:
    """Grant."""
    return Grant(depth=facts.depth, epoch=facts.epoch)


if __name__ == "__main__":
    admission.decide_issue = yes
    admission.decide_register = yes
    admission.check_presented = lambda _: None
    sys.exit(main())
