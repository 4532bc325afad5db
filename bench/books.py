"""Accounts whose usage is booked by hand: what the provider answers, what tallyd makes of it, and the bare upsert."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import perf_counter

import asyncpg
import msgspec

from bench.stage import Stage
from daemon.db import ledger, streams
from daemon.db.insights import Insights
from daemon.db.pool import Database, Session
from daemon.db.secrets import Keyring, Place
from daemon.domain.connection import Connection, ConnectionId, Secret, Stream, StreamId, TenantId
from daemon.domain.job import Completed, Job, NewJob, Settlement, Summary
from daemon.domain.ports import Answer
from daemon.domain.record import Rating, Totals
from daemon.domain.window import Window, floor_to, to_epoch
from daemon.pollers.openai import OpenAIPoller
from daemon.queue.postgres import PostgresQueue
from daemon.records.identity import Keyer
from daemon.records.normalize import ready_buckets
from daemon.records.price import Pricer
from daemon.sinks.ledger import Effect, Effects, Flush, LedgerSink, Piece
from daemon.worker.poll import grains_of

ROWS = 50
HOURS = 2
SOURCE = "completions"
MODELS = ("gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18", "gpt-4.1-2025-04-14", "o3-2025-04-16", "no-such-model")

_TABLE = """
create table bare_row (like usage_row including all);
alter table bare_row set (fillfactor = 85)
"""
_UPSERT = """
insert into bare_row (tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims, input_tokens,
  cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis,
  rate_version, detail)
select tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims::jsonb, input_tokens,
  cache_read_tokens, cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis,
  rate_version, detail::jsonb
from unnest($1::bigint[], $2::bigint[], $3::timestamptz[], $4::bytea[], $5::int[], $6::bytea[], $7::text[],
  $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[], $12::bigint[], $13::numeric[], $14::text[], $15::numeric[],
  $16::text[], $17::text[], $18::text[], $19::text[])
  as g(tenant_id, stream_id, bucket_start, row_key, revision, content_hash, dims, input_tokens, cache_read_tokens,
       cache_write_tokens, output_tokens, requests, quantity, unit, amount, currency, basis, rate_version, detail)
on conflict (stream_id, bucket_start, row_key) do update set
  revision = excluded.revision, content_hash = excluded.content_hash, input_tokens = excluded.input_tokens,
  cache_read_tokens = excluded.cache_read_tokens, cache_write_tokens = excluded.cache_write_tokens,
  output_tokens = excluded.output_tokens, requests = excluded.requests, quantity = excluded.quantity,
  unit = excluded.unit, amount = excluded.amount, currency = excluded.currency, basis = excluded.basis,
  rate_version = excluded.rate_version, detail = excluded.detail
