"""A poll of many connections over sockets: what it books, what it asks for, and what it leaves alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from msgspec.json import decode

from daemon.db import ticks
from daemon.domain.errors import UpstreamUnavailableError
from daemon.domain.job import Completed, Job, NewJob, Outcome, Snoozed, WorkerId
from daemon.domain.ports import Answer
from daemon.domain.window import rfc3339
from daemon.worker.caller import Http
from daemon.worker.ladder import Mode
from daemon.worker.poll import POLL, POLL_ONE, PollOrder
from tests.books_kit import Books, midnight, open_books, simulator_here, with_deps
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

BOTH = pytest.mark.parametrize("provider", ["openai", "anthropic"])
HOUR = timedelta(hours=1)


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


class Gate:
    """The door out, closed before the first request that `is_shut` names until the test opens it."""

    def __init__(self, http: Http, part_of_path: str) -> None:
        self._http = http
        self._part = part_of_path
        self.reached = anyio.Event()
        self.opened = anyio.Event()

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        if self._part in path and not self.reached.is_set():
            self.reached.set()
            await self.opened.wait()
        return await self._http.get(base_url, path, params, headers)


def beside(books: Books, http: Http) -> Books:
    """A second replica with its own door out."""
    return replace(books, app=with_deps(books.app, http=http))


async def lease(books: Books, order: PollOrder, copies: int = 1) -> list[Job]:
    worker: WorkerId = await books.app.jobs.register_worker("test")
    return await books.app.jobs.enqueue_leased([NewJob(POLL, order.encode())] * copies, worker)


# ── What is booked ──────────────────────────────────────────────────────────────────────────────


async def test_every_source_of_a_batch_equals_its_truth(books: Books) -> None:
    for n in range(3):
        await books.add(f"o{n}", requests_per_hour=8)
        await books.add(f"a{n}", "anthropic", requests_per_hour=8)
    first = await books.poll()
    assert all(await books.assert_equal()), "the seed left something out"
    assert (first.connections, first.retried, first.dead) == (6, 0, 0)
    again = await books.poll()
    assert (again.rows, again.stored, again.restated) == (0, 0, 0)
    await books.assert_equal()


async def test_a_sealed_key_opens_for_its_own_connection_alone(books: Books) -> None:
    await books.add("main", requests_per_hour=8)
    await books.db.execute(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print,
             since) select tenant_id, 'thief', provider, base_url, credential, credential_key_id, '', since
           from connection"""
    )
    summary = await books.tick()
    assert (summary.connections, summary.dead) == (2, 13)
    assert await books.db.fetchval("select state from connection where name = 'thief'") == "parked"
    await books.assert_equal()


async def test_a_downtime_is_caught_up_by_the_next_poll(books: Books) -> None:
    """Windows begin where the last read ended, though the ladder alone would look back three hours only."""
    await books.add("main", requests_per_hour=8)
    await books.poll()
    late = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 8 * HOUR
    await books.play("main", "late_arrival", bucket=rfc3339(late))
    await books.poll()
    with pytest.raises(AssertionError, match="completions"):
        await books.assert_equal()
    await books.db.execute("update stream set covered_to = covered_to - interval '9 hours'")
    await books.poll()
    await books.assert_equal()


async def test_history_is_read_newest_first_a_piece_a_tick_and_whole_by_hand(books: Books) -> None:
    await books.add("long", since=midnight(47), history_days=47, requests_per_hour=1)
    await books.add("other", since=midnight(47), history_days=47, requests_per_hour=1)
    settings = replace(books.app.poll_deps.settings, history_chunks=2)
    ticking = replace(books, app=with_deps(books.app, settings=settings))
    covered = []
    for _ in range(4):
        await ticking.tick()
        covered.append((await books.stream("long", "completions"))["covered_from"])
    assert covered == sorted(covered, reverse=True)
    assert covered[0] > midnight(47)
    assert covered[-1] == midnight(47)
    await ticking.poll("other")
    assert (await books.stream("other", "completions"))["covered_from"] == midnight(47)
    await books.assert_equal("other")
    await books.poll("long")
    await books.assert_equal()


