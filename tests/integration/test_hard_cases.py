"""Schedules that broke an earlier version of the poll, each with the law that it would break again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from time import monotonic

import anyio
import msgspec
import pytest

from daemon.db import ticks
from daemon.db.pool import Database
from daemon.domain.connection import Epoch, Stream, StreamId
from daemon.domain.errors import LeaseLostError, RateLimitedError
from daemon.domain.job import Completed, Job, NewJob, Summary, WorkerId
from daemon.domain.ports import Answer, Ladder, SourceSpec
from daemon.domain.record import GrainId
from daemon.domain.window import EPOCH, Width, rfc3339
from daemon.http_client import error_for
from daemon.pollers.openai import OpenAIPoller
from daemon.queue.postgres import PostgresQueue
from daemon.sinks.ledger import Effects, Flush, LedgerSink, LockLease, Piece
from daemon.worker import bookkeeper
from daemon.worker.governor import Governor, GovernorSettings
from daemon.worker.ladder import Mode, plan
from daemon.worker.poll import POLL, PollOrder
from tests.books_kit import Books, credential, midnight, open_books, simulator_here, with_deps
from tests.ledger_kit import GRAIN, HOUR, T0, make_account, row

pytestmark = pytest.mark.anyio

DAY = timedelta(days=1)
COMPLETIONS = "/usage/completions"


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


class Door:
    """The door out, where `meddle(path, params, headers)` may raise or wait before the request is made."""

    def __init__(self, books: Books, meddle: Callable[..., object]) -> None:
        self._http = books.app.poll_deps.http
        self._meddle = meddle

    async def get(self, base_url: str, path: str, params: object = (), headers: object = None) -> Answer:
        waited = self._meddle(path, params, headers)
        if waited is not None:
            await waited  # type: ignore[misc]
        return await self._http.get(base_url, path, params, headers)  # type: ignore[arg-type]


def beside(books: Books, meddle: Callable[..., object]) -> Books:
    return replace(books, app=with_deps(books.app, http=Door(books, meddle)))


def of(name: str, headers: object) -> bool:
    return credential("openai", name) in str(headers)


async def lease(books: Books, order: PollOrder, *, kind: str = POLL, timeout_s: float = 60.0) -> Job:
    worker: WorkerId = await books.app.jobs.register_worker("test")
    new = NewJob(kind, order.encode(), timeout_s=timeout_s)
    (job,) = await books.app.jobs.enqueue_leased([new], worker)
    return job


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_nul_in_a_refusal_holds_up_nobody_else(books: Books, status: int) -> None:
    """Schedule 10. The provider's own words end up in `state_reason` and `parked_reason`, unlike those of a job."""
    await books.add("ill")
    await books.add("well")

    def refuse(_path: object, _params: object, headers: object) -> None:
        if of("ill", headers):
            raise error_for(status, {}, rb'{"error": {"message": "no \u0000 such key"}}')

    await beside(books, refuse).poll()
    await books.assert_equal("well")


async def test_dead_letter_mourned_for_months_holds_up_nobody_else(books: Books) -> None:
    """`attempt` is a smallint and grows with each tick: 32,767 ticks of 300 s are 114 days."""
    await books.add("ill")
    await books.add("well")
    await books.fault("ill", "not_json", count=1000, path_contains=COMPLETIONS)
    assert (await books.poll()).dead == 1
    await books.db.execute("update dead set attempt = 32767")
    assert (await books.poll()).dead == 1


