"""What libraries want done around a fork, put off until a task is forked.

The standard library has three such wishes once it is all loaded: new locks for
``threading`` and ``logging``, a new seed for ``random``. Whatever they touch is
copied into the process that they run in, and an init has no thread, logs
nothing and draws nothing. So the zygote notes what the modules that it preloads
ask for, its forks do none of it, and each task, which is a fork of its init,
catches up before it runs anything, and does it again at every fork of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

Hooks = dict[str, Callable[[], object]]

_put_off: list[Hooks] = []


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Note what is registered with ``os.register_at_fork`` meanwhile, instead of registering it."""

    def note(**hooks: Callable[[], object]) -> None:
        _put_off.append(hooks)

    register = os.register_at_fork
    os.register_at_fork = note  # type: ignore[assignment]  # the documented keywords, no more
    try:
        yield
    finally:
        os.register_at_fork = register


def catch_up() -> None:
    """Do in this process, just forked, all that was put off, and have its own forks do so by themselves."""
    for hooks in _put_off:
        if "after_in_child" in hooks:
            hooks["after_in_child"]()
    while _put_off:
        os.register_at_fork(**_put_off.pop(0))
