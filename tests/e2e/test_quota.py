"""Quota counters by the real processes: the signed route, ticks, a kill in the midst of a sync."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import httpx
import pytest
from redis.asyncio import Redis

from daemon.db.pool import Database
from tests.books_kit import until
from tests.cli_kit import Result
from tests.e2e.conftest import Replica, Tallyd
from tests.http_kit import local_client
from tests.ledger_kit import assert_laws
from tests.qstash_stand_in import signature
from tests.valkey_kit import open_valkey
from tests.web_kit import CURRENT, NEXT, QUOTA, QUOTA_ALIAS

pytestmark = pytest.mark.anyio

PUBLIC_URL = "https://tallyd.example"
SIGNED = {
    "QSTASH_CURRENT_SIGNING_KEY": CURRENT,
    "QSTASH_NEXT_SIGNING_KEY": NEXT,
    "TALLYD_PUBLIC_URL": PUBLIC_URL,
    "TALLYD_TICK_SECONDS": "86400",
}


@pytest.fixture
def valkey() -> Iterator[str]:
    with open_valkey() as server:
        yield server.url


@pytest.fixture
async def redis(valkey: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(valkey)
    yield client
    await client.aclose()


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, pool_max=4)
    yield opened
    await opened.close()


async def add(tallyd: Tallyd, url: str, *more: str) -> Result:
    await tallyd.here("tenants", "add", "acme")
    return await tallyd.here(
        "quota", "add", "--tenant", "acme", "--name", "q", "--url", url, "--pattern", "quota:{user}", *more, "--json"
    )


async def url_of(replica: Replica) -> str:
    await replica.has_logged("daemon.started")
    return str(replica.events("daemon.started")[0]["listens"]["listen"])


async def deliver(url: str, route: str, message: str, body: bytes = b"{}") -> httpx.Response:
    headers = {"upstash-signature": signature(PUBLIC_URL + route, body, key=CURRENT), "upstash-message-id": message}
    async with local_client(base_url=url, timeout=20) as client:
        return await client.post(route, content=body, headers=headers)


async def values(db: Database) -> dict[str, Any]:
    return {row["user_name"]: row["value"] for row in await db.fetch("select user_name, value from quota")}


async def test_signed_delivery_syncs_and_an_unsigned_one_does_not(
    tallyd: Tallyd, valkey: str, redis: Redis, db: Database
) -> None:
    await redis.mset({f"quota:u{n}": n for n in range(50)})
    await add(tallyd, valkey)
    await db.execute("update connection set next_due_at = now() + interval '1 day'")
    replica = tallyd.run(**SIGNED)
    url = await url_of(replica)
    async with local_client(base_url=url) as client:
        assert (await client.post(QUOTA, content=b"{}")).status_code == 401
    for route, more in ((QUOTA, 0), (QUOTA_ALIAS, 7)):
        await redis.incrby("quota:u1", more)
        answer = await deliver(url, route, f"msg_{more}")
        assert (answer.status_code, answer.json()["connections"]) == (200, 1)

        async def has_come(more: int = more) -> bool:
            return (await values(db)).get("u1") == 1 + more

        await until(has_come, "the counters are in the database")
    again = await deliver(url, QUOTA, "msg_7")
    assert again.json() == {"created": False, "connections": 0, "batches": 0}
    await assert_laws(db)


async def test_a_tick_syncs_what_is_due_by_its_own_interval(
    tallyd: Tallyd, valkey: str, redis: Redis, db: Database
) -> None:
    await redis.set("quota:ann", 1)
    await add(tallyd, valkey, "--every", "3600")
    replica = tallyd.run()

    async def is_read() -> bool:
        return await values(db) == {"ann": 1}

    await until(is_read, "the first tick has read it")
    await redis.set("quota:ann", 2)
    ticks = await db.fetchval("select count(*) from tick")

    async def two_more() -> bool:
        return bool(await db.fetchval("select count(*) from tick") >= ticks + 2)

    await until(two_more, "two more ticks")
    assert await values(db) == {"ann": 1}
    await db.execute("update connection set next_due_at = now()")

    async def is_read_again() -> bool:
        return await values(db) == {"ann": 2}

    await until(is_read_again, "it was due again")
    replica.signal(signal.SIGTERM)
    assert await replica.ended() == 0


async def test_a_kill_in_the_midst_of_a_sync_counts_nothing_twice(
    tallyd: Tallyd, valkey: str, redis: Redis, db: Database
) -> None:
    """Killed as soon as a part is written; another replica brings it to its end."""
    count = 40_000
    for start in range(0, count, 10_000):
        await redis.mset({f"quota:u{n}": n for n in range(start, start + 10_000)})
    await add(tallyd, valkey)
    replica = tallyd.run(TALLYD_TICK_SECONDS="2")

    async def some() -> bool:
        return bool(await db.fetchval("select count(*) from quota"))

    await until(some, "a part is written")
    replica.kill()
    assert await db.fetchval("select count(*) from quota") < count
    tallyd.run(TALLYD_TICK_SECONDS="2")

    async def all_of_them() -> bool:
        return bool(
            await db.fetchval("select count(*) from quota") == count
            and await db.fetchval("select count(*) from stream where read_at is not null")
        )

    await until(all_of_them, "the sync has come to its end", wait_s=90)
    assert await db.fetchval("select sum(used) from quota") == sum(range(count))
    assert await db.fetchval("select count(*) from quota_change") == count
    await assert_laws(db)


async def test_two_replicas_and_a_command_at_once_count_once(
    tallyd: Tallyd, valkey: str, redis: Redis, db: Database
) -> None:
    await redis.mset({f"quota:u{n}": n for n in range(20_000)})
    await add(tallyd, valkey)
    await db.execute("update connection set next_due_at = now() + interval '1 day'")
    first, second = tallyd.run(**SIGNED), tallyd.run(**SIGNED)
    urls = [await url_of(first), await url_of(second)]
    results: list[Result] = []

    async def by_hand() -> None:
        results.append(await tallyd("quota", "sync", "--json"))

    async with anyio.create_task_group() as group:
        for number, url in enumerate(urls * 2):
            group.start_soon(deliver, url, QUOTA, f"msg_{number}")
        group.start_soon(by_hand)
    assert results[0].code == 0, results[0].err

    async def is_idle() -> bool:
        return not await db.fetchval("select (select count(*) from ready) + (select count(*) from lease)")

    await until(is_idle, "all of them are done")
    assert await db.fetchval("select sum(used) from quota") == sum(range(20_000))
    assert await db.fetchval("select count(*) from quota_change") == 20_000
    await assert_laws(db)
