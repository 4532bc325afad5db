"""From a delivery to the lines of the ledger it led to, and back: by ids in the database, and as one trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from daemon.app import tick_settings
from daemon.orchestrate import Occasion, tick
from daemon.telemetry import traces
from daemon.telemetry.traces import span
from tests.books_kit import Books, open_books, simulator_here

pytestmark = pytest.mark.anyio


async def deliver(books: Books, message: str) -> None:
    """What a delivery does once it is let in."""
    settings = tick_settings(books.app.settings)
    occasion = Occasion(via="qstash", message_id=message, request_id=message)
    with span("delivery", kind="server"):
        made = await tick(books.db, books.app.jobs, settings, occasion=occasion)
    assert made.created
    await books.run_queue()


async def test_every_line_of_the_ledger_leads_back_to_its_delivery(database_url: str) -> None:
    async with simulator_here() as sim, open_books(database_url, sim, tick_seconds=86_400) as books:
        await books.add("main")
        await books.add("other", "anthropic")
        await books.fault("main", "500", count=3)  # one source goes through the retry queue, and keeps its cause
        await deliver(books, "msg_first")
        await books.assert_equal()
        assert await books.db.fetchval("select count(*) from batch_summary where kind = 'poll_one'") > 0
        lines = await books.db.fetch(
            """select l.poll_seq, s.request_id from ledger l left join booking b using (poll_seq)
               left join batch_summary s on s.job_id = b.job_id"""
        )
        assert len(lines) > 10
        assert {line["request_id"] for line in lines} == {"msg_first"}
        await sim.grow("openai", "main", 5)
        await books.db.execute("update tick set slot_at = slot_at - interval '1 day'")
        await books.db.execute("update connection set next_due_at = now()")
        before = await books.db.fetchval("select max(poll_seq) from ledger")
        await deliver(books, "msg_second")
        newer = await books.db.fetch(
            """select distinct s.request_id, t.request_id as of_tick from ledger l join booking b using (poll_seq)
               join batch_summary s on s.job_id = b.job_id join tick t on t.slot_at = s.slot_at
               where l.poll_seq > $1""",
            before,
        )
        assert [tuple(row.values()) for row in newer] == [("msg_second", "msg_second")]


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    traces._start(exporter, service_version="0", role="test")
    yield exporter
    traces.shutdown()


async def test_delivery_tick_job_reads_and_flush_are_one_trace(
    database_url: str, exported: InMemorySpanExporter
) -> None:
    """Through the queue, where only the message carries it on."""
    async with simulator_here() as sim, open_books(database_url, sim, tick_seconds=86_400) as books:
        await books.add("main")
        await deliver(books, "msg_1")
    assert traces._otel is not None
    traces._otel.provider.force_flush()
    spans = exported.get_finished_spans()
    names = {s.name for s in spans}
    assert names >= {"delivery", "tick", "job", "poll.source", "http.request", "flush"}
    by_id = {s.context.span_id: s for s in spans}
    parents = {(s.name, by_id[s.parent.span_id].name) for s in spans if s.parent is not None}
    assert {("tick", "delivery"), ("job", "tick"), ("poll.source", "job"), ("flush", "job")} <= parents
    assert ("http.request", "poll.source") in parents
    assert len({s.context.trace_id for s in spans}) == 1
    texts = str([dict(s.attributes or {}) for s in spans])
    assert "sk-admin" not in texts
