"""The gauges of `/metrics`: what the database knows, read when somebody asks, and not again for a while.

What cannot be read is left out of the answer: an old value would look like a good one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic

import anyio
import structlog

from daemon.db.overlaps import cast_shadows, one_moment
from daemon.db.pool import Database, Record, query
from daemon.domain.errors import DaemonError
from daemon.domain.gauge import Gauge
from daemon.domain.overlap import Gateway

FAST_S, SLOW_S = 5.0, 300.0
"""How long the answers about the queue hold, and those that sum a month of the ledger."""
FAST_TIMEOUT_S, SLOW_TIMEOUT_S = 2.0, 6.0
"""A scrape waits 10 s by default, for both together."""
RETRY_S = 60.0

_NOW = query("figures_now")
_CONNECTIONS = query("figures_connections")
_DRIFT = query("figures_drift")
_TICK = query("figures_tick")
_POLLS = query("figures_polls")
_SPEND = query("figures_spend")
_TOKENS = query("figures_tokens")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SourceFact:
    """What the figures have to know of a source; its buckets are settled once they are older than `reach`."""

    provider: str
    source: str
    is_cost: bool
    reach: timedelta


class Figures:
    """One per process.

    Args:
        by_tenant: give spend, tokens and polls a label for the tenant. As many series as there are tenants.
        gateways: the sources whose rows may be the money of another connection; such are not added.
    """

    def __init__(
        self,
        db: Database,
        sources: Collection[SourceFact],
        *,
        by_tenant: bool = False,
        gateways: Collection[Gateway] = (),
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._db = db
        self._sources = list(sources)
        self._by_tenant = by_tenant
        self._gateways = gateways
        self._clock = clock
        self._lock = anyio.Lock()
        self._fast = _Held(self._read_fast, FAST_S)
        self._slow = _Held(self._read_slow, SLOW_S)

    async def gauges(self) -> list[Gauge]:
        """Every gauge that can be told now."""
        async with self._lock:
            now = self._clock()
            return [*await self._fast.get(now), *await self._slow.get(now)]

    async def _read_fast(self) -> list[Gauge]:
        now = await self._db.fetchrow(_NOW, timeout_s=FAST_TIMEOUT_S)
        assert now is not None  # a select without `from` has one row
        connections = await self._db.fetch(_CONNECTIONS, timeout_s=FAST_TIMEOUT_S)
        drift = await self._db.fetch(_DRIFT, timeout_s=FAST_TIMEOUT_S)
        tick = await self._db.fetchrow(_TICK, timeout_s=FAST_TIMEOUT_S)
        names, sources = self._columns(lambda fact: not fact.is_cost)
        polls = await self._db.fetch(_POLLS, self._by_tenant, names, sources, timeout_s=FAST_TIMEOUT_S)
        states = ("available", "scheduled", "retryable", "pending", "running", "discarded")
        jobs = ("jobs",)
        return [
            Gauge("tallyd_queue_jobs", "Jobs by state.", ["state"], [((state,), now[state]) for state in states]),
            Gauge("tallyd_queue_depth", "Jobs that could run now.", ["queue"], [(jobs, now["available"])]),
            Gauge(
                "tallyd_queue_oldest_age_seconds",
                "How long the oldest of them has waited.",
                ["queue"],
                [(jobs, now["oldest_s"] or 0.0)],
            ),
            Gauge("tallyd_dlq_messages", "Dead letters.", ["queue"], [(jobs, now["discarded"])]),
            Gauge("tallyd_replicas", "Workers with a heartbeat.", [], [((), now["replicas"])]),
            Gauge(
                "tallyd_poll_lag_seconds",
                "How long ago the connection that waits longest for its poll was polled.",
                [],
                [((), now["lag_s"] or 0.0)],
            ),
            Gauge(
                "tallyd_database_oldest_snapshot_seconds",
                "Age of the oldest transaction that keeps Postgres from cleaning up.",
                [],
                [((), now["snapshot_s"] or 0.0)],
            ),
            Gauge(
                "tallyd_connections", "Connections by state.", ["state"], [((r["state"],), r["n"]) for r in connections]
            ),
            Gauge(
                "tallyd_redis_counter_drift",
                "What a quota source's counters show, less what the ledger holds, in their units.",
                ["quota"],
                [((row["quota"],), row["drift"]) for row in drift],
            ),
            *(_tick_gauges(tick) if tick is not None else ()),
            self._gauge(
                "tallyd_poll_last_success_timestamp_seconds",
                "When the connection that was polled longest ago was polled.",
                [(row, (), row["polled_at"]) for row in polls],
            ),
            self._gauge(
                "tallyd_data_lag_seconds",
                "How long ago the usage ends that was read least far.",
                [(row, (), row["data_lag_s"]) for row in polls],
            ),
        ]

    async def _read_slow(self) -> list[Gauge]:
        facts = self._sources
        async with one_moment(self._db, SLOW_TIMEOUT_S) as moment:
            shade = await cast_shadows(
                moment, self._gateways, across=not self._by_tenant, as_of=None, timeout_s=SLOW_TIMEOUT_S
            )
            spend = await moment.fetch(
                _SPEND,
                self._by_tenant,
                [fact.provider for fact in facts],
                [fact.source for fact in facts],
                [fact.is_cost for fact in facts],
                [fact.reach for fact in facts],
                *shade.arguments,
                timeout_s=SLOW_TIMEOUT_S,
            )
            usage = self._columns(lambda fact: not fact.is_cost)
            tokens = await moment.fetch(_TOKENS, self._by_tenant, *usage, *shade.arguments, timeout_s=SLOW_TIMEOUT_S)
        keys = ("basis", "currency", "period", "state")
        classes = ("input", "cache_read", "cache_write", "output")
        return [
            self._gauge(
                "tallyd_spend",
                "Money of the current month and day, in its currency, as the ledger has it.",
                [(row, tuple(row[key] for key in keys), row["amount"]) for row in spend],
                keys,
            ),
            self._gauge(
                "tallyd_tokens",
                "Tokens of the current month and day, as the ledger has them.",
                [(row, (kind, row["period"]), row[kind]) for row in tokens for kind in classes],
                ("token_class", "period"),
            ),
        ]

    def _columns(self, wanted: Callable[[SourceFact], bool]) -> tuple[list[str], list[str]]:
        facts = [fact for fact in self._sources if wanted(fact)]
        return [fact.provider for fact in facts], [fact.source for fact in facts]

    def _gauge(
        self,
        name: str,
        text: str,
        values: Iterable[tuple[Record, tuple[str, ...], float | None]],
        labels: Sequence[str] = (),
    ) -> Gauge:
        """A gauge by provider, and by tenant where that is wanted."""
        extra = ("tenant",) if self._by_tenant else ()
        return Gauge(
            name,
            text,
            ["provider", *extra, *labels],
            [((row["provider"], *(row[key] for key in extra), *more), value) for row, more, value in values],
        )


def _tick_gauges(tick: Record) -> list[Gauge]:
    return [
        Gauge("tallyd_tick_slot_timestamp_seconds", "Slot of the newest tick.", [], [((), tick["slot"])]),
        Gauge("tallyd_tick_batches", "Batches of the newest tick.", [], [((), tick["batches"])]),
        Gauge("tallyd_tick_done_batches", "How many of them are done.", [], [((), tick["done"])]),
        Gauge(
            "tallyd_poll_cycle_duration_seconds",
            "How long the newest finished tick took.",
            [],
            [((), tick["duration_s"])],
        ),
    ]


class _Held:
    """An answer that holds for a while. One that could not be read is left out for a minute, so that a slow query holds
    up neither each scrape nor the database.
    """

    def __init__(self, read: Callable[[], Awaitable[list[Gauge]]], hold_s: float) -> None:
        self._read = read
        self._hold_s = hold_s
        self._until = 0.0
        self._gauges: list[Gauge] = []

    async def get(self, now: float) -> list[Gauge]:
        if now >= self._until:
            self._gauges, self._until = [], now + min(self._hold_s, RETRY_S)
            try:
                self._gauges = await self._read()
                self._until = now + self._hold_s
            except DaemonError as error:
                log.warning("metrics.unreadable", problem=str(error))
        return self._gauges
