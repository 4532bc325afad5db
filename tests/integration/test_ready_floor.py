"""Claims start at the floor of `ready`: nothing may ever lie below it, and what is gone costs them nothing."""

import json
import random

import anyio
import anyio.lowlevel
import asyncpg
import pytest

from daemon.db.pool import Database, query
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import KEY_END, Completed, JobId, NewJob, Settlement, WorkerId
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.postgres import FIRST_KEY, PostgresQueue

pytestmark = pytest.mark.anyio

CLAIM, RAISE = query("claim_fair"), query("raise_floor")
AHEAD = "9000000000000000000"


class UndoneError(Exception):
    """What rolls a transaction back."""


@pytest.fixture
def queue(db: Database) -> PostgresQueue:
    return PostgresQueue(db)


@pytest.fixture
async def worker(queue: PostgresQueue) -> WorkerId:
    return await queue.register_worker()


async def floor(db: Database) -> int:
    return int(await db.fetchval("select at::text from ready_floor"))


async def finish(queue: PostgresQueue, worker: WorkerId) -> list[JobId]:
    """Claim and complete until nothing is ready."""
    done: list[JobId] = []
    while jobs := (await queue.claim(worker, 100)).jobs:
        done += sorted(await queue.settle([Settlement(job, Completed(), 0) for job in jobs]))
    return done


