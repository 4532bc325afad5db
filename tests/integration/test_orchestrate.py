"""One tick per slot, whoever makes it; and each connection in its turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.db import ledger, ticks
from daemon.db.pool import Database
from daemon.domain.connection import ConnectionId
from daemon.domain.errors import UsageError
from daemon.domain.job import JobId, Summary
from daemon.domain.window import EPOCH, floor_to
from daemon.orchestrate import IDLE_LADDER, DueConnection, Occasion, Tick, TickSettings, next_due, plan, tick
from daemon.queue.postgres import PostgresQueue
from daemon.worker.poll import PollOrder
from tests.ledger_kit import assert_laws

anyio_mark = pytest.mark.anyio
SETTINGS = TickSettings(tick_s=300, batch_size=10)
SLOT = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
STEP = timedelta(seconds=300)


# ── Pure: who is due when ───────────────────────────────────────────────────────────────────────

slots = st.integers(0, 10**7).map(lambda n: EPOCH + n * STEP)
connections = st.integers(1, 2**40).map(ConnectionId)
RUNGS = [(timedelta(0), STEP), *reversed(IDLE_LADDER)]


@given(slots, connections, st.sampled_from(RUNGS))
def test_a_connection_on_a_rung_is_polled_once_a_period(
    slot: datetime, connection: ConnectionId, rung: tuple[timedelta, timedelta]
) -> None:
    at_least, period = rung
    polls = [slot]
    for _ in range(20):
        polls.append(next_due(polls[-1], DueConnection(connection, polls[-1] - at_least), 300))
    gaps = [after - before for before, after in pairwise(polls)]
    assert timedelta(0) < gaps[0] <= period, "never later than one period"
    assert set(gaps[1:]) == {period}, "and from then on exactly once in each"


@given(slots, st.integers(0, 2**40), st.sampled_from(IDLE_LADDER))
def test_idle_connections_spread_evenly(slot: datetime, first: int, rung: tuple[timedelta, timedelta]) -> None:
    at_least, period = rung
    width = period // STEP
    due = Counter(
        next_due(slot, DueConnection(ConnectionId(first + n), slot - at_least), 300) for n in range(width * 40)
    )
    assert len(due) <= width
    assert max(due.values()) < 40 * 2.5


@given(slots, connections, st.timedeltas(timedelta(0), timedelta(days=30)))
def test_news_bring_a_connection_back_to_every_tick(slot: datetime, connection: ConnectionId, idle: timedelta) -> None:
    later = next_due(slot, DueConnection(connection, slot - idle), 300)
    assert later > slot
    assert (later - EPOCH) % STEP == timedelta(0), "due times lie on the grid"
    assert next_due(later, DueConnection(connection, later), 300) == later + STEP


@given(slots, connections, st.sampled_from([1, 2, 60, 300, 900, 3600, 86400]), st.timedeltas(timedelta(0)))
def test_any_tick_length_moves_forward_by_whole_slots(
    slot: datetime, connection: ConnectionId, tick_s: int, idle: timedelta
) -> None:
    start = floor_to(slot, tick_s)
    due = next_due(
        start, DueConnection(connection, max(EPOCH, start - idle) if idle < start - EPOCH else EPOCH), tick_s
    )
    assert due >= start + timedelta(seconds=tick_s)
    assert (due - EPOCH) % timedelta(seconds=tick_s) == timedelta(0)


@given(st.integers(0, 350), st.integers(1, 120))
def test_a_plan_takes_everyone_once(count: int, size: int) -> None:
    due = [DueConnection(ConnectionId(n), SLOT) for n in range(count)]
    planned = plan(SLOT, due, TickSettings(batch_size=size))
    assert [id_ for batch in planned.batches for id_ in batch] == list(range(count))
    assert all(len(batch) == size for batch in planned.batches[:-1])
    assert len(planned.next_due) == count


# ── One tick per slot ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def many(database_url: str) -> AsyncIterator[list[Database]]:
    """Eight replicas' databases."""
    opened = [await Database.open(database_url, pool_max=2) for _ in range(8)]
    yield opened
    for db in opened:
        await db.close()


