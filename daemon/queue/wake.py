"""Telling workers that there is work: a hint over NOTIFY. Polling alone must be correct."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import structlog

from daemon.db.pool import Database
from daemon.domain.errors import StorageUnavailableError

CHANNEL = "tallyd_ready"
DEBOUNCE_S = 0.05
RECONNECT_S_MAX = 10.0

log = structlog.get_logger(__name__)


class Waker:
    """Debounced NOTIFY: at once, then at most every 50 ms, and once more for what came in between.

    NOTIFY takes a lock of the whole database at commit, so it never travels in the transactions that enqueue.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._wanted = anyio.Event()

    def wake(self) -> None:
        """There is new work, committed. Without a running `run` the workers find it by polling."""
        self._wanted.set()

    async def run(self) -> None:
        """Send what `wake` asks for, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = anyio.Event()
            await self.flush()
            await anyio.sleep(DEBOUNCE_S)

    async def flush(self) -> None:
        """Notify now: for a command that ends before `run` would."""
        try:
            await self._db.execute("select pg_notify($1, '')", CHANNEL, timeout_s=5)
        except StorageUnavailableError as error:
            log.debug("queue.notify_failed", problem=str(error))  # only a hint: polling finds the work

    async def listen(self, on_wake: Callable[[], None]) -> None:
        """Call `on_wake` for each notification, and after each new connection, until cancelled."""
        delay_s = 0.1
        while True:
            try:
                async with self._db.listen(CHANNEL) as notices:
                    on_wake()  # whatever was notified while we were deaf
                    delay_s = 0.1
                    while True:
                        await notices.receive()
                        on_wake()
            except StorageUnavailableError as error:
                log.debug("queue.listen_lost", problem=str(error), retry_in_s=delay_s)
                await anyio.sleep(delay_s)
                delay_s = min(RECONNECT_S_MAX, delay_s * 2)
