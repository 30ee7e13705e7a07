"""The seccomp listeners of this node's sandboxes: every call that waits at one is refused.

Each refusal costs this process some tens of microseconds, and who asks may ask
without end. So each sandbox is answered a limited number of times a second, and
all of them together too; whoever asks for more waits for its answer, in the
kernel, where it can be frozen and killed like anybody else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hayflick_orchestrator.denials import Budget
from hayflick_sandbox.denials import Book

if TYPE_CHECKING:
    from collections.abc import Callable

    from hayflick_orchestrator.sandboxes import Sandbox
    from hayflick_sandbox.denials import Denial

# With a tripwire's 1,000 denials at most, even the largest gives way at once.
ANSWERS_AT_ONCE = 1_000
ANSWERS_PER_SECOND = 250.0
NODE_ANSWERS_AT_ONCE = 2_000
NODE_ANSWERS_PER_SECOND = 1_000.0
# What one wake-up answers at most, so that it delays nothing else for long.
ANSWERS_A_TURN = 16

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Watch:
    sandbox: Sandbox
    listener: int
    budget: Budget
    resume: asyncio.TimerHandle | None = None


class Listeners:
    """Refuses for all sandboxes.

    Args:
        on_denial: Told of each refusal, after the caller has its answer.
    """

    def __init__(self, on_denial: Callable[[Sandbox, Denial], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_denial = on_denial
        self._book = Book()
        # One set inside the loop's own: to hold back a node's worth of sandboxes
        # is then one call, and the kernel goes round among those that wait.
        self._epoll = select.epoll()
        self._budget = Budget(NODE_ANSWERS_PER_SECOND, NODE_ANSWERS_AT_ONCE, time.monotonic())
        self._resume: asyncio.TimerHandle | None = None
        self._watches: dict[int, _Watch] = {}
        self._by_sandbox: dict[str, _Watch] = {}
        self._listen()

    def watch(self, sandbox: Sandbox, listener: int) -> None:
        """Answer for *sandbox* from now on; *listener* is ours to close."""
        budget = Budget(ANSWERS_PER_SECOND, ANSWERS_AT_ONCE, time.monotonic())
        watch = _Watch(sandbox, listener, budget)
        self._watches[listener] = watch
        self._by_sandbox[sandbox.launch_id] = watch
        self._epoll.register(listener, select.EPOLLIN)

    def forget(self, sandbox: Sandbox) -> None:
        """Let go of a sandbox's listener; whoever still asks there is told ENOSYS by the kernel."""
        watch = self._by_sandbox.pop(sandbox.launch_id, None)
        if watch is None:
            return
        if watch.resume is not None:
            watch.resume.cancel()
        del self._watches[watch.listener]
        os.close(watch.listener)  # which takes it out of the set as well

    def close(self) -> None:
        """Let go of all."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._resume is not None:
            self._resume.cancel()
        for watch in tuple(self._watches.values()):
            self.forget(watch.sandbox)
        self._epoll.close()

    def _listen(self) -> None:
        self._resume = None
        self._loop.add_reader(self._epoll.fileno(), self._readable)

    def _readable(self) -> None:
        for descriptor, event in self._epoll.poll(0, ANSWERS_A_TURN):
            watch = self._watches[descriptor]
            if not event & select.EPOLLIN:
                self._epoll.unregister(descriptor)  # nobody is left who could ask
                continue
            now = time.monotonic()
            if watch.budget.wait_seconds(now) > 0:
                self._hold_back(watch, now)
            elif self._budget.wait_seconds(now) > 0:
                self._loop.remove_reader(self._epoll.fileno())
                self._resume = self._loop.call_later(self._budget.wait_seconds(now), self._listen)
                return
            else:
                watch.budget.take(now)
                self._budget.take(now)
                self._answer(watch)

    def _hold_back(self, watch: _Watch, now: float) -> None:
        def resume() -> None:
            watch.resume = None
            self._epoll.register(watch.listener, select.EPOLLIN)

        self._epoll.unregister(watch.listener)
        watch.resume = self._loop.call_later(watch.budget.wait_seconds(now), resume)

    def _answer(self, watch: _Watch) -> None:
        try:
            denial = self._book.refuse(watch.listener)
        except OSError as error:
            log.warning("the listener of %r fails: %s", watch.sandbox, error)
            self._epoll.unregister(watch.listener)
            return
        if denial is not None:
            self._on_denial(watch.sandbox, denial)