async def add_connections(db: Database, count: int) -> None:
    await db.execute("insert into tenant (name) values ('acme') on conflict do nothing")
    await db.execute(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since)
           select t.id, 'c' || n, 'openai', 'https://x.test', '', '', '', now()
           from tenant t, generate_series(1, $1::int) n""",
        count,
    )


async def make(db: Database, slot: datetime | None = None) -> Tick:
    return await tick(db, PostgresQueue(db), SETTINGS, slot)


async def ordered(db: Database) -> list[int]:
    """The connections of all batches that wait."""
    bodies = [row["body"] for row in await db.fetch("select body from job order by id")]
    return [id_ for body in bodies for id_ in msgspec.json.decode(body, type=PollOrder).connections]


async def time_passes(db: Database) -> None:
    """The next slot: the ticks so far move one slot back."""
    await db.execute("update tick set slot_at = slot_at - interval '300 seconds'")
    await db.execute("update connection set next_due_at = next_due_at - interval '300 seconds'")


async def current_slot(db: Database) -> datetime:
    """A slot with enough of it left for a test."""
    while (now := await db.now()) - floor_to(now, 300) > timedelta(seconds=290):  # noqa: ASYNC110 - the clock is Postgres's
        await anyio.sleep(1)
    return floor_to(now, 300)


@anyio_mark
async def test_eight_replicas_race_for_a_slot_and_one_wins(many: list[Database]) -> None:
    await add_connections(many[0], 95)
    slot = await current_slot(many[0])
    made: list[Tick] = []

    async def race(db: Database) -> None:
        made.append(await make(db))

    for _ in range(4):
        made.clear()
        async with anyio.create_task_group() as group:
            for db in many:
                for _ in range(2):
                    group.start_soon(race, db)
        assert [t.created for t in made].count(True) == 1
        assert {t.slot for t in made} == {slot}
        (winner,) = [t for t in made if t.created]
        assert (winner.connections, winner.batches) == (95, 10)
        assert sorted(await ordered(many[0])) == list(range(1, 96)), "each once"
        await assert_laws(many[0])
        await many[0].execute("truncate job, ready")
        await many[0].execute("update connection set open_job = null")
        await time_passes(many[0])


@anyio_mark
async def test_a_slot_is_the_databases_and_on_the_grid(db: Database) -> None:
    await add_connections(db, 3)
    slot = await current_slot(db)
    with pytest.raises(UsageError, match="future"):
        await make(db, slot + STEP)
    with pytest.raises(UsageError, match=r"no start of a 300 s slot; use 2026|no start of a 300 s slot; use"):
        await make(db, slot - timedelta(seconds=1))
    with pytest.raises(UsageError, match="no start"):
        await make(db, slot + timedelta(microseconds=1))
    old = await make(db, slot - STEP)
    assert (old.created, old.slot) == (False, slot - STEP)
    assert not await db.fetchval("select count(*) from tick"), "what was refused suppresses nothing"
    assert (await make(db, slot)).created
    assert not (await make(db, slot)).created
    assert not (await make(db)).created


@anyio_mark
async def test_a_crash_in_a_tick_leaves_nothing_and_another_makes_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_connections(db, 25)
    await current_slot(db)

    class Crash(BaseException):
        pass

    for step in ("due_connections", "advance", "finish"):

        async def crash(*_: object) -> None:
            raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(ticks, step, crash)
            with pytest.raises(Crash):
                await make(db)
        for table in ("tick", "job", "ready"):
            assert not await db.fetchval(f"select count(*) from {table}"), (step, table)
        assert not await db.fetchval("select count(*) from connection where open_job is not null")
    made = await make(db)
    assert (made.created, made.connections) == (True, 25)


@anyio_mark
async def test_an_open_connection_is_not_taken_again(db: Database) -> None:
    await add_connections(db, 5)
    await current_slot(db)
    assert (await make(db)).connections == 5
    await time_passes(db)
    again = await make(db)
    assert (again.created, again.connections, again.batches) == (True, 0, 0)
    assert await db.fetchval("select finished_at is not null from tick where slot_at = $1", again.slot)
    await db.execute("update connection set open_job = null where id <= 2")
    await time_passes(db)
    assert (await make(db)).connections == 2


@anyio_mark
async def test_only_active_and_due_connections_are_taken(db: Database) -> None:
    await add_connections(db, 5)
    slot = await current_slot(db)
    for id_, state in enumerate(("paused", "parked", "archived"), start=1):
        await db.execute("update connection set state = $2 where id = $1", id_, state)
    await db.execute("update connection set next_due_at = $1 where id = 4", slot + STEP)
    await db.execute("update connection set next_due_at = $1 where id = 5", slot + STEP - timedelta(seconds=1))
    await make(db)
    assert await ordered(db) == [5], "due within the slot counts"


@anyio_mark
async def test_an_interval_that_is_none_keeps_nobody_from_being_polled(db: Database) -> None:
    """A poller of somebody else's may store what it likes under that name."""
    given = ("0.5", "3600.0", "1e30", "-5", '"soon"')
    await add_connections(db, len(given))
    await db.execute(
        """update connection c set settings = jsonb_build_object('every_s', g.value::jsonb)
           from (select row_number() over (order by id) as n, id from connection) i
           join unnest($1::text[]) with ordinality as g(value, n) using (n) where c.id = i.id""",
        list(given),
    )
    made = await make(db)
    assert (made.created, made.connections) == (True, len(given))


