"""The claim loop against a real queue: draining, outages, lost beats, deadlines."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from daemon.db.pool import Database
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import Completed, Discarded, Job, NewJob, Outcome, Retryable, Settlement
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.postgres import PostgresQueue
from daemon.worker import loop as module
from daemon.worker.loop import Pulse, WorkerLoop

pytestmark = pytest.mark.anyio

TERMINATE_OTHERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
"""


@pytest.fixture
def queue(db: Database) -> PostgresQueue:
    return PostgresQueue(db)


@asynccontextmanager
async def running(loop: WorkerLoop) -> AsyncIterator[None]:
    """Run the loop beside the block, then stop it."""
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run)
        yield
        loop.stop()


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that only the database tells; the test's own time-out ends it."""
    while not await check():  # noqa: ASYNC110 (another process writes it)
        await anyio.sleep(0.01)


async def until_true(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110 (the loop has no events for tests)
        await anyio.sleep(0.001)


async def done(_job: Job) -> Outcome:
    return Completed()


def counter(db: Database, table: str, expected: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return bool(await db.fetchval(f"select count(*) from {table}") == expected)

    return check


async def test_every_job_runs_once_and_is_settled(db: Database, queue: PostgresQueue) -> None:
    ids = await queue.enqueue([NewJob("a", key=i % 7) for i in range(2_000)])
    ran: list[int] = []

    async def run_job(job: Job) -> Outcome:
        ran.append(job.id)
        if job.id % 50 == 0:
            await anyio.lowlevel.checkpoint()
        return Completed()

    async with running(WorkerLoop(queue, run_job, concurrency=100, drain_s=5)):
        await until(counter(db, "job", 0))
    assert sorted(ran) == sorted(ids)
    assert await db.fetchval("select count(*) from attempt where outcome = 1") == 2_000
    assert await db.fetchval("select stopped_at is not null from worker")


async def test_concurrency_is_the_limit(queue: PostgresQueue, db: Database) -> None:
    now = most = 0

    async def run_job(_job: Job) -> Outcome:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.001)
        now -= 1
        return Completed()

    await queue.enqueue([NewJob("a") for _ in range(100)])
    async with running(WorkerLoop(queue, run_job, concurrency=8, drain_s=5)):
        await until(counter(db, "job", 0))
    assert most == 8


@pytest.mark.parametrize("listens", [True, False])
async def test_later_work_is_found_with_and_without_notifications(db, queue, listens: bool) -> None:
    """Polling alone must be correct: PgBouncer in transaction mode has no LISTEN."""
    async with running(WorkerLoop(queue, done, concurrency=4, drain_s=5, listens=listens)):
        await until(counter(db, "worker", 1))
        other = PostgresQueue(db)  # another process: nobody here is told
        await other.enqueue([NewJob("a")])
        if listens:
            await other.waker.flush()
        await until(counter(db, "attempt", 1))


async def test_drain_lets_running_jobs_end_and_claims_no_more(db: Database, queue: PostgresQueue) -> None:
    started, may_end = anyio.Event(), anyio.Event()

    async def run_job(_job: Job) -> Outcome:
        started.set()
        await may_end.wait()
        return Completed()

    await queue.enqueue([NewJob("a")])
    loop = WorkerLoop(queue, run_job, concurrency=2, drain_s=60)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run)
        await started.wait()
        loop.stop()
        await queue.enqueue([NewJob("late")])
        may_end.set()
    assert await db.fetchval("select array_agg(outcome) from attempt") == [1]
    assert await db.fetchval("select count(*) from ready") == 1
    assert await db.fetchval("select stopped_at is not null from worker")


async def test_drain_gives_back_what_does_not_end(db: Database, queue: PostgresQueue) -> None:
    started = anyio.Event()

    async def run_job(_job: Job) -> Outcome:
        started.set()
        await anyio.sleep_forever()
        return Completed()

    await queue.enqueue([NewJob("a") for _ in range(3)])
    loop = WorkerLoop(queue, run_job, concurrency=3, drain_s=0.05)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run)
        await started.wait()
        await until(counter(db, "lease", 3))
        loop.stop()
    rows = await db.fetch("select attempt, token from ready")
    assert [tuple(r) for r in rows] == [(0, 1)] * 3
    assert await QueueMaintenance(db).conservation() == []


