"""The daemon: every service in one task group, until a signal drains it.

    role        listener   /api, /v2   ticks, schedules   jobs, messages   housekeeping
    all         yes        yes         yes                yes              yes
    worker      yes        no          yes                yes              yes
    listener    yes        yes         no                 no               no

A service that crashes ends the process non-zero, and whoever supervises it starts it again.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import anyio
import structlog
from anyio.abc import TaskStatus

from daemon import __version__, orchestrate
from daemon.app import App, days, open_app, qstash_settings, tick_settings
from daemon.config import Settings
from daemon.db import ledger, migrate, pauses, quota, streams, ticks
from daemon.domain.dev import DEV_ACCOUNTS
from daemon.domain.errors import DaemonError, TransientError
from daemon.domain.gauge import Gauge
from daemon.queue.maintenance import drop_partitions
from daemon.queue.pruning import prune_messages
from daemon.telemetry import metrics, traces
from daemon.telemetry.health import Health
from daemon.telemetry.systemd import ServiceManager
from daemon.triggers.schedule import run_schedule
from daemon.worker.loop import WorkerLoop

if TYPE_CHECKING:
    import socket

    from daemon.web.delivery import Routes
    from daemon.web.server import Listener
    from daemon.web.v2.app import V2

MAINTENANCE_S = 300.0
JUDGE_S = 5.0
MOURN_S = 5.0
STATUS_S = 10.0

log = structlog.get_logger()


def run(settings: Settings, *, is_dev: bool = False, on_ready: Callable[[str], None] | None = None) -> int:
    """The daemon, until SIGTERM or SIGINT. Returns the exit code.

    Args:
        is_dev: accept the public tokens of `tallyd dev`, for which the listener must be on loopback.
        on_ready: told the listener's URL once it serves.

    Raises:
        ConfigError: an address that cannot be listened on, or anything else that is wrong at the start.
    """
    # Until the services run there is nothing to drain; without this, process 1 of a container would ignore it.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    _raise_file_limit()
    with ExitStack() as stack:
        sockets = _bind(settings, stack)  # before anything else: a second daemon by mistake should disturb nothing
        if settings.traces != "off":
            traces.configure(service_version=__version__, role=settings.role)
            stack.callback(traces.shutdown)
        serve = partial(_serve, settings, sockets, is_dev, on_ready)
        return anyio.run(serve, backend_options={"use_uvloop": has_uvloop()})


def _raise_file_limit() -> None:
    """Take all the file descriptors that we may: service managers give 1,024 unless asked for more."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - not on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def has_uvloop() -> bool:
    """Uvloop is installed where it exists."""
    return importlib.util.find_spec("uvloop") is not None


def _bind(settings: Settings, stack: ExitStack) -> dict[str, socket.socket]:
    sockets: dict[str, socket.socket] = {}
    for name, address in (("listen", settings.listen), ("listen_private", settings.listen_private)):
        if address is not None:
            from daemon.web.server import bind  # noqa: PLC0415 - a worker may have no listener at all

            sockets[name] = bind(name, address)
            stack.callback(sockets[name].close)
    return sockets


async def _serve(
    settings: Settings, sockets: dict[str, socket.socket], is_dev: bool, on_ready: Callable[[str], None] | None
) -> int:
    """Own every service in one task group: a service that crashes ends them all, and the process non-zero."""
    async with open_app(settings, lets_dev_in=is_dev) as app:
        await streams.check_sequences(app.db)
        if is_dev:
            for account in DEV_ACCOUNTS:
                await app.accounts.ensure_dev(account)
        service = _Service(app, sockets, on_ready)
        await service.run()
    log.info("daemon.stopped")
    return 0