"""
_FILL = """
with t as (insert into tenant (name) values ('acme') returning id)
insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id, credential_print, since)
select id, 'connection-' || i, 'openai', 'https://x.test', '', '', '', now() - interval '30 days'
from t, generate_series(1, $1) i returning id, tenant_id
"""


class Canned:
    """A provider that always gives the same answer."""

    def __init__(self, body: bytes) -> None:
        self._answer = Answer(200, {"content-type": "application/json"}, body)

    async def get(
        self,
        path: str,  # noqa: ARG002 - it is the protocol's
        params: Sequence[tuple[str, str]] = (),  # noqa: ARG002
        headers: Mapping[str, str] | None = None,  # noqa: ARG002
    ) -> Answer:
        return self._answer


@dataclass(frozen=True, slots=True)
class Account:
    connection: Connection
    stream: Stream


class Books:
    """The accounts of one database, what books their rows, and a table for the bare side."""

    def __init__(self, db: Database, bare: asyncpg.Connection, accounts: Sequence[Account]) -> None:
        self.accounts = accounts
        self.poller = OpenAIPoller()
        self._db = db
        self._bare = bare
        self._queue = PostgresQueue(db)
        self._sink = LedgerSink(db)
        self._pricer = Pricer()
        self._hour = floor_to(datetime.now(UTC), 3600) - timedelta(hours=HOURS)

    @property
    def rows(self) -> int:
        return len(self.accounts) * ROWS

    def fresh_window(self) -> Window:
        """Hours that nothing was booked in yet."""
        self._hour -= timedelta(hours=HOURS)
        return Window(self._hour, self._hour + timedelta(hours=HOURS))

    def answers(self, window: Window, edition: int, *, is_grouped: bool = True) -> list[bytes]:
        """What the provider says of each account; every number is another one in another edition."""
        return [_report(window, account.connection.id, edition, is_grouped) for account in self.accounts]

    async def pieces(self, bodies: Sequence[bytes], window: Window) -> list[Piece]:
        """What the worker makes of the answers, as `daemon.worker.poll` does."""
        made = []
        seqs = await ledger.next_seqs(self._db, len(bodies))
        for account, body, seq in zip(self.accounts, bodies, seqs, strict=True):
            connection, epoch = account.connection, account.stream.epochs[-1]
            snapshot = await self.poller.fetch(connection.target, SOURCE, epoch.grain, window, Canned(body))
            keyer = Keyer(connection.id, SOURCE, epoch.grain)
            buckets = tuple(ready_buckets(snapshot, keyer, "usage", self._price))
            made.append(Piece(connection, account.stream, seq, epoch.grain_id, epoch.grain.width, buckets))
        return made

    async def leased(self) -> Job:
        """A job that a flush can settle."""
        worker = await self._queue.register_worker("bench")
        return (await self._queue.enqueue_leased([NewJob("poll", b"{}")], worker))[0]

    async def book(self, job: Job, pieces: Sequence[Piece], window: Window) -> Effect:
        """The only flush of a batch: every stream and connection ends, the summary is written, the job settled.

        Without pieces the streams end as found unchanged.
        """
        seqs = [piece.seq for piece in pieces] or await ledger.next_seqs(self._db, len(self.accounts))
        ends = [
            ledger.StreamEnd(
                account.stream.id, seq, window, window.start, window.end, None, 1, None,
                is_hourly=False, is_daily=False,
            )
            for account, seq in zip(self.accounts, seqs, strict=True)
        ]  # fmt: skip
        turns = [ledger.ConnectionEnd(a.connection.id, True, None) for a in self.accounts]

        async def finish(tx: Session, effects: Effects) -> None:
            rows = sum(effect.rows for effect in effects.values())
            await ledger.write_summary(tx, job.id, job.kind, None, Summary(len(self.accounts), rows=rows))
            await self._queue.settle_in(tx, Settlement(job, Completed(), 1))

        async def lock(tx: Session) -> None:
            await self._queue.lock_lease(tx, job)

        effects = await self._sink.book(Flush(job.id, list(pieces), ends, turns, also=[finish]), lock)
        return sum(effects.values(), Effect())

    async def settle(self, pieces: Sequence[Piece], window: Window, expected: Effect) -> float:
        """Rows a second of one flush of ready pieces."""
        job = await self.leased()
        began = perf_counter()
        effect = await self.book(job, pieces, window)
        took = perf_counter() - began
        assert effect == expected, effect
        return self.rows / took

    async def whole_way(self, bodies: Sequence[bytes], window: Window, expected: Effect) -> float:
        """Rows a second from the answers' bytes to the commit."""
        job = await self.leased()
        began = perf_counter()
        effect = await self.book(job, await self.pieces(bodies, window), window)
        took = perf_counter() - began
        assert effect == expected, effect
        return self.rows / took

    async def probe_again(self, window: Window, edition: int) -> float:
        """Rows a second that an ungrouped look finds unchanged: bytes, comparison with what is held, commit."""
        job = await self.leased()
        held = await self._held(window)
        bodies = self.answers(window, edition, is_grouped=False)
        began = perf_counter()
        for account, body in zip(self.accounts, bodies, strict=True):
            grain = account.stream.epochs[-1].grain
            probe = await self.poller.probe(account.connection.target, SOURCE, grain, window, Canned(body))
            assert probe.totals == held[account.stream.id], (probe.totals, held[account.stream.id])
        await self.book(job, (), window)
        return self.rows / (perf_counter() - began)

    async def _held(self, window: Window) -> Mapping[StreamId, Mapping[datetime, Totals]]:
        ids = [account.stream.id for account in self.accounts]
        found = await streams._held(self._db, ids, window.start)
        return {id_: {at: totals for at, totals in found[id_].items() if at in window} for id_ in ids}

    async def upsert(self, pieces: Sequence[Piece]) -> float:
        """Rows a second of the bare side. Its arguments are ready before the clock starts."""
        columns = _columns(pieces)
        began = perf_counter()
        tag = await self._bare.execute(_UPSERT, *columns)
        took = perf_counter() - began
        assert tag == f"INSERT 0 {self.rows}", tag
        return self.rows / took

    async def check(self) -> None:
        """What was booked this fast must be right too."""
        broken = [law.name for law in await Insights(self._db).laws() if not law.is_ok]
        assert not broken, broken

    def _price(self, rating: Rating, at: datetime) -> tuple[Decimal | None, str]:
        priced = self._pricer.price(rating, at)
        return priced.amount, priced.rate_version