async def test_floor_follows_what_is_gone(db: Database, queue: PostgresQueue, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a")])
    await finish(queue, worker)
    (last,) = await queue.enqueue([NewJob("b")])
    await queue.raise_floor()
    assert await floor(db) == int(await db.fetchval("select born::text from ready"))
    assert await finish(queue, worker) == [last]


async def test_job_whose_commit_comes_late_is_found(db: Database, queue: PostgresQueue, worker: WorkerId) -> None:
    async with db.transaction() as tx:
        (late,) = await queue.enqueue([NewJob("late")], tx)
        born = int(await tx.fetchval("select pg_current_xact_id()::text"))
        for _ in range(3):
            await queue.enqueue([NewJob("a")])
            await finish(queue, worker)
            await queue.raise_floor()
        assert await floor(db) <= born
    await queue.raise_floor()
    assert await finish(queue, worker) == [late]


async def test_claim_that_is_rolled_back_leaves_its_job_above_the_floor(database_url, db, queue, worker) -> None:
    (job_id,) = await queue.enqueue([NewJob("a")])
    other: asyncpg.Connection = await asyncpg.connect(database_url)
    await other.execute("begin")
    assert len(await other.fetch(CLAIM, FIRST_KEY, 10, worker, 15.0, KEY_END, 10, [], [])) == 1
    await queue.raise_floor()
    await other.close()
    await queue.raise_floor()
    assert await finish(queue, worker) == [job_id]


async def test_returned_job_is_born_anew(db: Database, queue: PostgresQueue, worker: WorkerId) -> None:
    (job_id,) = await queue.enqueue([NewJob("a")])
    jobs = (await queue.claim(worker, 1)).jobs
    await queue.raise_floor()
    await queue.release(jobs)
    await queue.claim(worker, 1)
    await queue.raise_floor()
    await queue.stop_worker(worker)
    assert await finish(queue, await queue.register_worker()) == [job_id]


async def test_raise_with_an_old_snapshot_loses_nothing(database_url, db, queue, worker) -> None:
    other: asyncpg.Connection = await asyncpg.connect(database_url)
    await other.execute("begin isolation level repeatable read; select count(*) from ready")
    first = await queue.enqueue([NewJob("a")])
    await other.execute(RAISE, 1_000)
    await other.execute("commit")
    await other.close()
    second = await queue.enqueue([NewJob("a", key=1)])
    assert await finish(queue, worker) == first + second


@pytest.mark.parametrize("sql", [f"update ready_floor set at = '{AHEAD}'", "delete from ready_floor"])
async def test_floor_that_says_nothing_is_ignored(db: Database, queue: PostgresQueue, worker: WorkerId, sql) -> None:
    await db.execute(sql)
    ids = await queue.enqueue([NewJob("a", key=n) for n in range(3)])
    assert await finish(queue, worker) == ids


@pytest.mark.parametrize("heads", [0, 1_000])
async def test_floor_of_another_server_is_replaced(db: Database, queue: PostgresQueue, heads: int) -> None:
    await queue.enqueue([NewJob("a", key=n) for n in range(3)])
    await db.execute(f"update ready_floor set at = '{AHEAD}'")
    await db.execute(RAISE, heads)
    assert await floor(db) <= int(await db.fetchval("select min(born::text::numeric) from ready"))


async def test_floor_stays_when_there_are_too_many_heads(db: Database, queue: PostgresQueue, worker) -> None:
    await queue.enqueue([NewJob("a", key=n // 2, prio=n % 2) for n in range(6)])
    await db.execute(RAISE, 5)
    assert await floor(db) == 0
    await db.execute(RAISE, 6)
    assert await floor(db) > 0


async def test_loop_raises_it_by_promoting_once_something_was_claimed(
    db: Database, queue: PostgresQueue, worker
) -> None:
    await queue.promote()
    first = await floor(db)
    await queue.promote()
    assert await floor(db) == first, "an idle queue writes nothing"
    await queue.enqueue([NewJob("a")])
    await finish(queue, worker)
    while await floor(db) == first:  # half a second after the claim
        await queue.promote()
        await anyio.sleep(0.05)


async def buffers(db: Database, worker: WorkerId) -> int:
    """Pages that a claim of 100 touches to find its jobs."""
    async with db.transaction() as tx:
        await tx.execute("set local plan_cache_mode = force_generic_plan")
        explain = "explain (analyze, buffers, format json) "
        (row,) = await tx.fetch(explain + CLAIM, FIRST_KEY, 100, worker, 15.0, KEY_END, 100, [], [])
        plan = json.loads(row[0])[0]["Plan"]
        await tx.execute("delete from lease")
    (keys,) = [node for node in plan["Plans"] if node.get("Subplan Name") == "CTE k"]
    (heads,) = [node for node in plan["Plans"] if node.get("Subplan Name") == "CTE h"]
    return int(keys["Shared Hit Blocks"] + heads["Shared Hit Blocks"])


async def test_claim_under_a_held_snapshot_does_not_walk_what_is_gone(database_url: str, db, queue, worker) -> None:
    if await db.fetchval("select current_setting('server_version_num')::int") < 180000:
        pytest.skip("older servers walk the index, though not the rows")
    holder: asyncpg.Connection = await asyncpg.connect(database_url)
    await holder.execute("begin isolation level repeatable read; select count(*) from ready")
    try:
        await queue.enqueue([NewJob("a", key=n % 10) for n in range(100)])
        fresh = await buffers(db, worker)
        for _ in range(5):
            await queue.enqueue([NewJob("a", key=n % 10) for n in range(1_000)])
            await finish(queue, worker)
        await queue.enqueue([NewJob("a", key=n % 10) for n in range(100)])
        assert await buffers(db, worker) > 5 * fresh
        await queue.raise_floor()
        assert await buffers(db, worker) < 2 * fresh
    finally:
        await holder.close()


async def test_racing_with_late_commits_and_lost_connections_loses_nothing(db: Database) -> None:
    """The floor is raised without pause while transactions commit late, roll back or are killed."""
    queue, care, chance = PostgresQueue(db), QueueMaintenance(db), random.Random(7)
    stored: set[JobId] = set()
    done: list[JobId] = []
    enqueuing = 6

    async def enqueue() -> None:
        nonlocal enqueuing
        for _ in range(25):
            pid, ids = None, []
            try:
                async with db.transaction() as tx:
                    ids = await queue.enqueue([NewJob("k", key=chance.randrange(5), prio=n % 2) for n in range(4)], tx)
                    pid = await tx.fetchval("select pg_backend_pid()")
                    for _ in range(chance.randrange(20)):
                        await anyio.lowlevel.checkpoint()
                        await tx.fetchval("select 1")
                    if chance.random() < 0.2:
                        await db.execute("select pg_terminate_backend($1)", pid)
                    elif chance.random() < 0.3:
                        raise UndoneError
            except (UndoneError, StorageUnavailableError):
                continue
            stored.update(ids)
        enqueuing -= 1

    async def work() -> None:
        worker = await queue.register_worker()
        while enqueuing or len(done) < len(stored):
            jobs = (await queue.claim(worker, 7)).jobs
            if jobs and chance.random() < 0.2:
                await queue.release(jobs)
            else:
                done.extend(await queue.settle([Settlement(job, Completed(), 0) for job in jobs]))

    async def raise_floor() -> None:
        while enqueuing or len(done) < len(stored):
            await queue.raise_floor()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(enqueuing):
                group.start_soon(enqueue)
            for _ in range(2):
                group.start_soon(work)
                group.start_soon(raise_floor)
    assert sorted(done) == sorted(stored)
    assert await care.conservation() == []
