"""The gauges of /metrics against a real ledger, and what is told when it cannot be read."""

from __future__ import annotations

from datetime import timedelta

import pytest

from daemon.db.figures import FAST_S, RETRY_S, SLOW_S, Figures, SourceFact
from daemon.db.pool import Database
from daemon.domain.gauge import Gauge
from daemon.domain.job import NewJob
from daemon.queue.postgres import PostgresQueue
from daemon.telemetry.metrics import REGISTRY, exposition
from tests.books_kit import open_books, simulator_here

pytestmark = pytest.mark.anyio


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def values(gauges: list[Gauge], name: str) -> dict[tuple[str, ...], float | None]:
    (found,) = [gauge for gauge in gauges if gauge.name == name]
    return dict(found.values)


async def test_spend_and_tokens_are_the_ledgers(database_url: str) -> None:
    async with simulator_here() as sim, open_books(database_url, sim) as books:
        await books.add("main", history_days=0)
        await books.add("other", "anthropic", history_days=0)
        await sim.grow("openai", "main", 30)
        await books.poll()
        gauges = await books.app.figures.gauges()
        spend = values(gauges, "tallyd_spend")
        tokens = values(gauges, "tallyd_tokens")
        row = await books.db.fetchrow(
            """select sum(l.input_tokens) as input, sum(l.output_tokens) as output from ledger l
               join stream s on s.id = l.stream_id join connection c on c.id = s.connection_id
               where c.provider = 'openai' and s.source <> 'costs'
                 and l.bucket_start >= date_trunc('month', now(), 'UTC')"""
        )
        assert row is not None
        assert row["input"] > 0
        assert tokens["openai", "input", "month"] == row["input"]
        assert tokens["openai", "output", "month"] == row["output"]
        for basis, source in (("provider", "= 'costs'"), ("local", "<> 'costs'")):
            wanted = await books.db.fetchval(
                f"""select sum(l.amount)::float8 from ledger l join stream s on s.id = l.stream_id
                    join connection c on c.id = s.connection_id
                    where c.provider = 'openai' and s.source {source}
                      and l.bucket_start >= date_trunc('month', now(), 'UTC')"""
            )
            told = [v or 0 for labels, v in spend.items() if labels[:4] == ("openai", basis, "USD", "month")]
            assert sum(told) == pytest.approx(wanted), basis
        assert values(gauges, "tallyd_connections") == {("active",): 2}
        assert set(values(gauges, "tallyd_data_lag_seconds")) == {("openai",), ("anthropic",)}
        text = exposition(gauges).decode()
        assert 'tallyd_spend{basis="provider",currency="USD",period="month",provider="openai"' in text
        assert "main" not in text, "no name of a connection or tenant is a label"
        assert "acme" not in text


async def test_tenants_are_labels_only_where_they_are_asked_for(database_url: str) -> None:
    async with simulator_here() as sim, open_books(database_url, sim, metrics_by_tenant=True) as books:
        await books.add("main", history_days=0)
        await sim.grow("openai", "main", 5)
        await books.poll()
        gauges = await books.app.figures.gauges()
        assert {labels[1] for labels in values(gauges, "tallyd_tokens")} == {"acme"}


async def test_the_queue_is_told_by_state(db: Database) -> None:
    queue = PostgresQueue(db)
    await queue.enqueue([NewJob("noop"), NewJob("noop"), NewJob("noop", delay=timedelta(hours=1))])
    clock = Clock()
    figures = Figures(db, [], clock=clock)
    gauges = await figures.gauges()
    states = values(gauges, "tallyd_queue_jobs")
    assert (states["available",], states["scheduled",], states["running",]) == (2, 1, 0)
    assert values(gauges, "tallyd_queue_depth") == {("jobs",): 2}
    await queue.enqueue([NewJob("noop")])
    assert values(await figures.gauges(), "tallyd_queue_depth") == {("jobs",): 2}, "held for a moment"
    clock.now += FAST_S
    assert values(await figures.gauges(), "tallyd_queue_depth") == {("jobs",): 3}


async def test_what_cannot_be_read_is_left_out_and_not_told_from_memory(db: Database) -> None:
    """An old value would look like a good one."""
    clock = Clock()
    figures = Figures(db, [SourceFact("openai", "costs", True, timedelta(days=35))], clock=clock)
    assert "tallyd_spend" in {gauge.name for gauge in await figures.gauges()}
    await db.execute("alter table usage_row rename to lost")
    clock.now += FAST_S
    assert "tallyd_spend" in {gauge.name for gauge in await figures.gauges()}, "it holds for five minutes"
    clock.now += SLOW_S
    names = {gauge.name for gauge in await figures.gauges()}
    assert "tallyd_spend" not in names
    assert "tallyd_queue_depth" in names
    await db.execute("alter table lost rename to usage_row")
    assert "tallyd_spend" not in {gauge.name for gauge in await figures.gauges()}, "not asked for at each scrape"
    clock.now += RETRY_S
    assert "tallyd_spend" in {gauge.name for gauge in await figures.gauges()}


async def test_work_done_is_counted(database_url: str) -> None:
    def count(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    async with simulator_here() as sim, open_books(database_url, sim) as books:
        await books.add("main")
        await books.fault("main", "500", count=1)
        before = [count("tallyd_provider_requests_total", provider="openai", code=code) for code in ("200", "500")] + [
            count("tallyd_usage_rows_written_total", provider="openai", outcome="inserted")
        ]
        summary = await books.poll()
        good, bad, rows = [
            count("tallyd_provider_requests_total", provider="openai", code=code) for code in ("200", "500")
        ] + [count("tallyd_usage_rows_written_total", provider="openai", outcome="inserted")]
        assert (good - before[0]) + (bad - before[1]) == summary.requests
        assert bad - before[1] == 1
        assert rows - before[2] == await books.count("usage_row")
        assert summary.rows == await books.count("usage_row") + await books.count("name")
        assert count("tallyd_jobs_total", kind="poll", outcome="completed") >= 1
