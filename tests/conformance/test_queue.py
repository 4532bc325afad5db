"""What every queue must do, whatever it is built on. Time is moved by writing it into the database, never by waiting."""

from collections.abc import AsyncIterator
from datetime import timedelta

import anyio
import pytest

from daemon.db.pool import Database
from daemon.domain.errors import DataRejectedError, LeaseLostError, UsageError
from daemon.domain.job import (
    KEY_END,
    PUSH_KEY,
    Cancelled,
    Completed,
    Discarded,
    Job,
    JobId,
    Lane,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
    Snoozed,
    WorkerId,
)
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.postgres import BODY_BYTES_MAX, FIRST_KEY, LOSSES_MAX, PostgresQueue, backoff_s

pytestmark = pytest.mark.anyio


@pytest.fixture
def queue(db: Database) -> PostgresQueue:
    return PostgresQueue(db)


@pytest.fixture
async def care(db: Database) -> AsyncIterator[QueueMaintenance]:
    maintenance = QueueMaintenance(db)
    yield maintenance
    assert await maintenance.conservation() == []


@pytest.fixture
async def worker(queue: PostgresQueue) -> WorkerId:
    return await queue.register_worker("test")


def settled(job: Job, outcome: Outcome) -> list[Settlement]:
    return [Settlement(job, outcome, 1)]


async def one(queue: PostgresQueue, worker: WorkerId) -> Job:
    (job,) = (await queue.claim(worker, 1)).jobs
    return job


async def states(db: Database, job_id: JobId) -> list[str]:
    return [r["state"] for r in await db.fetch("select state from job_state where id = $1", job_id)]


async def let_time_pass(db: Database, seconds: float) -> None:
    for table, column in (("due", "run_at"), ("dedup", "expires_at"), ("worker", "seen_at"), ("lease", "lease_until")):
        await db.execute(f"update {table} set {column} = {column} - make_interval(secs => $1)", seconds)


# Enqueue


async def test_job_comes_back_as_it_was_given(db: Database, queue: PostgresQueue, care, worker: WorkerId) -> None:
    body = bytes(range(256))
    (job_id,) = await queue.enqueue([NewJob("kind", body, key=7, max_attempts=3, timeout_s=12.5)])
    job = await one(queue, worker)
    assert (job.id, job.kind, job.body, job.key, job.max_attempts, job.timeout_s) == (
        job_id, "kind", body, 7, 3, 12.5,
    )  # fmt: skip
    assert (job.attempt, job.token) == (1, 1)
    lease_s = "select extract(epoch from lease_until - claimed_at)::float8 from lease"
    assert await db.fetchval(lease_s) == 12.5 + 15


async def test_ids_come_in_the_order_of_the_jobs(queue: PostgresQueue, care, worker: WorkerId) -> None:
    ids = await queue.enqueue(
        [NewJob(str(i), delay=timedelta(hours=i % 2), dedup_id=f"d{i}" if i % 3 else None) for i in range(50)]
    )
    claimed = (await queue.claim(worker, 100)).jobs
    assert {job.id: job.kind for job in claimed} == {ids[i]: str(i) for i in range(0, 50, 2)}


async def test_enqueue_belongs_to_the_callers_transaction(db: Database, queue: PostgresQueue, care) -> None:
    with pytest.raises(LookupError):  # noqa: PT012
        async with db.transaction() as tx:
            await queue.enqueue([NewJob("a"), NewJob("b", dedup_id="x"), NewJob("c", delay=timedelta(1))], tx)
            raise LookupError
    assert await db.fetchval("select (select count(*) from job) + (select count(*) from dedup)") == 0
    async with db.transaction() as tx:
        await queue.enqueue([NewJob("a")], tx)
        assert await db.fetchval("select count(*) from ready") == 0
    assert await db.fetchval("select count(*) from ready") == 1


@pytest.mark.parametrize("job", [NewJob("a", b"x" * (BODY_BYTES_MAX + 1)), NewJob("a", key=-1)])
async def test_impossible_job_is_refused_before_it_is_sent(queue: PostgresQueue, job: NewJob) -> None:
    with pytest.raises(UsageError):
        await queue.enqueue([job])


