"""What the live views and `trace` read, on rows written by hand; and the commands themselves, on a terminal and without."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.main import main
from daemon.db import insights as module
from daemon.db.insights import Booking, Handovers, Insights, Minute, RunningJob, Sum
from daemon.db.pool import Database, query
from tests.conftest import run_sql

SLOT = datetime(2026, 11, 20, 10, tzinfo=UTC)
MADE = datetime(2026, 11, 20, 10, 0, 1, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return MADE + timedelta(seconds=seconds)


@pytest.fixture
def insights(db: Database) -> Insights:
    return Insights(db)


async def add_job(db: Database, kind: str = "poll", body: bytes = b"{}", key: int = 0) -> int:
    found: int = await db.fetchval(
        "insert into job (kind, key_id, body) values ($1, $3, $2) returning id", kind, body, key
    )
    return found


async def add_attempts(
    db: Database, outcome: int, *, ago: str = "1 second", worker: int = 1, note: str | None = None, times: int = 1
) -> None:
    await db.execute(
        "insert into attempt (at, id, attempt, worker, outcome, took_ms, note) "
        "select now() - $2::text::interval, n, 1, $3, $1, 5, $4 from generate_series(1, $5::int) n",
        outcome,
        ago,
        worker,
        note,
        times,
    )


# ── Status ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("columns", "summaries", "done_in_time", "is_complete"),
    [
        # The deadline is ahead: open until all are done.
        ("deadline_at = now() + interval '1 h'", [], None, None),
        ("deadline_at = now() + interval '1 h', finished_at = now()", ["0", "0"], None, True),
        # It has passed, and no replica has judged the tick: counted here, as it would be.
        ("deadline_at = now() - interval '1 min'", ["2 min", "0"], 1, False),
        ("deadline_at = now() - interval '1 min', finished_at = now()", ["2 min", "3 min"], 2, True),
        # Judged: what was stored then holds, whatever is done since.
        ("deadline_at = now() - interval '1 min', done_in_time = 1, finished_at = now()", ["2 min", "3 min"], 1, False),
        # A tick of the version before.
        ("deadline_at = null, finished_at = now()", ["0", "0"], None, True),
        ("deadline_at = null", ["0"], None, None),
    ],
)
async def test_tick_is_complete_by_what_was_done_until_its_deadline(
    insights: Insights,
    db: Database,
    columns: str,
    summaries: list[str],
    done_in_time: int | None,
    is_complete: bool | None,
) -> None:
    await db.execute("insert into tick (slot_at, connections, batches, via) values ($1, 2, 2, 'fallback')", SLOT)
    await db.execute(f"update tick set {columns}")
    for job, ago in enumerate(summaries, start=1):
        await summarise(db, job, slot=SLOT, ago=ago)
    await summarise(db, 90, slot=SLOT, kind="poll_one")  # a retry is no batch
    (tick,) = (await insights.status()).ticks
    assert (tick.via, tick.batches, tick.batches_done) == ("fallback", 2, len(summaries))
    assert (tick.done_in_time, tick.is_complete) == (done_in_time, is_complete)


@pytest.mark.anyio
async def test_tick_is_complete_from_the_configured_ratio_on(insights: Insights, db: Database) -> None:
    await db.execute(
        "insert into tick (slot_at, connections, batches, deadline_at, done_in_time) values ($1, 9, 20, now(), 19)",
        SLOT,
    )
    for ratio, verdict in ((0.95, True), (0.96, False)):
        assert (await insights.status(complete_ratio=ratio)).ticks[0].is_complete is verdict


async def summarise(
    db: Database, job: int, *, slot: datetime | None, ago: str = "0", kind: str = "poll", request: str | None = None,
    finished_at: datetime | None = None, rows: int = 0,
) -> None:  # fmt: skip
    await db.execute(
        "insert into batch_summary (job_id, slot_at, kind, finished_at, connections, unchanged, stored, restated, retried, "
        "dead, requests, requests_saved, rows, duration_s, request_id) values "
        "($1, $2, $3, coalesce($6, now() - $4::text::interval), 1, 2, 3, 0, 0, 0, 4, 0, $7, 0.5, $5)",
        job, slot, kind, ago, request, finished_at, rows,
    )  # fmt: skip


@pytest.mark.anyio
async def test_handed_over_batches_are_told_apart_by_what_released_them(insights: Insights, db: Database) -> None:
    await db.execute("insert into tick (slot_at, connections, batches) values ($1, 1, 6)", SLOT)
    await db.execute(
        """
        insert into handover (job_id, slot_at, place, message_id, published_at, released_at, released_by) values
          (1, $1, 1, 'm1', now(), now(), 'delivery'), (2, $1, 2, 'm2', now(), now(), 'delivery'),
          (3, $1, 3, 'm3', now(), now(), 'failure'), (4, $1, 4, null, null, now(), 'refusal'),
          (5, $1, 5, 'm5', now(), null, null), (6, $1, 6, null, null, null, null), (7, $1, 7, 'm7', now(), null, null),
          (8, $1 - interval '1 day', 1, 'old', now(), null, null)
        """,
        SLOT,
    )
    # 5 still waits for its first attempt; 6 is over; 7 ran at its deadline, and waits for another attempt.
    await db.execute("insert into due values (now() + interval '1 min', 0, 50, 5, 0, 0, 0), (now(), 0, 50, 7, 1, 0, 1)")
    status = await insights.status()
    assert status.handovers == (
        Handovers(SLOT, batches=7, published=5, delivery=2, failure=1, refusal=1, waiting=1, deadline=2),
    )


@pytest.mark.anyio
@pytest.mark.parametrize(("until", "is_paused"), [("1 hour", True), ("-1 second", False)])
async def test_running_pause_of_qstash_is_told(insights: Insights, db: Database, until: str, is_paused: bool) -> None:
    await db.execute(
        "insert into pause values ('qstash', '', now() + $1::text::interval, 'spent'), ('x', '', now() + interval '1 d', '')",
        until,
    )
    status = await insights.status()
    assert status.qstash_pause_reason == ("spent" if is_paused else None)
    assert (status.qstash_paused_s is not None and 3_500 < status.qstash_paused_s <= 3_600) is is_paused


# ── What happens right now ──────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_replicas_that_stopped_or_fell_silent_long_ago_are_left_out(insights: Insights, db: Database) -> None:
    await db.execute("""
      insert into worker (info, started_at, seen_at, stopped_at) values
        ('well', now() - interval '1 h', now(), null), ('silent', now(), now() - interval '1 min', null),
        ('gone', now(), now() - interval '11 min', null), ('stopped', now(), now(), now())
    """)
    await db.execute("insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until) "
                     "select n, 1, 1, 0, 1, 0, 1, now() from generate_series(1, 3) n")  # fmt: skip
    await add_attempts(db, 1, ago="2 seconds", times=4)
    await add_attempts(db, 2, ago="59 seconds")
    await add_attempts(db, 1, ago="61 seconds")
    found = (await insights.activity()).replicas
    assert [(r.worker, r.info, r.running, r.settled) for r in found] == [
        (1, "well", 3, {"done": 4, "retry": 1}),
        (2, "silent", 0, {}),
    ]
    assert found[0].beat_s < 30 < found[1].beat_s < 90
    assert found[1].up_s < 60
    assert found[0].up_s >= 3_600


@pytest.mark.anyio
async def test_running_jobs_tell_what_they_are_about(insights: Insights, db: Database) -> None:
    await db.execute("insert into tenant (name) values ('acme')")
    batch = json.dumps({"connections": [1, 2, 3], "slot": "2026-11-20T10:00:00Z", "request_id": "r", "mode": "tick"})
    one = json.dumps({"connections": [7], "source": "costs"})
    ids = [
        await add_job(db, body=batch.encode()),
        await add_job(db, "poll_one", one.encode(), key=1),
        await add_job(db, "poll", b"written by a later version", key=9),
        await add_job(db, "publish", batch.encode()),
    ]
    for n, job in enumerate(ids):
        await db.execute(
            "insert into lease (id, token, attempt, losses, worker, key_id, prio, claimed_at, lease_until) "
            "select id, 1, 2, 0, 5, key_id, 1, now() - make_interval(secs => $2), now() from job where id = $1",
            job,
            100.0 - n,
        )
    found = await insights.activity()
    assert all(90 < job.running_s < 130 for job in found.running)
    assert [replace(job, running_s=0.0) for job in found.running] == [
        RunningJob(ids[0], "poll", None, 2, 5, 0.0, SLOT, 3, None),
        RunningJob(ids[1], "poll_one", "acme", 2, 5, 0.0, None, 1, "costs"),
        RunningJob(ids[2], "poll", "tenant 9", 2, 5, 0.0, None, None, None),
        RunningJob(ids[3], "publish", None, 2, 5, 0.0, None, None, None),
    ]
    assert found.running_total == 4


@pytest.mark.anyio
async def test_long_lists_are_cut_and_say_so(insights: Insights, db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KIND_ROWS", 5)
    monkeypatch.setattr(module, "RUNNING_MAX", 2)
    ids = [await add_job(db) for _ in range(10)]
    await db.execute("insert into ready (key_id, prio, run_at, id, attempt, losses, token) "
                     "select 0, 1, now(), id, 0, 0, 0 from unnest($1::bigint[]) id", ids[:6])  # fmt: skip
    await db.execute(
        "insert into due select now(), 0, 1, id, (id % 2)::int, 0, 0 from unnest($1::bigint[]) id", ids[6:8]
    )
    await db.execute("insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until) "
                     "select id, 1, 1, 0, 1, 0, 1, now() from unnest($1::bigint[]) id", ids[7:])  # fmt: skip
    found = await insights.activity()
    assert {(k.state, k.jobs, k.is_cut) for k in found.kinds} == {
        ("available", 5, True),
        ("scheduled", 1, False),
        ("retryable", 1, False),
        ("running", 3, False),
    }
    assert (len(found.running), found.running_total) == (2, 3)


@pytest.mark.anyio
async def test_settled_attempts_are_counted_by_minute(insights: Insights, db: Database) -> None:
    await add_attempts(db, 1, times=3)
    await add_attempts(db, 9, ago="30 seconds", worker=2)
    await add_attempts(db, 3, ago="14 minutes 30 seconds")
    await add_attempts(db, 4, ago="15 minutes 1 second")
    found = await insights.activity()
    assert found.settled_for_s == 900
    assert [minute for minute in found.minutes if minute.settled] == [
        Minute(0, {"done": 3, "worker lost": 1}),
        Minute(14, {"snooze": 1}),
    ]
    assert [minute.ago for minute in found.minutes] == list(range(15))


@pytest.mark.anyio
async def test_only_the_end_of_a_long_log_is_read(
    insights: Insights, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then the view tells for how long back it counts, so that no rate is too low."""
    monkeypatch.setattr(module, "LOG_BLOCKS", 3)
    await add_attempts(db, 1, ago="5 minutes", times=2_000)
    await add_attempts(db, 2, ago="90 seconds", times=1_000, note="failed")
    found = await insights.activity()
    assert 90 <= found.settled_for_s < 120
    counted = {name: jobs for minute in found.minutes for name, jobs in minute.settled.items()}
    assert 0 < counted.pop("retry") < 1_000
    assert counted == {}
    assert [minute.ago for minute in found.minutes] == [0, 1]
    assert len(found.failures) == module.FAILURES_MAX


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["insights_settled", "insights_failures"])
async def test_log_is_read_by_place_and_not_as_a_whole(db: Database, name: str) -> None:
    await add_attempts(db, 1, times=20_000)
    await db.execute("analyze attempt")
    more = [20] if name == "insights_failures" else []
    plan = [row[0] for row in await db.fetch("explain analyze " + query(name), timedelta(minutes=15), 10, *more)]
    assert any("Tid Range Scan on attempt_" in line for line in plan), plan
    read = [line for line in plan if "Scan on attempt_" in line and "never executed" not in line]
    assert not any("Seq Scan" in line for line in read), plan