async def test_a_history_floor_is_met_remembered_and_not_asked_again(books: Books) -> None:
    await books.add("short", since=midnight(9), history_days=9, lookback_days=8, requests_per_hour=2)
    await books.poll()
    floor = (await books.stream("short", "completions"))["floor_at"]
    assert floor > midnight(9)
    await books.assert_equal()
    await books.sim.control("DELETE", "stats")
    await books.poll(full=True)
    assert set((await books.sim.control("GET", "stats"))["statuses"]) == {"200"}
    assert (await books.stream("short", "completions"))["floor_at"] == floor
    await books.assert_equal()


# ── What is asked for ───────────────────────────────────────────────────────────────────────────


@BOTH
async def test_an_unchanged_poll_asks_once_and_writes_the_stream_alone(books: Books, provider: str) -> None:
    await books.add("main", provider, requests_per_hour=8)
    probing = "completions" if provider == "openai" else "messages"
    for _ in range(3):
        await books.tick()
    versions = {table: await _versions(books, table) for table in ("usage_row", "bucket", "ledger")}
    streams = await _versions(books, "stream")
    seq = (await books.stream("main", probing))["last_seq"]
    summary = await books.tick()
    assert (summary.requests, summary.unchanged, summary.rows) == (1, 1, 0)
    assert summary.requests_saved > 0
    assert {table: await _versions(books, table) for table in versions} == versions
    touched = set(await _versions(books, "stream")) - set(streams)
    assert len(touched) == 1
    assert (await books.stream("main", probing))["last_seq"] > seq, "an unchanged answer fences older ones too"
    await books.assert_equal()


async def _versions(books: Books, table: str) -> list[tuple[object, ...]]:
    rows = await books.db.fetch(f"select tableoid::text, ctid::text, xmin::text from {table} order by 1, 2")
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("provider", "settings"), [("openai", {}), ("anthropic", {}), ("anthropic", {"api": "analytics"})]
)
async def test_a_refused_answer_leaves_no_probe_behind(books: Books, provider: str, settings: dict[str, str]) -> None:
    """Schedule 2: poll 1 takes its seq and stalls, poll 2 books B, the provider moves to C, poll 1 reads C and is
    refused. Had it left its probe's digest behind, C would never be booked.
    """
    await books.add("main", provider, settings=settings)
    await books.poll()
    await books.sim.control("POST", "advance", {"seconds": 2})
    await books.sim.grow(provider, "main", 20)
    gate = Gate(books.app.poll_deps.http, "completions" if provider == "openai" else "usage")
    stalled = beside(books, gate)
    async with anyio.create_task_group() as group:
        group.start_soon(stalled.poll)
        await gate.reached.wait()
        await books.poll()
        await books.sim.control("POST", "advance", {"seconds": 2})  # its freshness stamp counts in seconds
        await books.sim.grow(provider, "main", 20)
        gate.opened.set()
    await books.poll()
    await books.assert_equal(by_dims=not settings)


async def test_a_stalled_old_answer_does_not_undo_a_newer_one(books: Books) -> None:
    """Poll 1 has A in its hands when poll 2 books B."""
    await books.add("main")
    await books.poll()

    class Slow(Gate):
        async def get(
            self,
            base_url: str,
            path: str,
            params: Sequence[tuple[str, str]] = (),
            headers: Mapping[str, str] | None = None,
        ) -> Answer:
            answer = await self._http.get(base_url, path, params, headers)
            if self._part in path and ("group_by", "model") in params:
                self.reached.set()
                await self.opened.wait()
            return answer

    await books.sim.grow("openai", "main", 20)
    gate = Slow(books.app.poll_deps.http, "completions")
    async with anyio.create_task_group() as group:
        group.start_soon(beside(books, gate).poll)
        await gate.reached.wait()
        await books.sim.grow("openai", "main", 20)
        await books.poll()
        gate.opened.set()
    await books.assert_equal(but=["costs"])
    await books.poll()
    await books.assert_equal()