@anyio_mark
async def test_a_downtime_of_a_day_makes_one_tick(db: Database) -> None:
    await add_connections(db, 12)
    await current_slot(db)
    await make(db)
    await db.execute("update connection set open_job = null, next_due_at = next_due_at - interval '1 day'")
    await db.execute("update tick set slot_at = slot_at - interval '1 day'")
    await db.execute("truncate job, ready")
    assert (await make(db)).connections == 12
    assert sorted(await ordered(db)) == list(range(1, 13))
    assert await db.fetchval("select count(*) from tick") == 2


@anyio_mark
async def test_who_waits_longest_comes_first(db: Database) -> None:
    await add_connections(db, 30)
    await current_slot(db)
    await db.execute("update connection set next_due_at = now() - make_interval(mins => id::int)")
    await make(db)
    assert await ordered(db) == list(range(30, 0, -1))


@anyio_mark
async def test_a_tick_in_which_a_connection_is_locked_passes_it_over(many: list[Database]) -> None:
    await add_connections(many[0], 3)
    await current_slot(many[0])
    async with many[1].transaction() as tx:
        await tx.fetch("select from connection where id = 2 for update")
        assert (await make(many[0])).connections == 2
    assert sorted(await ordered(many[0])) == [1, 3]


@anyio_mark
async def test_two_batches_that_end_at_the_same_moment_finish_their_tick(many: list[Database]) -> None:
    """Neither sees the other's summary before both have committed."""
    await add_connections(many[0], 20)
    slot = await current_slot(many[0])
    assert (await make(many[0])).batches == 2
    first = many[0].transaction()
    tx = await first.__aenter__()
    await ledger.write_summary(tx, JobId(1), "poll", slot, Summary(connections=10))
    async with anyio.create_task_group() as group:

        async def second() -> None:
            async with many[1].transaction() as other:
                await ledger.write_summary(other, JobId(2), "poll", slot, Summary(connections=10))

        group.start_soon(second)
        while not await many[2].fetchval("select count(*) from batch_summary"):
            waiting = (
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            )
            if await many[2].fetchval(waiting):
                break
            await anyio.lowlevel.checkpoint()
        await first.__aexit__(None, None, None)
    assert await many[0].fetchval("select finished_at is not null from tick where slot_at = $1", slot)


# ── Occasions ───────────────────────────────────────────────────────────────────────────────────


@anyio_mark
async def test_a_fallback_waits_for_its_grace_and_then_stands_in(db: Database) -> None:
    await add_connections(db, 3)
    day = TickSettings(tick_s=86_400)
    age_s = (await db.now() - floor_to(await db.now(), 86_400)).total_seconds()
    early = Occasion(via="fallback", grace_s=age_s + 3_600)
    assert not (await tick(db, PostgresQueue(db), day, occasion=early)).created
    assert not await db.fetchval("select count(*) from tick")
    late = Occasion(via="fallback", grace_s=max(0.0, age_s - 1))
    assert (await tick(db, PostgresQueue(db), day, occasion=late)).created
    assert await db.fetchval("select via from tick") == "fallback"
    assert not await db.fetchval("select count(*) from handover"), "a QStash that is silent is not asked for more"
    assert await db.fetchval("select count(*) from ready") == 1