@asynccontextmanager
async def open_books(stage: Stage) -> AsyncIterator[Books]:
    keyring = Keyring([b"k" * 32])
    async with stage.database() as url:
        bare: asyncpg.Connection = await asyncpg.connect(url)
        db = await Database.open(url)
        try:
            await bare.execute(_TABLE)
            ids = []
            for row in await bare.fetch(_FILL, stage.size(100, 5)):
                ids.append(ConnectionId(row["id"]))
                place = Place(TenantId(row["tenant_id"]), ids[-1], "openai")
                sealed = keyring.seal(Secret("sk-admin-bench"), place)
                await bare.execute(
                    "update connection set credential = $2, credential_key_id = $3 where id = $1",
                    row["id"], sealed.blob, sealed.key_id,
                )  # fmt: skip
            now = await db.now()
            loaded, _ = await streams.load(db, keyring, ids, lambda c: grains_of({"openai": OpenAIPoller()}, c), now)
            assert all(item.problem is None for item in loaded)
            yield Books(db, bare, [Account(item.connection, item.streams[SOURCE]) for item in loaded])
        finally:
            await db.close()
            await bare.close()


def _report(window: Window, account: int, edition: int, is_grouped: bool) -> bytes:
    hours = [window.start + timedelta(hours=n) for n in range(HOURS)]
    return msgspec.json.encode(
        {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": to_epoch(hour),
                    "end_time": to_epoch(hour) + 3600,
                    "results": _rows(account, edition) if is_grouped else [_sum(_rows(account, edition))],
                }
                for hour in hours
            ],
            "has_more": False,
            "next_page": None,
        }
    )


def _rows(account: int, edition: int) -> list[dict[str, object]]:
    return [
        {
            "object": "organization.usage.completions.result",
            "input_tokens": 1_000 * edition + 90 * n,
            "output_tokens": 300 * edition + n,
            "input_cached_tokens": 40 * edition + n,
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "num_model_requests": 5 + edition,
            "project_id": f"proj_{account:08}abcdefghijkl{n % 5}",
            "user_id": f"user-{account:08}abcdefghijklmn{n % 7}",
            "api_key_id": f"key_{account:08}abcdefghijk{n}",
            "model": MODELS[n % len(MODELS)],
            "batch": False,
            "service_tier": "default",
        }
        for n in range(ROWS // HOURS)
    ]


def _sum(rows: Sequence[Mapping[str, object]]) -> dict[str, object]:
    numbers = [name for name, value in rows[0].items() if type(value) is int]
    nothing = dict.fromkeys(("project_id", "user_id", "api_key_id", "model", "batch", "service_tier"))
    return {**nothing, **{name: sum(int(str(row[name])) for row in rows) for name in numbers}}


def _columns(pieces: Sequence[Piece]) -> list[list[object]]:
    rows = [
        (
            piece.connection.tenant_id, piece.stream.id, bucket.start, ready.key, 1, ready.content, ready.dims_json,
            ready.row.input_tokens, ready.row.cache_read_tokens, ready.row.cache_write_tokens,
            ready.row.output_tokens, ready.row.requests, ready.row.quantity, ready.row.unit, ready.amount,
            ready.currency, ready.basis, ready.rate_version, ready.detail_json,
        )
        for piece in pieces for bucket in piece.buckets for ready in bucket.rows
    ]  # fmt: skip
    return [list(column) for column in zip(*rows, strict=True)]