# ── At least once, exactly once ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [Mode.TICK, Mode.POLL, Mode.FULL])
async def test_three_deliveries_of_one_order_at_once_book_it_once(books: Books, mode: Mode) -> None:
    for n in range(4):
        await books.add(f"o{n}", requests_per_hour=8)
        await books.add(f"a{n}", "anthropic", requests_per_hour=8)
    order = PollOrder([*books.ids.values()], mode=mode)
    for _ in range(2):
        jobs = await lease(books, order, copies=3)
        outcomes: list[Outcome] = []

        async def run(job: Job, into: list[Outcome] = outcomes) -> None:
            into.append(await books.app.run_job(job))

        async with anyio.create_task_group() as group:
            for job in jobs:
                group.start_soon(run, job)
        assert outcomes == [Completed(is_settled=True)] * 3
        for n in range(4):
            await books.sim.grow("openai", f"o{n}", 3)
    await books.poll()
    await books.assert_equal()
    assert not await books.count("lease")


async def test_three_runs_under_one_lease_settle_it_once(books: Books) -> None:
    """A lease belongs to whoever settles first; the others find it gone and say nothing."""
    await books.add("main", requests_per_hour=8)
    (job,) = await lease(books, PollOrder([books.ids["main"]]))
    outcomes: list[Outcome] = []

    async def run() -> None:
        outcomes.append(await books.app.run_job(job))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run)
    lost = Completed(is_settled=True, note="lease lost")
    assert sorted(outcomes, key=str) == sorted([Completed(is_settled=True), lost, lost], key=str)
    assert await books.count("batch_summary") == 1
    await books.assert_equal()


async def test_a_poll_one_delivered_three_times_books_it_once(books: Books) -> None:
    await books.add("main", requests_per_hour=8)
    order = PollOrder([books.ids["main"]], source="completions")
    worker = await books.app.jobs.register_worker("test")
    jobs = await books.app.jobs.enqueue_leased([NewJob(POLL_ONE, order.encode())] * 3, worker)
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(books.app.run_job, job)
    await books.poll()
    await books.assert_equal()
    assert not await books.count("job")


async def test_a_zombie_books_nothing_and_its_batch_runs_elsewhere(books: Books) -> None:
    """Schedule 4: every flush is fenced by the lease, not the last alone."""
    await books.add("main", requests_per_hour=8)
    (job,) = await lease(books, PollOrder([books.ids["main"]]))
    gate = Gate(books.app.poll_deps.http, "costs")
    zombie = beside(books, gate)
    outcomes: list[Outcome] = []

    async def haunt() -> None:
        outcomes.append(await zombie.app.run_job(job))

    async with anyio.create_task_group() as group:
        group.start_soon(haunt)
        await gate.reached.wait()
        await books.db.execute("update worker set seen_at = now() - interval '1 minute'")
        rescued = await books.app.jobs.rescue()
        assert rescued.ready == [job.id]
        rows = await books.count("usage_row")
        gate.opened.set()
    assert outcomes == [Completed(is_settled=True, note="lease lost")]
    assert (await books.count("usage_row"), await books.count("batch_summary")) == (rows, 0)
    await books.run_queue()
    await books.assert_equal()


async def test_a_batch_that_keeps_losing_its_worker_is_split(books: Books) -> None:
    """Schedule 10: what kills a worker kills it alone the third time. No connection stays open, no tick unfinished."""
    for n in range(3):
        await books.add(f"o{n}")
    made = await books.app.tick(None, wait=False)
    assert (made.created, made.batches) == (True, 1)
    worker = await books.app.jobs.register_worker("test")
    (job,) = (await books.app.jobs.claim(worker, 10)).jobs
    assert await books.app.run_job(replace(job, losses=2)) == Completed(is_settled=True)
    open_jobs = {row["id"]: row["open_job"] for row in await books.db.fetch("select id, open_job from connection")}
    alone = await books.db.fetch("select id, body from job")
    assert {decode(row["body"], type=PollOrder).connections[0]: row["id"] for row in alone} == open_jobs
    await books.run_queue()
    assert not await books.db.fetchval("select count(*) from connection where open_job is not null")
    assert not await ticks.open_batches(books.db, made.slot)
    await books.assert_equal()


async def test_a_crash_of_the_poller_costs_its_source_alone(books: Books) -> None:
    class Broken:
        async def get(self, *args: object, **more: object) -> Answer:
            if "embeddings" in str(args[1]):
                raise ZeroDivisionError("a bug")
            return await books.app.poll_deps.http.get(*args, **more)  # type: ignore[arg-type]

    await books.add("main")
    await books.add("other", "anthropic")
    summary = await beside(books, Broken()).poll()
    assert summary.dead == 1
    await books.assert_equal(but=["embeddings"])
    await books.poll()
    await books.assert_equal()


