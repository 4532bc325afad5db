"""What `tallyd trace` reads, on rows written by hand: from a cause to its bookings, and back."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest

from daemon.db.causes import Booking, Causes, Sum
from daemon.db.pool import Database
from tests.tick_kit import SLOT, TICK, add_job, after

pytestmark = pytest.mark.anyio

COMPLETIONS = Booking(
    5, 11, after(5), "acme", "main", "openai", "completions", 3, 0, 1, 0, (Sum("USD", "local", Decimal("0.103")),)
)
COSTS = Booking(
    6, 11, after(6), "acme", "main", "openai", "costs", 1, 1, 0, 1,
    (Sum("EUR", "provider", Decimal(7)), Sum("USD", "local", Decimal("0.5")), Sum("USD", "provider", Decimal(-1))),
)  # fmt: skip


@pytest.fixture
async def traced(db: Database) -> Causes:
    await db.execute(TICK)
    return Causes(db)


async def test_tick_is_followed_to_its_jobs_and_what_they_booked(traced: Causes) -> None:
    """Also over several flushes of one read; nothing that another job booked meanwhile; and no currencies in one sum."""
    trace = await traced.trace_slot(SLOT, limit=50)
    assert trace is not None
    assert trace.tick is not None
    assert (trace.tick.request_id, trace.tick.via, trace.tick.done_in_time) == ("req-1", "qstash", 1)
    assert [(d.message_id, d.is_maker) for d in trace.deliveries] == [("msg-1", True), ("msg-2", False)]
    assert [(job.id, job.kind, job.state) for job in trace.jobs] == [
        (11, "poll", "completed"),
        (12, "poll", "running"),
        (13, "poll_one", "completed"),
        (14, "poll", "completed"),
    ]
    assert trace.bookings[:2] == (COMPLETIONS, COSTS)
    assert [(b.poll_seq, b.job, b.sums) for b in trace.bookings[2:]] == [(7, 12, (Sum("USD", "local", Decimal(3)),))]
    assert (trace.jobs_total, trace.reads_total) == (4, 3)
    first, second = trace.jobs[0], trace.jobs[1]
    assert first.handover is not None
    assert (first.handover.message_id, first.handover.released_by, first.handover.reported_status) == (
        "m-11",
        "delivery",
        200,
    )
    assert first.summary is not None
    assert (first.summary.rows, first.summary.retried) == (6, 1)
    assert second.summary is None
    assert second.handover is not None
    assert second.handover.released_by is None


@pytest.mark.parametrize("request_id", ["req-1", "msg-1", "msg-2"])
async def test_request_and_message_lead_to_the_same_trace_as_their_slot(traced: Causes, request_id: str) -> None:
    assert await traced.trace_request(request_id, limit=50) == await traced.trace_slot(SLOT, limit=50)


async def test_booking_is_followed_back_to_its_cause(traced: Causes) -> None:
    trace = await traced.trace_seq(6, limit=50)
    assert trace is not None
    assert trace.bookings == (COSTS,)
    assert [job.id for job in trace.jobs] == [11]
    assert [(a.outcome, a.note) for a in trace.attempts] == [("done", None), ("retry", "first")]
    assert trace.tick is not None
    assert trace.tick.request_id == "req-1"


async def test_job_without_a_tick_is_traced_too(traced: Causes, db: Database) -> None:
    dead = await add_job(db, "poll", b'{"connections":[1],"mode":"range"}')
    await db.execute("insert into dead (id, attempt, token, reason) values ($1, 5, 1, 'no')", dead)
    trace = await traced.trace_job(dead, limit=50)
    assert trace is not None
    assert (trace.tick, [(job.id, job.state) for job in trace.jobs], trace.bookings) == (
        None,
        [(dead, "discarded")],
        (),
    )
    running = await traced.trace_job(12, limit=50)
    assert running is not None
    assert running.tick is not None, "its hand-over names the slot"


async def test_finished_job_tells_how_it_ended_as_long_as_a_log_knows(traced: Causes, db: Database) -> None:
    await db.execute("insert into handover (job_id, slot_at, place) values (31, $1, 3), (32, $1, 4), (33, $1, 5)", SLOT)
    await db.execute("insert into attempt (id, attempt, outcome) values (31, 1, 5), (32, 1, 1)")
    for job, state in ((31, "cancelled"), (32, "completed"), (33, "gone")):
        trace = await traced.trace_job(job, limit=50)
        assert trace is not None
        assert [found.state for found in trace.jobs] == [state]


async def test_job_that_ran_again_hours_later_shows_what_both_runs_booked(traced: Causes, db: Database) -> None:
    later = after(5 * 3_600)
    await db.execute("insert into booking values (9, 11, $1)", later)
    await db.execute("update ledger set poll_seq = 9, booked_at = $1 where row_key = 'e'", later)
    await db.execute("update batch_summary set finished_at = $1 where job_id = 11", after(5 * 3_600 + 1))
    trace = await traced.trace_job(11, limit=50)
    assert trace is not None
    assert [(b.poll_seq, b.new) for b in trace.bookings] == [(5, 3), (6, 0), (9, 1)]


async def test_trace_is_cut_to_its_limit_and_tells_the_whole(traced: Causes) -> None:
    trace = await traced.trace_slot(SLOT, limit=1)
    assert trace is not None
    assert (trace.bookings, trace.reads_total) == ((COMPLETIONS,), 2), "the reads of the jobs shown"
    assert ([job.id for job in trace.jobs], trace.jobs_total) == ([11], 4)


async def test_what_is_not_known_leads_nowhere(traced: Causes) -> None:
    assert await traced.trace_request("nope", limit=5) is None
    assert await traced.trace_slot(SLOT + timedelta(minutes=5), limit=5) is None
    assert await traced.trace_job(999, limit=5) is None
    assert await traced.trace_seq(999, limit=5) is None
