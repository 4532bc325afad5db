"""The daemon: every service in one task group, until a signal drains it.

A service that crashes ends the process non-zero, and whoever supervises it starts it again.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from datetime import timedelta

import anyio
import structlog

from daemon import __version__, orchestrate
from daemon.app import App, days, open_app, tick_settings
from daemon.config import Settings
from daemon.db import ledger, pauses, streams, ticks
from daemon.domain.errors import PermanentError, TransientError
from daemon.triggers.schedule import run_schedule
from daemon.worker.loop import WorkerLoop

MAINTENANCE_S = 300.0

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """The daemon, until SIGTERM or SIGINT. Returns the exit code."""
    return anyio.run(_serve, settings, backend_options={"use_uvloop": has_uvloop()})


def has_uvloop() -> bool:
    """Uvloop is installed where it exists."""
    return importlib.util.find_spec("uvloop") is not None


async def _serve(settings: Settings) -> int:
    """Own every service in one task group: a service that crashes ends them all, and the process non-zero."""
    async with open_app(settings) as app:
        await streams.check_sequence(app.db)
        loop = app.worker_loop()
        chosen = tick_settings(settings)
        async with anyio.create_task_group() as services:
            services.start_soon(run_schedule, settings.tick_seconds, lambda: orchestrate.tick(app.db, app.jobs, chosen))
            services.start_soon(_maintain, app)
            services.start_soon(_obey_signals, loop)
            for problem in app.pollers.problems.values():
                log.error("poller.refused", problem=problem)
            log.info("daemon.started", version=__version__, pid=os.getpid(), tick_s=settings.tick_seconds)
            await loop.run()
            services.cancel_scope.cancel()
    log.info("daemon.stopped")
    return 0


async def _obey_signals(loop: WorkerLoop) -> None:
    """The first SIGTERM or SIGINT drains, the second one ends the process now: leases make that safe."""
    is_draining = False
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if is_draining:
                log.warning("daemon.forced", signal=signal.Signals(number).name)
                os._exit(1)
            log.info("daemon.draining", signal=signal.Signals(number).name)
            is_draining = True
            loop.stop()


async def _maintain(app: App) -> None:
    while True:
        await keep_house(app)
        await anyio.sleep(MAINTENANCE_S * random.uniform(0.8, 1.2))  # noqa: S311 - spreads replicas, guards nothing


async def keep_house(app: App) -> None:
    """One round of what any replica may do, now and then; doing it twice is harmless. A chore that fails is told, and
    holds up neither the others nor the daemon.
    """
    for chore in (_prune_queue, _drop_months, _prune_notes, _make_partitions):
        try:
            await chore(app)
        except TransientError as error:
            log.warning("maintenance.postponed", reason=str(error))
        except PermanentError as error:
            log.exception("maintenance.failed", reason=str(error))


async def _prune_queue(app: App) -> None:
    await app.queue.prune(
        attempts_kept=days(app.settings.retention_attempts_days) or timedelta(days=36_500),
        dead_kept=days(app.settings.retention_dead_days),
    )


async def _drop_months(app: App) -> None:
    if kept := days(app.settings.retention_ledger_days):
        for month in await ledger.drop_months(app.db, kept):
            log.info("ledger.month_dropped", partition=month)


async def _prune_notes(app: App) -> None:
    await pauses.prune(app.db)
    await ticks.prune(app.db, app.settings.retention_ticks_days, app.settings.retention_summaries_days)


async def _make_partitions(app: App) -> None:
    now = await app.db.now()
    await ledger.make_partitions(app.db, [now, now + timedelta(days=31)])