async def test_the_database_going_away_in_a_batch_costs_time_alone(books: Books) -> None:
    """Every connection to Postgres is cut in the middle of the reading; the job is done all the same, or again."""
    for n in range(3):
        await books.add(f"o{n}", requests_per_hour=8)
    (job,) = await lease(books, PollOrder([*books.ids.values()], mode=Mode.POLL))
    gate = Gate(books.app.poll_deps.http, "costs")
    async with anyio.create_task_group() as group:
        group.start_soon(beside(books, gate).app.run_job, job)
        await gate.reached.wait()
        await books.db.execute(
            """select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and pid <> pg_backend_pid()"""
        )
        gate.opened.set()
    await books.run_queue()
    await books.poll()
    await books.assert_equal()


async def test_what_runs_out_of_time_goes_on_alone(books: Books) -> None:
    """A connection that hangs leaves the batch at 80 % of its time; the others are settled with it."""
    await books.add("hangs")
    await books.add("well")

    class Hanging:
        async def get(self, *args: object, **more: object) -> Answer:
            if "hangs" in str(args[3]) and "embeddings" in str(args[1]):
                await anyio.sleep_forever()
            return await books.app.poll_deps.http.get(*args, **more)  # type: ignore[arg-type]

    worker = await books.app.jobs.register_worker("test")
    order = PollOrder([*books.ids.values()], mode=Mode.POLL)
    (job,) = await books.app.jobs.enqueue_leased([NewJob(POLL, order.encode(), timeout_s=1.5)], worker)
    assert await beside(books, Hanging()).app.run_job(job) == Completed(is_settled=True)
    await books.assert_equal("well")
    assert await books.db.fetchval("select count(*) from due") > 0
    await books.run_queue()
    await books.assert_equal()


async def test_an_unexpected_kind_of_job_is_kept_for_a_person(books: Books) -> None:
    worker = await books.app.jobs.register_worker("test")
    (job,) = await books.app.jobs.enqueue_leased([NewJob("of_tomorrow")], worker)
    assert "of_tomorrow" in (await books.app.run_job(job)).reason  # type: ignore[union-attr]


async def test_a_batch_of_a_connection_that_is_gone_is_done(books: Books) -> None:
    await books.add("main")
    await books.app.connections.pause("acme", "main")
    (job,) = await lease(books, PollOrder([books.ids["main"], 999_999], mode=Mode.POLL))
    assert await books.app.run_job(job) == Completed(is_settled=True)
    assert not await books.count("usage_row")
    await assert_laws(books.db)


async def test_transient_error_is_ours(books: Books) -> None:
    """The gate and its kin above raise nothing of their own: the real client maps what it meets."""
    await books.add("main")
    await books.fault("main", "500", count=3)
    with pytest.raises(UpstreamUnavailableError):
        await books.app.http.get(
            books.sim.base_url("openai"),
            "/organization/costs",
            (("start_time", "1"),),
            {"authorization": "Bearer sk-admin-main"},
        )


# ── In turn ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_poll_in_turn_waits_until_nobody_else_polls_the_same(books: Books) -> None:
    """Else orders that come faster than a collection is read would bar each other for ever."""
    main = await books.add("main", requests_per_hour=2)
    other = await books.add("other", requests_per_hour=2)
    await books.db.execute("update connection set open_job = 4711 where id = $1", other)
    for ids in ([other], [main, other]):
        (job,) = await lease(books, PollOrder(ids, mode=Mode.POLL, in_turn=True))
        assert isinstance(await books.app.run_job(job), Snoozed)
    assert await books.db.fetchval("select open_job from connection where id = $1", main) is None
    (job,) = await lease(books, PollOrder([main], mode=Mode.POLL, in_turn=True))
    assert isinstance(await books.app.run_job(job), Completed)
    assert await books.db.fetchval("select open_job from connection where id = $1", main) is None
    await books.db.execute("update connection set open_job = null")
    (job,) = await lease(books, PollOrder([main, other], mode=Mode.POLL, in_turn=True))
    assert isinstance(await books.app.run_job(job), Completed)
    await books.assert_equal()
