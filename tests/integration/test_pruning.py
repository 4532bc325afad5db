"""Housekeeping of messages: what is over goes, and nothing that anybody still needs."""

from datetime import timedelta

import anyio
import pytest

from daemon.db.pool import Database
from daemon.queue import pruning as module
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.message import MessageId, Spec
from daemon.queue.pruning import PrunedMessages, prune_messages
from tests.message_kit import Post

pytestmark = pytest.mark.anyio

KEPT = timedelta(days=7)


@pytest.fixture
async def post(db: Database) -> Post:
    return await Post.open(db)


async def prune(db: Database) -> PrunedMessages:
    return await prune_messages(db, kept=KEPT, dead_kept=timedelta(days=3))


async def age(db: Database, *ids: MessageId, days: float = 8) -> None:
    """Let these messages, and whatever is written of them, be older than they are; without any, all of them."""
    jobs = [id_.job for id_ in ids] or [row["id"] for row in await db.fetch("select id from message")]
    await db.execute(
        "update message set created_at = created_at - make_interval(secs => $2) where id = any($1)", jobs, days * 86_400
    )
    await db.execute(
        "update event set at = at - make_interval(secs => $2) where message_id = any($1)", jobs, days * 86_400
    )


async def left(db: Database, table: str = "message") -> list[int]:
    return [row["id"] for row in await db.fetch(f"select id from {table} order by id")]


async def test_old_and_finished_messages_go_with_their_bodies(post, db) -> None:
    await post.send("https://1.example", body=b"old")
    await post.deliver()
    await age(db)
    young = await post.send("https://2.example", body=b"young")
    await post.deliver()
    assert await prune(db) == PrunedMessages(letters=0, messages=1, payloads=1, partitions=0, gates=0)
    assert await left(db) == await left(db, "payload") == [young.job]
    assert await prune(db) == PrunedMessages(0, 0, 0, 0, 0)


async def test_what_still_waits_stays_however_old(post, db) -> None:
    waiting = [
        await post.send("https://1.example", body=b"ready"),
        await post.send("https://2.example", Spec(delay_s=90 * 86_400), body=b"due"),
        *[await post.send("https://3.example", queue="q", body=b"held") for _ in range(2)],
    ]
    await age(db)
    assert (await prune(db)).messages == 0
    assert await left(db) == await left(db, "payload") == [id_.job for id_ in waiting]


async def test_message_that_has_ended_only_now_stays_as_long_as_its_log(post, db) -> None:
    """It was published long ago, with a long delay: whoever looks should still see what became of it."""
    late = await post.send("https://1.example")
    await age(db)
    await post.deliver()
    assert (await prune(db)).messages == 0
    assert await left(db) == [late.job]
    await db.execute("update event set at = at - interval '8 days'")
    assert (await prune(db)).messages == 1


async def test_body_stays_while_a_follower_needs_it(post, db) -> None:
    shared = [
        post.publication(f"https://{number}.example", body=b"shared", body_of=0 if number else None)
        for number in range(3)
    ]
    shared[2] = post.publication("https://2.example", Spec(delay_s=60), body=b"shared", body_of=0)
    first, _, third = await post.publish(*shared)
    await post.send("https://4.example", body=b"other")
    await post.deliver()
    await age(db)
    pruned = await prune(db)
    assert (pruned.messages, pruned.payloads) == (3, 1)
    assert await left(db) == [third.job]
    assert await left(db, "payload") == [first.job]
    await db.execute("update due set run_at = now()")
    await post.queue.promote()
    [job] = await post.claim()
    [load] = await post.messages.load([job])
    assert load.body == b"shared"
    await post.queue.cancel([third.job])
    await age(db, third, days=30)
    assert (await prune(db)).payloads == 1
    assert await left(db, "payload") == []


async def test_follower_that_goes_first_leaves_the_body(post, db) -> None:
    first, _ = await post.publish(
        post.publication("https://1.example", Spec(delay_s=60), body=b"shared"),
        post.publication("https://2.example", body=b"shared", body_of=0),
    )
    await post.deliver()
    await age(db)
    pruned = await prune(db)
    assert (pruned.messages, pruned.payloads) == (1, 0)
    assert await left(db) == await left(db, "payload") == [first.job]