class _Service:
    def __init__(
        self, app: App, sockets: dict[str, socket.socket], on_ready: Callable[[str], None] | None = None
    ) -> None:
        self._app = app
        self._on_ready = on_ready
        self._settings = app.settings
        self._health = Health()
        self._health.add("database", self._database_problem)
        self._health.add("migrations", self._schema_problem)
        self._manager = ServiceManager()
        self._stopping = anyio.Event()
        self._loop: WorkerLoop | None = None
        if self._settings.role != "listener":
            self._loop = app.worker_loop()
            self._health.add("queue", self._worker_problem)
        self._listeners = self._make_listeners(sockets)

    async def run(self) -> None:
        app, settings = self._app, self._settings
        async with anyio.create_task_group() as services:
            await services.start(self._obey_signals)  # whoever is told that we are ready may end us at once
            services.start_soon(self._tell_manager)
            for listener in self._listeners.values():
                services.start_soon(listener.run)
            for problem in app.pollers.problems.values():
                log.error("poller.refused", problem=problem)
            if self._loop is None:
                services.start_soon(app.jobs.waker.run)
            else:
                services.start_soon(_maintain, app)
                services.start_soon(_judge_ticks, app)
                services.start_soon(_mourn, app)
                services.start_soon(self._fire_schedules)
                if settings.trigger != "internal" and not settings.qstash_token:
                    log.info(
                        "handover.off", reason="QSTASH_TOKEN is not set: QStash starts ticks, and batches run here"
                    )
                if settings.trigger != "qstash":
                    services.start_soon(self._schedule)
            log.info(
                "daemon.started",
                version=__version__,
                pid=os.getpid(),
                role=settings.role,
                trigger=settings.trigger,
                tick_s=settings.tick_seconds,
                listens={name: listener.url for name, listener in self._listeners.items()},
            )
            if self._loop is not None and qstash_settings(settings) is not None:
                _ = app.publisher  # its SDK takes a second to import, which nothing should wait for later
            # What is there by now stays: collecting garbage need not look at it each time.
            gc.collect()
            gc.freeze()
            if self._on_ready is not None:
                self._on_ready(self._listeners["listen"].url)
            self._manager.ready(f"{settings.role}, trigger {settings.trigger}, {self._addresses()}")
            if self._loop is None:
                await self._stopping.wait()
            else:
                await self._loop.run()
            # Deliveries are taken until here: all they do is write a row that another replica finds.
            async with anyio.create_task_group() as goodbyes:
                for listener in self._listeners.values():
                    goodbyes.start_soon(listener.stop)
            services.cancel_scope.cancel()

    # HTTP

    def _make_listeners(self, sockets: dict[str, socket.socket]) -> dict[str, Listener]:
        if not sockets:
            return {}
        from daemon.web.server import Listener  # noqa: PLC0415

        settings = self._settings
        private = "listen_private" if "listen_private" in sockets else "listen"
        listeners = {}
        for name, bound in sockets.items():
            routes: Routes = []
            if name == "listen" and settings.role != "worker":
                routes += self._delivery_routes()
            if name == private:
                routes += self._health_routes(bound)
            has_v2 = name == "listen" and settings.role != "worker"
            listeners[name] = Listener(bound, routes, self._v2() if has_v2 else None)
        return listeners

    def _v2(self) -> V2:
        from daemon.queue.gather import Gatherer  # noqa: PLC0415
        from daemon.web.v2.app import V2  # noqa: PLC0415
        from daemon.web.v2.services import Services  # noqa: PLC0415

        app = self._app
        services = Services(
            app.accounts,
            Gatherer(app.messages.publish),
            app.push_client.check,
            app.jobs.gates,
            app.groups,
            app.schedules,
            app.logs,
            app.letters,
            app.pending,
        )
        return V2(services, bytes_max=self._settings.v2_bytes_max)

    def _delivery_routes(self) -> Routes:
        from daemon.triggers.qstash import Deliveries, Door  # noqa: PLC0415
        from daemon.web.delivery import delivery_routes  # noqa: PLC0415

        app, settings = self._app, self._settings
        hands_over = settings.trigger != "internal" and qstash_settings(settings) is not None
        door = Door(settings.signing_keys, settings.public_url)
        if settings.signing_keys and not door.is_open:
            log.warning(
                "deliveries.closed", reason="signing keys are set, but not TALLYD_PUBLIC_URL, which QStash signs"
            )
        deliveries = Deliveries(app.db, app.jobs, tick_settings(settings), hands_over=hands_over)
        return delivery_routes(door, deliveries)

    def _health_routes(self, bound: socket.socket) -> Routes:
        from daemon.domain.address import is_loopback  # noqa: PLC0415
        from daemon.web.health import health_routes  # noqa: PLC0415

        is_local = is_loopback(bound.getsockname()[0])
        token = self._settings.metrics_token
        if token is None and not is_local:
            log.warning("metrics.closed", reason="the listener is not on loopback; set TALLYD_METRICS_TOKEN")
        return health_routes(self._health, self._gauges, token=token, is_local=is_local)

    async def _gauges(self) -> list[Gauge]:
        build = Gauge("tallyd_build_info", "The version that runs.", ["version"], [((__version__,), 1.0)])
        return [build, *await self._app.figures.gauges()]

    # Health

    async def _database_problem(self) -> str | None:
        await self._app.db.fetchval("select 1")
        return None

    async def _schema_problem(self) -> str | None:
        status = await migrate.status(self._app.db)
        return None if status.is_current else f"schema {status.version} of {status.target}"

    async def _worker_problem(self) -> str | None:
        assert self._loop is not None
        return None if self._loop.is_beating else "the worker has no heartbeat"

    # Life

    async def _schedule(self) -> None:
        app, settings = self._app, self._settings
        is_fallback = settings.trigger == "both"
        occasion = orchestrate.Occasion(
            via="fallback" if is_fallback else "internal", grace_s=settings.fallback_grace_s if is_fallback else 0.0
        )
        make = partial(orchestrate.tick, app.db, app.jobs, tick_settings(settings), occasion=occasion)
        async with anyio.create_task_group() as group:
            group.start_soon(partial(run_schedule, settings.tick_seconds, make, offset_s=occasion.grace_s))
            await self._stopping.wait()  # who drains makes no more work: what is cut short here was not committed
            group.cancel_scope.cancel()

    async def _fire_schedules(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._app.schedules.run)
            await self._stopping.wait()
            group.cancel_scope.cancel()

    async def _obey_signals(self, *, task_status: TaskStatus[None]) -> None:
        """The first SIGTERM or SIGINT drains, the second one ends the process now: leases make that safe."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                if self._stopping.is_set():
                    log.warning("daemon.forced", signal=signal.Signals(number).name)
                    os._exit(1)
                log.info("daemon.draining", signal=signal.Signals(number).name)
                self._health.is_draining = True
                self._manager.stopping("draining")
                self._stopping.set()
                if self._loop is not None:
                    self._loop.stop()

    async def _tell_manager(self) -> None:
        """The watchdog watches that this event loop turns: an outage of Postgres is no reason to be restarted."""
        every_s = STATUS_S if self._manager.watchdog_s is None else min(STATUS_S, self._manager.watchdog_s / 3)
        while True:
            await anyio.sleep(every_s)
            self._manager.alive()
            if not self._stopping.is_set():
                running = 0 if self._loop is None else self._loop.running
                self._manager.status(f"{self._settings.role}, {running} jobs running, {self._addresses()}")

    def _addresses(self) -> str:
        return ", ".join(listener.url for listener in self._listeners.values()) or "no listener"


async def _mourn(app: App) -> None:
    """Tell of messages that died with their worker."""
    while True:
        await anyio.sleep(MOURN_S * random.uniform(0.8, 1.2))  # noqa: S311 - spreads replicas, guards nothing
        try:
            if told := await app.messages.mourn():
                log.warning("push.mourned", messages=told)
        except TransientError as error:
            log.debug("push.mourning_postponed", reason=str(error))
        except DaemonError as error:  # one message's, and no reason to stop delivering the others
            log.exception("push.mourning_failed", reason=str(error))


async def _judge_ticks(app: App) -> None:
    """Store of each tick, once its deadline has passed, whether it was done; tell where too little was."""
    ratio = app.settings.tick_complete_ratio
    while True:
        await anyio.sleep(JUDGE_S * random.uniform(0.8, 1.2))  # noqa: S311 - spreads replicas, guards nothing
        try:
            for tick in await ticks.judge(app.db):
                if tick.done < ratio * tick.expected:
                    metrics.TICKS_INCOMPLETE.inc()
                    log.error(
                        "tick.incomplete",
                        slot=tick.slot,
                        expected=tick.expected,
                        done=tick.done,
                        deadline=tick.deadline,
                    )
        except TransientError as error:
            log.debug("tick.judging_postponed", reason=str(error))


async def _maintain(app: App) -> None:
    while True:
        await keep_house(app)
        await anyio.sleep(MAINTENANCE_S * random.uniform(0.8, 1.2))  # noqa: S311 - spreads replicas, guards nothing


async def keep_house(app: App) -> None:
    """One round of what any replica may do, now and then; doing it twice is harmless. A chore that fails is told, and
    holds up neither the others nor the daemon.
    """
    for chore in (_prune_queue, _prune_messages, _prune_quotas, _drop_months, _prune_notes, _make_partitions):
        try:
            await chore(app)
        except TransientError as error:
            log.warning("maintenance.postponed", reason=str(error))
        except DaemonError as error:
            log.exception("maintenance.failed", reason=str(error))


async def _prune_queue(app: App) -> None:
    await app.queue.prune(
        attempts_kept=days(app.settings.retention_attempts_days) or timedelta(days=36_500),
        dead_kept=days(app.settings.retention_dead_days),
    )


async def _prune_messages(app: App) -> None:
    await app.messages.mourn(timedelta(days=1))  # those whom a restart has kept from being told of
    ever = timedelta(days=36_500)
    await prune_messages(
        app.db,
        kept=days(app.settings.retention_messages_days) or ever,
        dead_kept=days(app.settings.retention_letters_days) or ever,
    )


async def _prune_quotas(app: App) -> None:
    if kept := days(app.settings.retention_quota_days):
        await drop_partitions(app.db, quota.PRUNE, kept)


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