@anyio_mark
async def test_an_order_that_comes_just_before_its_slot_waits_for_it(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QStash's clock is ahead: answered at once, the order would find the old slot made, and the new one unmade."""
    await add_connections(db, 3)
    day = TickSettings(tick_s=86_400)
    midnight = floor_to(await db.now(), 86_400)
    early = Occasion(via="qstash", message_id="msg_1", early_s=10)
    clock = iter([midnight - timedelta(seconds=2), midnight - timedelta(seconds=0.5), midnight])
    waits: list[float] = []

    async def now(_self: Database) -> datetime:
        return next(clock)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    await db.execute("insert into tick (slot_at, connections, batches) values ($1, 0, 0)", midnight - timedelta(days=1))
    with monkeypatch.context() as patch:
        patch.setattr(Database, "now", now)
        patch.setattr("daemon.orchestrate.anyio.sleep", sleep)
        made = await tick(db, PostgresQueue(db), day, occasion=early)
    assert (made.slot, made.created, waits) == (midnight, True, [2.0, 0.5])


@anyio_mark
async def test_an_early_order_makes_the_slot_that_it_came_in_where_that_has_none(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    day = TickSettings(tick_s=86_400)
    midnight = floor_to(await db.now(), 86_400)

    async def now(_self: Database) -> datetime:
        return midnight - timedelta(seconds=2)

    monkeypatch.setattr(Database, "now", now)
    made = await tick(db, PostgresQueue(db), day, occasion=Occasion(via="qstash", message_id="msg_1", early_s=10))
    assert (made.slot, made.created) == (midnight - timedelta(days=1), True)


@anyio_mark
async def test_delivery_and_fallback_race_for_a_slot_and_one_wins(many: list[Database]) -> None:
    await add_connections(many[0], 30)
    await current_slot(many[0])
    made: list[Tick] = []

    async def race(db: Database, occasion: Occasion) -> None:
        made.append(await tick(db, PostgresQueue(db), SETTINGS, occasion=occasion))

    async with anyio.create_task_group() as group:
        for number, db in enumerate(many):
            by_qstash = Occasion(via="qstash", message_id=f"msg_{number % 3}", request_id="r", hands_over=True)
            group.start_soon(race, db, by_qstash)
            group.start_soon(race, db, Occasion(via="fallback"))
    assert [t.created for t in made].count(True) == 1
    via = await many[0].fetchval("select via from tick")
    handed = await many[0].fetchval("select count(*) from handover")
    assert handed == (3 if via == "qstash" else 0)
    assert await many[0].fetchval("select count(*) from job where kind = 'poll'") == 3
    await assert_laws(many[0])


@anyio_mark
async def test_a_tick_is_judged_once_when_its_time_is_up(many: list[Database]) -> None:
    """How much was expected and done by when is stored with the tick, whoever looks."""
    await add_connections(many[0], 30)
    slot = await current_slot(many[0])
    await make(many[0])
    assert await ticks.judge(many[0]) == [], "not yet"
    await ledger.write_summary(many[0], JobId(1), "poll", slot, Summary(connections=10))
    await many[0].execute("update tick set deadline_at = now() - interval '1 second'")
    await many[0].execute("update batch_summary set finished_at = now() - interval '2 seconds'")
    await ledger.write_summary(many[0], JobId(2), "poll", slot, Summary(connections=10))
    found: list[ticks.Judged] = []

    async def judge(db: Database) -> None:
        found.extend(await ticks.judge(db))

    async with anyio.create_task_group() as group:
        for db in many:
            group.start_soon(judge, db)
    (judged,) = found
    assert (judged.slot, judged.expected, judged.done) == (slot, 3, 1), "one was in time, one late, one is missing"
    assert await many[0].fetchval("select done_in_time from tick") == 1


@anyio_mark
async def test_what_is_old_is_pruned_and_the_rest_kept(db: Database) -> None:
    await db.execute(
        """insert into tick (slot_at, connections, batches) select now() - n * interval '1 day', 0, 0 from generate_series(1, 2500) n;
           insert into handover (job_id, slot_at, place) select n, now() - n * interval '1 day', 1 from generate_series(1, 2500) n;
           insert into delivery (message_id, slot_at, at) select n::text, now(), now() - n * interval '1 day' from generate_series(1, 9) n;
           insert into booking (poll_seq, job_id, booked_at) select n, 1, now() - n * interval '1 day' from generate_series(1, 500) n"""
    )
    await ticks.prune(db, 90, 400)
    counts = await db.fetchrow(
        """select (select count(*) from tick), (select count(*) from handover), (select count(*) from delivery),
             (select count(*) from booking)"""
    )
    assert counts is not None
    assert tuple(counts.values()) == (89, 89, 2, 399)
    await ticks.prune(db, None, None)
    assert await db.fetchval("select count(*) from tick") == 89, "none keeps everything"
