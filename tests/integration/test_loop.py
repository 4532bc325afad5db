"""The claim loop against a real queue: draining, outages, lost beats, deadlines."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from daemon.db.pool import Database
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import (
    KEY_END,
    PUSH_KEY,
    Completed,
    Discarded,
    Job,
    Lane,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
)
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.postgres import PostgresQueue
from daemon.worker import loop as module
from daemon.worker.loop import Pulse, WorkerLoop

pytestmark = pytest.mark.anyio

TERMINATE_OTHERS = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()
"""


POLL = Lane("poll", 0, PUSH_KEY, concurrency=2)
PUSH = Lane("push", PUSH_KEY, KEY_END, concurrency=16, per_key=3)


def pushes(jobs: int, *keys: int) -> list[NewJob]:
    return [NewJob("push", key=PUSH_KEY + key) for _ in range(jobs) for key in keys]


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
    ran: list[str] = []

    async def run_job(job: Job) -> Outcome:
        ran.append(job.kind)
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
    assert ran == ["a"]
    assert await db.fetchval("select count(*) from attempt where outcome = 1") == 1
    assert await db.fetchval("select count(*) from ready") == 1  # a claim that was under way gives it back
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
    ran: list[str] = []
    cancelled: list[str] = []

    @asynccontextmanager
    async def heart(worker):
        async with genuine(worker) as beat:

            async def maybe() -> bool:
                if is_away:
                    raise StorageUnavailableError("away")
                return await beat()

            yield maybe

    async def run_job(job: Job) -> Outcome:
        ran.append(job.kind)
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            cancelled.append(job.kind)
            raise
        return Completed()

    monkeypatch.setattr(queue, "heart", heart)
    await queue.enqueue([NewJob("poll"), *pushes(1, 0)])
    async with running(WorkerLoop(queue, run_job, lanes=[POLL, PUSH], drain_s=0)):
        await until_true(lambda: len(ran) == 2)
        is_away = True
        await until_true(lambda: sorted(cancelled) == ["poll", "push"])
        await until(counter(db, "ready", 2))
        assert await db.fetchval("select count(*) from lease") == 0  # and nothing more is claimed
        is_away = False
        await until_true(lambda: sorted(ran) == ["poll", "poll", "push", "push"])


