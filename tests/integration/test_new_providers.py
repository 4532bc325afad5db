"""OpenRouter and LiteLLM through a whole poll: what is booked equals the truth, whatever breaks on the way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from daemon.app import NewConnection
from daemon.domain.connection import Secret
from daemon.domain.window import parse_rfc3339, rfc3339
from daemon.simulator.faults import ALL_TRANSIENT
from tests.books_kit import METRICS, Books, midnight, open_books, simulator_here
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

KEYS = {"openrouter": "sk-or-v1-", "litellm": "sk-"}
BASES = {"openrouter": "/api/v1", "litellm": "/litellm"}

BOTH = pytest.mark.parametrize("provider", ["openrouter", "litellm"])
HISTORY_DAYS = 3
FAULTS = (*ALL_TRANSIENT, "408")

Key = tuple[datetime, tuple[tuple[str, str | None], ...]]
Numbers = tuple[Decimal, ...]

_STREAMS = """
select s.id, s.source, s.covered_from, (select json_agg(e.group_by order by e.start_at) from grain_epoch e
  where e.stream_id = s.id)::text as group_by
from stream s join connection c on c.id = s.connection_id where c.id = $1 and s.source <> 'names' order by s.id
"""
_BOOKED = f"""
select r.bucket_start, r.dims, {", ".join(f"coalesce(sum(l.{metric}), 0)::numeric as {metric}" for metric in METRICS)}
from usage_row r join ledger l using (stream_id, bucket_start, row_key)
where r.stream_id = $1 group by r.bucket_start, r.row_key, r.dims
"""


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


def key_of(books: Books, name: str) -> str:
    return KEYS[books.providers[name]] + name


async def add(books: Books, provider: str, name: str = "main", **profile: Any) -> None:
    """A connection whose organisation only moves when the test says so."""
    shape = {"live": False, "history_days": HISTORY_DAYS, "requests_per_hour": 8, **profile}
    key = KEYS[provider] + name
    await books.sim.control("POST", "orgs", {"provider": provider, "key": key, "profile": shape})
    books.providers[name] = provider
    new = NewConnection(
        "acme", name, provider, books.sim.url + BASES[provider], Secret(key), midnight(HISTORY_DAYS), None
    )
    books.ids[name] = (await books.app.connections.add(new)).id


async def play(books: Books, action: str, name: str = "main", **more: Any) -> Mapping[str, Any]:
    asked = {"provider": books.providers[name], "key": key_of(books, name), "action": action, **more}
    told: Mapping[str, Any] = await books.sim.control("POST", "scenario", asked)
    return told


async def fault(books: Books, kind: str, name: str = "main", **more: Any) -> None:
    asked = {"kind": kind, "provider": books.providers[name], "key": key_of(books, name), **more}
    await books.sim.control("POST", "faults/next", asked)


async def assert_equal(books: Books, name: str = "main") -> dict[str, Numbers]:
    """Every bucket and row of the ledger is the truth's, and the other way round. Returns the sums by source."""
    await assert_laws(books.db)
    provider = books.providers[name]
    sums: dict[str, Numbers] = {}
    streams = await books.db.fetch(_STREAMS, books.ids[name])
    assert {stream["source"] for stream in streams} == set(SOURCES[provider])
    for stream in streams:
        source = stream["source"]
        (group_by,) = msgspec.json.decode(stream["group_by"], type=list[list[str]])
        truth = await true_rows(books, name, source, group_by)
        booked = await booked_rows(books, stream["id"], is_cost=SOURCES[provider][source])
        wrong = [
            f"{source} {key}: booked {booked.get(key)}, true {truth.get(key)}"
            for key in booked.keys() | truth.keys()
            if booked.get(key) != truth.get(key)
        ]
        assert not wrong, f"{len(wrong)} differences: " + "\n".join(wrong[:6])
        sums[source] = tuple(sum(column) for column in zip(*truth.values(), strict=True))
    return sums


SOURCES = {"openrouter": {"activity": False, "costs": True}, "litellm": {"logs": False, "activity": True}}
"""The reports of each, and whether they are of money."""


async def true_rows(books: Books, name: str, source: str, group_by: list[str]) -> dict[Key, Numbers]:
    answer = await books.sim.control(
        "GET", "truth", provider=books.providers[name], key=key_of(books, name), source=source,
        since=rfc3339(midnight(HISTORY_DAYS)), until=rfc3339(_end(books.providers[name])), group_by=group_by,
    )  # fmt: skip
    rows: dict[Key, Numbers] = {}
    for row in answer["sources"][source]:
        numbers = tuple(Decimal(row[metric] or 0) for metric in METRICS)
        if any(numbers):
            rows[parse_rfc3339(row["bucket_start"]), tuple(sorted(row["dims"].items()))] = numbers
    return rows


def _end(provider: str) -> datetime:
    """OpenRouter says nothing of a day before it is over."""
    return midnight() + timedelta(days=0 if provider == "openrouter" else 1)


