"""An orchestrator on a machine whose kernel is said to have no Landlock. For tests alone."""

from __future__ import annotations

import errno
import sys

from hayflick_orchestrator.__main__ import main
from hayflick_sandbox import probe

if __name__ == "__main__":
    probe._landlock_abi = lambda: (0, errno.EOPNOTSUPP)
    sys.exit(main())
