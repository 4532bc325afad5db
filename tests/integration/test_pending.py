"""Messages under way: what is known of them, and cancelling them whatever state they are in."""

import anyio
import anyio.lowlevel
import pytest

from daemon.db.pool import Database
from daemon.domain.job import Completed, Discarded, Retryable, Settlement
from daemon.queue import pending as module
from daemon.queue.listing import Filter
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.message import Callback, MessageId, Spec
from daemon.queue.pending import FINISHED_S, Pending
from tests.message_kit import BROKEN, OK, Post

pytestmark = pytest.mark.anyio


@pytest.fixture
async def post(db: Database) -> Post:
    return await Post.open(db)


@pytest.fixture
def pending(post: Post) -> Pending:
    return Pending(post.db, post.queue)


async def states(db: Database, id_: MessageId) -> list[int]:
    return [
        row["state"] for row in await db.fetch("select state from event where message_id = $1 order by id", id_.job)
    ]


async def consistent(db: Database) -> bool:
    return await QueueMaintenance(db).conservation() == []


# ── Looking ─────────────────────────────────────────────────────────────────────────────────────


async def test_message_can_be_looked_at_until_some_time_after_its_end(pending, post, db) -> None:
    id_ = await post.send(body=b"\xffbody", queue="q", labels=("l",))
    stored = await pending.get(post.account, id_)
    assert (stored.message.id, stored.body, stored.is_alive) == (id_, b"\xffbody", True)
    jobs = await post.claim()
    assert (await pending.get(post.account, id_)).is_alive
    await post.end(jobs, Completed(), OK)
    stored = await pending.get(post.account, id_)
    assert (stored.message.queue, stored.message.labels, stored.is_alive) == ("q", ("l",), False)
    await db.execute("update event set at = at - make_interval(secs => $1)", FINISHED_S - 5)
    assert await pending.get(post.account, id_) is not None
    await db.execute("update event set at = at - interval '6 seconds'")
    assert await pending.get(post.account, id_) is None


async def test_dead_and_cancelled_ones_have_ended_too(pending, post, db) -> None:
    dead = await post.send("https://1.example")
    await post.kill()
    cancelled = await post.send("https://2.example")
    await pending.cancel(post.account, [cancelled])
    for id_ in (dead, cancelled):
        assert not (await pending.get(post.account, id_)).is_alive
    await db.execute("update event set at = at - interval '1 hour'")
    await db.execute("update dead set at = at - interval '1 hour'")
    for id_ in (dead, cancelled):
        assert await pending.get(post.account, id_) is None


async def test_unknown_guessed_and_foreign_ids_give_nothing(pending, post, db) -> None:
    other = await Post.open(db, "b")
    theirs, mine = await other.send(), await post.send()
    wrong = [theirs, MessageId(mine.job, mine.salt ^ 1), MessageId(99, 1)]
    for id_ in wrong:
        assert await pending.get(post.account, id_) is None
    assert await pending.cancel(post.account, wrong) == 0
    assert await pending.cancel_matching(post.account, Filter(ids=tuple(wrong))) == 0
    assert await pending.delete_queue(post.account, "q") == 0
    assert len(await post.live()) == 2


# ── Cancelling ──────────────────────────────────────────────────────────────────────────────────


async def test_cancelled_in_every_state_it_can_be_in(pending, post, db) -> None:
    dead = await post.send("https://dead.example")
    await post.kill()
    done = await post.send("https://done.example")
    await post.deliver()
    leased = await post.send("https://lease.example")
    [job] = await post.claim()
    ready = await post.send("https://ready.example")
    due = await post.send("https://due.example", Spec(delay_s=60))
    lane, held = [await post.send("https://held.example", queue="q") for _ in range(2)]
    assert await consistent(db)
    ids = [leased, ready, due, lane, held]
    assert await pending.cancel(post.account, [*ids, dead, done, held]) == 5
    for id_ in ids:
        assert (await states(db, id_))[-2:] == [7, 8]
    for id_ in (dead, done):
        assert 8 not in await states(db, id_)
    assert await post.messages.load([job]) == [None], "what its delivery still writes is refused"
    assert await db.fetchval("select count(*) from slot") == 0
    assert await db.fetchval("select count(*) from dead") == 1
    assert await consistent(db)
    assert await pending.cancel(post.account, ids) == 0