async def test_several_who_prune_at_once_leave_no_body_behind(post, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "BATCH", 1)
    for number in range(20):
        await post.publish(
            *(post.publication(f"https://{number}.example", body=b"x", body_of=0 if n else None) for n in range(3))
        )
    await post.deliver()
    await age(db)
    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(prune, db)
    await prune(db)
    assert await left(db) == await left(db, "payload") == []


async def test_one_who_finds_another_at_it_leaves_it_to_him(post, db) -> None:
    await post.send()
    await post.deliver()
    await age(db)
    async with db.transaction() as tx:
        await tx.execute("select pg_advisory_xact_lock(hashtext('tallyd.messages.prune'))")
        assert (await prune(db)).messages == 0
    assert (await prune(db)).messages == 1


async def test_many_that_wait_are_walked_once(post, db) -> None:
    """In batches by their ids: those behind them are found, and so is the end."""
    await db.execute(
        "with m as (insert into message (id, account_id, salt, url, host, method, spec, not_before, created_at) "
        "select n, $1, n, 'https://x.example', 'x.example', 'POST', '{}', now(), now() - interval '30 days' "
        "from generate_series(1000, 6999) n returning id) "
        "insert into job (id, kind, body) overriding system value select id, 'push', '' from m where id % 1000 <> 7",
        post.account,
    )  # fmt: skip
    assert (await prune(db)).messages == 6
    assert len(await left(db)) == 5_994


async def test_old_letters_go_and_others_stay(post, db) -> None:
    old, new = await post.send("https://1.example"), await post.send("https://2.example")
    await post.kill()
    await db.execute("update dead set at = at - interval '4 days' where id = $1", old.job)
    inner = await db.fetchval(
        "with j as (insert into job (kind, body) values ('poll', '') returning id) "
        "insert into dead (id, at, attempt, token, reason) select id, now() - interval '4 days', 1, 1, '' from j returning id"
    )
    assert (await prune(db)).letters == 1
    assert await left(db, "dead") == [new.job, inner]
    assert len(await left(db)) == 2, "the message itself is younger than its log is kept"
    assert await QueueMaintenance(db).conservation() == []


async def test_weeks_of_the_log_go_as_a_whole_and_strays_one_by_one(post, db) -> None:
    await post.send()
    await db.execute("update event set at = at - interval '30 days'")
    await db.execute("select make_weeks('event', now() - interval '20 days', 3)")
    await db.execute(
        "insert into event (at, account_id, message_id, state) values (now() - interval '15 days', 1, 1, 1)"
    )
    pruned = await prune(db)
    assert pruned.partitions == 2
    assert await db.fetchval("select count(*) from event") == 0
    assert (await prune(db)).partitions == 0


async def test_flow_keys_that_nothing_uses_go(post, db) -> None:
    used = await post.send("https://1.example", Spec(flow=("used", 1, None, 1), delay_s=60))
    for key in ("unused", "paused", "pinned", "fresh"):
        await post.send("https://2.example", Spec(flow=(key, 1, None, 1)))
    await post.send("https://3.example", queue="q")
    while await post.deliver():
        pass
    await post.queue.gates.pause_flow(post.account, "paused")
    await post.queue.gates.pin(post.account, "pinned", 1, None, None)
    await age(db)
    await db.execute("update gate set updated_at = updated_at - interval '2 days' where name <> 'fresh'")
    pruned = await prune(db)
    assert pruned.gates == 1
    rows = await db.fetch("select name from gate order by name")
    assert [row["name"] for row in rows] == ["fresh", "paused", "pinned", "q", "used"]
    assert await left(db) == [used.job]


async def test_flow_key_that_is_just_being_used_stays(post, db) -> None:
    """Whoever publishes has found the key but not committed yet."""
    await post.send(spec=Spec(flow=("k", 1, None, 1)))
    await post.deliver()
    await age(db)
    await db.execute("update gate set updated_at = updated_at - interval '2 days'")
    async with db.transaction() as tx:
        await post.messages.publish_in(tx, [(post.limits, [post.publication(spec=Spec(flow=("k", 1, None, 1)))])])
        assert (await prune(db)).gates == 0
    await post.queue.promote()
    assert await post.deliver() == 1
