"""What other controllers on the same PostgreSQL database changed, as they commit it.

A thread of its own listens on a connection of its own. A notice holds names
alone; what became of them is read in a transaction, after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import threading
from collections.abc import Callable

import psycopg

from hayflick_controller.store.postgres import CHANNEL, CONNECT_TIMEOUT_SECONDS, UNANSWERED_MS
from hayflick_controller.store.protocol import Notice

RECONNECT_SECONDS = 1.0
"""How long after a failure the thread waits before it connects again."""

log = logging.getLogger(__name__)


class Notices:
    """Hears notices until it is closed.

    Args:
        url: The database.
        controller_id: Our own; what it says is not told back.
        on_notice: Called on the event loop; with ``None`` after each connection is made,
            when anything may have been missed.
    """

    def __init__(self, url: str, controller_id: str, on_notice: Callable[[Notice | None], None]) -> None:
        self._url = url
        self._controller_id = controller_id
        self._on_notice = on_notice
        self._loop = asyncio.get_running_loop()
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="notices", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Stop; return when the thread has ended."""
        os.eventfd_write(self._end, 1)
        await asyncio.to_thread(self._thread.join)
        os.close(self._end)

    def _run(self) -> None:
        while True:
            try:
                with psycopg.connect(
                    self._url,
                    autocommit=True,
                    connect_timeout=CONNECT_TIMEOUT_SECONDS,
                    tcp_user_timeout=UNANSWERED_MS,
                    fallback_application_name="hayflick_controller notices",
                ) as connection:
                    connection.execute(f"LISTEN {CHANNEL}".encode())
                    self._tell(None)
                    if self._hear(connection):
                        return
            except psycopg.Error as error:
                log.warning("does not hear other controllers: %s", type(error).__name__)
            if select.select([self._end], [], [], RECONNECT_SECONDS)[0]:
                return

    def _hear(self, connection: psycopg.Connection[tuple[object, ...]]) -> bool:
        """Hear until told to end (``True``); raises when the connection is lost."""
        while True:
            ready, _, _ = select.select([self._end, connection.fileno()], [], [])
            if self._end in ready:
                return True
            for notice in connection.notifies(timeout=0):
                self._take(notice.payload)

    def _take(self, payload: str) -> None:
        try:
            said = json.loads(payload)
            if said["c"] == self._controller_id:
                return
            notice = Notice(tuple(said["w"]), tuple(said["q"]))
        except (ValueError, KeyError, TypeError):
            log.warning("another program writes on channel %s", CHANNEL)
            return
        self._tell(notice)

    def _tell(self, notice: Notice | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._on_notice, notice)
