"""The gateways through the whole road: poll, book, compare with what really happened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from daemon.app import NewConnection
from daemon.domain.connection import Secret
from daemon.domain.window import rfc3339
from tests.books_kit import Books, midnight, open_books, simulator_here
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

KEYS = {"openrouter": "sk-or-v1-books", "litellm": "sk-books"}
PATHS = {"openrouter": "/api/v1", "litellm": "/litellm"}
SOURCES = {"openrouter": ("activity", "costs"), "litellm": ("logs", "activity")}
GATEWAYS = pytest.mark.parametrize("provider", KEYS)
COUNTS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests", "amount")
COSTS = {("openrouter", "costs"), ("litellm", "activity")}


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim, http_read_timeout_s=10) as opened:
        yield opened


async def add(books: Books, provider: str, **profile: Any) -> None:
    asked = {"live": False, "history_days": 3, "requests_per_hour": 8, **profile}
    await books.sim.control("POST", "orgs", {"provider": provider, "key": KEYS[provider], "profile": asked})
    url = books.sim.url + PATHS[provider]
    new = NewConnection("acme", provider, provider, url, Secret(KEYS[provider]), midnight(3), None)
    books.ids[provider] = (await books.app.connections.add(new)).id


async def booked(books: Books, provider: str) -> dict[tuple[str, datetime], tuple[Decimal, ...]]:
    """Sums by bucket. Of usage, money is our estimate; of costs, there is only money."""
    sums = ", ".join(f"coalesce(sum({name}), 0)::numeric as {name}" for name in COUNTS)
    rows = await books.db.fetch(
        f"select s.source, r.bucket_start, {sums} from usage_row r join stream s on s.id = r.stream_id "
        "where s.connection_id = $1 and not r.is_tombstone group by 1, 2",
        books.ids[provider],
    )
    return {(row["source"], row["bucket_start"]): _comparable(provider, row["source"], row) for row in rows}


def _comparable(provider: str, source: str, row: Mapping[str, Any]) -> tuple[Decimal, ...]:
    numbers = tuple(Decimal(row[name] or 0) for name in COUNTS)
    return numbers[-1:] if (provider, source) in COSTS else numbers[:-1]


async def true(books: Books, provider: str) -> dict[tuple[str, datetime], tuple[Decimal, ...]]:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    until = {"until": rfc3339(today)} if provider == "openrouter" else {}  # it reports completed days
    found = {}
    for source in SOURCES[provider]:
        told = await books.sim.control(
            "GET", "truth", provider=provider, key=KEYS[provider], source=source, since=rfc3339(midnight(3)),
            group_by="", **until,
        )  # fmt: skip
        for row in told["sources"][source]:
            start = datetime.fromisoformat(row["bucket_start"])
            found[source, start] = _comparable(provider, source, row)
    return found


@GATEWAYS
async def test_every_report_equals_its_truth_and_a_second_poll_changes_nothing(books: Books, provider: str) -> None:
    await add(books, provider)
    first = await books.poll()
    assert (first.connections, first.retried, first.dead) == (1, 0, 0)
    truth = await true(books, provider)
    assert {source for source, _ in truth} == set(SOURCES[provider])
    assert await booked(books, provider) == truth
    again = await books.poll()
    assert (again.rows, again.restated, again.dead) == (0, 0, 0)
    await assert_laws(books.db)


@GATEWAYS
async def test_what_comes_late_is_booked_once(books: Books, provider: str) -> None:
    await add(books, provider)
    await books.poll()
    late = midnight(1) + timedelta(hours=12) if provider == "openrouter" else datetime.now(UTC) - timedelta(hours=1)
    late = late.replace(minute=0, second=0, microsecond=0)
    action = {"provider": provider, "key": KEYS[provider], "action": "late_arrival", "bucket": rfc3339(late)}
    await books.sim.control("POST", "scenario", action)
    for _ in range(2):
        await books.poll(full=True)
        assert await booked(books, provider) == await true(books, provider)
    await assert_laws(books.db)


async def test_log_count_spares_the_logs_of_an_idle_proxy(books: Books) -> None:
    await add(books, "litellm")
    await books.tick()
    await books.tick()  # the probe learns of the window that the first read left
    await books.sim.control("DELETE", "stats")
    summary = await books.tick()
    assert (summary.unchanged, summary.rows) == (1, 0)
    stats = await books.sim.control("GET", "stats")
    assert sum(stats["statuses"].values()) == 1


@GATEWAYS
async def test_names_are_booked_beside_the_reports(books: Books, provider: str) -> None:
    await add(books, provider)
    await books.poll()
    kinds = {row["kind"] for row in await books.db.fetch("select distinct kind from name where until is null")}
    assert kinds == {"openrouter": {"workspace", "api_key"}, "litellm": {"api_key", "user", "team"}}[provider]
