"""`tick` and `poll` run by a person or by cron, where no daemon may be there to help."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import anyio
import pytest

from daemon.domain.errors import ConfigError
from daemon.domain.job import Completed, Discarded, Job, Settlement
from daemon.worker.poll import POLL_ONE
from tests.books_kit import Books, midnight, open_books, simulator_here

pytestmark = pytest.mark.anyio


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


async def claim_one(books: Books) -> Job:
    (job,) = (await books.app.jobs.claim(await books.app.jobs.register_worker("test"), 10)).jobs
    return job


# ── Waiting for a tick that another process made ────────────────────────────────────────────────


async def test_dead_batch_is_not_waited_for(books: Books) -> None:
    """It writes no summary, so that summaries alone would leave its tick open for ever."""
    await books.add("main")
    report = await books.app.tick(None, wait=False)
    job = await claim_one(books)
    await books.app.jobs.settle([Settlement(job, Discarded("died"), 1)])
    with anyio.fail_after(5):
        assert not (await books.app.tick(report.slot, wait=True)).created


async def test_batch_that_runs_elsewhere_is_waited_for(books: Books) -> None:
    await books.add("main")
    report = await books.app.tick(None, wait=False)
    job = await claim_one(books)
    is_over = False

    async def wait() -> None:
        nonlocal is_over
        summary = (await books.app.tick(report.slot, wait=True)).summary
        assert summary is not None
        assert summary.connections == 1
        is_over = True

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        assert isinstance(await books.app.run_job(job), Completed)
    assert is_over
    await books.assert_equal()


async def test_slot_without_a_tick_is_not_waited_for(books: Books) -> None:
    report = await books.app.tick(None, wait=False)
    with anyio.fail_after(5):
        assert not (await books.app.tick(report.slot - timedelta(days=1), wait=True)).created


# ── Ticks from cron alone ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("silent_s", "is_rescued"), [(61, True), (30, False)])
async def test_tick_takes_over_what_a_killed_command_had_leased(books: Books, silent_s: int, is_rescued: bool) -> None:
    """Its connections are open, so that no later tick has them: without a daemon they would never be polled again."""
    await books.add("main")
    await books.app.tick(None, wait=False)
    job = await claim_one(books)
    await books.db.execute("update worker set seen_at = now() - make_interval(secs => $1)", float(silent_s))
    assert (await books.tick()).connections == 0, "a batch has it open"
    assert bool(await books.db.fetchval("select count(*) from lease where id = $1", job.id)) is not is_rescued
    if is_rescued:
        await books.assert_equal()
        assert (await books.tick()).connections == 1


async def test_tick_runs_the_retries_that_have_become_due(books: Books) -> None:
    """A source that waits for its retry is left out by ticks."""
    await books.add("main")
    await books.fault("main", "500", count=3, path_contains="/usage/completions")
    assert (await books.tick()).retried == 1
    await books.forget_pauses()
    await books.tick()
    assert await books.db.fetchval("select kind from job") == POLL_ONE, "it is not due yet"
    await books.db.execute("update due set run_at = now()")
    await books.tick()
    assert not await books.count("job")
    await books.assert_equal()


async def test_tick_runs_a_backfill_that_waits(books: Books) -> None:
    await books.add("main", since=midnight(3), history_days=3)
    report = await books.app.backfill([books.ids["main"]], midnight(3), midnight(2), dry_run=False)
    assert report.jobs == 1
    await books.tick()
    assert not await books.count("job")


# ── A copy of the database that lost its sequence ───────────────────────────────────────────────


async def test_polls_behind_a_lost_sequence_are_refused_until_it_is_mended(books: Books) -> None:
    """Every answer would look old: each poll would book nothing and end content."""
    await books.add("main")
    await books.poll()
    await books.sim.grow("openai", "main", 20)
    await books.db.execute("select setval('poll_seq', 1, false)")
    # A bucket may be newer than its stream: an attempt that failed half-way has booked, and moved no fence.
    newest = await books.db.fetchval("select max(last_seq) + 5 from stream")
    await books.db.execute("update bucket set last_seq = $1 where ctid = (select min(ctid) from bucket)", newest)
    for refused in (books.poll, lambda: books.app.tick(None, wait=True), lambda: books.app.tick(None, wait=False)):
        with pytest.raises(ConfigError, match=r"poll_seq stands at 0, behind \d+.*tallyd doctor --fix"):
            await refused()
    assert not await books.count("tick")
    failed = [check for check in await books.app.doctor(reach=False) if not check.is_ok]
    assert [check.name for check in failed] == ["poll_seq ahead of every fence"]
    assert "tallyd doctor --fix" in failed[0].fix
    assert await books.app.mend() == [f"poll_seq now stands at {newest}"]
    assert await books.app.mend() == []
    assert (await books.poll()).rows
    await books.assert_equal()


async def test_a_database_that_was_never_polled_has_lost_nothing(books: Books) -> None:
    await books.add("main")
    assert await books.app.mend() == []
    assert (await books.poll()).rows
