"""Messages through real processes: replicas that are killed while they deliver, and the whole of `/v2` behind a daemon."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest

from daemon.db.pool import Database
from tests.books_kit import until
from tests.e2e.conftest import Replica, Tallyd
from tests.e2e.test_triggers import url_of
from tests.http_kit import local_client
from tests.push_kit import Endpoint, Reply, open_endpoint

pytestmark = pytest.mark.anyio

MESSAGES = int(os.environ.get("TALLYD_TEST_CHAOS_MESSAGES", "600"))
BATCH = 100
KILLS = 3


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with open_endpoint() as opened:
        yield opened


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, pool_max=4)
    yield opened
    await opened.close()


async def client_of(tallyd: Tallyd, replica: Replica) -> httpx.AsyncClient:
    token = (await tallyd.here("tokens", "add", f"t{len(tallyd.replicas)}", "--json")).json["token"]
    return local_client(base_url=await url_of(replica), headers={"Authorization": f"Bearer {token}"}, timeout=60)


async def test_replicas_killed_while_they_deliver_lose_nothing(
    tallyd: Tallyd, endpoint: Endpoint, db: Database
) -> None:
    """Each message arrives, some of them twice: those that a killed replica had under way."""
    allowed = {"TALLYD_PUSH_ALLOW": "127.0.0.0/8", "TALLYD_PUSH_CONCURRENCY": "64"}
    replicas = [tallyd.run(**allowed) for _ in range(3)]

    async def judge(_one: object) -> Reply:
        await anyio.sleep(0.02)  # so that a kill always meets some under way
        return Reply()

    endpoint.judge = judge
    sent: list[str] = []
    async with await client_of(tallyd, replicas[0]) as client:
        for start in range(0, MESSAGES, BATCH):
            items = [
                {"destination": f"{endpoint.url}/{n}", "body": str(n), "headers": {"Upstash-Delay": "1s"}}
                for n in range(start, min(start + BATCH, MESSAGES))
            ]
            answer = await client.post("/v2/batch", json=items)
            assert answer.status_code == 200, answer.text
            sent += [one["messageId"] for one in answer.json()]
    for kill in range(KILLS):
        await endpoint.has(MESSAGES * (kill + 1) // (KILLS + 1), wait_s=60)
        replicas[kill].kill()
        replicas.append(tallyd.run(**allowed))
    await endpoint.has(MESSAGES, wait_s=60)

    async def is_quiet() -> bool:
        left = "select (select count(*) from job) + (select count(*) from lease)"
        return not await db.fetchval(left)

    await until(is_quiet, "everything is settled", wait_s=90)
    came = Counter(one.message_id for one in endpoint.arrived)
    assert came.keys() == set(sent)
    assert {one.body.decode() for one in endpoint.arrived} == {str(n) for n in range(MESSAGES)}
    delivered = await db.fetch("select message_id from event where state = 5 group by 1 having count(*) > 1")
    assert delivered == [], "each is settled once, however often it arrived"
    assert await db.fetchval("select count(*) from event where state = 5") == MESSAGES
    checks = (await tallyd.here("doctor", "--json")).json
    assert [check for check in checks if not check["ok"]] == []
    print(f"{MESSAGES} messages, {KILLS} kills: {sum(came.values()) - MESSAGES} duplicates")  # noqa: T201 - for -s
    for replica in replicas[KILLS:]:
        replica.signal(signal.SIGTERM)
        assert await replica.ended() == 0


async def test_what_drains_gives_back_what_it_cannot_finish(tallyd: Tallyd, endpoint: Endpoint, db: Database) -> None:
    """SIGTERM while an endpoint takes its time: no attempt is spent, and the next replica delivers it."""
    go_on = anyio.Event()

    async def judge(_one: object) -> Reply:
        await go_on.wait()
        return Reply()

    endpoint.judge = judge
    first = tallyd.run(TALLYD_PUSH_ALLOW="127.0.0.1", TALLYD_DRAIN_S="0.5")
    async with await client_of(tallyd, first) as client:
        answer = await client.post(f"/v2/publish/{endpoint.url}/slow", content=b"x")
        assert answer.status_code == 200, answer.text
    await endpoint.has(1)
    first.signal(signal.SIGTERM)
    assert await first.ended() == 0
    assert await db.fetchval("select attempt from ready") == 0
    go_on.set()
    tallyd.run(TALLYD_PUSH_ALLOW="127.0.0.1")
    again, twice = await endpoint.has(2, wait_s=30)
    assert again.message_id == twice.message_id
    assert [again.retried, twice.retried] == [0, 0]
