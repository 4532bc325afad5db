"""Messages for the figures: an account, publishing straight into the queue, the endpoint, and workers that deliver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import httpx
import psutil  # type: ignore[import-untyped]  # it has no types

from bench.fleet import environment
from bench.receiver import DIGITS, PREFIX
from bench.replica import Replica, replica
from bench.stage import Stage, process
from daemon.db.accounts import AccountStore
from daemon.db.pool import Database
from daemon.db.secrets import Keyring, parse_keys
from daemon.domain.account import AccountId, Limits
from daemon.queue.message import Publication, Spec
from daemon.queue.messages import Messages
from daemon.queue.postgres import PostgresQueue

IN_FLIGHT = 200
CHUNK = 1_000
DELIVER_S = 120.0
HEADER = {"Content-Type": ["application/json"]}


def body(number: int, bytes_: int = 200) -> bytes:
    """JSON of that length which begins with its number."""
    text = PREFIX + str(number).zfill(DIGITS).encode() + b',"text":"'
    return text + b"x" * (bytes_ - len(text) - 2) + b'"}'


def settings(stage: Stage, database_url: str, in_flight: int = IN_FLIGHT) -> dict[str, str]:
    """For a `tallyd run` that may push to this machine, so many at once to its one host. No ticks."""
    return {
        **environment(stage, database_url),
        "TALLYD_PUSH_ALLOW": "127.0.0.0/8",
        "TALLYD_PUSH_CONCURRENCY": str(in_flight),
        "TALLYD_PUSH_CONCURRENCY_PER_HOST": str(in_flight),
        "TALLYD_TICK_SECONDS": "86400",
    }


class Endpoint:
    """`bench.receiver` in a process of its own."""

    def __init__(self, child: psutil.Process, port: int) -> None:
        self.process = child
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(base_url=self.url, timeout=30)

    async def reset(self, count: int) -> None:
        await self._ask(f"/_reset/{count}")

    async def seen(self) -> tuple[int, int, int]:
        """How many of the numbers have come, how many requests, and how many of them were held at once."""
        distinct, arrived, most = await self._ask("/_seen")
        return distinct, arrived, most

    async def times(self) -> list[float]:
        """When each number came first, in Unix seconds."""
        found: list[float] = await self._ask("/_times")
        return found

    async def until_all(self, count: int, wait_s: float = DELIVER_S, every_s: float = 0.02) -> None:
        """Wait until each number has come, and check that none came twice."""
        with anyio.fail_after(wait_s):
            while (seen := await self.seen())[0] < count:  # noqa: ASYNC110 - in another process
                await anyio.sleep(every_s)
        assert seen[:2] == (count, count), seen

    async def _ask(self, path: str) -> Any:
        answer = await self._client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def aclose(self) -> None:
        await self._client.aclose()


@asynccontextmanager
async def endpoint() -> AsyncIterator[Endpoint]:
    with process("-m", "bench.receiver") as (child, ready):
        made = Endpoint(psutil.Process(child.pid), int(ready))
        try:
            yield made
        finally:
            await made.aclose()


@dataclass
class Mail:
    """A database with an account, as somebody who publishes without HTTP sees it."""

    db: Database
    queue: PostgresQueue
    messages: Messages
    accounts: AccountStore
    account: AccountId
    watch: asyncpg.Connection

    @classmethod
    @asynccontextmanager
    async def open(cls, stage: Stage, url: str) -> AsyncIterator[Mail]:
        db = await Database.open(url, pool_max=10)
        keys = environment(stage, url)["TALLYD_SECRET_KEY"]
        watch: asyncpg.Connection = await asyncpg.connect(url)
        try:
            queue = PostgresQueue(db)
            accounts = AccountStore(db, Keyring(parse_keys(keys)))
            yield cls(db, queue, Messages(db, queue), accounts, await accounts.add("bench"), watch)
        finally:
            await watch.close()
            await db.close()

    def publications(self, url: str, bodies: Sequence[bytes], **fields: Any) -> list[Publication]:
        """What is no field of a publication is one of its spec."""
        spec = Spec(header=HEADER, **{name: fields.pop(name) for name in [*fields] if name in Spec.__struct_fields__})
        return [Publication(self.account, url, spec, each, **fields) for each in bodies]

    async def publish(self, publications: Sequence[Publication]) -> None:
        """In one transaction, so that workers see all of it at one moment, which is when this returns."""
        gates: set[int] = set()
        async with self.db.transaction(statement_timeout_ms=120_000) as tx:
            for at in range(0, len(publications), CHUNK):
                _, found = await self.messages.publish_in(tx, [(Limits(), publications[at : at + CHUNK])])
                gates |= found
        if gates:
            await self.queue.gates.admit(gates)
        await self.queue.waker.flush()

    async def until_settled(self, wait_s: float = DELIVER_S) -> None:
        """Wait until nothing is left in the queue. Every job is in one of these tables."""
        with anyio.fail_after(wait_s):
            while await self.watch.fetchval(  # noqa: ASYNC110 - in another process
                "select exists (select from lease) or exists (select from ready) or exists (select from held)"
            ):
                await anyio.sleep(0.005)

    async def check_delivered(self, count: int) -> None:
        """So many messages were delivered, each at its first attempt, and none died. Then their rows go."""
        delivered = await self.watch.fetchval("select count(distinct message_id) from event where state = 5")
        others = await self.watch.fetchval("select count(*) from event where state not in (1, 2, 5)")
        dead = await self.watch.fetchval("select count(*) from dead")
        assert (delivered, others, dead) == (count, 0, 0), (delivered, others, dead)

    async def clear(self) -> None:
        """As if nothing had ever been published; the account stays."""
        await self.watch.execute("truncate job, ready, due, held, slot, dead, attempt, message, payload, event")


@asynccontextmanager
async def worker(env: Mapping[str, str], log: Path) -> AsyncIterator[Replica]:
    async with replica(env, log, "--role", "worker") as made:
        yield made
