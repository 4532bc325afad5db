"""A tick over copied providers, made here and worked off by replicas; and the proof that it was booked once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.request import urlopen

import anyio
import anyio.to_thread
import asyncpg
import msgspec

from bench.fleet import Fleet
from bench.stage import Stage, process
from daemon import orchestrate
from daemon.db.insights import Insights
from daemon.db.pool import Database
from daemon.queue.postgres import PostgresQueue

_UNEVEN = """
select provider, min(amount) as least, max(amount) as most, count(*) from (
  select c.provider, c.id, (
    select count(*) || ' lines, ' || coalesce(sum(l.amount), 0) || ' $, ' || coalesce(sum(l.input_tokens), 0) || ' tokens'
    from stream s join ledger l on l.stream_id = s.id where s.connection_id = c.id) as amount
  from connection c) x
group by 1 having min(amount) <> max(amount) or min(amount) like '0 lines%'
"""
_SETTLED = """
select worker, count(*) as batches from attempt a where outcome = 1 and id = any($1::bigint[]) group by 1 order by 1
"""


@dataclass(frozen=True, slots=True)
class Provider:
    """`bench.copies` in a process of its own."""

    url: str

    async def asked(self) -> int:
        """How many requests it has answered."""
        return await self._control("")

    async def wait_before_answers(self, delay_s: float) -> None:
        await self._control(f"?delay_s={delay_s}")

    async def _control(self, query: str) -> int:
        def ask() -> int:
            with urlopen(f"{self.url}/_copies{query}", timeout=10) as answer:
                asked: int = msgspec.json.decode(answer.read())["asked"]
                return asked

        return await anyio.to_thread.run_sync(ask)


@asynccontextmanager
async def copied_provider() -> AsyncIterator[Provider]:
    with process("-m", "bench.copies") as (_, ready):
        yield Provider(f"http://127.0.0.1:{int(ready)}")


async def connections_template(stage: Stage, name: str, provider: Provider, count: int) -> None:
    """A template of databases with so many connections that were never read, each with Anthropic's two reports."""
    async with stage.template(name, like="tallyd") as url:
        await Fleet(stage, url, provider.url).import_connections(count, hours=3, providers=["anthropic"])


class Tick:
    """One tick in one database.

    Attributes:
        jobs: its batches.
    """

    def __init__(self, url: str, watch: asyncpg.Connection, batch_size: int) -> None:
        self._url = url
        self._batch_size = batch_size
        self.watch = watch
        self.jobs: list[int] = []

    @classmethod
    @asynccontextmanager
    async def in_database(cls, url: str, batch_size: int = 100) -> AsyncIterator[Tick]:
        watch: asyncpg.Connection = await asyncpg.connect(url)
        try:
            yield cls(url, watch, batch_size)
        finally:
            await watch.close()

    async def make(self, count: int, *, hands_over: bool = False) -> None:
        """Make it, and tell the replicas. Handed over, its batches wait for deliveries."""
        db = await Database.open(self._url)
        queue = PostgresQueue(db)
        occasion = orchestrate.Occasion(via="qstash", message_id="msg_tick", hands_over=hands_over)
        settings = orchestrate.TickSettings(batch_size=self._batch_size)
        made = await orchestrate.tick(db, queue, settings, occasion=occasion)
        assert (made.created, made.connections, made.batches) == (True, count, -(-count // self._batch_size)), made
        if hands_over:  # nothing publishes here: the deliveries are ours
            await db.execute("delete from ready where id in (select id from job where kind = 'publish')")
            await db.execute("delete from job where kind = 'publish'")
        await queue.waker.flush()
        await db.close()
        self.jobs = [row["id"] for row in await self.watch.fetch("select id from job where kind = 'poll' order by id")]

    async def finished_s(self, longest_s: float = 1_800.0) -> float:
        """Wait for its end. Returns the seconds from its creation, by the database's clock."""
        with anyio.fail_after(longest_s):
            while True:
                took_s: float | None = await self.watch.fetchval(
                    "select extract(epoch from finished_at - created_at)::float8 from tick"
                )
                if took_s is not None:
                    return took_s
                await anyio.sleep(0.1)

    async def shares(self) -> list[int]:
        """How many of its batches each replica has settled; together each once."""
        found = [row["batches"] for row in await self.watch.fetch(_SETTLED, self.jobs)]
        assert sum(found) == len(self.jobs), (found, len(self.jobs))
        done = await self.watch.fetchval(
            "select count(distinct id) from attempt where outcome = 1 and id = any($1::bigint[])", self.jobs
        )
        assert done == len(self.jobs), done
        return found

    async def assert_booked_once(self, count: int) -> None:
        """Every connection was polled in one batch, and all of a provider have the same books; the laws hold."""
        summed = await self.watch.fetchrow(
            "select count(*) as batches, sum(connections) as connections, sum(retried) as retried, sum(dead) as dead "
            "from batch_summary where kind = 'poll'"
        )
        assert dict(summed) == {"batches": len(self.jobs), "connections": count, "retried": 0, "dead": 0}, summed
        assert await self.watch.fetchval("select count(*) from job") == 0
        uneven = [tuple(row) for row in await self.watch.fetch(_UNEVEN)]
        assert not uneven, uneven
        db = await Database.open(self._url)
        broken = [check for check in await Insights(db).laws() if not check.is_ok]
        await db.close()
        assert not broken, broken
