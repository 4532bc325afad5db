"""Every way in which a provider changes its mind, and the books that follow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from daemon.domain.window import rfc3339
from tests.books_kit import Books, midnight, open_books, simulator_here

pytestmark = pytest.mark.anyio

ACTIONS: dict[str, dict[str, Any]] = {
    "late_arrival": {},
    "correction_up": {},
    "correction_down": {},
    "vanish_row": {},
    "vanish_bucket": {},
    "relabel_model": {},
    "equal_amounts": {},
    "new_enum_value": {},
    "unpriced_model": {},
    "attribute": {},
    "negative_credit": {},
}
WIRES = ("duplicate_rows", "unknown_fields", "clamp_limit", "refuse_future_end")
BOTH = pytest.mark.parametrize("provider", ["openai", "anthropic"])


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


def hours_ago(hours: int) -> datetime:
    return datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours)


@BOTH
@pytest.mark.parametrize("action", ACTIONS)
async def test_a_full_poll_follows_the_provider_there_and_back(books: Books, provider: str, action: str) -> None:
    """A→B→A: the third state is no duplicate of the first."""
    await books.add("main", provider, requests_per_hour=8, history_days=2, since=midnight(2))
    await books.poll()
    before = await books.assert_equal()
    edit = await books.play("main", action, **ACTIONS[action])
    assert edit["before"] or edit["after"], "the scenario changed nothing"
    assert (await books.poll(full=True)).rows
    await books.assert_equal()
    await books.play("main", "restore")
    assert (await books.poll(full=True)).rows
    assert await books.assert_equal() == before
    assert not (await books.poll(full=True)).rows


@BOTH
@pytest.mark.parametrize("action", ["late_arrival", "correction_up", "correction_down", "equal_amounts"])
async def test_an_ordinary_poll_follows_within_the_young_hours(books: Books, provider: str, action: str) -> None:
    await books.add("main", provider, requests_per_hour=8)
    await books.poll()
    await books.play("main", action, bucket=rfc3339(hours_ago(2)))
    assert (await books.poll()).rows
    await books.assert_equal()


@BOTH
async def test_the_ladder_reaches_older_hours_in_its_own_time(books: Books, provider: str) -> None:
    await books.add("main", provider, requests_per_hour=8, history_days=6, since=midnight(6))
    await books.poll()
    source = "completions" if provider == "openai" else "messages"
    for hours, wait in ((20, timedelta(hours=1)), (100, timedelta(days=1))):
        await books.play("main", "correction_up", bucket=rfc3339(hours_ago(hours)))
        await books.poll()
        with pytest.raises(AssertionError, match=source):
            await books.assert_equal()
        await books.age(wait)
        # Aging moves the mark of what is covered too; the ladder alone has to reach it.
        await books.db.execute("update stream set covered_to = now() - interval '1 minute'")
        await books.poll()
        await books.assert_equal()


@BOTH
async def test_a_vanished_row_needs_a_witness_and_a_probe_is_one(books: Books, provider: str) -> None:
    await books.add("main", provider, requests_per_hour=30)
    await books.poll()
    edit = await books.play("main", "vanish_row", bucket=rfc3339(hours_ago(1)))
    assert edit["before"]
    await books.poll()
    await books.assert_equal(but=["costs", "cost"])


async def test_a_row_vanished_from_a_report_without_probe_waits_for_a_second_look(books: Books) -> None:
    await books.add("main", requests_per_hour=60, sources=["embeddings"])
    await books.poll()
    await books.play("main", "vanish_row", source="embeddings", bucket=rfc3339(hours_ago(1)))
    for _ in range(3):
        await books.poll()
        assert await books.db.fetchval("select count(*) from bucket where pending_since is not null")
    await books.age(timedelta(minutes=11))
    await books.poll()
    await books.assert_equal()
    assert not await books.db.fetchval("select count(*) from bucket where pending_since is not null")


async def test_a_bucket_that_drops_to_empty_and_comes_back_was_never_touched(books: Books) -> None:
    """The provider's bad moment: both reads agree on nothing, and nothing is what they are worth."""
    await books.add("main", requests_per_hour=20)
    await books.poll()
    rows = await books.count("ledger")
    await books.play("main", "vanish_bucket", bucket=rfc3339(hours_ago(1)))
    await books.poll()
    assert await books.count("ledger") == rows + await books.db.fetchval(
        "select count(*) from ledger l join stream s on s.id = l.stream_id where s.source = 'costs' and kind > 1"
    )
    await books.play("main", "restore")
    await books.poll()
    await books.assert_equal(but=["costs"])
    await books.age(timedelta(minutes=11))
    await books.poll()
    await books.assert_equal()


@BOTH
@pytest.mark.parametrize("wire", WIRES)
async def test_an_odd_wire_format_changes_no_number(books: Books, provider: str, wire: str) -> None:
    await books.add("main", provider, requests_per_hour=6)
    await books.poll()
    await books.play("main", wire)
    await books.poll(full=True)
    await books.assert_equal()


@BOTH
async def test_fields_that_go_missing_come_back_as_they_were(books: Books, provider: str) -> None:
    """A dimension that is left out is null, so the rows move to other keys; sums that do not need it stay."""
    await books.add("main", provider, requests_per_hour=6)
    await books.poll()
    before = await books.assert_equal()
    await books.play("main", "missing_optional_fields")
    assert (await books.poll(full=True)).dead == 0
    await books.play("main", "missing_optional_fields", enabled=False)
    await books.poll(full=True)
    assert await books.assert_equal() == before


@pytest.mark.parametrize("spelling", ["string", "exponent", "number"])
async def test_money_is_the_same_however_it_is_spelled(books: Books, spelling: str) -> None:
    await books.add("main", requests_per_hour=6)
    await books.poll()
    await books.play("main", "money_format", format=spelling)
    assert (await books.poll(full=True)).rows == 0
    await books.assert_equal()


@BOTH
async def test_growth_is_booked_as_it_comes(books: Books, provider: str) -> None:
    await books.add("main", provider)
    await books.poll()
    for _ in range(5):
        await books.sim.grow(provider, "main", 5)
        assert (await books.poll()).rows
        await books.assert_equal()


async def test_growth_between_two_pages_is_booked_by_the_next_poll(books: Books) -> None:
    await books.add("main", "anthropic", row_cap=40, requests_per_hour=3, models=["claude-haiku-4-5-20251001"], keys=1)
    await books.fault("main", "grow_between_pages", count=2)
    await books.poll()
    await books.poll()
    await books.assert_equal()