async def test_buckets_that_were_young_before_a_long_pause_are_read_after_it() -> None:
    """Law 3. The hour before the last poll was read once, minutes after it closed; what arrived later is never read."""
    now = datetime(2026, 11, 22, 10, 20, tzinfo=UTC)
    last = now - 10 * DAY
    spec = SourceSpec("completions", "usage", "tick", Ladder(3 * HOUR, 48 * HOUR, 7 * DAY), 168, can_probe=True)
    stream = Stream(
        id=StreamId(1), source="completions", epochs=(Epoch(EPOCH, GrainId("h"), GRAIN),),
        covered_from=now - 60 * DAY, covered_to=Width.HOUR.floor(last), last_seq=1, last_window=None, last_pages=1,
        probe_digest=None, floor=None, read_at=last, hourly_at=last, daily_at=last, changed_at=last, parked_reason=None,
    )  # fmt: skip
    got = plan(spec, stream, Mode.TICK, now, now - 60 * DAY)
    assert got.live[-1].window.start <= Width.HOUR.floor(last) - HOUR


async def test_what_arrived_late_before_a_long_pause_is_booked_after_it(books: Books) -> None:
    """The same with books: parked for 12 days, and a request of the hour before was reported six minutes late."""
    await books.add("main", since=midnight(20), history_days=20, requests_per_hour=1)
    await books.poll(full=True)
    await books.assert_equal()
    pause = timedelta(days=12)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - pause - HOUR
    await books.db.execute(
        """update stream set read_at = read_at - $1::interval, hourly_at = hourly_at - $1::interval,
             daily_at = daily_at - $1::interval, covered_to = covered_to - $1::interval""",
        pause,
    )
    await books.play("main", "late_arrival", bucket=rfc3339(hour))
    for _ in range(3):
        await books.tick()
    await books.assert_equal(but=["costs"])


