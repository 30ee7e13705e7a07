"""What libraries want done around a fork: put off by the zygote, done for every task."""

from __future__ import annotations

import json
import subprocess
import sys

# Each line that it prints is what some process draws first.
PROGRAM = """
import os, sys
from hayflick_sandbox import forks
assert "random" not in sys.modules
with forks.put_off():
    import random

def fork(then):
    pid = os.fork()
    if pid == 0:
        then()
        os._exit(0)
    os.waitpid(pid, 0)

def draw():
    os.write(1, f"{random.random()}\\n".encode())

def caught_up():
    forks.catch_up()
    draw()
    fork(draw)
    fork(lambda: fork(draw))

for _ in range(2):
    fork({"as they are": draw, "caught up": caught_up}[sys.argv[1]])
"""


def drawn(how: str) -> list[float]:
    """Return what the forks of a fresh interpreter draw."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, stdout=subprocess.PIPE)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_nothing_is_done_until_it_is_caught_up_with() -> None:
    """A fork that did not catch up has done nothing of what was put off: it draws what its sister draws."""
    one, other = drawn("as they are")
    assert one == other


def test_every_later_fork_does_it_too() -> None:
    """Forks that caught up, and theirs, and theirs in turn, each draw something of their own."""
    values = drawn("caught up")
    assert len(values) == 6
    assert len(set(values)) == 6