async def test_job_that_postgres_cannot_hold_is_rejected_whole(queue: PostgresQueue, care, db: Database) -> None:
    with pytest.raises(DataRejectedError):
        await queue.enqueue([NewJob("good"), NewJob("bad\x00")])
    assert await db.fetchval("select count(*) from job") == 0


async def test_delayed_job_waits_and_is_promoted_when_due(
    db: Database, queue: PostgresQueue, care, worker: WorkerId
) -> None:
    await queue.enqueue([NewJob("later", delay=timedelta(seconds=30))])
    promotion = await queue.promote()
    assert promotion.moved == 0
    assert promotion.next_s is not None
    assert 0 < promotion.next_s <= 30
    assert (await queue.claim(worker, 10)).jobs == []
    await let_time_pass(db, 31)
    assert await queue.promote() == type(promotion)(1, None)
    assert (await one(queue, worker)).kind == "later"


async def test_bring_forward_moves_only_what_waits(queue: PostgresQueue, care, worker: WorkerId) -> None:
    waiting, other = await queue.enqueue([NewJob("a", delay=timedelta(hours=1)), NewJob("b")])
    assert await queue.bring_forward([waiting, other, JobId(999)]) == {waiting}
    assert await queue.bring_forward([waiting]) == set()
    assert {job.id for job in (await queue.claim(worker, 10)).jobs} == {waiting, other}


async def test_leased_jobs_are_the_workers_at_once(queue: PostgresQueue, care, worker: WorkerId) -> None:
    jobs = await queue.enqueue_leased([NewJob("a", b"1"), NewJob("b", b"2")], worker)
    assert [(job.kind, job.body, job.token, job.attempt) for job in jobs] == [("a", b"1", 1, 1), ("b", b"2", 1, 1)]
    assert (await queue.claim(worker, 10)).jobs == []
    assert await queue.settle([Settlement(job, Completed(), 0) for job in jobs]) == {job.id for job in jobs}
    with pytest.raises(UsageError):
        await queue.enqueue_leased([NewJob("a", dedup_id="x")], worker)


# Deduplication


async def test_duplicates_give_the_first_id_also_inside_one_call(db: Database, queue: PostgresQueue, care) -> None:
    first, second, other = await queue.enqueue(
        [NewJob("a", dedup_id="x"), NewJob("a", dedup_id="x"), NewJob("a", dedup_id="y")]
    )
    assert first == second != other
    assert await queue.enqueue([NewJob("a", dedup_id="x"), NewJob("b")]) != [first]
    assert await db.fetchval("select count(*) from job where kind = 'a'") == 2


async def test_window_of_a_dedup_id_ends(db: Database, queue: PostgresQueue, care) -> None:
    (first,) = await queue.enqueue([NewJob("a", dedup_id="x", dedup_window=timedelta(minutes=10))])
    await let_time_pass(db, 599)
    assert await queue.enqueue([NewJob("a", dedup_id="x")]) == [first]
    await let_time_pass(db, 2)
    assert await queue.enqueue([NewJob("a", dedup_id="x")]) != [first]


async def test_finished_job_still_blocks_inside_its_window(queue: PostgresQueue, care, worker: WorkerId) -> None:
    (first,) = await queue.enqueue([NewJob("a", dedup_id="x")])
    await queue.settle(settled(await one(queue, worker), Completed()))
    assert await queue.enqueue([NewJob("a", dedup_id="x")]) == [first]


@pytest.mark.parametrize("outcome", [None, Completed(), Discarded("no")])
async def test_claimed_job_no_longer_blocks_when_only_unclaimed_count(
    queue: PostgresQueue, care, worker: WorkerId, outcome: Outcome | None
) -> None:
    """A job that runs has read its data already, so what came later needs another one."""
    job = NewJob("judge", dedup_id="x", only_unclaimed=True)
    (first,) = await queue.enqueue([job])
    assert await queue.enqueue([job]) == [first]
    claimed = await one(queue, worker)
    if outcome is not None:
        await queue.settle(settled(claimed, outcome))
    (second,) = await queue.enqueue([job])
    assert second != first
    assert await queue.enqueue([job]) == [second]


async def test_waiting_job_blocks_when_only_unclaimed_count(queue: PostgresQueue, care) -> None:
    (first,) = await queue.enqueue([NewJob("judge", dedup_id="x", only_unclaimed=True, delay=timedelta(hours=1))])
    assert await queue.enqueue([NewJob("judge", dedup_id="x", only_unclaimed=True)]) == [first]