async def test_crash_after_costs_are_booked_still_wakes_their_followers(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`changed_at` is written with the stream's end, not with the rows: a crash between them loses it, and with it the
    read of every `follow` source, for up to a day."""
    await books.add("main")
    await books.poll()
    await books.db.execute("update stream set changed_at = null")
    await books.play("main", "late_arrival", source="costs", bucket=rfc3339(midnight(1)))
    booked = await books.count("ledger")
    monkeypatch.setattr(bookkeeper, "FLUSH_ROWS", 1)

    async def crash(*_: object) -> Summary:
        raise LeaseLostError("as if the process had died before its last flush")

    with monkeypatch.context() as patch:
        patch.setattr(bookkeeper.Bookkeeper, "close", crash)
        await books.app.run_job(await lease(books, PollOrder([books.ids["main"]], mode=Mode.POLL)))
    assert await books.count("ledger") > booked
    await books.app.run_job(await lease(books, PollOrder([books.ids["main"]], mode=Mode.POLL)))
    await books.assert_equal()
    assert (await books.stream("main", "costs"))["changed_at"] is not None


async def test_full_poll_that_fails_half_way_does_not_stamp_the_ladder(books: Books) -> None:
    """`end()` says hourly and daily for a full poll that has read the three young hours only."""
    await books.add("main", since=midnight(3), history_days=3)
    await books.poll()
    await books.db.execute("update stream set daily_at = daily_at - interval '23 hours'")
    before = (await books.stream("main", "completions"))["daily_at"]
    # The live chunk and its totals go well; history fails.
    await books.fault("main", "500", skip=2, count=1000, path_contains=COMPLETIONS)
    assert (await books.poll(full=True)).retried == 1
    assert (await books.stream("main", "completions"))["daily_at"] == before


async def test_source_with_one_bad_bucket_in_its_history_keeps_its_live_cursor(books: Books) -> None:
    """The live window was read and booked, yet the source stays `never read`: seven days are read again each tick."""
    await books.add("main", since=midnight(20), history_days=20)
    # Eight days are two chunks: the live window's. What comes next is history.
    await books.fault("main", "not_json", skip=2, count=1000, path_contains=COMPLETIONS)
    await books.tick()
    stream = await books.stream("main", "completions")
    assert await books.db.fetchval("select count(*) from usage_row where stream_id = $1", stream["id"])
    assert stream["covered_to"] is not None


async def test_answer_that_ends_early_moves_no_cursor_past_its_end(books: Books) -> None:
    """Rule 0.4: `has_more: false` after half of the hours. What is missing is neither zeroed nor taken for read."""
    await books.add("main")
    await books.poll()
    spent = await books.db.fetchval("select sum(input_tokens) from ledger")
    await books.db.execute("update stream set covered_to = covered_to - interval '5 hours', hourly_at = null")
    half = books.app.poll_deps.http

    class Cut:
        async def get(self, base_url: str, path: str, params: object = (), headers: object = None) -> Answer:
            answer = await half.get(base_url, path, params, headers)  # type: ignore[arg-type]
            if COMPLETIONS not in path:
                return answer
            page = msgspec.json.decode(answer.body)
            buckets = page["data"][:-3]
            buckets[-1]["results"] = []
            return replace(answer, body=msgspec.json.encode({**page, "data": buckets}))

    before = await books.stream("main", "completions")
    await replace(books, app=with_deps(books.app, http=Cut())).poll()
    after = await books.stream("main", "completions")
    now = Width.HOUR.floor(datetime.now(UTC))
    assert before["covered_to"] <= after["covered_to"] <= now - 2 * HOUR
    assert await books.db.fetchval("select sum(input_tokens) from ledger") == spent
    await books.poll()
    await books.assert_equal()


async def test_sequence_that_is_lost_under_a_running_daemon_is_told(books: Books) -> None:
    """Schedule 13: every answer would look old, and each poll would be content with `unchanged`."""
    await books.add("main")
    await books.poll()
    await books.db.execute("update stream set last_seq = last_seq + 1000000")
    job = await lease(books, PollOrder([books.ids["main"]], mode=Mode.POLL))
    await books.app.run_job(job)
    _, summary = await ticks.summary_of(books.db, [job.id])
    assert (summary.unchanged, summary.dead) == (0, len(OpenAIPoller.sources))


async def test_retry_of_a_paused_connection_gives_its_stream_back(books: Books) -> None:
    """The paused turn has no ends, so nothing is closed, and a settled job frees nothing. Only the sweep of a daemon
    mends it: where `tallyd tick --wait` runs from cron, the source is never read again."""
    await books.add("main")
    await books.fault("main", "500", count=1000, path_contains=COMPLETIONS)
    await books.tick()
    await books.app.connections.pause("acme", "main")
    await books.run_queue()
    await books.app.connections.resume("acme", "main")
    assert not await books.count("job")
    assert (await books.stream("main", "completions"))["open_job"] is None


async def test_split_batch_gives_its_connections_back(books: Books) -> None:
    """`open_job` still names the batch, which is gone: `end_connections` of the split jobs does not match it."""
    for name in ("a", "b"):
        await books.add(name)
    report = await books.app.tick(None, wait=False)
    assert report.batches == 1
    worker = await books.app.jobs.register_worker("test")
    (job,) = (await books.app.jobs.claim(worker, 10)).jobs
    await books.app.run_job(replace(job, losses=2))
    await books.run_queue()
    assert not await books.db.fetchval("select count(*) from connection where open_job is not null")


async def test_failed_backfill_does_not_stop_the_live_reads(books: Books) -> None:
    """Its `poll_one` of one old window has the whole stream, for up to a day of Retry-After."""
    await books.add("main", since=midnight(3), history_days=3)
    await books.poll()
    await books.fault("main", "429", path_contains=COMPLETIONS, retry_after_s=7200)
    order = PollOrder([books.ids["main"]], mode=Mode.RANGE, start=midnight(3), end=midnight(2))
    await books.app.run_job(await lease(books, order))
    await books.forget_pauses()
    await books.sim.grow("openai", "main", 5)
    await books.tick()
    await books.assert_equal(but=[name for name in OpenAIPoller.sources if name != "completions"])


async def test_long_outage_leaves_one_dead_letter_for_a_stream(books: Books) -> None:
    """`_follow_up` promises one; each round of five tries in the retry queue leaves another."""
    await books.add("ill")
    await books.fault("ill", "500", count=10_000, path_contains=COMPLETIONS)
    for _ in range(2):
        await books.forget_pauses()
        await books.tick()
        await books.db.execute("update job set max_attempts = 1")
        await books.run_queue()
    assert await books.count("dead") == 1


async def test_lost_lease_in_the_middle_of_a_batch_is_told_as_one(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper's error leaves its task group inside an ExceptionGroup, which `run_job` takes for a bug."""
    await books.add("main", requests_per_hour=8)
    monkeypatch.setattr(bookkeeper, "FLUSH_ROWS", 1)
    job = await lease(books, PollOrder([books.ids["main"]], mode=Mode.POLL))
    await books.db.execute("update lease set token = token + 1")
    assert await books.app.run_job(job) == Completed(is_settled=True, note="lease lost")


async def test_flush_is_bounded_whatever_one_answer_holds(db: Database) -> None:
    """Law 10. A piece is one page chain (a week of hours) and goes into one transaction. At 168 hours of 4,000 keys it
    never commits: encoding its columns leaves the transaction idle for more than 5 s, Postgres ends the session, and
    the whole batch with it, each time. A bucket is the unit that must not be cut, not the chain."""
    account = await make_account(db)
    flushed: list[int] = []

    class Watched(LedgerSink):
        async def book(self, flush: Flush, lock_lease: LockLease) -> Effects:
            flushed.append(sum(piece.rows for piece in flush.pieces))
            return await super().book(flush, lock_lease)

    queue = PostgresQueue(db)
    (job,) = await queue.enqueue_leased([NewJob(POLL)], await queue.register_worker("test"))
    keeper = bookkeeper.Bookkeeper(job, None, Watched(db), queue)
    outbox, inbox = anyio.create_memory_object_stream[Piece | bookkeeper.Turn](1)
    async with anyio.create_task_group() as group, outbox:
        group.start_soon(keeper.run, inbox)
        a_week = {T0 - n * HOUR: tuple(row(f"m{m}") for m in range(100)) for n in range(168)}
        await outbox.send(account.piece(await account.seq(), a_week))
    await keeper.close(lambda *_: NewJob(POLL), lambda: 0.0)
    assert sum(flushed) == 16_800
    assert max(flushed) < 2 * bookkeeper.FLUSH_ROWS


async def test_waiting_for_ones_own_pace_takes_nobody_elses_place() -> None:
    """Schedule 11: one tenant's 429s slow everyone on the host. The pause between two requests of a throttled
    organisation, up to a minute, is slept out while holding one of the host's (and of all) places."""
    governor = Governor(GovernorSettings(per_host=1), monotonic)
    for _ in range(5):
        with pytest.raises(RateLimitedError):
            async with governor.request("h", "throttled"):
                raise RateLimitedError("429")
        governor._hosts["h"].orgs["throttled"].next_at = 0.0  # do not wait in the test
    served = anyio.Event()

    async def other() -> None:
        async with governor.request("h", "other"):
            served.set()

    async def throttled() -> None:
        async with governor.request("h", "throttled"):
            pass

    governor._hosts["h"].orgs["throttled"].next_at = monotonic() + 5.0
    async with anyio.create_task_group() as group:
        group.start_soon(throttled)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(other)
        with anyio.move_on_after(1.0):
            await served.wait()
        group.cancel_scope.cancel()
    assert served.is_set()


async def test_full_poll_is_tried_again_in_full_though_a_tick_is_waiting_to_be(books: Books) -> None:
    """A `poll_one` of a tick is open, so the failed full poll gets none: `retried`, says the summary, but nobody will."""
    await books.add("main", since=midnight(20), history_days=20)
    await books.poll(full=True)
    await books.play("main", "late_arrival", bucket=rfc3339(midnight(15)))
    await books.fault("main", "500", count=1000, path_contains=COMPLETIONS)
    await books.tick()
    await books.forget_pauses()
    assert (await books.poll(full=True)).retried == 1
    await books.sim.control("DELETE", "faults")
    await books.forget_pauses()
    await books.run_queue()
    await books.assert_equal(but=["costs"])
