"""A controller whose machine's wall clock is off: ``other_wall_clock.py SECONDS …`` with its options.

Run as a program by the tests that ask what rests on the wall clock. It is set in this
process alone, before the product is imported.
"""

from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_right = time.time
_ahead_seconds = float(sys.argv.pop(1))
time.time = lambda: _right() + _ahead_seconds

from hayflick_controller.__main__ import main  # noqa: E402 -- its clock takes time.time when it is imported

if __name__ == "__main__":
    sys.exit(main())
