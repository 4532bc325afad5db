"""Orchestrating a tick: fifty thousand due connections into batches, in one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from time import perf_counter

import asyncpg

from bench.report import Line, Target
from bench.stage import Stage, alternate
from daemon import orchestrate
from daemon.db.pool import Database, Session
from daemon.domain.window import floor_to
from daemon.queue.postgres import PostgresQueue
from daemon.worker.poll import POLL, PollOrder

_FILL = """
with t as (insert into tenant (name) select 'tenant-' || i from generate_series(1, 100) i returning id)
insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
select id, 'connection-' || i, 'openai', 'https://x.test', '', '', '', now() from t, generate_series(1, $1) i
"""


class _TimedDatabase(Database):
    """Adds up how long the statements of its transactions take, as seen from here: their arguments' encoding included."""

    database_s = 0.0

    @asynccontextmanager
    async def transaction(
        self, *, lock_timeout_ms: int = 5_000, statement_timeout_ms: int = 30_000
    ) -> AsyncIterator[Session]:
        began = perf_counter()
        inside = 0.0
        async with super().transaction(
            lock_timeout_ms=lock_timeout_ms, statement_timeout_ms=statement_timeout_ms
        ) as tx:
            session = _TimedSession(tx)
            entered = perf_counter()
            yield session
            inside = perf_counter() - entered
        around = perf_counter() - began - inside  # begin and commit
        self.database_s = around + session.database_s


class _TimedSession(Session):
    def __init__(self, session: Session) -> None:
        super().__init__(session._connection, session._timeout_s)
        self._then = session._then
        self.database_s = 0.0

    async def fetch(self, sql: str, *args: object, timeout_s: float | None = None) -> list[asyncpg.Record]:
        began = perf_counter()
        rows = await super().fetch(sql, *args, timeout_s=timeout_s)
        self.database_s += perf_counter() - began
        return rows

    async def fetchval(self, sql: str, *args: object, timeout_s: float | None = None) -> object:
        began = perf_counter()
        value: object = await super().fetchval(sql, *args, timeout_s=timeout_s)
        self.database_s += perf_counter() - began
        return value

    async def execute(self, sql: str, *args: object, timeout_s: float | None = None) -> str:
        began = perf_counter()
        tag = await super().execute(sql, *args, timeout_s=timeout_s)
        self.database_s += perf_counter() - began
        return tag


async def orchestrate_tick(stage: Stage) -> list[Line]:
    count = stage.size(50_000, 1_000)
    async with stage.template("connections", like="tallyd") as url:
        connection = await asyncpg.connect(url)
        await connection.execute(_FILL, count // 100)
        await connection.execute("vacuum analyze")
        await connection.close()
    whole: list[float] = []

    async def ours() -> float:
        async with stage.database("connections") as url:
            db = await _TimedDatabase.open(url)
            assert isinstance(db, _TimedDatabase)
            began = perf_counter()
            made = await orchestrate.tick(db, PostgresQueue(db), orchestrate.TickSettings())
            whole.append(perf_counter() - began)
            assert (made.connections, made.batches) == (count, count // 100), made
            await db.close()
            return db.database_s

    async def reference() -> float:
        async with stage.database("connections") as url:
            return await _bare(url, count)

    rounds = await alternate(stage.size(5, 1), ours, reference)
    return [
        Line(
            f"orchestrate {count:,} connections, database time",
            rounds.ours,
            "s",
            rounds.reference,
            "bare update and insert",
            rounds.ratio,
            Target("≤", 1.0, "ours"),
            f"the whole call, planning in Python included: {sorted(whole)[len(whole) // 2]:.2f} s",
        )
    ]


async def _bare(url: str, count: int) -> float:
    """The same rows without a tick: no row locks, no due index, no fence against a second one."""
    connection = await asyncpg.connect(url)
    ids = [row["id"] for row in await connection.fetch("select id from connection order by id")]
    now = await connection.fetchval("select now()")
    due = [floor_to(now, 300) + timedelta(seconds=300)] * count
    bodies = [PollOrder(ids[at : at + 100]).encode() for at in range(0, count, 100)]
    began = perf_counter()
    async with connection.transaction():
        rows = await connection.fetch(
            """with j as (insert into job (kind, prio, body) select $1, 50, body from unnest($2::bytea[]) body returning id)
            insert into ready (key_id, prio, run_at, id, attempt, losses, token)
            select 0, 50, now(), id, 0, 0, 0 from j returning id""",
            POLL,
            bodies,
        )
        owners = [row["id"] for row in rows for _ in range(100)]
        await connection.execute(
            """update connection c set next_due_at = g.due, open_job = g.job
            from unnest($1::bigint[], $2::timestamptz[], $3::bigint[]) as g(id, due, job) where c.id = g.id""",
            ids,
            due,
            owners,
        )
    took = perf_counter() - began
    await connection.close()
    return took