async def booked_rows(books: Books, stream_id: int, *, is_cost: bool) -> dict[Key, Numbers]:
    rows: dict[Key, Numbers] = {}
    for row in await books.db.fetch(_BOOKED, stream_id):
        dims = msgspec.json.decode(row["dims"], type=dict[str, str | None])
        dims.pop("currency", None)
        # Of usage, money is our own estimate, which is not the provider's to confirm.
        numbers = tuple(row[metric] if is_cost or metric != "amount" else Decimal(0) for metric in METRICS)
        if any(numbers):
            rows[row["bucket_start"], tuple(sorted(dims.items()))] = numbers
    return rows


@BOTH
@pytest.mark.parametrize("attempt", range(2))
async def test_books_equal_truth_through_a_rain_of_faults(books: Books, provider: str, attempt: int) -> None:
    """A fifth of all answers breaks, in another order each time. What a job could not mend waits in the retry queue."""
    await add(books, provider, page_rows_max=100)
    rain = {"rate": 0.2, "kinds": list(FAULTS), "seed": attempt, "retry_after_s": 0, "hold_s": 0.6, "drip_s": 0.001}
    await books.sim.control("POST", "faults", rain)
    for _ in range(3):
        await books.poll(full=True)
        await books.forget_pauses()
    served = (await books.sim.control("GET", "stats"))["faults"]
    assert sum(served.values()) > 0
    await books.sim.control("DELETE", "faults")
    await books.forget_pauses()
    await books.run_queue()
    await books.poll(full=True)
    sums = await assert_equal(books)
    assert all(any(numbers) for numbers in sums.values())
    again = await books.poll(full=True)
    assert (again.rows, again.stored, again.restated) == (0, 0, 0)
    assert await assert_equal(books) == sums


@BOTH
async def test_one_transient_fault_is_ridden_out_within_the_job(books: Books, provider: str) -> None:
    await add(books, provider)
    for kind in FAULTS:
        await fault(books, kind, retry_after_s=0, hold_s=0.6, drip_s=0.001)
        summary = await books.poll(full=True)
        assert (summary.retried, summary.dead) == (0, 0), kind
    assert set((await books.sim.control("GET", "stats"))["faults"]) == set(FAULTS)
    await assert_equal(books)


@BOTH
@pytest.mark.parametrize(("status", "state"), [("401", "parked"), ("403", "active")])
async def test_a_refusal_waits_for_a_person(books: Books, provider: str, status: str, state: str) -> None:
    """A key that is no good parks the connection; a right that is missing parks the source alone."""
    await add(books, provider)
    await fault(books, status, count=1000)
    await books.poll()
    assert await books.state("main") == state
    assert not await books.count("usage_row")


CORRECTIONS = (
    "late_arrival", "correction_up", "correction_down", "vanish_row", "relabel_model", "equal_amounts",
    "new_enum_value", "unpriced_model", "negative_credit", "hostile_text",
)  # fmt: skip


@pytest.mark.parametrize("action", CORRECTIONS)
async def test_a_full_poll_follows_the_provider_there_and_back(books: Books, action: str) -> None:
    """A→B→A: the third state is no duplicate of the first."""
    before = {}
    for provider in SOURCES:
        await add(books, provider, provider)
    await books.poll()
    for provider in SOURCES:
        before[provider] = await assert_equal(books, provider)
        edit = await play(books, action, provider)
        assert edit["before"] or edit["after"], "the scenario changed nothing"
    assert (await books.poll(full=True)).rows
    for provider in SOURCES:
        if action != "hostile_text":  # what no text column takes is stored in another spelling
            after = await assert_equal(books, provider)
            assert (after == before[provider]) == (action == "relabel_model")
        await play(books, "restore", provider)
    assert (await books.poll(full=True)).rows
    for provider in SOURCES:
        assert await assert_equal(books, provider) == before[provider]


async def test_the_same_log_twice_is_one_request(books: Books) -> None:
    """Pages are cut by number: a log that is written meanwhile pushes another one to the next page, where it is again."""
    await add(books, "litellm")
    await play(books, "duplicate_rows")
    await books.poll()
    await assert_equal(books)


async def test_logs_that_are_written_while_they_are_read_are_booked_by_the_next_poll(books: Books) -> None:
    await add(books, "litellm", requests_per_hour=40, page_rows_max=100)
    await fault(books, "grow_between_pages", requests=5, count=6, path_contains="/spend/logs")
    await books.poll()
    assert (await books.sim.control("GET", "stats"))["faults"]["grow_between_pages"] == 6
    await books.poll(full=True)
    await assert_equal(books)


async def test_what_came_late_to_a_closed_day_of_openrouter_is_booked(books: Books) -> None:
    """Its days are restated for a day or two."""
    await add(books, "openrouter", late_s=30 * 3600, reveal_now=False, live=True, requests_per_hour=4)
    await books.poll()
    first = await assert_equal(books)
    yesterday = rfc3339(midnight(1))
    await play(books, "late_arrival", bucket=yesterday)
    await books.poll(full=True)
    assert (await assert_equal(books))["costs"] != first["costs"]


@BOTH
async def test_two_accounts_are_kept_apart(books: Books, provider: str) -> None:
    await add(books, provider, "one")
    await add(books, provider, "two")
    await books.poll()
    assert await assert_equal(books, "one") != await assert_equal(books, "two")