async def test_freed_lane_goes_to_the_next_at_once(pending, post) -> None:
    first, second = [await post.send(queue="q") for _ in range(2)]
    assert [job.id for job in await post.claim()] == [first.job]
    assert await pending.cancel(post.account, [first]) == 1
    assert [job.id for job in await post.claim()] == [second.job]


async def test_cancelling_waits_for_a_settle_and_finds_the_job_where_it_went(pending, post, db) -> None:
    """The settle holds the lease; when it lets go, the job is in another table than the cancellation has seen."""
    id_ = await post.send()
    [job] = await post.claim()
    counts: list[int] = []

    async def cancel() -> None:
        counts.append(await pending.cancel(post.account, [id_]))

    async with anyio.create_task_group() as tasks, db.transaction() as tx:
        await post.queue.lock_leases(tx, [job])
        tasks.start_soon(cancel)
        await until_waiting(db)
        await post.queue.settle_many_in(tx, [Settlement(job, Retryable("again", delay_s=60), 1)])
    assert counts == [1]
    assert await post.live() == []
    assert await consistent(db)


async def test_cancelling_what_a_settle_is_just_ending_is_too_late(pending, post, db) -> None:
    id_ = await post.send()
    [job] = await post.claim()
    counts: list[int] = []

    async def cancel() -> None:
        counts.append(await pending.cancel(post.account, [id_]))

    async with anyio.create_task_group() as tasks, db.transaction() as tx:
        await post.queue.lock_leases(tx, [job])
        tasks.start_soon(cancel)
        await until_waiting(db)
        await post.queue.settle_many_in(tx, [Settlement(job, Completed(), 1)])
    assert counts == [0]
    assert 8 not in await states(db, id_)


async def until_waiting(db: Database) -> None:
    """Until somebody waits for a lock."""
    with anyio.fail_after(5):
        while not await db.fetchval(
            "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')"
        ):
            await anyio.lowlevel.checkpoint()


async def test_many_cancellations_and_settles_at_once_end_each_message_once(pending, post, db) -> None:
    """In opposite orders, so that locks taken in the order of the arguments would deadlock."""
    ids = [
        await post.send(f"https://{number % 5}.example", queue=f"q{number % 3}" if number % 2 else None)
        for number in range(60)
    ]
    jobs = await post.claim()
    counts: list[int] = []
    accepted: list[bool] = []

    async def cancel(which: list[MessageId]) -> None:
        counts.append(await pending.cancel(post.account, which))

    async def settle(which) -> None:
        accepted.extend(await post.end(which, Completed(), OK))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(settle, jobs[::-1])
        tasks.start_soon(cancel, ids)
        tasks.start_soon(cancel, ids[::-1])
        tasks.start_soon(post.queue.promote)
        tasks.start_soon(cancel, ids[10:50])
    assert sum(counts) + sum(accepted) == 60
    assert await post.live() == []
    assert await db.fetchval("select count(*) from event where state = 8") == sum(counts)
    assert await db.fetchval("select count(*) from event where state = 5") == sum(accepted)
    assert await consistent(db)


async def test_job_that_keeps_moving_is_caught(pending, post, db, monkeypatch) -> None:
    """A statement sees each table as it was, so that a job which goes from one to the other can escape it."""
    id_ = await post.send(spec=Spec(delay_s=60))
    real = post.queue.cancel
    misses = [True, True]

    async def cancel(jobs, reason="", tx=None):
        return set() if misses and misses.pop() else await real(jobs, reason, tx)

    monkeypatch.setattr(post.queue, "cancel", cancel)
    assert await pending.cancel(post.account, [id_]) == 1