async def test_job_that_stands_for_another_starts_only_after_that_commit(
    db: Database, queue: PostgresQueue, care, worker: WorkerId
) -> None:
    """Otherwise it could read before it sees what the deduplicated caller wrote, and an alert would never fire."""
    (first,) = await queue.enqueue([NewJob("judge", dedup_id="x", only_unclaimed=True)])
    async with db.transaction() as tx:
        assert await queue.enqueue([NewJob("judge", dedup_id="x", only_unclaimed=True)], tx) == [first]
        assert (await queue.claim(worker, 10)).jobs == []
    assert (await one(queue, worker)).id == first


@pytest.mark.parametrize("only_unclaimed", [False, True])
async def test_racing_callers_store_one_job(db: Database, queue: PostgresQueue, care, only_unclaimed: bool) -> None:
    results: list[list[JobId]] = []

    async def call(turn: int) -> None:
        keys = ["a", "b", "c"] if turn % 2 else ["c", "b", "a"]
        jobs = [NewJob(key, dedup_id=key, only_unclaimed=only_unclaimed) for key in keys]
        ids = await queue.enqueue(jobs)
        results.append(ids if turn % 2 else ids[::-1])

    async with anyio.create_task_group() as group:
        for turn in range(8):
            group.start_soon(call, turn)
    assert len({tuple(ids) for ids in results}) == 1
    assert await db.fetchval("select count(*) from job") == 3


# Claim


async def test_concurrent_claimers_never_share_a_job(queue: PostgresQueue, care, db: Database) -> None:
    await queue.enqueue([NewJob("a", key=i % 5) for i in range(600)])
    taken: list[JobId] = []

    async def claim_all() -> None:
        worker, cursor = await queue.register_worker(), FIRST_KEY
        while True:
            result = await queue.claim(worker, 40, cursor)
            if not result.jobs:
                return
            cursor = result.last_key
            taken.extend(job.id for job in result.jobs)

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(claim_all)
    assert len(taken) == len(set(taken)) == await db.fetchval("select count(*) from lease")
    # A claimer ends when it sees nothing, which may be a moment in which others hold the rest.
    assert len(taken) == 600


async def test_small_keys_are_served_beside_a_hog(queue: PostgresQueue, care, db: Database, worker: WorkerId) -> None:
    await db.execute("""
        with j as (insert into job (kind, key_id, body)
          select 'x', case when i <= 20000 then 5 else i end, '' from generate_series(1, 20200) i returning id, key_id)
        insert into ready select key_id, 100, now(), id, 0, 0, 0 from j
    """)
    small, cursor = set(), FIRST_KEY
    for _ in range(30):
        result = await queue.claim(worker, 20, cursor)
        cursor = result.last_key
        small |= {job.key for job in result.jobs} - {5}
    assert len(small) == 200