async def test_worker_whose_row_is_gone_takes_a_new_id(queue, db, monkeypatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    loop = WorkerLoop(queue, done, lanes=[POLL, PUSH], drain_s=1)
    async with running(loop):
        await until(counter(db, "worker", 1))
        old = loop.worker
        await db.execute("delete from worker")
        await until(counter(db, "worker", 1))
        await queue.enqueue([NewJob("a"), *pushes(1, 0)])
        await until(counter(db, "job", 0))
    assert loop.worker != old
    assert await db.fetchval("select array_agg(distinct worker) from attempt where outcome = 1") == [loop.worker]


async def test_forgotten_worker_claims_nothing_until_it_has_a_new_id(queue, db, monkeypatch) -> None:
    """Its row is gone, so others would take such jobs at once, and they would run twice."""
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    register, genuine = queue.register_worker, queue.claim
    claims: list[int] = []
    is_new = anyio.Event()

    async def claim(worker, *args):
        claims.append(worker)
        return await genuine(worker, *args)

    async def register_worker(info):
        if claims:
            before = len(claims)
            for _ in range(20):
                loop._wake()
                await anyio.lowlevel.checkpoint()
            assert len(claims) == before
            is_new.set()
        return await register(info)

    monkeypatch.setattr(queue, "claim", claim)
    monkeypatch.setattr(queue, "register_worker", register_worker)
    loop = WorkerLoop(queue, done, lanes=[POLL, PUSH], drain_s=1)
    async with running(loop):
        await until_true(lambda: len(claims) >= 2 and not any(slots.is_claiming for slots in loop._lanes))
        await db.execute("delete from worker")
        await is_new.wait()


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


async def test_nothing_is_given_back_while_another_lane_claims(queue, db, monkeypatch) -> None:
    """What that claim takes is not known yet: given back, its jobs would run twice."""
    genuine, lost = queue.claim, 0
    polls_claimed, may_answer = anyio.Event(), anyio.Event()

    async def claim(worker, limit, after_key, lane, busy):
        nonlocal lost
        if lane is PUSH:
            await polls_claimed.wait()
        claimed = await genuine(worker, limit, after_key, lane, busy)
        if lane is PUSH and not lost:
            lost = len(claimed.jobs)
            raise StorageUnavailableError("the answer was lost")
        polls_claimed.set()
        await may_answer.wait()
        return claimed

    monkeypatch.setattr(queue, "claim", claim)
    await queue.enqueue([NewJob("a"), NewJob("a"), *pushes(1, 0, 1, 2)])
    loop = WorkerLoop(queue, done, lanes=[POLL, PUSH], drain_s=1)
    async with running(loop):
        await until_true(loop._release_turn.locked)
        assert await db.fetchval("select count(*) from lease") == 5
        may_answer.set()
        await until(counter(db, "job", 0))
    assert lost == 3
    assert await db.fetchval("select array_agg(attempt.outcome order by outcome) from attempt") == [1] * 5 + [8] * 3


async def test_discarded_job_is_a_dead_letter(queue, db) -> None:
    async def run_job(_job: Job) -> Outcome:
        return Discarded("no use")

    await queue.enqueue([NewJob("a")])
    async with running(WorkerLoop(queue, run_job, concurrency=1, drain_s=1)):
        await until(counter(db, "dead", 1))


# Lanes


class Gauge:
    """A `run_job` that holds jobs until they may end, and counts what runs at once."""

    def __init__(self, hangs: Callable[[Job], bool] = lambda _job: True) -> None:
        self.now: Counter[int] = Counter()  # by key
        self.most: Counter[int] = Counter()
        self.may_end = anyio.Event()
        self._hangs = hangs

    async def run_job(self, job: Job) -> Outcome:
        self.now[job.key] += 1
        self.most[job.key] = max(self.most[job.key], self.now[job.key])
        try:
            if self._hangs(job):
                await self.may_end.wait()
            await anyio.lowlevel.checkpoint()
        finally:
            self.now[job.key] -= 1
        return Completed()


async def test_lanes_never_take_each_others_slots(db: Database, queue: PostgresQueue) -> None:
    gauge = Gauge()
    loop = WorkerLoop(queue, gauge.run_job, lanes=[POLL, PUSH], drain_s=5)
    await queue.enqueue([*pushes(1, *range(50)), *(NewJob("poll") for _ in range(50))])
    async with running(loop):
        await until_true(lambda: loop.running == 18)
        assert loop.running_by_lane() == {"poll": 2, "push": 16}
        assert await db.fetchval("select count(*) from lease") == 18
        gauge.may_end.set()
        await until(counter(db, "job", 0))
    assert gauge.most[0] == 2
    assert loop.running_by_lane() == {"poll": 0, "push": 0}


async def test_key_never_has_more_than_its_share_of_the_slots(db: Database, queue: PostgresQueue) -> None:
    gauge = Gauge()
    loop = WorkerLoop(queue, gauge.run_job, lanes=[POLL, PUSH], drain_s=5)
    await queue.enqueue(pushes(20, 0))
    async with running(loop):
        await until_true(lambda: loop.running == 3)
        await queue.enqueue(pushes(20, *range(1, 40)))
        await until_true(lambda: loop.running == 16)
        gauge.may_end.set()
        await until(counter(db, "job", 0))
    assert max(gauge.most.values()) == 3
    assert len(gauge.most) == 40


@pytest.mark.parametrize("dead", [1, 5])
async def test_hosts_that_hang_stop_nobody_else(db: Database, queue: PostgresQueue, monkeypatch, dead: int) -> None:
    """Five of them leave one slot of sixteen, which is less than what is worth a claim otherwise."""
    monkeypatch.setattr(module, "POLL_S", (60.0, 60.0))
    gauge = Gauge(hangs=lambda job: job.key < PUSH_KEY + dead)
    loop = WorkerLoop(queue, gauge.run_job, lanes=[POLL, PUSH], drain_s=5)
    await queue.enqueue(pushes(50, *range(dead)))
    async with running(loop):
        await until_true(lambda: loop.running == 3 * dead)
        await queue.enqueue(pushes(3, *range(dead, 30)))
        await until(counter(db, "attempt", 3 * (30 - dead)))
        assert loop.running_by_lane() == {"poll": 0, "push": 3 * dead}
        assert await db.fetchval("select count(*) from ready") == 47 * dead  # for any other replica
        gauge.may_end.set()
        await until(counter(db, "job", 0))
    assert max(gauge.most.values()) == 3


async def test_full_key_goes_on_as_soon_as_one_of_its_jobs_ends(db, queue, monkeypatch) -> None:
    """Though too few slots are free to be worth a claim, and no notification tells of anything new."""
    monkeypatch.setattr(module, "POLL_S", (60.0, 60.0))
    running_here: list[anyio.Event] = []

    async def run_job(job: Job) -> Outcome:
        may_end = anyio.Event()
        if job.key == PUSH_KEY:
            running_here.append(may_end)
        await may_end.wait()
        return Completed()

    lane = Lane("push", PUSH_KEY, KEY_END, concurrency=16, per_key=2)
    loop = WorkerLoop(queue, run_job, lanes=[lane], drain_s=0)
    await queue.enqueue(pushes(1, *range(1, 14)))  # leaves three slots, and the key two of them
    async with running(loop):
        await until_true(lambda: loop.running == 13)
        await queue.enqueue(pushes(8, 0))
        for _ in range(6):
            await until_true(
                lambda: len(running_here) == 2 and loop._lanes[0].is_held_back and not loop._lanes[0].is_claiming
            )
            running_here.pop().set()
        await until_true(lambda: len(running_here) == 2)


async def test_drain_ends_and_gives_back_in_every_lane(db: Database, queue: PostgresQueue) -> None:
    gauge = Gauge()
    loop = WorkerLoop(queue, gauge.run_job, lanes=[POLL, PUSH], drain_s=60)
    await queue.enqueue([*pushes(9, 0), *(NewJob("poll") for _ in range(9))])
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run)
        await until_true(lambda: loop.running == 5)
        loop.stop()
        gauge.may_end.set()
    assert await db.fetchval("select array_agg(outcome) from attempt") == [1] * 5
    assert await db.fetchval("select count(*) from ready") == 13
    gauge = Gauge()
    loop = WorkerLoop(queue, gauge.run_job, lanes=[POLL, PUSH], drain_s=0)
    async with anyio.create_task_group() as group:
        group.start_soon(loop.run)
        await until_true(lambda: loop.running == 5)
        loop.stop()
    assert await db.fetchval("select count(*) from ready") == 13
    assert await QueueMaintenance(db).conservation() == []


@pytest.mark.parametrize("lanes", [[], [POLL, Lane("late", PUSH_KEY - 1, KEY_END, concurrency=1)]])
async def test_lanes_that_share_a_key_or_are_none_are_refused(queue: PostgresQueue, lanes: list[Lane]) -> None:
    with pytest.raises(ValueError, match="lanes"):
        WorkerLoop(queue, done, lanes=lanes, drain_s=1)


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
