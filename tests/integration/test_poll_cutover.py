"""Cutting a source anew: another generation of an API, other dimensions; each bucket is owned by one grain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from daemon.domain.errors import UsageError
from daemon.domain.window import rfc3339
from tests.books_kit import Books, midnight, open_books, simulator_here

pytestmark = pytest.mark.anyio
HOUR = timedelta(hours=1)


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


async def time_passes_until_the_cut(books: Books, hours: int) -> None:
    """The new grain begins `hours` ago instead of at the next boundary: tests do not wait for a full hour."""
    moved = await books.db.fetchval(
        """with moved as (update grain_epoch e set start_at = $1 from stream s
             where s.id = e.stream_id and e.start_at > now() and e.width = '1h' returning 1)
           select count(*) from moved""",
        datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - hours * HOUR,
    )
    assert moved


async def provider_lags(books: Books, hours: int) -> None:
    at = datetime.now(UTC).replace(minute=30, second=0, microsecond=0) - hours * HOUR
    await books.sim.control("POST", "freeze", {"now": rfc3339(at), "frozen": True})


async def provider_catches_up(books: Books) -> None:
    await books.sim.control("POST", "freeze", {"now": rfc3339(datetime.now(UTC)), "frozen": True})


@pytest.mark.parametrize(
    ("provider", "old", "new"),
    [
        ("anthropic", {}, {"api": "analytics"}),
        ("anthropic", {"api": "analytics"}, {"api": "reports"}),
        ("openai", {}, {"group_by": {"completions": ["model"]}}),
        ("openai", {"group_by": {"completions": ["project_id"]}}, {}),
    ],
)
async def test_a_new_grain_takes_over_at_a_boundary_without_doubling(
    books: Books, provider: str, old: dict[str, object], new: dict[str, object]
) -> None:
    await provider_lags(books, 2)
    await books.add("main", provider, settings=old, since=midnight(2), history_days=2, requests_per_hour=12, live=True)
    await books.poll()
    await books.assert_equal(by_dims=False)
    await books.app.regroup("acme", "main", new)
    await books.poll()
    await books.assert_equal(by_dims=False)
    await time_passes_until_the_cut(books, 1)
    await provider_catches_up(books)
    assert (await books.poll()).rows
    await books.assert_equal(by_dims=False)
    assert (await books.poll(full=True)).dead == 0
    await books.assert_equal(by_dims=False)
    source = "completions" if provider == "openai" else "messages"
    grains = await books.db.fetch(
        "select distinct r.bucket_start, r.dims ?& e.group_by as is_of_new from usage_row r join stream s"
        " on s.id = r.stream_id join grain_epoch e on e.stream_id = s.id and e.start_at > 'epoch'"
        " where s.source = $1 and not r.is_tombstone",
        source,
    )
    assert grains
    by_bucket = [row["bucket_start"] for row in grains]
    assert len(by_bucket) == len(set(by_bucket)), "a bucket holds rows of one grain"


async def test_corrections_before_the_cut_are_read_in_the_old_grain(books: Books) -> None:
    await provider_lags(books, 2)
    await books.add("main", requests_per_hour=12, live=True)
    await books.poll()
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await time_passes_until_the_cut(books, 1)
    await provider_catches_up(books)
    await books.poll()
    for hours in (1, 3, 2):
        bucket = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - hours * HOUR
        await books.play("main", "correction_up", bucket=rfc3339(bucket))
        await books.poll()
        await books.assert_equal(by_dims=False)
    await books.assert_equal()


async def test_the_same_settings_cut_nothing_and_a_second_change_must_wait(books: Books) -> None:
    await books.add("main")
    await books.poll()
    await books.app.regroup("acme", "main", {})
    assert await books.db.fetchval("select count(*) from grain_epoch where start_at > 'epoch'") == 0
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["model"]}})
    await books.app.regroup("acme", "main", {"group_by": {"completions": ["project_id"]}})
    assert await books.db.fetchval("select count(*) from grain_epoch where start_at > 'epoch'") == 1
    with pytest.raises(UsageError, match="no dimension"):
        await books.app.regroup("acme", "main", {"group_by": {"completions": ["colour"]}})
    await books.poll()
    await books.assert_equal()