async def test_lone_key_fills_the_whole_batch(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a", key=3) for _ in range(100)])
    assert len((await queue.claim(worker, 64)).jobs) == 64


async def test_cursor_past_the_last_key_goes_round(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a", key=3)])
    result = await queue.claim(worker, 10, after_key=99)
    assert [job.key for job in result.jobs] == [3]


async def test_order_within_a_key_is_priority_then_age(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("old"), NewJob("urgent", prio=1)])
    await queue.enqueue([NewJob("young")])
    kinds = []
    for _ in range(3):
        job = await one(queue, worker)
        kinds.append(job.kind)
    assert kinds == ["urgent", "old", "young"]


# Lanes

PUSH = Lane("push", PUSH_KEY, KEY_END, concurrency=100, per_key=3)


async def test_lane_takes_its_own_keys_only(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a", key=key) for key in (9, 10, 11, 19, 20)])
    lane = Lane("some", 10, 20, concurrency=5)
    for after_key in (FIRST_KEY, 10, 19, 500):  # wherever the cursor stands
        result = await queue.claim(worker, 10, after_key, lane)
        assert {job.key for job in result.jobs} == ({11, 19} if after_key == 10 else {10, 11, 19})
        await queue.release(result.jobs)
    assert len((await queue.claim(worker, 10, FIRST_KEY, lane)).jobs) == 3
    assert (await queue.claim(worker, 10, FIRST_KEY, lane)).jobs == []
    assert {job.key for job in (await queue.claim(worker, 10)).jobs} == {9, 20}


@pytest.mark.parametrize("busy", [0, 1, 2, 3, 4])
async def test_key_gets_no_more_than_its_lane_allows(queue, care, worker, busy: int) -> None:
    """What is beyond stays ready, for whoever has room for it."""
    await queue.enqueue([NewJob("a", key=PUSH_KEY + n % 2) for n in range(20)])
    result = await queue.claim(worker, 50, FIRST_KEY, PUSH, {PUSH_KEY: busy})
    keys = [job.key - PUSH_KEY for job in result.jobs]
    assert (keys.count(0), keys.count(1)) == (max(0, 3 - busy), 3)
    assert result.is_held_back == (busy >= 3)
    assert (await care.stats()).available == 20 - len(keys)


async def test_lane_without_a_limit_by_key_ignores_what_is_in_hand(queue, care, worker) -> None:
    await queue.enqueue([NewJob("a", key=5) for _ in range(20)])
    lane = Lane("poll", 0, PUSH_KEY, concurrency=100)
    assert len((await queue.claim(worker, 20, FIRST_KEY, lane, {5: 50})).jobs) == 20


async def test_full_keys_take_no_share_and_starve_nobody_behind_them(queue, care, worker) -> None:
    """More keys are full than a claim looks at otherwise, and each has its jobs in the way."""
    await queue.enqueue([NewJob("a", key=PUSH_KEY + n % 40) for n in range(200)])
    await queue.enqueue([NewJob("a", key=PUSH_KEY + 40 + n % 2) for n in range(20)])
    lane = Lane("push", PUSH_KEY, KEY_END, concurrency=100, per_key=5)
    busy = {PUSH_KEY + n: 5 for n in range(40)} | {PUSH_KEY + 41: 4}
    result = await queue.claim(worker, 10, FIRST_KEY, lane, busy)
    assert sorted(job.key - PUSH_KEY for job in result.jobs) == [40] * 5 + [41]
    assert result.is_held_back
    busy |= {PUSH_KEY + 40: 5, PUSH_KEY + 41: 5}
    nothing = await queue.claim(worker, 10, result.last_key, lane, busy)
    assert (nothing.jobs, nothing.is_held_back) == ([], True)


async def test_claim_goes_on_behind_keys_whose_heads_others_are_taking(db, queue, care, worker) -> None:
    """An empty answer means that nothing can be claimed, not that the first keys could not."""
    await queue.enqueue([NewJob("a", key=PUSH_KEY + key) for key in range(10)])
    for after_key in (FIRST_KEY, PUSH_KEY + 3, PUSH_KEY + 9):
        async with db.transaction() as tx:
            await tx.execute("select from ready where key_id < $1 for update", PUSH_KEY + 9)
            result = await queue.claim(worker, 2, after_key, PUSH)
            assert [job.key for job in result.jobs] == [PUSH_KEY + 9]
        await queue.release(result.jobs)


async def test_cursor_of_a_lane_visits_every_key_in_turn(queue, care, worker) -> None:
    await queue.enqueue([NewJob("a", key=PUSH_KEY + n % 10) for n in range(100)])
    seen, cursor = set(), FIRST_KEY
    for _ in range(5):
        result = await queue.claim(worker, 2, cursor, PUSH)
        cursor = result.last_key
        seen |= {job.key for job in result.jobs}
    assert len(seen) == 10


# Settle and fence


async def test_completed_job_leaves_only_its_attempt(db: Database, queue: PostgresQueue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    assert await queue.settle(settled(job, Completed(note="fine"))) == {job.id}
    assert await db.fetchval("select count(*) from job") == 0
    row = await db.fetchrow("select outcome, note, worker, took_ms from attempt where id = $1", job.id)
    assert tuple(row) == (1, "fine", worker, 1)


async def test_settle_by_the_handler_is_not_repeated(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a")])
    assert await queue.settle(settled(await one(queue, worker), Completed(is_settled=True))) == set()


async def test_retry_waits_and_keeps_its_attempt_and_token(db: Database, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    await queue.settle(settled(await one(queue, worker), Retryable("no luck", delay_s=60)))
    await let_time_pass(db, 61)
    await queue.promote()
    job = await one(queue, worker)
    assert (job.attempt, job.token) == (2, 2)


async def test_spent_attempts_make_a_dead_letter_with_its_reason(db, queue, care, worker) -> None:
    (job_id,) = await queue.enqueue([NewJob("a", b"body", max_attempts=2)])
    for _ in range(2):
        await queue.settle(settled(await one(queue, worker), Retryable("503 again", delay_s=0)))
        await queue.promote()
    assert await states(db, job_id) == ["discarded"]
    detail = await care.dead_show(job_id)
    assert (detail.letter.reason, detail.body, [a.note for a in detail.attempts]) == (
        "503 again", b"body", ["503 again", "503 again"],
    )  # fmt: skip


async def test_snooze_costs_no_attempt(queue: PostgresQueue, care, worker: WorkerId) -> None:
    await queue.enqueue([NewJob("a", max_attempts=1)])
    for turn in range(3):
        job = await one(queue, worker)
        assert (job.attempt, job.token) == (1, turn + 1)
        await queue.settle(settled(job, Snoozed(0, "later")))
        await queue.promote()


async def test_hostile_notes_are_cut_and_cleaned(db: Database, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a"), NewJob("b")])
    jobs = (await queue.claim(worker, 2)).jobs
    done = await queue.settle(
        [Settlement(jobs[0], Discarded("nul\x00\ud800" + "é" * 5000), 1), *settled(jobs[1], Completed())]
    )
    assert len(done) == 2
    assert await db.fetchval("select octet_length(reason) from dead") <= 2000


async def test_stale_token_settles_nothing(db: Database, queue, care, worker) -> None:
    """A replica that slept through its lease wakes up and tries to finish what another one has."""
    await queue.enqueue([NewJob("a")])
    zombie = await one(queue, worker)
    await let_time_pass(db, 100)
    await queue.rescue()
    owner_id = await queue.register_worker()
    owner = await one(queue, owner_id)
    assert owner.id == zombie.id
    assert owner.token > zombie.token
    for outcome in (Completed(), Retryable("x"), Snoozed(1), Discarded("x"), Cancelled("x")):
        assert await queue.settle(settled(zombie, outcome)) == set()
    assert await queue.release([zombie]) == set()
    for act in (lambda tx: queue.settle_in(tx, *settled(zombie, Completed())), lambda tx: queue.lock_lease(tx, zombie)):
        with pytest.raises(LeaseLostError):
            async with db.transaction() as tx:
                await act(tx)
    assert await queue.settle(settled(owner, Completed())) == {owner.id}


async def test_settling_twice_accepts_once(queue: PostgresQueue, care, worker: WorkerId) -> None:
    """The reply to a settle can be lost, so it is sent again."""
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    assert await queue.settle(settled(job, Retryable("x"))) == {job.id}
    assert await queue.settle(settled(job, Retryable("x"))) == set()


async def test_settle_commits_with_the_data_of_its_transaction(db: Database, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    with pytest.raises(LookupError):  # noqa: PT012
        async with db.transaction() as tx:
            await queue.lock_lease(tx, job)
            await queue.settle_in(tx, *settled(job, Completed()))
            raise LookupError
    assert await states(db, job.id) == ["running"]


async def test_locked_lease_cannot_be_rescued(db: Database, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    await let_time_pass(db, 100)
    async with db.transaction() as tx:
        await queue.lock_lease(tx, job)
        assert (await queue.rescue()).ready == []
        await queue.settle_in(tx, *settled(job, Completed()))
    assert (await queue.rescue()).ready == []


async def test_release_gives_back_the_attempt_but_never_the_token(queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    assert await queue.release([job]) == {job.id}
    again = await one(queue, worker)
    assert (again.attempt, again.token) == (1, 2)


@pytest.mark.parametrize("where", ["ready", "due", "lease"])
async def test_cancel_removes_a_job_from_wherever_it_is(db: Database, queue, care, worker, where: str) -> None:
    (job_id,) = await queue.enqueue([NewJob("a", delay=timedelta(hours=where == "due"))])
    job = await one(queue, worker) if where == "lease" else None
    assert await queue.cancel([job_id], "not wanted") == {job_id}
    assert await queue.cancel([job_id]) == set()
    if job is not None:
        assert await queue.settle(settled(job, Completed())) == set()
    assert await db.fetchval("select count(*) from job") == 0


@pytest.mark.parametrize("attempt", [1, 5, 9, 10, 11, 60, 30_000])
def test_backoff_doubles_to_an_hour(attempt: int) -> None:
    longest = min(3600, 5 * 2 ** min(attempt, 20))
    assert longest / 2 <= backoff_s(attempt) <= longest


# Rescue


async def test_job_of_a_silent_worker_runs_again_at_once_and_keeps_its_attempt(db, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a", max_attempts=1)])
    lost = await one(queue, worker)
    assert (await queue.rescue()).ready == []
    await db.execute("update worker set seen_at = now() - interval '14 s'")
    assert (await queue.rescue()).ready == []
    await db.execute("update worker set seen_at = now() - interval '16 s'")
    assert (await queue.rescue()).ready == [lost.id]
    job = await one(queue, await queue.register_worker())
    assert (job.attempt, job.token, job.losses) == (1, 2, 1)


async def test_beat_keeps_a_worker_alive_and_a_stopped_one_is_told(db, queue, worker) -> None:
    await db.execute("update worker set seen_at = now() - interval '16 s'")
    async with queue.heart(worker) as beat:
        assert await beat()
        assert await db.fetchval("select seen_at > now() - interval '5 s' from worker")
        await queue.stop_worker(worker)
        assert not await beat()


async def test_expired_lease_is_rescued_though_its_worker_lives(db, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    job = await one(queue, worker)
    await db.execute("update lease set lease_until = now() - interval '1 s'")
    assert (await queue.rescue()).ready == [job.id]
    assert await db.fetchval("select note from attempt") == "lease expired"


async def test_job_that_loses_every_worker_dies_in_the_end(db, queue, care) -> None:
    (job_id,) = await queue.enqueue([NewJob("bomb", max_attempts=50)])
    for turn in range(LOSSES_MAX):
        await one(queue, await queue.register_worker())
        await db.execute("update worker set seen_at = '-infinity'")
        rescued = await queue.rescue()
        assert (rescued.dead if turn == LOSSES_MAX - 1 else rescued.ready) == [job_id]
    assert [letter.reason for letter in await care.dead_list()] == ["worker lost"]


async def test_ended_run_forgives_earlier_losses(db, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a")])
    await one(queue, worker)
    await db.execute("update lease set lease_until = '-infinity', losses = 3")
    await queue.rescue()
    await queue.settle(settled(await one(queue, worker), Retryable("x")))
    assert await db.fetchval("select losses from due") == 0


async def test_stopping_worker_frees_everything_it_holds(queue, care, worker) -> None:
    ids = await queue.enqueue([NewJob("a"), NewJob("b")])
    await queue.claim(worker, 2)
    await queue.stop_worker(worker)
    assert {job.id for job in (await queue.claim(await queue.register_worker(), 5)).jobs} == set(ids)


async def test_claim_whose_answer_was_lost_is_given_back(queue, care, worker) -> None:
    first, second = await queue.enqueue([NewJob("a"), NewJob("b")])
    await queue.claim(worker, 2)
    assert await queue.release_others(worker, [first]) == {second}


# Dead letters and housekeeping


async def test_replay_keeps_the_identity_and_starts_anew(db, queue, care, worker) -> None:
    (job_id,) = await queue.enqueue([NewJob("a", b"x", max_attempts=3)])
    await queue.settle(settled(await one(queue, worker), Discarded("no")))
    assert await care.dead_replay([job_id, JobId(12345)]) == {job_id}
    assert await care.dead_replay([job_id]) == set()
    job = await one(queue, worker)
    assert (job.id, job.body, job.attempt, job.token) == (job_id, b"x", 1, 2)
    await queue.settle(settled(job, Completed()))
    assert await care.dead_list() == []


async def test_dropped_letter_is_gone_for_good(db, queue, care, worker) -> None:
    (job_id,) = await queue.enqueue([NewJob("a")])
    await queue.settle(settled(await one(queue, worker), Discarded("no")))
    assert await care.dead_drop([job_id]) == {job_id}
    assert await care.dead_drop([job_id]) == set()
    assert await care.dead_show(job_id) is None
    assert await db.fetchval("select count(*) from job") == 0


async def test_dead_letters_are_listed_in_pages(queue, care, worker) -> None:
    ids = await queue.enqueue([NewJob(str(i)) for i in range(5)])
    jobs = (await queue.claim(worker, 5)).jobs
    await queue.settle([Settlement(job, Discarded("no"), 0) for job in jobs])
    page = await care.dead_list(limit=3)
    rest = await care.dead_list(limit=3, after=page[-1].id)
    assert [letter.id for letter in (*page, *rest)] == ids


async def test_stats_name_every_state(db, queue, care, worker) -> None:
    await queue.enqueue([NewJob("a", max_attempts=1) for _ in range(4)] + [NewJob("b", delay=timedelta(hours=1))])
    jobs = (await queue.claim(worker, 3)).jobs
    await queue.settle(settled(jobs[0], Discarded("x")) + settled(jobs[1], Snoozed(60)))
    stats = await care.stats()
    assert (stats.available, stats.scheduled, stats.retryable, stats.running, stats.discarded) == (1, 2, 0, 1, 1)
    assert stats.oldest_available_s is not None


@pytest.fixture
async def opened(db: Database, queue: PostgresQueue) -> JobId:
    """A job that a connection and a stream have opened."""
    (job_id,) = await queue.enqueue([NewJob("poll")])
    await db.execute(f"""
        insert into tenant (name) values ('t');
        insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print,
                                since, open_job)
          select id, 'c', 'openai', 'https://x', '', '', '', now(), {job_id} from tenant;
        insert into stream (tenant_id, connection_id, source, open_job)
          select tenant_id, id, 's', {job_id} from connection;
    """)
    return job_id


OPEN = "select (select count(open_job) from connection) + (select count(open_job) from stream)"


@pytest.mark.parametrize("end", ["discard", "cancel", "drop", "worker lost", "cancel outcome"])
async def test_job_that_ends_badly_lets_go_of_what_it_had_opened(db, queue, care, worker, opened, end: str) -> None:
    """Otherwise the connection would never be polled again."""
    match end:
        case "cancel":
            await queue.cancel([opened])
        case "worker lost":
            await one(queue, worker)
            await db.execute("update lease set losses = 4, lease_until = '-infinity'")
            await queue.rescue()
        case "cancel outcome":
            await queue.settle(settled(await one(queue, worker), Cancelled("x")))
        case _:
            await queue.settle(settled(await one(queue, worker), Discarded("x")))
    if end == "drop":
        await db.execute("update connection set open_job = $1", opened)
        await care.dead_drop([opened])
    assert await db.fetchval(OPEN) == 0


async def test_job_that_goes_on_keeps_what_it_had_opened(db, queue, care, worker, opened) -> None:
    await queue.settle(settled(await one(queue, worker), Retryable("x", delay_s=0)))
    await queue.promote()
    await queue.release([await one(queue, worker)])
    assert await db.fetchval(OPEN) == 2
    assert (await care.prune()).connections == 0


async def test_prune_removes_what_nobody_needs(db, queue, care, worker, opened) -> None:
    await queue.settle(settled(await one(queue, worker), Completed()))
    await db.execute("insert into dedup select i::text, i, now() - interval '1 s' from generate_series(1, 2500) i")
    await db.execute("insert into worker (seen_at) select now() - interval '2 days' from generate_series(1, 3)")
    await db.execute("select attempt_make_partitions(now() - interval '90 days', 0)")
    pruned = await care.prune()
    assert (pruned.dedups, pruned.workers, pruned.partitions, pruned.connections, pruned.streams) == (2500, 3, 1, 1, 1)
    again = await care.prune()
    assert (again.dedups, again.workers, again.partitions, again.connections) == (0, 0, 0, 0)


async def test_conservation_check_finds_what_is_lost_or_doubled(db: Database, queue: PostgresQueue) -> None:
    lost, doubled = await queue.enqueue([NewJob("a"), NewJob("b")])
    await db.execute("delete from ready where id = $1", lost)
    await db.execute("insert into dead (id, attempt, token, reason) values ($1, 0, 0, ''), (999, 0, 0, '')", doubled)
    found = {m.id: (set(m.states), m.has_job) for m in await QueueMaintenance(db).conservation()}
    assert found == {lost: (set(), True), doubled: ({"ready", "dead"}, True), 999: ({"dead"}, False)}
