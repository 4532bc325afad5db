"""Quota counters against the ledger: what stands apart, and what a write-back sets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.app import App, NewConnection
from daemon.by_hand import quota_drift, quota_write_back
from daemon.domain.connection import Secret
from daemon.domain.errors import PermanentError, UpstreamUnavailableError
from daemon.domain.window import Window
from daemon.worker.quota import Measure, compare, period_window, settable, write_back
from tests.books_kit import Books, open_books, simulator_here
from tests.ledger_kit import Account, assert_laws, make_account, row
from tests.valkey_kit import open_valkey

pytestmark = pytest.mark.anyio

MONTH = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


class Quota:
    """A source on a Valkey of its own, in an app whose ledger the test books by hand."""

    def __init__(self, books: Books, redis: Redis, url: str) -> None:
        self.books = books
        self.redis = redis
        self.url = url

    @property
    def app(self) -> App:
        return self.books.app

    async def add(self, pattern: str = "quota:{user}", **settings: Any) -> None:
        given = {"pattern": pattern, "every_s": 3600, "measure": "total_tokens", "dimension": "project_id", **settings}
        self.app.pollers.named("redis_quota").check_settings(given)
        new = NewConnection("acme", "q", "redis_quota", self.url, Secret(""), settings=given)
        self.books.ids["q"] = (await self.app.connections.add(new)).id

    async def sync(self) -> None:
        summary = await self.app.poll([self.books.ids["q"]], full=False)
        assert (summary.retried, summary.dead) == (0, 0), summary

    async def drift(self) -> dict[str, tuple[Decimal, Decimal | None]]:
        return {d.key: (d.counted, d.booked) async for d in quota_drift(self.app, "acme", "q")}

    async def values(self) -> dict[str, str]:
        keys = sorted(await self.redis.keys("quota:*"))
        return {key.decode(): value.decode() for key, value in zip(keys, await self.redis.mget(keys), strict=True)}


@pytest.fixture
def valkey() -> Iterator[str]:
    with open_valkey() as server:
        yield server.url


@pytest.fixture
async def quota(database_url: str, valkey: str) -> AsyncIterator[Quota]:
    redis = Redis.from_url(valkey)
    async with simulator_here() as sim, open_books(database_url, sim) as books:
        yield Quota(books, redis, valkey)
    await redis.aclose()


async def book(quota: Quota, tokens: dict[str, int]) -> Account:
    account = await make_account(quota.app.db)
    await account.read({MONTH: tuple(row("m1", user, tokens=count) for user, count in tokens.items())})
    return account


async def test_drift_is_counter_less_ledger(quota: Quota) -> None:
    await book(quota, {"ann": 100, "bob": 50})
    await quota.redis.mset({"quota:ann": 130, "quota:bob": 50, "quota:eve": 7})
    await quota.add()
    await quota.sync()
    assert await quota.drift() == {"quota:ann": (130, 100), "quota:bob": (50, 50), "quota:eve": (7, None)}


async def test_what_a_period_names_is_compared_with_that_period(quota: Quota) -> None:
    before = (MONTH - timedelta(days=1)).replace(hour=0)
    account = await book(quota, {"ann": 100})
    await account.read({before: (row("m1", "ann", tokens=30),)})
    await quota.redis.mset({f"quota:ann:{MONTH:%Y-%m}": 100, f"quota:ann:{before:%Y-%m}": 31, "quota:ann:ever": 5})
    await quota.add("quota:{user}:{period}")
    await quota.sync()
    assert await quota.drift() == {
        f"quota:ann:{MONTH:%Y-%m}": (100, 100),
        f"quota:ann:{before:%Y-%m}": (31, 30),
    }


async def test_a_period_that_has_not_begun_is_not_asked_for(quota: Quota) -> None:
    """Whoever may write keys chooses what stands there: a report for each of a million days would never end."""
    await quota.redis.mset({f"quota:ann:{year}-01-01": 5 for year in range(MONTH.year + 1, MONTH.year + 20)})
    await quota.add("quota:{user}:{period}")
    await quota.sync()
    assert await quota.drift() == {}


async def test_what_was_counted_before_the_window_is_no_drift(quota: Quota) -> None:
    """A counter of last month that nobody reset, or whose key has expired, says nothing about this one."""
    await book(quota, {"bob": 50})
    await quota.redis.mset({"quota:ann": 70, "quota:bob": 60, "quota:eve": 7})
    await quota.add()
    await quota.sync()
    await quota.app.db.execute(
        "update quota set updated_at = $1 where user_name in ('ann', 'bob')", MONTH - timedelta(days=1)
    )
    assert await quota.drift() == {"quota:bob": (60, 50), "quota:eve": (7, None)}


async def test_a_unit_turns_the_ledger_s_figure_into_the_counter_s(quota: Quota) -> None:
    await book(quota, {"ann": 100_000})
    await quota.redis.set("quota:ann", 99)
    await quota.add(unit=1000)
    await quota.sync()
    assert await quota.drift() == {"quota:ann": (99, 100)}


async def test_without_a_measure_there_is_nothing_to_compare(quota: Quota) -> None:
    await quota.redis.set("quota:ann", 99)
    given = {"pattern": "quota:{user}", "every_s": 3600}
    new = NewConnection("acme", "q", "redis_quota", quota.url, Secret(""), settings=given)
    quota.books.ids["q"] = (await quota.app.connections.add(new)).id
    await quota.sync()
    with pytest.raises(PermanentError, match="measure"):
        await quota.drift()
    assert not await quota.books.count("ready")


async def test_a_sync_is_followed_by_a_comparison_that_is_noted(quota: Quota) -> None:
    await book(quota, {"ann": 100})
    await quota.redis.set("quota:ann", 130)
    await quota.add()
    await quota.sync()
    await quota.sync()
    assert await quota.books.count("ready") == 1  # one that waits is enough
    await quota.books.run_queue()
    noted = await quota.app.db.fetchrow("select counters, counted, booked, drift from quota_drift")
    assert tuple(noted or ()) == (1, 130, 100, 30)
    gauges = {gauge.name: gauge.values for gauge in await quota.app.figures.gauges()}
    assert gauges["tallyd_redis_counter_drift"] == [(("acme/q",), 30.0)]
    assert await quota.values() == {"quota:ann": "130"}


async def test_write_back_sets_and_never_adds(quota: Quota) -> None:
    await book(quota, {"ann": 100, "bob": 50, "gone": 3})
    await quota.redis.mset({"quota:ann": 130, "quota:bob": 50, "quota:eve": 7, "quota:gone": 9})
    await quota.redis.expire("quota:ann", 1_000)
    await quota.add(write_back=True)
    await quota.sync()
    await quota.redis.delete("quota:gone")
    for _ in range(2):
        await quota.books.run_queue()
        await quota.sync()
    assert await quota.values() == {"quota:ann": "100", "quota:bob": "50", "quota:eve": "7"}
    assert 0 < await quota.redis.ttl("quota:ann") <= 1_000
    used = {r["user_name"]: int(r["used"]) for r in await quota.app.db.fetch("select user_name, used from quota")}
    assert used == {"ann": 130, "bob": 50, "eve": 7, "gone": 9}
    await quota.redis.incrby("quota:ann", 4)
    await quota.sync()
    assert await quota.app.db.fetchval("select used from quota where user_name = 'ann'") == 134
    await assert_laws(quota.app.db)


async def test_a_write_back_that_is_refused_is_one_dead_letter_and_the_figure_is_noted(quota: Quota) -> None:
    await book(quota, {"ann": 100})
    await quota.redis.set("quota:ann", 130)
    await quota.add(write_back=True)
    await quota.redis.execute_command("ACL", "SETUSER", "default", "-set")
    for attempt in (1, 2):
        await quota.sync()
        await quota.books.run_queue()
        (letter,) = await quota.app.queue.dead_list()
        assert (letter.kind, letter.attempt, letter.connections) == ("quota_drift", attempt, (quota.books.ids["q"],))
    assert await quota.app.db.fetchval("select drift from quota_drift") == 30
    await quota.redis.execute_command("ACL", "SETUSER", "default", "+set")
    assert await quota.app.queue.dead_replay([letter.id]) == {letter.id}
    await quota.books.run_queue()
    assert await quota.values() == {"quota:ann": "100"}
    assert await quota.app.queue.dead_list() == []
    await quota.sync()
    await assert_laws(quota.app.db)


async def test_a_write_back_by_hand_counts_first_and_sets_then(quota: Quota) -> None:
    await book(quota, {"ann": 100})
    await quota.redis.set("quota:ann", 130)
    await quota.add()
    await quota.sync()
    assert await quota_write_back(quota.app, "acme", "q", dry_run=True) == (1, 0)
    assert await quota.values() == {"quota:ann": "130"}
    assert await quota_write_back(quota.app, "acme", "q", dry_run=False) == (1, 1)
    assert await quota.values() == {"quota:ann": "100"}
    assert await quota_write_back(quota.app, "acme", "q", dry_run=False) == (0, 0)


async def test_a_write_back_by_hand_counts_what_it_overwrites(quota: Quota) -> None:
    await book(quota, {"ann": 100})
    await quota.redis.set("quota:ann", 130)
    await quota.add()
    await quota.sync()
    await quota.redis.incrby("quota:ann", 40)
    assert await quota_write_back(quota.app, "acme", "q", dry_run=False) == (1, 1)
    assert await quota.app.db.fetchval("select used from quota") == 170


async def test_a_write_back_by_hand_sets_nothing_that_it_cannot_read(quota: Quota) -> None:
    await book(quota, {"ann": 100})
    await quota.redis.set("quota:ann", 130)
    await quota.add()
    await quota.sync()
    await quota.redis.execute_command("ACL", "SETUSER", "default", "-scan")
    with pytest.raises(UpstreamUnavailableError, match="acme/q"):
        await quota_write_back(quota.app, "acme", "q", dry_run=False)
    assert await quota.values() == {"quota:ann": "130"}


@pytest.mark.parametrize("is_set_first", [False, True])
async def test_a_sync_in_the_midst_of_a_write_back_counts_nothing_twice(quota: Quota, is_set_first: bool) -> None:
    await book(quota, {"ann": 100, "bob": 90})
    await quota.redis.mset({"quota:ann": 130, "quota:bob": 50})
    await quota.add()
    await quota.sync()
    poller = quota.app.pollers.named("redis_quota")

    class Interrupted:
        async def write(self, *call: Any) -> set[str]:
            if not is_set_first:
                await quota.sync()
            there: set[str] = await poller.write(*call)  # type: ignore[attr-defined]
            if is_set_first:
                await quota.sync()
            return there

    deps = quota.app.quota_deps
    deps = replace(deps, poll=replace(deps.poll, pollers={"redis_quota": Interrupted()}))  # type: ignore[dict-item]
    connection = await quota.app.connections.get("acme", "q")
    stream = await quota.app.quotas.stream_of(connection.id)
    assert stream is not None
    async for lines in compare(deps, connection, stream):
        assert await write_back(deps, connection, stream, lines) == 2
    assert await quota.values() == {"quota:ann": "100", "quota:bob": "90"}
    for key in ("quota:ann", "quota:bob"):
        await quota.redis.incrby(key, 4)
    await quota.sync()
    used = {r["user_name"]: int(r["used"]) for r in await quota.app.db.fetch("select user_name, used from quota")}
    assert used == {"ann": 134, "bob": 54}
    await assert_laws(quota.app.db)


# ── Pure ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "start", "days"),
    [
        ("2026-11", datetime(2026, 11, 1, tzinfo=UTC), 30),
        ("202612", datetime(2026, 12, 1, tzinfo=UTC), 31),
        ("2026-11-26", datetime(2026, 11, 26, tzinfo=UTC), 1),
        ("20240229", datetime(2024, 2, 29, tzinfo=UTC), 1),
        ("2024", datetime(2024, 1, 1, tzinfo=UTC), 366),
    ],
)
def test_periods(text: str, start: datetime, days: int) -> None:
    assert period_window(text) == Window(start, start + timedelta(days=days))


@pytest.mark.parametrize(
    "text", ["", "november", "2026-13", "2026-02-30", "0000", "2026-1", "٢٠٢٦", "20261", "9999-12"]
)
def test_what_is_no_period(text: str) -> None:
    assert period_window(text) is None


def test_measure_of_settings() -> None:
    assert Measure.of({"pattern": "quota:{user}"}) is None
    assert Measure.of({"measure": "amount", "dimension": "user_id", "unit": "0.01"}) == Measure(
        "amount", "user_id", Decimal("0.01"), "month"
    )


def test_a_whole_counter_is_set_to_a_whole_number() -> None:
    from daemon.worker.quota import Drift

    def value(counted: str, booked: str | None) -> Decimal | None:
        return settable(Drift("k", "u", "t", None, Decimal(counted), None if booked is None else Decimal(booked)))

    assert value("10", "9.6") is None
    assert value("10", "12.5") == 13
    assert value("10.5", "12.25") == Decimal("12.25")
    assert value("10", None) is None
    assert value("10", "10.4") is None