async def test_cancelled_loop_frees_its_jobs_too(db: Database, queue: PostgresQueue) -> None:
    """The second signal: no drain, but others need not wait for a rescue."""
    started = anyio.Event()

    async def run_job(_job: Job) -> Outcome:
        started.set()
        await anyio.sleep_forever()
        return Completed()

    await queue.enqueue([NewJob("a")])
    async with anyio.create_task_group() as group:
        group.start_soon(WorkerLoop(queue, run_job, concurrency=3, drain_s=60).run)
        await started.wait()
        group.cancel_scope.cancel()
    assert await db.fetchval("select count(*) from ready") == 1


async def test_job_past_its_deadline_is_tried_again(db: Database, queue: PostgresQueue) -> None:
    async def run_job(_job: Job) -> Outcome:
        await anyio.sleep_forever()
        return Completed()

    await queue.enqueue([NewJob("a", timeout_s=0.05)])
    async with running(WorkerLoop(queue, run_job, concurrency=1, drain_s=5)):
        await until(counter(db, "due", 1))
    assert await db.fetchval("select note from attempt") == "deadline passed"


async def test_each_job_has_its_own_deadline(db: Database, queue: PostgresQueue) -> None:
    """A nearer deadline does not wait for a later one, nor does a later one follow from a nearer."""
    go_on = anyio.Event()

    async def run_job(job: Job) -> Outcome:
        if job.kind == "quick":
            await anyio.sleep_forever()
        await go_on.wait()
        return Completed(note=job.kind)

    await queue.enqueue([NewJob("slow", timeout_s=60), NewJob("slow", timeout_s=50)])
    async with running(WorkerLoop(queue, run_job, concurrency=8, drain_s=5)):
        await until(counter(db, "lease", 2))
        await queue.enqueue([NewJob("quick", timeout_s=timeout_s) for timeout_s in (0.2, 0.05)])
        await until(counter(db, "due", 2))
        await queue.enqueue([NewJob("quick", timeout_s=0.05)])
        await until(counter(db, "due", 3))
        go_on.set()
        await until(counter(db, "job", 3))
    notes = await db.fetch("select note from attempt order by note")
    assert [row["note"] for row in notes] == ["deadline passed"] * 3 + ["slow"] * 2


async def test_job_that_its_handler_settled_is_left_alone(db: Database, queue: PostgresQueue) -> None:
    async def run_job(job: Job) -> Outcome:
        async with db.transaction() as tx:
            await queue.lock_lease(tx, job)
            await queue.settle_in(tx, Settlement(job, Completed(note="mine"), 0))
        return Completed(is_settled=True)

    await queue.enqueue([NewJob("a") for _ in range(5)])
    async with running(WorkerLoop(queue, run_job, concurrency=2, drain_s=5)):
        await until(counter(db, "job", 0))
    assert await db.fetchval("select array_agg(distinct note) from attempt") == ["mine"]
    assert await db.fetchval("select count(*) from attempt") == 5


async def test_defect_in_run_job_ends_the_loop_with_it(queue: PostgresQueue, db: Database) -> None:
    async def run_job(_job: Job) -> Outcome:
        raise ZeroDivisionError

    await queue.enqueue([NewJob("a")])
    with pytest.raises(ZeroDivisionError):
        await WorkerLoop(queue, run_job, concurrency=1, drain_s=5).run()
    assert await db.fetchval("select count(*) from ready") == 1


async def test_terminated_connections_lose_no_result(db: Database, database_url: str) -> None:
    """The database restarts under a busy worker, several times: every job still ends, and none is in two states."""
    admin = await Database.open(database_url, pool_max=2)
    own = PostgresQueue(db)
    await own.enqueue([NewJob("a", max_attempts=100) for _ in range(600)])
    settled = 0

    async def run_job(job: Job) -> Outcome:
        nonlocal settled
        settled += 1
        await anyio.sleep(0.002)
        return Retryable("again", delay_s=0) if job.attempt == 1 and job.id % 5 == 0 else Completed()

    async with running(WorkerLoop(own, run_job, concurrency=20, drain_s=5)):
        for goal in (100, 200, 300, 400):
            await until_true(lambda goal=goal: settled >= goal)
            await admin.execute(TERMINATE_OTHERS)
        await until(counter(admin, "job", 0))
    assert await admin.fetchval("select count(*) from attempt where outcome = 1") == 600
    await admin.close()


