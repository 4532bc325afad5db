"""What `tallyd top` reads, on rows written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest

from daemon.db import activity as module
from daemon.db.activity import Minute, RunningJob, read_activity
from daemon.db.pool import Database
from tests.tick_kit import SLOT, add_job, summarise

pytestmark = pytest.mark.anyio


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


async def test_replicas_that_stopped_or_fell_silent_long_ago_are_left_out(db: Database) -> None:
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
    found = (await read_activity(db)).replicas
    assert [(r.worker, r.info, r.running, r.settled) for r in found] == [
        (1, "well", 3, {"done": 4, "retry": 1}),
        (2, "silent", 0, {}),
    ]
    assert found[0].beat_s < 30 < found[1].beat_s < 90
    assert found[1].up_s < 60
    assert found[0].up_s >= 3_600


async def test_running_jobs_tell_what_they_are_about(db: Database) -> None:
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
    found = await read_activity(db)
    assert all(90 < job.running_s < 130 for job in found.running)
    assert [replace(job, running_s=0.0) for job in found.running] == [
        RunningJob(ids[0], "poll", None, 2, 5, 0.0, SLOT, 3, None),
        RunningJob(ids[1], "poll_one", "acme", 2, 5, 0.0, None, 1, "costs"),
        RunningJob(ids[2], "poll", "tenant 9", 2, 5, 0.0, None, None, None),
        RunningJob(ids[3], "publish", None, 2, 5, 0.0, None, None, None),
    ]
    assert found.running_total == 4


async def test_long_lists_are_cut_and_say_so(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
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
    found = await read_activity(db)
    assert {(k.state, k.jobs, k.is_cut) for k in found.kinds} == {
        ("available", 5, True),
        ("scheduled", 1, False),
        ("retryable", 1, False),
        ("running", 3, False),
    }
    assert (len(found.running), found.running_total) == (2, 3)


async def test_settled_attempts_are_counted_by_minute(db: Database) -> None:
    await add_attempts(db, 1, times=3)
    await add_attempts(db, 9, ago="30 seconds", worker=2)
    await add_attempts(db, 3, ago="14 minutes 30 seconds")
    await add_attempts(db, 4, ago="15 minutes 1 second")
    found = await read_activity(db)
    assert found.settled_for_s == 900
    assert [minute for minute in found.minutes if minute.settled] == [
        Minute(0, {"done": 3, "worker lost": 1}),
        Minute(14, {"snooze": 1}),
    ]
    assert [minute.ago for minute in found.minutes] == list(range(15))


async def test_only_the_end_of_a_long_log_is_read(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then the view tells for how long back it counts, so that no rate is too low."""
    monkeypatch.setattr(module, "LOG_BLOCKS", 3)
    await add_attempts(db, 1, ago="5 minutes", times=2_000)
    await add_attempts(db, 2, ago="90 seconds", times=1_000, note="failed")
    found = await read_activity(db)
    assert 90 <= found.settled_for_s < 120
    counted = {name: jobs for minute in found.minutes for name, jobs in minute.settled.items()}
    assert 0 < counted.pop("retry") < 1_000
    assert counted == {}
    assert [minute.ago for minute in found.minutes] == [0, 1]
    assert len(found.failures) == module.FAILURES_MAX


@pytest.mark.parametrize(
    ("sql", "more"), [(module._SETTLED, []), (module._FAILURES, [20])], ids=["settled", "failures"]
)
async def test_log_is_read_by_place_and_not_as_a_whole(db: Database, sql: str, more: list[int]) -> None:
    await add_attempts(db, 1, times=20_000)
    await db.execute("analyze attempt")
    plan = [row[0] for row in await db.fetch("explain analyze " + sql, timedelta(minutes=15), 10, *more)]
    assert any("Tid Range Scan on attempt_" in line for line in plan), plan
    read = [line for line in plan if "Scan on attempt_" in line and "never executed" not in line]
    assert not any("Seq Scan" in line for line in read), plan


async def test_failures_are_told_newest_first_also_those_of_last_week(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAILURES_FOR", timedelta(days=7, hours=1))
    await db.execute("select attempt_make_partitions(now() - interval '7 days', 0)")
    await add_attempts(db, 4, ago="7 days", note="last week")
    await add_attempts(db, 2, ago="2 seconds", note="x" * 1_000)
    await add_attempts(db, 9, ago="1 second", note="worker lost")
    for outcome in (1, 3, 5, 8):
        await add_attempts(db, outcome, note="no failure")
    await summarise(db, 1, slot=None, kind="poll_one")
    found = (await read_activity(db)).failures
    assert [(f.outcome, f.kind, f.note) for f in found] == [
        ("worker lost", "poll_one", "worker lost"),
        ("retry", "poll_one", "x" * 500),
        ("dead", "poll_one", "last week"),
    ]