@pytest.mark.anyio
async def test_failures_are_told_newest_first_also_those_of_last_week(
    insights: Insights, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAILURES_FOR", timedelta(days=7, hours=1))
    await db.execute("select attempt_make_partitions(now() - interval '7 days', 0)")
    await add_attempts(db, 4, ago="7 days", note="last week")
    await add_attempts(db, 2, ago="2 seconds", note="x" * 1_000)
    await add_attempts(db, 9, ago="1 second", note="worker lost")
    for outcome in (1, 3, 5, 8):
        await add_attempts(db, outcome, note="no failure")
    await summarise(db, 1, slot=None, kind="poll_one")
    found = (await insights.activity()).failures
    assert [(f.outcome, f.kind, f.note) for f in found] == [
        ("worker lost", "poll_one", "worker lost"),
        ("retry", "poll_one", "x" * 500),
        ("dead", "poll_one", "last week"),
    ]


# ── Trace ───────────────────────────────────────────────────────────────────────────────────────

# Of one tick: batch 11 is done, 12 runs, 13 tries one source again, 14 came of a split batch. 20 is of another tick.
TICK = f"""
  insert into tenant (name) values ('acme');
  insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
    values (1, 'main', 'openai', '', '', '', '', now());
  insert into stream (tenant_id, connection_id, source) values (1, 1, 'completions'), (1, 1, 'costs');
  select ledger_make_partitions(array['2026-11-20'::timestamptz]);
  insert into tick (slot_at, created_at, connections, batches, via, request_id, deadline_at)
    values ('{SLOT}', '{MADE}', 9, 2, 'qstash', 'req-1', '{after(300)}');
  insert into delivery values ('msg-1', '{SLOT}', '{MADE}'), ('msg-2', '{SLOT}', '{after(2)}');
  insert into job (id, kind, created_at, body) overriding system value values (12, 'poll', '{MADE}', '{{"connections":[1]}}');
  insert into lease (id, token, attempt, losses, worker, key_id, prio, lease_until) values (12, 1, 1, 0, 1, 0, 1, now());
  insert into batch_summary (job_id, slot_at, kind, finished_at, connections, unchanged, stored, restated, retried, dead,
    requests, requests_saved, rows, duration_s, request_id) values
    (11, '{SLOT}', 'poll', '{after(10)}', 1, 0, 2, 0, 1, 0, 5, 0, 6, 9.5, 'req-1'),
    (13, '{SLOT}', 'poll_one', '{after(60)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-1'),
    (14, null, 'poll', '{after(90)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-1'),
    (20, '{SLOT}'::timestamptz - interval '5 min', 'poll', '{after(9)}', 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 'req-0');
  insert into handover values (11, '{SLOT}', 1, 'm-11', '{after(1)}', '{after(2)}', 'delivery', '{after(3)}', 200);
  insert into handover values (12, '{SLOT}', 2);
  insert into attempt (at, id, attempt, worker, outcome, took_ms, note) values
    (now() - interval '1 min', 11, 1, 3, 2, 50, 'first'), (now(), 11, 2, 3, 1, 60, null);
  insert into booking values (5, 11, '{after(5)}'), (6, 11, '{after(6)}'), (7, 12, '{after(6)}'), (8, 20, '{after(6)}');
  insert into ledger (tenant_id, bucket_start, row_key, revision, stream_id, poll_seq, booked_at, kind, amount) values
    (1, '{SLOT}', 'a', 1, 1, 5, '{after(5)}', 1, 0.10), (1, '{SLOT}', 'b', 1, 1, 5, '{after(5)}', 1, null),
    (1, '{SLOT}', 'c', 1, 1, 5, '{after(9)}', 1, 0.0230), (1, '{SLOT}', 'd', 3, 1, 5, '{after(9)}', 3, -0.02),
    (1, '{SLOT}', 'a', 2, 2, 6, '{after(6)}', 2, -1), (1, '{SLOT}', 'e', 1, 2, 6, '{after(6)}', 1, 7),
    (1, '{SLOT}', 'f', 1, 2, 6, '{after(6)}', 4, 0.5),
    (1, '{SLOT}', 'g', 1, 1, 7, '{after(6)}', 1, 3), (1, '{SLOT}', 'h', 1, 1, 8, '{after(6)}', 1, 100);
  insert into usage_row (tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims, amount, currency,
    basis, detail)
    select tenant_id, stream_id, bucket_start, row_key, 1, '', '{{}}', 0,
      case row_key when 'b' then null when 'e' then 'EUR' else 'USD' end,
      case when row_key = 'f' then 'local' when stream_id = 2 then 'provider' else 'local' end, '{{}}' from ledger;
"""
COMPLETIONS = Booking(
    5, 11, after(5), "acme", "main", "openai", "completions", 3, 0, 1, 0, (Sum("USD", "local", Decimal("0.103")),)
)
COSTS = Booking(
    6, 11, after(6), "acme", "main", "openai", "costs", 1, 1, 0, 1,
    (Sum("EUR", "provider", Decimal(7)), Sum("USD", "local", Decimal("0.5")), Sum("USD", "provider", Decimal(-1))),
)  # fmt: skip


@pytest.fixture
async def traced(db: Database) -> Insights:
    await db.execute(TICK)
    return Insights(db)


@pytest.mark.anyio
async def test_tick_is_followed_to_its_jobs_and_what_they_booked(traced: Insights) -> None:
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


@pytest.mark.anyio
@pytest.mark.parametrize("request_id", ["req-1", "msg-1", "msg-2"])
async def test_request_and_message_lead_to_the_same_trace_as_their_slot(traced: Insights, request_id: str) -> None:
    assert await traced.trace_request(request_id, limit=50) == await traced.trace_slot(SLOT, limit=50)


@pytest.mark.anyio
async def test_booking_is_followed_back_to_its_cause(traced: Insights) -> None:
    trace = await traced.trace_seq(6, limit=50)
    assert trace is not None
    assert trace.bookings == (COSTS,)
    assert [job.id for job in trace.jobs] == [11]
    assert [(a.outcome, a.note) for a in trace.attempts] == [("done", None), ("retry", "first")]
    assert trace.tick is not None
    assert trace.tick.request_id == "req-1"


@pytest.mark.anyio
async def test_job_without_a_tick_is_traced_too(traced: Insights, db: Database) -> None:
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


@pytest.mark.anyio
async def test_finished_job_tells_how_it_ended_as_long_as_a_log_knows(traced: Insights, db: Database) -> None:
    await db.execute("insert into handover (job_id, slot_at, place) values (31, $1, 3), (32, $1, 4), (33, $1, 5)", SLOT)
    await db.execute("insert into attempt (id, attempt, outcome) values (31, 1, 5), (32, 1, 1)")
    for job, state in ((31, "cancelled"), (32, "completed"), (33, "gone")):
        trace = await traced.trace_job(job, limit=50)
        assert trace is not None
        assert [found.state for found in trace.jobs] == [state]


@pytest.mark.anyio
async def test_job_that_ran_again_hours_later_shows_what_both_runs_booked(traced: Insights, db: Database) -> None:
    later = after(5 * 3_600)
    await db.execute("insert into booking values (9, 11, $1)", later)
    await db.execute("update ledger set poll_seq = 9, booked_at = $1 where row_key = 'e'", later)
    await db.execute("update batch_summary set finished_at = $1 where job_id = 11", after(5 * 3_600 + 1))
    trace = await traced.trace_job(11, limit=50)
    assert trace is not None
    assert [(b.poll_seq, b.new) for b in trace.bookings] == [(5, 3), (6, 0), (9, 1)]


@pytest.mark.anyio
async def test_trace_is_cut_to_its_limit_and_tells_the_whole(traced: Insights) -> None:
    trace = await traced.trace_slot(SLOT, limit=1)
    assert trace is not None
    assert (trace.bookings, trace.reads_total) == ((COMPLETIONS,), 2), "the reads of the jobs shown"
    assert ([job.id for job in trace.jobs], trace.jobs_total) == ([11], 4)


@pytest.mark.anyio
async def test_what_is_not_known_leads_nowhere(traced: Insights) -> None:
    assert await traced.trace_request("nope", limit=5) is None
    assert await traced.trace_slot(SLOT + timedelta(minutes=5), limit=5) is None
    assert await traced.trace_job(999, limit=5) is None
    assert await traced.trace_seq(999, limit=5) is None


# ── The commands ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def database(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALLYD_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYD_SECRET_KEY", base64.b64encode(b"k" * 32).decode())
    run_sql(database_url, TICK, "insert into worker (info) values (E'tallyd\\x1b[2J on alpha')")
    return database_url


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def words(line: str) -> list[str]:
    return line.split()


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = printed(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_status_json_only_gains_keys(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed_json(capsys, "status")
    assert list(found) == [
        "now", "tenants", "connections", "parked_sources", "dead_letters", "unpriced_rows", "lag_s", "due", "replicas",
        "queue", "ticks", "handovers", "qstash_paused_s",
    ]  # fmt: skip
    assert found["ticks"] == [
        {
            "slot_at": "2026-11-20T10:00:00Z",
            "created_at": "2026-11-20T10:00:01Z",
            "connections": 9,
            "batches": 2,
            "batches_done": 1,
            "finished_at": None,
            "via": "qstash",
            "request_id": "req-1",
            "deadline_at": "2026-11-20T10:05:01Z",
            "done_in_time": 1,
            "expected": 2,
            "done": 1,
            "complete": False,
        }
    ]
    assert found["handovers"] == [
        {
            "slot_at": "2026-11-20T10:00:00Z", "batches": 2, "published": 1, "delivery": 1, "failure": 0, "refusal": 0,
            "waiting": 0, "deadline": 1,
        }
    ]  # fmt: skip


def test_status_shows_ticks_hand_over_and_pause(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(database, "insert into pause values ('qstash', '', now() + interval '3 hours 1 second', E'spent\\x07')")
    code, out, _ = printed(capsys, "status")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert words("2026-11-20 10:00:00 qstash 9 1/2 1/2 10:05:01 - no") in lines
    assert words("2026-11-20 10:00:00 2 1 1 0 0 0 1") in lines
    assert words("QStash paused for another 3 h 00 min: spent\\x07") in lines


def test_top_prints_one_frame_where_there_is_no_terminal(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "top", "--once")
    assert code == 0
    assert "tallyd\\x1b[2J on alpha" in out
    assert "\x1b" not in out
    found = printed_json(capsys, "top")
    assert list(found) == [
        "now", "replicas", "running", "running_total", "queue", "kinds", "minutes", "settled_for_s", "failures",
    ]  # fmt: skip
    assert [(job["id"], job["connections"], job["tenant"]) for job in found["running"]] == [(12, 1, None)]
    assert found["queue"]["running"] == 1
    assert [(f["job"], f["outcome"]) for f in found["failures"]] == [(11, "retry")]


@pytest.mark.parametrize("what", ["req-1", "11", "2026-11-20T10:00:00Z", "2026-11-20T11:00:00+01:00", "seq:6", "msg-2"])
def test_trace_takes_every_form(database: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    found = printed_json(capsys, "trace", what)
    assert found["tick"]["request_id"] == "req-1"
    assert next(b["sums"] for b in found["bookings"] if b["source"] == "costs") == [
        {"currency": "EUR", "basis": "provider", "amount": "7"},
        {"currency": "USD", "basis": "local", "amount": "0.5"},
        {"currency": "USD", "basis": "provider", "amount": "-1"},
    ]


def test_request_id_may_look_like_a_job_id(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(database, "update tick set request_id = '4711'")
    assert printed_json(capsys, "trace", "4711")["jobs_total"] == 3


@pytest.mark.parametrize(
    "what", ["nope", "99", "seq:99", "seq:x", "seq:", "2026-11-20T10:05:00Z", "2026-11-20T10:00", "9" * 30, "é", "a\nb"]
)
def test_unknown_id_is_refused_with_the_forms(database: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, err = printed(capsys, "trace", what)
    assert (code, out) == (2, "")
    assert err.startswith("error: ID: nothing is known of ")
    assert all(form in err for form in ("a request id", "a job id", "2026-11-22T10:00:00Z", "seq:N"))


def test_trace_shows_the_road_and_says_what_is_cut(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, "trace", "req-1")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert words("tick 2026-11-20 10:00:00 UTC via qstash, made 10:00:01") in lines
    assert words("batches 1 of 2 done, 1 by 10:05:01: incomplete") in lines
    assert words("11 1 10:00:02 10:00:03 delivery 10:00:04 200 m-11") in lines
    assert words("12 2 - - deadline - - -") in lines
    booked = "acme/main costs 6 11 10:00:07 1 1 0 7 EUR provider; 0.5 USD local; -1 USD provider"
    assert words(booked) in lines
    code, _, err = printed(capsys, "trace", "req-1", "--limit", "1")
    assert (code, err.splitlines()) == (
        0,
        [
            "note: 1 of 4 jobs are shown; --limit shows more",
            "note: 1 of 2 reads of these are shown; --limit shows more",
        ],
    )


@contextmanager
def on_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What comes until `wanted` has come; the suite's time-out ends waiting in vain."""
    seen = b""
    with suppress(OSError):  # the other side is closed
        while wanted not in seen and (more := os.read(terminal, 65_536)):
            seen += more
    assert wanted in seen, seen
    return seen


@pytest.mark.parametrize(
    ("arguments", "shown", "end"),
    [(("top",), b"REPLICA", "q"), (("status", "--watch"), b"complete", "signal"), (("top",), b"REPLICA", "ctrl-c")],
)
def test_live_view_ends_well_and_gives_the_terminal_back(
    database: str, arguments: tuple[str, ...], shown: bytes, end: str
) -> None:
    with on_a_terminal(*arguments, "--every", "0.2") as (process, terminal):
        seen = read_until(terminal, shown)
        assert b"\x1b[?1049h" in seen
        match end:
            case "q":
                os.write(terminal, b"q")
            case "signal":
                process.send_signal(signal.SIGTERM)
            case _:
                process.send_signal(signal.SIGINT)
        read_until(terminal, b"\x1b[?1049l")
        if arguments[0] == "status":
            read_until(terminal, b"complete")  # the last frame stays
        assert process.wait() == 0