async def test_filters_choose_what_is_cancelled(pending, post) -> None:
    a = await post.send("https://a.example/x", labels=("l",))
    b = await post.send("https://b.example/x", topic="t", spec=Spec(flow=("k", 1, None, 1)))
    c = await post.send("https://a.example/y", schedule="s", queue="q", caller_ip="10.0.0.1")
    for nothing in (Filter(ids=()), Filter(labels=("no",)), Filter(labels=("l",), topics=("t",)), Filter(to_ms=1)):
        assert await pending.cancel_matching(post.account, nothing) == 0
    assert await pending.cancel_matching(post.account, Filter(hosts=("a.example",), paths=("/x",))) == 1
    assert await post.live() == [b.job, c.job]
    assert await pending.cancel_matching(post.account, Filter(ids=(a, b, c), flow_keys=("k",))) == 1
    assert await pending.cancel_matching(post.account, Filter(queues=("q",), caller_ips=("10.0.0.1",), from_ms=1)) == 1
    assert await post.live() == []


async def test_count_bounds_and_none_means_all(pending, post, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "CANCEL_MAX", 3)
    monkeypatch.setattr(module, "STRETCH_MAX", 2)
    other = await Post.open(db, "b")
    theirs = [await other.send() for _ in range(3)]
    dead = await post.publish(*(post.publication(f"https://{number}.example") for number in range(10)))
    claimed = [job for job in await post.claim() if job.id in {id_.job for id_ in dead}]
    await post.end(claimed, Discarded("no"), BROKEN)
    ids = await post.publish(*(post.publication(f"https://{number}.example") for number in range(10)))
    assert await pending.cancel_matching(post.account, Filter(), 4) == 4
    assert (await pending.get(post.account, ids[4])).is_alive
    assert not (await pending.get(post.account, ids[3])).is_alive
    assert await pending.cancel_matching(post.account, Filter(), 0) == 0
    assert await pending.cancel_matching(post.account, Filter()) == 6
    assert await pending.cancel_matching(post.account, Filter()) == 0
    assert await db.fetchval("select count(*) from dead") == 10
    assert await post.live() == [id_.job for id_ in theirs]


# ── Queues ──────────────────────────────────────────────────────────────────────────────────────


async def test_deleted_queue_takes_its_messages_along(pending, post, db) -> None:
    running, held = [await post.send(queue="q") for _ in range(2)]
    [job] = await post.claim()
    due = await post.send(queue="q", spec=Spec(delay_s=60))
    other = await post.send(queue="other")
    assert await pending.delete_queue(post.account, "q") == 3
    for id_ in (running, held, due):
        assert (await states(db, id_))[-2:] == [7, 8]
    assert await post.live() == [other.job]
    assert await post.queue.gates.show(post.account, "queue", "q") is None
    assert await post.end([job], Completed(), OK) == []
    assert await db.fetchval("select count(*) from slot s left join gate g on g.id = s.gate_id where g.id is null") == 0
    assert await consistent(db)
    assert await pending.delete_queue(post.account, "q") == 0


async def test_callbacks_of_a_deleted_queue_go_on(pending, post, db) -> None:
    await post.send(queue="q", spec=Spec(callback=Callback("https://c.example")))
    await post.deliver()
    waiting = await post.send(queue="q")
    assert await pending.delete_queue(post.account, "q") == 1
    assert not (await pending.get(post.account, waiting)).is_alive
    assert await post.deliver() == 1
    assert await db.fetchval("select count(*) from slot") == 0
    assert await consistent(db)


async def test_message_waiting_at_another_limit_goes_with_its_queue(pending, post, db) -> None:
    flow = Spec(flow=("k", 1, None, 1))
    await post.send(spec=flow)
    blocked = await post.send(queue="q", spec=flow)
    assert await pending.delete_queue(post.account, "q") == 1
    assert (await states(db, blocked))[-2:] == [7, 8]
    assert await consistent(db)
