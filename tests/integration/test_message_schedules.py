"""Schedules of messages: each instant fires once, whoever sees it and wherever it is cut off."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice

import anyio
import pytest
from structlog.testing import capture_logs

from daemon.db.pool import Database
from daemon.domain.account import AccountId, Limits
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import Completed, Discarded, Retryable
from daemon.queue import schedules as module
from daemon.queue.cron import upcoming
from daemon.queue.groups import Endpoint, Groups
from daemon.queue.message import Callback, Spec
from daemon.queue.messages import Messages
from daemon.queue.postgres import PostgresQueue
from daemon.queue.schedules import Schedules, TooManySchedulesError
from tests.message_kit import BROKEN, URL, Post, add_account

pytestmark = pytest.mark.anyio

MINUTELY = "* * * * *"


@pytest.fixture
async def post(db: Database) -> Post:
    return await Post.open(db)


@pytest.fixture
def schedules(post: Post) -> Schedules:
    return make(post)


def make(post: Post, limits: Limits | None = None) -> Schedules:
    async def limits_of(account: AccountId) -> Limits:
        return limits or post.limits

    return Schedules(post.db, post.queue, post.messages, limits_of)


async def put(schedules: Schedules, post: Post, id_: str | None = "s", cron: str = MINUTELY, **fields) -> str:
    destination, spec = fields.pop("destination", URL), fields.pop("spec", Spec())
    return await schedules.put(post.account, id_, cron, destination, spec, fields.pop("limits", Limits()), **fields)


async def come_due(db: Database, late_s: float = 1.0) -> None:
    await db.execute("update schedule set next_at = now() - make_interval(secs => $1)", late_s)


async def messages_of(db: Database) -> list:
    return await db.fetch("select m.*, p.body from message m left join payload p on p.id = payload_id order by m.id")


# ── Firing ──────────────────────────────────────────────────────────────────────────────────────


async def test_firing_publishes_what_was_put(schedules, post, db) -> None:
    spec = Spec(
        method="PUT",
        header={"X-A": ["1"]},
        retries=7,
        delay_s=40,
        flow=("k", 2, None, 1),
        callback=Callback("https://c.example"),
    )
    url = "https://User:pw@Example.COM:8443/x?y=1"
    await put(
        schedules,
        post,
        spec=spec,
        destination=url,
        body=b"\x00\xff",
        queue="q",
        labels=["l", "m"],
        caller_ip="10.0.0.9",
    )
    assert await schedules.fire_due() == 0, "it is not due yet"
    await come_due(db)
    assert await schedules.fire_due() == 1
    [message] = await messages_of(db)
    assert (message["url"], message["host"], message["method"], message["body"]) == (
        url,
        "example.com",
        "PUT",
        b"\x00\xff",
    )
    assert (message["queue"], message["schedule_id"], message["labels"]) == ("q", "s", ["l", "m"])
    assert message["caller_ip"] == "10.0.0.9"
    assert message["not_before"] - message["created_at"] == timedelta(seconds=40)
    assert message["flow_id"] is not None
    schedule = await schedules.get(post.account, "s")
    assert schedule.spec == spec
    assert list(schedule.last_states.values()) == ["IN_PROGRESS"]
    assert schedule.error is None
    assert await schedules.fire_due() == 0, "and fires once"


async def test_next_instant_is_counted_by_the_database(schedules, post, db) -> None:
    await put(schedules, post, cron="CRON_TZ=Asia/Kolkata 30 5 * * *")
    now = await db.now()
    schedule = await schedules.get(post.account, "s")
    assert timedelta(0) < schedule.next_at - now <= timedelta(days=1)
    assert (schedule.next_at.hour, schedule.next_at.minute) == (0, 0)
    assert schedule.cron == "CRON_TZ=Asia/Kolkata 30 5 * * *"


async def test_hours_of_downtime_are_one_firing(schedules, post, db) -> None:
    await put(schedules, post)
    await come_due(db, 7 * 3600)
    assert await schedules.fire_due() == 1
    assert await schedules.fire_due() == 0
    assert len(await messages_of(db)) == 1
    schedule = await schedules.get(post.account, "s")
    now = await db.now()
    assert now - timedelta(seconds=1) < schedule.next_at <= now + timedelta(minutes=1)
    assert now - schedule.last_at < timedelta(seconds=10)


async def test_replicas_that_fire_at_once_share_the_schedules(schedules, post, db, database_url) -> None:
    for number in range(60):
        await put(schedules, post, f"s{number}", queue=f"q{number % 3}")
    await come_due(db)
    others = [await Database.open(database_url) for _ in range(3)]
    fired: list[int] = []

    async def fire(database: Database) -> None:
        replica = make(
            replace(post, db=database, queue=(queue := PostgresQueue(database)), messages=Messages(database, queue))
        )
        while count := await replica.fire_due(7):
            fired.append(count)

    try:
        async with anyio.create_task_group() as tasks:
            for database in [*others, db]:
                tasks.start_soon(fire, database)
    finally:
        for database in others:
            await database.close()
    assert sum(fired) == 60
    assert await db.fetchval("select count(*) from message") == 60
    assert await db.fetchval("select count(distinct schedule_id) from message") == 60


async def test_replica_does_not_wait_for_a_schedule_that_another_is_firing(schedules, post, db) -> None:
    await put(schedules, post, "slow")
    await put(schedules, post, "free")
    await come_due(db)
    async with db.transaction() as tx:
        await tx.execute("select 1 from schedule where id = 'slow' for update")
        assert await schedules.fire_due() == 1
    assert [row["schedule_id"] for row in await messages_of(db)] == ["free"]
    assert await schedules.fire_due() == 1


@pytest.mark.parametrize("step", ["publish_in", "execute"])
async def test_killed_firing_leaves_nothing_and_fires_again(schedules, post, db, step, monkeypatch) -> None:
    """Cut off before its messages, and between them and the note that it has fired."""
    await put(schedules, post)
    await come_due(db)

    class Killed(BaseException):
        pass

    async def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if step == "publish_in":
            patch.setattr(post.messages, "publish_in", kill)
        else:
            kinds = "$1::bigint[], $2::text[], $3::text[], $4::text[], $5::timestamptz[]"
            patch.setattr(module, "_FIRED", f"select pg_terminate_backend(pg_backend_pid()), {kinds}")
        with pytest.raises((Killed, StorageUnavailableError)):
            await schedules.fire_due()
    assert await messages_of(db) == []
    assert await schedules.fire_due() == 1
    assert len(await messages_of(db)) == 1


async def test_firing_into_a_queue_keeps_its_parallelism_and_passes_its_gate(schedules, post, db) -> None:
    await post.queue.gates.set_queue(post.account, "q", 3, None, 10)
    await put(schedules, post, queue="q")
    for _ in range(2):
        await come_due(db)
        await schedules.fire_due()
    gate = await post.queue.gates.show(post.account, "queue", "q")
    assert (gate.parallelism, gate.running, gate.waiting) == (3, 2, 0)
    assert len(await post.claim()) == 2, "admitted as they were published, without a round of promotion"


# ── Groups ──────────────────────────────────────────────────────────────────────────────────────


async def test_firing_to_a_group_is_one_message_each_and_one_body(schedules, post, db) -> None:
    await Groups(db).upsert_endpoints(
        post.account, "g", [Endpoint("https://b.example", "bee"), Endpoint("https://a.example")], Limits()
    )
    await put(schedules, post, "plain", body=b"other")
    await put(schedules, post, "grouped", destination="g", body=b"shared")
    await come_due(db)
    assert await schedules.fire_due() == 2
    rows = [row for row in await messages_of(db) if row["schedule_id"] == "grouped"]
    assert [(row["url"], row["topic"], row["body"]) for row in rows] == [
        ("https://b.example", "g", b"shared"),
        ("https://a.example", "g", b"shared"),
    ]
    assert ["bee" in row["spec"] for row in rows] == [True, False]
    assert await db.fetchval("select count(*) from payload") == 2
    assert len((await schedules.get(post.account, "grouped")).last_states) == 2


async def test_group_that_is_gone_is_an_error_and_no_obstacle(schedules, post, db) -> None:
    await put(schedules, post, "lost", destination="g")
    await put(schedules, post, "well")
    await come_due(db)
    with capture_logs() as logs:
        assert await schedules.fire_due() == 2
    assert [row["schedule_id"] for row in await messages_of(db)] == ["well"]
    lost = await schedules.get(post.account, "lost")
    assert "'g'" in lost.error
    assert lost.next_at > await db.now()
    assert lost.last_states == {}
    assert [line["schedule_id"] for line in logs if line["event"] == "schedule.failed"] == ["lost"]

    await come_due(db)
    with capture_logs() as logs:
        await schedules.fire_due()
    assert not [line for line in logs if line["event"] == "schedule.failed"], "told as it begins only"

    await Groups(db).upsert_endpoints(post.account, "g", [Endpoint(URL)], Limits())
    await come_due(db)
    with capture_logs() as logs:
        await schedules.fire_due()
    assert (await schedules.get(post.account, "lost")).error is None
    assert [line["schedule_id"] for line in logs if line["event"] == "schedule.recovered"] == ["lost"]


async def test_schedule_over_a_limit_bears_its_error_alone(post, db) -> None:
    """Its queue was deleted, and the account has no room for another."""
    schedules = make(post, Limits(queues=0))
    await put(schedules, post, "bad", queue="gone")
    await put(schedules, post, "good")
    await come_due(db)
    assert await schedules.fire_due() == 2
    assert [row["schedule_id"] for row in await messages_of(db)] == ["good"]
    assert "maxQueues" in (await schedules.get(post.account, "bad")).error
    assert await schedules.fire_due() == 0


async def test_firing_is_bounded_by_the_bodies_it_carries(schedules, post, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "BODIES_BYTES_MAX", 2_500)
    for number in range(4):
        await put(schedules, post, f"s{number}", body=b"x" * 1_000)
    await put(schedules, post, "large", body=b"x" * 9_000)
    await come_due(db)
    fired = []
    while count := await schedules.fire_due():
        fired.append(count)
    assert sum(fired) == 5
    assert max(fired) <= 2
    listed = await schedules.list(post.account)
    assert [schedule.body is None for schedule in listed] == [False, False, True, True, True]
    assert len((await schedules.get(post.account, "large")).body) == 9_000


async def test_firing_is_bounded_by_the_messages_it_makes(schedules, post, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "MESSAGES_MAX", 2)
    for number in range(3):
        await put(schedules, post, f"s{number}")
    await come_due(db)
    assert [await schedules.fire_due() for _ in range(3)] == [2, 1, 0]


# ── Putting, pausing, deleting ──────────────────────────────────────────────────────────────────


async def test_put_replaces_the_whole_schedule(schedules, post, db) -> None:
    await put(schedules, post, spec=Spec(retries=9, flow=("k", 1, None, 1)), body=b"old", queue="q", labels=["l"])
    first = await schedules.get(post.account, "s")
    await schedules.pause(post.account, "s")
    assert await put(schedules, post, cron="5 5 5 5 *", destination="g") == "s"
    second = await schedules.get(post.account, "s")
    assert (second.body, second.queue, second.labels, second.spec) == (b"", None, (), Spec())
    assert (second.cron, second.destination, second.is_paused) == ("5 5 5 5 *", "g", False)
    assert second.created_at == first.created_at
    assert (second.next_at.month, second.next_at.minute) == (5, 5)
    assert await db.fetchval("select flow_key from schedule") is None


async def test_put_of_the_same_expression_loses_no_instant(schedules, post, db) -> None:
    """Applications put their schedules at each start: that must not swallow what has just come due."""
    await put(schedules, post)
    await come_due(db)
    await put(schedules, post, body=b"new")
    assert await schedules.fire_due() == 1
    assert [row["body"] for row in await messages_of(db)] == [b"new"]
    await come_due(db)
    await put(schedules, post, cron="0 0 1 1 *")
    assert await schedules.fire_due() == 0
    await schedules.pause(post.account, "s")
    await come_due(db)
    await put(schedules, post, cron="0 0 1 1 *")
    assert await schedules.fire_due() == 0, "what a pause skipped stays skipped"


async def test_firing_that_was_cut_off_before_its_gates_is_let_through_later(schedules, post, db, monkeypatch) -> None:
    await put(schedules, post, queue="q")
    await come_due(db)

    async def cut_off(gates: object) -> int:
        raise StorageUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(post.queue.gates, "admit", cut_off)
        assert await schedules.fire_due() == 1, "it is committed"
    assert await post.claim() == []
    assert await schedules.fire_due() == 0, "it has fired"
    await post.queue.promote()
    assert len(await post.claim()) == 1


async def test_ids_are_made_up_so_that_nobody_guesses_them(schedules, post) -> None:
    ids = {await put(schedules, post, None) for _ in range(5)}
    assert len(ids) == 5
    assert all(id_.startswith("scd_") and len(id_) > 25 for id_ in ids)


async def test_limit_counts_new_ones_only(schedules, post) -> None:
    limits = Limits(schedules=2)
    await put(schedules, post, "a", limits=limits)
    await put(schedules, post, "b", limits=limits)
    await put(schedules, post, "b", limits=limits)
    for id_ in ("c", None):
        with pytest.raises(TooManySchedulesError, match="2"):
            await put(schedules, post, id_, limits=limits)
    await schedules.delete(post.account, "a")
    await put(schedules, post, "c", limits=limits)


async def test_of_many_who_put_the_last_one_at_once_one_does(schedules, post) -> None:
    refused = []

    async def put_one(number: int) -> None:
        try:
            await put(schedules, post, f"s{number}", limits=Limits(schedules=1))
        except TooManySchedulesError as error:
            refused.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(put_one, number)
    assert len(await schedules.list(post.account)) == 1
    assert len(refused) == 5


async def test_paused_schedule_skips_its_instants_and_makes_none_up(schedules, post, db) -> None:
    await put(schedules, post)
    assert await schedules.pause(post.account, "s")
    assert await schedules.pause(post.account, "s")
    await come_due(db, 3600)
    assert await schedules.fire_due() == 0
    assert (await schedules.get(post.account, "s")).is_paused
    assert await schedules.resume(post.account, "s")
    assert await schedules.fire_due() == 0
    resumed = await schedules.get(post.account, "s")
    assert not resumed.is_paused
    assert resumed.next_at > await db.now()


async def test_resuming_what_runs_skips_nothing(schedules, post, db) -> None:
    await put(schedules, post)
    await come_due(db)
    assert await schedules.resume(post.account, "s")
    assert await schedules.fire_due() == 1


async def test_deleting_keeps_the_messages_that_were_made(schedules, post, db) -> None:
    await put(schedules, post)
    await come_due(db)
    await schedules.fire_due()
    assert await schedules.delete(post.account, "s")
    assert not await schedules.delete(post.account, "s")
    assert await schedules.get(post.account, "s") is None
    assert len(await post.claim()) == 1


async def test_account_sees_only_its_own(schedules, post, db) -> None:
    other = await add_account(db, "b")
    await put(schedules, post)
    assert await schedules.get(other, "s") is None
    assert await schedules.list(other) == []
    for call in (schedules.delete, schedules.pause, schedules.resume):
        assert not await call(other, "s")
    await schedules.put(other, "s", "0 0 1 1 *", "https://other.example", Spec(), Limits())
    assert (await schedules.get(post.account, "s")).destination == URL


async def test_states_of_the_last_firing(schedules, post, db) -> None:
    await Groups(db).upsert_endpoints(
        post.account, "g", [Endpoint(f"https://{number}.example") for number in range(4)], Limits()
    )
    await put(schedules, post, destination="g")
    await come_due(db)
    await schedules.fire_due()

    async def states() -> list[str]:
        return list((await schedules.get(post.account, "s")).last_states.values())

    assert sorted(await states()) == ["IN_PROGRESS"] * 4
    jobs = await post.claim()
    await post.end(jobs[:1], Completed(), BROKEN)
    await post.end(jobs[1:2], Discarded("no"), BROKEN)
    await post.end(jobs[2:3], Retryable("again", delay_s=60), BROKEN)
    names = {id_.job: state for id_, state in (await schedules.get(post.account, "s")).last_states.items()}
    assert [names[job.id] for job in jobs] == ["SUCCESS", "FAIL", "IN_PROGRESS", "IN_PROGRESS"]
    await db.execute("delete from message where id = $1", jobs[0].id)
    assert sorted(await states()) == ["FAIL", "IN_PROGRESS", "IN_PROGRESS"], "what is pruned is unknown"


# ── The service ─────────────────────────────────────────────────────────────────────────────────


async def test_next_due_tells_how_long_to_sleep(schedules, post, db) -> None:
    assert await schedules.next_due_s() is None
    await put(schedules, post)
    assert 0 < await schedules.next_due_s() <= 60
    await schedules.pause(post.account, "s")
    assert await schedules.next_due_s() is None


async def test_service_fires_and_outlives_an_outage(schedules, post, db, monkeypatch) -> None:
    """A fault is told as it begins and as it ends, not on each try."""
    monkeypatch.setattr(module, "LOOK_S", (0.001, 0.001))
    await put(schedules, post)
    await come_due(db)
    real, tries, fired = schedules.fire_due, [], anyio.Event()

    async def fire_due(limit: int = 100) -> int:
        tries.append(None)
        if len(tries) <= 3:
            raise StorageUnavailableError("away")
        count = await real(limit)
        if count == 0:
            fired.set()
        return count

    monkeypatch.setattr(schedules, "fire_due", fire_due)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(schedules.run)
            with anyio.fail_after(5):
                await fired.wait()
            tasks.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["schedule.postponed", "schedule.fired", "schedule.resumed"]
    assert len(await messages_of(db)) == 1


async def test_look_for_what_is_due_costs_the_same_with_many_schedules(schedules, post, db) -> None:
    await put(schedules, post)
    await db.execute(
        "insert into schedule (account_id, id, cron, destination, spec, next_at) "
        "select $1, 'x' || n, '* * * * *', 'https://x.example', '{}', now() + make_interval(secs => 60 + n) "
        "from generate_series(1, 10000) n",
        post.account,
    )
    await db.execute("analyze schedule")
    for sql, args in ((module._DUE, "(100, array[1]::bigint[], 1000000)"), (module._DUE_ACCOUNTS, "(100)")):
        await check_plan(db, sql, args)


async def check_plan(db: Database, sql: str, args: str) -> None:
    async with db.transaction() as tx:
        await tx.execute(f"prepare q as {sql}")
        rows = await tx.fetch(f"explain (analyze, buffers, costs off) execute q{args}")
        await tx.execute("deallocate q")
    plan = "\n".join(row[0] for row in rows)
    assert "schedule_next" in plan, plan
    assert "Seq Scan on schedule" not in plan, plan


# ── What cronsim makes of the hours that a zone skips or repeats ────────────────────────────────


def instants(cron: str, after: datetime, count: int) -> list[str]:
    return [f"{at:%d %H:%M}" for at in islice(upcoming(cron, after), count)]


SPRING = datetime(2026, 3, 28, 12, tzinfo=UTC)  # Berlin has no 29 March 02:00 to 03:00; it is 01:00 UTC
AUTUMN = datetime(2026, 10, 24, 12, tzinfo=UTC)  # and 25 October 02:00 to 03:00 twice, at 00:00 and 01:00 UTC


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        # A fixed time that is skipped fires as the clock goes on, and one that is repeated fires once.
        ("CRON_TZ=Europe/Berlin 30 2 * * *", SPRING, ["29 01:00", "30 00:30"]),
        ("CRON_TZ=Europe/Berlin 30 2 * * *", AUTUMN, ["25 00:30", "26 01:30"]),
        # What repeats by the hour or minute goes by real time.
        ("CRON_TZ=Europe/Berlin 0 * * * *", SPRING + timedelta(hours=11), ["29 00:00", "29 01:00", "29 02:00"]),
        ("CRON_TZ=Europe/Berlin 0 * * * *", AUTUMN + timedelta(hours=11), ["25 00:00", "25 01:00", "25 02:00"]),
        ("CRON_TZ=Europe/Berlin */30 2 * * *", SPRING, ["30 00:00", "30 00:30"]),
        ("CRON_TZ=Europe/Berlin */30 2 * * *", AUTUMN, ["25 00:00", "25 00:30", "25 01:00", "25 01:30"]),
        # Day of month or day of week: either is enough. A step that begins with a star restricts nothing.
        ("0 0 13 * 5", datetime(2026, 1, 1, tzinfo=UTC), ["02 00:00", "09 00:00", "13 00:00", "16 00:00"]),
        ("0 0 13 * *", datetime(2026, 1, 1, tzinfo=UTC), ["13 00:00", "13 00:00"]),
        ("0 0 */2 * 1", datetime(2026, 1, 1, tzinfo=UTC), ["05 00:00", "19 00:00"]),
        ("0 0 29 2 *", datetime(2026, 1, 1, tzinfo=UTC), ["29 00:00"]),
    ],
)  # fmt: skip
def test_instants_of_hard_expressions(cron, after, expected) -> None:
    assert instants(cron, after, len(expected)) == expected


async def test_a_schedule_that_cannot_be_read_stops_neither_the_others_nor_the_service(schedules, post, db) -> None:
    await put(schedules, post, "bad")
    await put(schedules, post, "good")
    await db.execute("update schedule set spec = '{\"retries\": []}' where id = 'bad'")
    await come_due(db)
    assert await schedules.fire_due() == 2
    assert [row["schedule_id"] for row in await messages_of(db)] == ["good"]
    assert await db.fetchval("select error from schedule where id = 'bad'")
    assert await schedules.fire_due() == 0
