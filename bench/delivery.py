"""Signed deliveries: how many a listener proves, makes durable and answers, against the proof and the answer alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit

import anyio.to_thread
import asyncpg
import msgspec
import psutil  # type: ignore[import-untyped]  # it has no types

from bench.fleet import environment
from bench.replica import PostgresCpu, Replica, cpu_s, replica
from bench.report import Line, Target
from bench.sender import ENV, Shipment, Shipped, sender, ship
from bench.stage import Stage, process, summarise
from daemon.queue.qstash import WORKER_PATH
from daemon.triggers.qstash import ORCHESTRATE_PATH

CONNECTIONS = 32
TWICE = 200
"""So many are delivered once more after the clock has stopped: they must release nothing."""

_WAITING = """
with j as (
  insert into job (kind, prio, body) select 'poll', 50, '{"connections":[]}' from generate_series(1, $1) returning id),
d as (
  insert into due (run_at, key_id, prio, id, attempt, losses, token)
  select now() + interval '1 hour', 0, 50, id, 0, 0, 0 from j),
h as (insert into handover (job_id, slot_at, place) select id, now(), row_number() over (order by id) from j)
select id from j order by id
"""
_CLEAR = "truncate job, ready, due, handover, tick, delivery"
_CONNECTIONS = """
with t as (insert into tenant (name) values ('tenant') returning id)
insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
select id, 'connection-' || i, 'openai', 'https://x.test', '', '', '', now() from t, generate_series(1, 100) i
"""
_DUE_AGAIN = "update connection set open_job = null, next_due_at = '-infinity'"


@dataclass
class _Sides:
    """Both servers, the client, and what each of them cost."""

    ours: Replica
    reference: psutil.Process
    reference_port: int
    postgres: PostgresCpu
    pool: ProcessPoolExecutor
    watch: asyncpg.Connection
    shares: list[tuple[float, float, float]] = field(default_factory=list)
    """(server, client, Postgres) in cores, while ours was measured."""
    reference_shares: list[tuple[float, float]] = field(default_factory=list)
    waits_ms: list[tuple[float, float]] = field(default_factory=list)
    sent: int = 0

    async def deliver(self, path: str, bodies: Sequence[bytes]) -> Shipped:
        """To ours."""
        port = urlsplit(self.ours.url).port
        assert port is not None
        server, postgres = cpu_s(self.ours.process), self.postgres.cpu_s()
        done = await self._ship(port, path, bodies)
        server, postgres = cpu_s(self.ours.process) - server, self.postgres.cpu_s() - postgres
        self.shares.append((server / done.took_s, done.cpu_s / done.took_s, postgres / done.took_s))
        self.waits_ms.append(done.waits_ms)
        return done

    async def verify(self, path: str, bodies: Sequence[bytes]) -> float:
        """To the reference. Returns deliveries per second."""
        server = cpu_s(self.reference)
        done = await self._ship(self.reference_port, path, bodies)
        self.reference_shares.append(
            ((cpu_s(self.reference) - server) / done.took_s, done.cpu_s / done.took_s)
        )  # fmt: skip
        assert done.answers == {(200, b'{"verified":true}'): len(bodies)}, done.answers.most_common(3)
        return len(bodies) / done.took_s

    async def _ship(self, port: int, path: str, bodies: Sequence[bytes]) -> Shipped:
        self.sent += 1
        shipment = Shipment(port, path, bodies, f"msg_bench_{self.sent}", CONNECTIONS)
        return await anyio.to_thread.run_sync(self.pool.submit(ship, shipment).result)


async def deliveries(stage: Stage) -> list[Line]:
    """Both routes of QStash on `tallyd run --role listener`, one after the other."""
    async with stage.database() as url:
        env = {**environment(stage, url), **ENV, "TALLYD_TRIGGER": "qstash", "TALLYD_TICK_SECONDS": "86400"}
        watch: asyncpg.Connection = await asyncpg.connect(url)
        await watch.execute(_CONNECTIONS)
        try:
            async with replica(env, stage.folder / "listener.log", "--role", "listener") as listener:
                with process("-m", "bench.verify_server") as (child, ready), sender() as pool:
                    postgres = await PostgresCpu.find(url)
                    sides = _Sides(listener, psutil.Process(child.pid), int(ready), postgres, pool, watch)
                    return [
                        await _route(stage, sides, "a batch released each", WORKER_PATH, _releases, Target("≥", 0.6)),
                        await _route(stage, sides, "a tick asked for each", ORCHESTRATE_PATH, _orchestrations),
                    ]
        finally:
            await watch.close()


async def _route(
    stage: Stage,
    sides: _Sides,
    what: str,
    path: str,
    measure: Callable[[_Sides, int], Awaitable[float]],
    target: Target | None = None,
) -> Line:
    count = stage.size(3_000, 250)
    await measure(sides, stage.size(500, 250))  # what is loaded or connected on first use
    bodies = [b'{"batch":%d}' % number for number in range(count)]
    await sides.verify(path, bodies[: stage.size(500, 250)])
    for seen in (sides.shares, sides.reference_shares, sides.waits_ms):
        seen.clear()
    pairs: list[tuple[float, float]] = []
    for number in range(stage.size(5, 1)):
        if number % 2:
            theirs, mine = await sides.verify(path, bodies), await measure(sides, count)
        else:
            mine, theirs = await measure(sides, count), await sides.verify(path, bodies)
        pairs.append((mine, theirs))
    rounds = summarise(pairs)
    server, client, postgres = (median(each) for each in zip(*sides.shares, strict=True))
    their_server, their_client = (median(each) for each in zip(*sides.reference_shares, strict=True))
    p50, p99 = (median(each) for each in zip(*sides.waits_ms, strict=True))
    return Line(
        f"signed deliveries on {CONNECTIONS} connections, {what}", rounds.ours, "deliveries/s", rounds.reference,
        "bare verify route", rounds.ratio, target,
        f"p50 {p50:.1f} ms, p99 {p99:.1f} ms; of a core: server {server:.0%}, client {client:.0%}, Postgres "
        f"{postgres:.0%}; at the reference: server {their_server:.0%}, client {their_client:.0%}",
    )  # fmt: skip


async def _releases(sides: _Sides, count: int) -> float:
    """Each delivery releases another waiting batch. Returns deliveries per second."""
    watch = sides.watch
    await watch.execute(_CLEAR)
    batches = [row["id"] for row in await watch.fetch(_WAITING, count)]
    await watch.execute("analyze job, ready, due, handover")
    bodies = [b'{"batch":%d}' % batch for batch in batches]
    done = await sides.deliver(WORKER_PATH, bodies)
    # Each answer names its own batch, so that as many different ones were released as there were deliveries.
    assert set(done.answers) == {(200, b'{"batch":%d,"released":true}' % batch) for batch in batches}
    shares, waits_ms = sides.shares.pop(), sides.waits_ms.pop()
    again = await sides.deliver(WORKER_PATH, bodies[:TWICE])
    assert set(again.answers) == {(200, b'{"batch":%d,"released":false}' % batch) for batch in batches[:TWICE]}
    sides.shares[-1], sides.waits_ms[-1] = shares, waits_ms
    ready = [row["id"] for row in await watch.fetch("select id from ready order by id")]
    assert ready == batches, (len(ready), len(batches))
    assert await watch.fetchval("select count(*) from due") == 0
    assert await watch.fetchval("select count(*) from handover where released_by = 'delivery'") == count
    return count / done.took_s


async def _orchestrations(sides: _Sides, count: int) -> float:
    """The first delivery makes the tick of the slot, the others find it made. Returns deliveries per second."""
    watch = sides.watch
    await watch.execute(_CLEAR)
    await watch.execute(_DUE_AGAIN)
    done = await sides.deliver(ORCHESTRATE_PATH, [b"{}"] * count)
    made = [0, 0]
    for (status, body), times in done.answers.items():
        assert status == 200, (status, body)
        made[msgspec.json.decode(body)["created"]] += times
    assert made == [count - 1, 1], made
    ticks = [tuple(row) for row in await watch.fetch("select connections, batches, via from tick")]
    assert ticks == [(100, 1, "qstash")], ticks
    assert await watch.fetchval("select count(*) from delivery") == count
    return count / done.took_s