async def test_results_outlive_an_outage_and_claiming_pauses(queue, db, monkeypatch) -> None:
    """Settles fail for a while: what ended is kept, claims stop at the limit, and all is written in the end."""
    monkeypatch.setattr(module, "RESULTS_MAX", 20)
    monkeypatch.setattr(module, "FLUSH_AT", 5)
    monkeypatch.setattr(module, "BACKOFF_S", (0.01, 0.02))
    genuine, is_away, ran = queue.settle, True, 0

    async def settle(batch):
        if is_away:
            raise StorageUnavailableError("away")
        return await genuine(batch)

    async def run_job(_job: Job) -> Outcome:
        nonlocal ran
        ran += 1
        return Completed()

    monkeypatch.setattr(queue, "settle", settle)
    await queue.enqueue([NewJob("a") for _ in range(200)])
    loop = WorkerLoop(queue, run_job, concurrency=10, drain_s=5)
    async with running(loop):
        await until_true(lambda: loop._is_held_up)
        assert ran <= 20 + 10 + 1
        is_away = False
        await until(counter(db, "job", 0))
    assert ran == 200


async def test_worker_without_beats_stops_its_jobs_before_others_may_have_them(queue, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOST_AFTER_S", 0.2)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    is_away = False
    genuine = queue.heart
    cancelled, started = anyio.Event(), anyio.Event()

    @asynccontextmanager
    async def heart(worker):
        async with genuine(worker) as beat:

            async def maybe() -> bool:
                if is_away:
                    raise StorageUnavailableError("away")
                return await beat()

            yield maybe

    async def run_job(_job: Job) -> Outcome:
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.set()
            raise
        return Completed()

    monkeypatch.setattr(queue, "heart", heart)
    await queue.enqueue([NewJob("a")])
    async with running(WorkerLoop(queue, run_job, concurrency=1, drain_s=0)):
        await started.wait()
        is_away = True
        await cancelled.wait()
        await until(counter(db, "ready", 1))
        assert await db.fetchval("select count(*) from lease") == 0  # and nothing more is claimed
        started = anyio.Event()
        is_away = False
        await started.wait()


async def test_worker_whose_row_is_gone_takes_a_new_id(queue, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    loop = WorkerLoop(queue, done, concurrency=1, drain_s=1)
    async with running(loop):
        await until(counter(db, "worker", 1))
        old = loop.worker
        await db.execute("delete from worker")
        await until(counter(db, "worker", 1))
        await queue.enqueue([NewJob("a")])
        await until(counter(db, "attempt", 1))
    assert loop.worker != old
    assert await db.fetchval("select worker from attempt") == loop.worker


async def test_claim_with_a_lost_answer_is_given_back_and_run(queue, db, monkeypatch) -> None:
    genuine, losses = queue.claim, 1

    async def claim(*args):
        nonlocal losses
        claimed = await genuine(*args)
        if losses and claimed.jobs:
            losses -= 1
            raise StorageUnavailableError("the answer was lost")
        return claimed

    monkeypatch.setattr(queue, "claim", claim)
    await queue.enqueue([NewJob("a") for _ in range(3)])
    async with running(WorkerLoop(queue, done, concurrency=4, drain_s=1)):
        await until(counter(db, "job", 0))
    assert await db.fetchval("select count(*) from attempt where outcome = 8") == 3


async def test_discarded_job_is_a_dead_letter(queue, db) -> None:
    async def run_job(_job: Job) -> Outcome:
        return Discarded("no use")

    await queue.enqueue([NewJob("a")])
    async with running(WorkerLoop(queue, run_job, concurrency=1, drain_s=1)):
        await until(counter(db, "dead", 1))


def test_rescue_needs_fifteen_healthy_seconds() -> None:
    pulse = Pulse(last=100.0, since=100.0)
    pulse.beat(105.0)
    pulse.beat(110.0)
    assert not pulse.may_rescue(114.9)
    assert pulse.may_rescue(115.0)
    pulse.miss(116.0)
    pulse.beat(117.0)
    assert not pulse.may_rescue(130.9)
    pulse.beat(122.0)
    pulse.beat(127.0)
    assert pulse.may_rescue(131.0)


def test_worker_is_lost_twelve_seconds_after_its_last_beat() -> None:
    pulse = Pulse(last=100.0, since=0.0)
    assert not pulse.is_lost(111.9)
    assert pulse.is_lost(112.0)
    assert not pulse.may_rescue(112.0)


def test_process_that_was_stopped_is_not_fit_to_rescue_when_it_wakes() -> None:
    """Its clock jumped: to it, all its peers look stale at once."""
    pulse = Pulse(last=100.0, since=0.0)
    pulse.beat(200.0)
    assert not pulse.may_rescue(214.0)
    assert not pulse.is_lost(200.0)
