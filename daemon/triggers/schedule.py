"""The internal trigger: an alarm clock that decides nothing.

APScheduler rings at each slot of the local clock, and every few seconds in between; each time the replica looks whether
the database's current slot has its tick, and tries to make it. So a clock that runs ahead or behind, a replica that
died in its tick, or one that starts in the middle of a slot, never costs a tick and never makes two.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import anyio
import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from daemon.domain.errors import StorageUnavailableError
from daemon.domain.window import EPOCH, floor_to

log = structlog.get_logger()

LOOK_S = 5
"""Looks for a missing slot this often at least; a slot that is shorter is looked for at each of its starts."""


async def run_schedule(tick_s: int, make_tick: Callable[[], Awaitable[object]], offset_s: float = 0.0) -> None:
    """Ring until cancelled.

    Args:
        make_tick: makes the tick of the database's current slot, or finds it made.
        offset_s: how long after the start of a slot to ring for it.
    """
    scheduler = AsyncIOScheduler(timezone=UTC)
    bell = anyio.Event()

    async def strike() -> None:
        bell.set()

    options = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
    grid = floor_to(datetime.now(UTC), tick_s) + timedelta(seconds=offset_s)
    scheduler.add_job(strike, IntervalTrigger(seconds=tick_s, start_date=grid, timezone=UTC), id="slot", **options)
    if tick_s > LOOK_S:
        scheduler.add_job(strike, IntervalTrigger(seconds=LOOK_S, start_date=EPOCH, timezone=UTC), id="look", **options)
    scheduler.start()
    is_away = False
    try:
        while True:
            # The work happens here and not in the scheduler, which would log an exception of ours and go on.
            try:
                await make_tick()
            except StorageUnavailableError as error:
                if not is_away:
                    log.warning("tick.postponed", reason=str(error))
                is_away = True
            else:
                if is_away:
                    log.info("tick.resumed")
                is_away = False
            await bell.wait()
            bell = anyio.Event()
    finally:
        scheduler.shutdown(wait=False)
