"""Building blocks for tests of the ledger: a tenant with one connection, and pieces made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from daemon.db import ledger, streams
from daemon.db.insights import Insights
from daemon.db.pool import Database, Session
from daemon.db.secrets import Keyring, Place
from daemon.domain.connection import Connection, ConnectionId, Secret, Stream, TenantId
from daemon.domain.job import JobId
from daemon.domain.record import BucketRead, Grain, Row, Snapshot
from daemon.domain.window import Width, Window
from daemon.records.identity import Keyer, grain_id
from daemon.records.normalize import ready_buckets
from daemon.records.restate import Witness
from daemon.sinks.ledger import Flush, LedgerSink, Piece

HOUR = timedelta(hours=1)
T0 = datetime(2026, 11, 1, 10, tzinfo=UTC)
GRAIN = Grain("reports", Width.HOUR, ("model", "project_id"))
OTHER_GRAIN = Grain("reports", Width.HOUR, ("model",))
KEYRING = Keyring([b"k" * 32])


def row(model: str | None = "m1", project: str | None = "p1", *, tokens: int | None = 10, **values: object) -> Row:
    return Row((("model", model), ("project_id", project)), input_tokens=tokens, **values)  # type: ignore[arg-type]


async def lock_nothing(_tx: Session) -> None:
    """Stands for a lease that is held."""


@dataclass
class Account:
    """One connection whose source is booked by hand."""

    db: Database
    sink: LedgerSink
    connection: Connection
    stream: Stream
    kind: str = "usage"

    async def seq(self) -> int:
        return (await ledger.next_seqs(self.db, 1))[0]

    def piece(
        self,
        seq: int,
        buckets: Mapping[datetime, tuple[Row, ...]],
        *,
        witness: Witness = "none",
        grain: Grain = GRAIN,
        window: Window | None = None,
    ) -> Piece:
        window = window or Window(min(buckets), max(buckets) + HOUR)
        snapshot = Snapshot(grain, window, tuple(BucketRead(s, r) for s, r in sorted(buckets.items())), 1)
        keyer = Keyer(self.connection.id, self.stream.source, grain)
        ready = tuple(ready_buckets(snapshot, keyer, self.kind, lambda _r, _at: (Decimal(1), "test")))  # type: ignore[arg-type]
        witnesses = {bucket.start: witness for bucket in ready}
        return Piece(self.connection, self.stream, seq, grain_id(grain), grain.width, ready, witnesses)

    def end(self, seq: int, window: Window) -> ledger.StreamEnd:
        return ledger.StreamEnd(
            self.stream.id, seq, window, window.start, window.end, None, 1, None,
            is_hourly=True, is_daily=True,
        )  # fmt: skip

    async def book(self, *pieces: Piece, ends: tuple[ledger.StreamEnd, ...] = ()) -> object:
        effects = await self.sink.book(Flush(JobId(0), pieces=list(pieces), ends=list(ends)), lock_nothing)
        return effects[self.stream.id]

    async def read(self, buckets: Mapping[datetime, tuple[Row, ...]], *, witness: Witness = "none") -> object:
        """A newer answer, booked."""
        return await self.book(self.piece(await self.seq(), buckets, witness=witness))

    async def tokens(self) -> int:
        """What the ledger says; what the rows say must be the same."""
        found = await self.db.fetchrow(
            """select (select coalesce(sum(input_tokens), 0) from ledger where stream_id = $1)::bigint as booked,
                 (select coalesce(sum(input_tokens), 0) from usage_row where stream_id = $1)::bigint as current""",
            self.stream.id,
        )
        assert found is not None
        assert found["booked"] == found["current"]
        return int(found["booked"])

    async def ledger(self) -> list[tuple[int, int, int]]:
        """(revision, difference, kind) in the order of booking."""
        rows = await self.db.fetch(
            "select revision, input_tokens, kind from ledger where stream_id = $1 order by poll_seq, row_key, revision",
            self.stream.id,
        )
        return [(r["revision"], r["input_tokens"], r["kind"]) for r in rows]


async def make_account(db: Database, name: str = "one", *, source: str = "completions", kind: str = "usage") -> Account:
    """A tenant `acme` with a connection and one stream in `GRAIN`."""
    tenant = await db.fetchval(
        "insert into tenant (name) values ('acme') on conflict (name) do update set name = 'acme' returning id"
    )
    connection = await db.fetchval(
        """insert into connection (tenant_id, name, provider, base_url, credential, credential_key_id,
             credential_print, since) values ($1, $2, 'openai', 'https://x.test', '', '', '', $3) returning id""",
        tenant,
        name,
        T0 - timedelta(days=30),
    )
    place = Place(TenantId(tenant), ConnectionId(connection), "openai")
    sealed = KEYRING.seal(Secret("sk-admin-test"), place)
    await db.execute(
        "update connection set credential = $2, credential_key_id = $3 where id = $1",
        connection,
        sealed.blob,
        sealed.key_id,
    )
    grains = {source: (grain_id(GRAIN), GRAIN)}
    loaded, _ = await streams.load(db, KEYRING, [ConnectionId(connection)], lambda _c: grains, T0)
    item = loaded[0]
    assert item.problem is None
    return Account(db, LedgerSink(db), item.connection, item.streams[source], kind)


async def assert_laws(db: Database) -> None:
    """Every law that SQL can check."""
    broken = [f"{check.name}: {check.detail}" for check in await Insights(db).laws() if not check.is_ok]
    assert not broken, broken
