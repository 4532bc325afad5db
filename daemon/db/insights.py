"""Reports, the status and the laws: the reads behind `tallyd usage`, `spend`, `gaps`, `status` and `doctor`.

Without `as_of`, sums are taken over the current rows: the same as over the ledger (a law that `doctor` checks), but a
row is one line there and one line per revision here, and it carries its dimensions with it. With `as_of` they are taken
over the ledger's deltas that had been booked by then.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec

from daemon.db import names
from daemon.db.overlaps import Shade, cast_shadows, labels, one_moment
from daemon.db.pool import Database, Executor, Record, query
from daemon.domain.collection import NameKind
from daemon.domain.errors import UsageError
from daemon.domain.overlap import Gateway, Reason
from daemon.domain.record import Basis
from daemon.domain.window import rfc3339

_HORIZON = query("insights_horizon")
_UNPRICED = query("insights_unpriced")
_GAPS = query("insights_gaps")
_TICKS = query("insights_ticks")
_STATUS = query("insights_status")
_LABELS = query("insights_stream_labels")
_HANDOVERS = query("insights_handovers")

REPORT_TIMEOUT_S = 600.0
STALE = timedelta(days=2)
SKEW_S_MAX = 2.0

# What a key means in SQL, over u (a row's dimensions), c (connection), t (tenant), s (stream).
_KEYS: dict[str, str] = {
    "tenant": "t.name",
    "connection": "c.name",
    "provider": "c.provider",
    "source": "s.source",
    "model": "coalesce(u.dims ->> 'model', u.detail ->> 'model')",
    "day": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM-DD')",
    "hour": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:00:00\"Z\"')",
    "month": "to_char(u.bucket_start at time zone 'UTC', 'YYYY-MM')",
    "project": "coalesce(u.dims ->> 'project_id', u.dims ->> 'workspace_id')",
    "workspace": "u.dims ->> 'workspace_id'",
    "team": "u.dims ->> 'team_id'",
    "api_key": "u.dims ->> 'api_key_id'",
    "user": "coalesce(u.dims ->> 'user_id', u.dims ->> 'actor')",
    "service_tier": "u.dims ->> 'service_tier'",
    "line_item": "coalesce(u.dims ->> 'line_item', u.dims ->> 'description')",
}
# The keys whose values are ids that may have a name, and what the names are of.
_NAMED: dict[str, tuple[NameKind, ...]] = {
    "project": ("project", "workspace"),
    "workspace": ("workspace",),
    "team": ("team",),
    "api_key": ("api_key",),
    "user": ("user",),
}
_DIM = re.compile(r"dim:([a-z][a-z0-9_]{0,62})")
Line = TypeVar("Line")
Group = tuple[tuple[str, str | None], ...]
METRICS = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests")

_CURRENT = """
  select u.* from usage_row u where not u.is_tombstone
    and ($1::timestamptz is null or u.bucket_start >= $1) and ($2::timestamptz is null or u.bucket_start < $2)
    and $3::timestamptz is null
"""
# Rows that had vanished by then are left out, as they are above: they sum to nothing, and null must stay null.
_AS_OF = """
  select l.stream_id, l.bucket_start, r.dims, r.detail, r.currency, r.basis, l.input_tokens, l.cache_read_tokens,
    l.cache_write_tokens, l.output_tokens, l.requests, l.amount
  from (
    select stream_id, bucket_start, row_key, sum(input_tokens) as input_tokens,
      sum(cache_read_tokens) as cache_read_tokens, sum(cache_write_tokens) as cache_write_tokens,
      sum(output_tokens) as output_tokens, sum(requests) as requests, sum(amount) as amount,
      (array_agg(kind order by revision desc))[1] = 3 as is_gone
    from ledger
    where ($1::timestamptz is null or bucket_start >= $1) and ($2::timestamptz is null or bucket_start < $2)
      and booked_at <= $3
    group by 1, 2, 3
  ) l join usage_row r using (stream_id, bucket_start, row_key)
  where not l.is_gone
"""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """`group` in the order that was asked for, `names` what people call its ids; a metric that no row reports is None."""

    group: Group
    metrics: tuple[tuple[str, int | None], ...]
    names: Group = ()


@dataclass(frozen=True, slots=True)
class SpendLine:
    group: Group
    amount: Decimal
    currency: str
    basis: Basis
    names: Group = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Money that another connection's report tells too, so that it is not added.

    Attributes:
        same_as: the connection that counts in its place, `TENANT/NAME`.
        amount: None where none of the rows has a price.
        reason: "gateway", whose row the vendor has too; "duplicate", the same organisation twice.
    """

    tenant: str
    connection: str
    source: str
    same_as: str
    amount: Decimal | None
    currency: str | None
    basis: Basis
    rows: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Question:
    """What to sum: buckets that start in [since, until), None meaning no bound.

    Attributes:
        group_by: of `_KEYS`, or `dim:<name>` for a provider's own dimension.
        cost_sources: (provider, source) pairs that report money, not usage.
        as_of: the answer as it was then; clamped to the oldest open flush.
        gateways: the sources whose rows may be the money of another connection.
    """

    since: datetime | None
    until: datetime | None
    group_by: Sequence[str]
    cost_sources: Collection[tuple[str, str]]
    as_of: datetime | None = None
    gateways: Collection[Gateway] = ()

    @property
    def sums_tenants(self) -> bool:
        """Whether a line may hold the money of several tenants: then an organisation of two of them counts once."""
        return "tenant" not in self.group_by


@dataclass(frozen=True, slots=True)
class Report(Generic[Line]):
    """The lines, and the instant that was really answered for when `as_of` was asked: never past an open flush.

    `left_out` is what the lines do not hold, since other connections tell the same money.
    """

    lines: tuple[Line, ...]
    as_of: datetime | None = None
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True, slots=True)
class Gap:
    """`kind` is parked, paused, never_read, history (older buckets not reached yet) or stale."""

    tenant: str
    connection: str
    provider: str
    source: str | None
    kind: str
    from_at: datetime | None
    to_at: datetime | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick and how far it is.

    Attributes:
        done_in_time: batches done by the deadline; None until it has passed.
        is_complete: whether enough of them were; None while that is open.
    """

    slot_at: datetime
    created_at: datetime
    via: str
    request_id: str | None
    connections: int
    batches: int
    batches_done: int
    deadline_at: datetime | None
    done_in_time: int | None
    finished_at: datetime | None
    is_complete: bool | None = None

    def judged(self, ratio: float) -> Tick:
        """As `tick.incomplete` judges it: by the deadline, `ratio` of the batches. Without a deadline, all of them."""
        verdict: bool | None = None
        if self.done_in_time is not None:
            verdict = self.done_in_time >= ratio * self.batches
        elif self.finished_at is not None:
            verdict = self.deadline_at is None or self.finished_at <= self.deadline_at
        return replace(self, is_complete=verdict)


@dataclass(frozen=True, slots=True)
class Handovers:
    """The batches of one tick that were handed over to QStash.

    Attributes:
        published: those that QStash has accepted.
        delivery, failure, refusal: released by that.
        waiting: nothing has released them yet.
        deadline: nothing ever did, so that they ran when their hand-over deadline had come.
    """

    slot_at: datetime
    batches: int
    published: int
    delivery: int
    failure: int
    refusal: int
    waiting: int
    deadline: int


@dataclass(frozen=True, slots=True)
class Status:
    """`lag_s`: how long ago the connection that waits longest for its poll was last polled; None when none waits.

    `qstash_paused_s`: for how much longer nothing is handed over to QStash; None when something may be.
    """

    now: datetime
    tenants: int
    connections: dict[str, int]
    parked_sources: int
    dead_letters: int
    unpriced_rows: int
    lag_s: float | None
    due: int
    replicas: int
    qstash_paused_s: float | None
    qstash_pause_reason: str | None
    ticks: tuple[Tick, ...]
    handovers: tuple[Handovers, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict of `doctor`; `detail` says what was found, `fix` what to do about it."""

    name: str
    is_ok: bool
    detail: str
    fix: str = ""


_LAWS: tuple[tuple[str, str, str], ...] = (
    (
        "ledger equals rows",
        query("law_ledger_equals_rows"),
        "report it with this output; `tallyd poll --full` re-reads",
    ),
    ("revisions contiguous", query("law_revisions_contiguous"), "report it with this output"),
    ("bucket totals equal rows", query("law_bucket_totals"), "`tallyd poll --full` on the connection re-reads them"),
    ("buckets within their grain", query("law_grain_epochs"), "`tallyd poll --full` on the connection re-reads them"),
    (
        "poll_seq ahead of every fence",
        query("law_poll_seq"),
        "look what else the copy has lost, then `tallyd doctor --fix`",
    ),
    ("ids ahead of every row", query("law_ids"), "look what else the copy has lost, then `tallyd doctor --fix`"),
    ("jobs in one state each", query("law_jobs_conserved"), "report it with this output"),
    ("ready jobs above the floor", query("law_ready_floor"), "`update ready_floor set at = '0'` in psql"),
    ("messages and places", query("law_messages"), "report it with this output"),
    ("quota history equals use", query("law_quota_used"), "report it with this output"),
    ("partitions made ahead", query("law_partitions"), "start a replica: its maintenance makes them"),
)


class Insights:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def usage(self, question: Question) -> Report[UsageLine]:
        """Token and request sums, of the usage reports only."""
        keys, expressions = _grouping(question.group_by)
        sums = ", ".join(f"sum(u.{metric})::bigint" for metric in METRICS)
        found = await self._read(question, keys, expressions, sums, where="not x.is_cost")
        lines = [
            UsageLine(group, tuple(zip(METRICS, values, strict=True)), named) for group, values, named in found.lines
        ]
        return Report(tuple(lines), found.as_of, found.left_out)

    async def spend(self, question: Question) -> Report[SpendLine]:
        """Money, split by currency and basis: as the cost reports say, and as we price the usage reports.

        Unpriced rows have no amount and are not in here: see `unpriced`.
        """
        keys, expressions = _grouping(question.group_by)
        expressions = [*expressions, "u.currency", "u.basis"]
        found = await self._read(question, keys, expressions, "trim_scale(sum(u.amount))", where=_MONEY)
        lines = [
            SpendLine(group, amount, currency, basis, named) for group, (currency, basis, amount), named in found.lines
        ]
        return Report(tuple(lines), found.as_of, found.left_out)

    async def overlaps(self, question: Question) -> Report[LeftOut]:
        """What the same money through other connections keeps out of the sums, by connection, source and reason."""
        as_of = await self._settled(question.as_of)
        async with one_moment(self._db, REPORT_TIMEOUT_S) as moment:
            shade = await self._shade(moment, question, as_of)
            return Report(await _left_out(moment, question, as_of, shade, where="true"), as_of)

    async def _read(
        self, question: Question, keys: Sequence[str], expressions: Sequence[str], sums: str, *, where: str
    ) -> Report[_Found]:
        """The lines of a report: their groups, their other values, and the names of the ids in the groups."""
        as_of = await self._settled(question.as_of)
        async with one_moment(self._db, REPORT_TIMEOUT_S) as moment:
            shade = await self._shade(moment, question, as_of)
            rows = await _grouped(moment, question, as_of, expressions, sums, shade, where=where)
            left_out = await _left_out(moment, question, as_of, shade, where=where)
            groups = [tuple(zip(keys, row.values(), strict=False)) for row in rows]
            named = await _named(moment, keys, groups)
        lines = [
            (group, tuple(row.values())[len(keys) :], of_group)
            for group, row, of_group in zip(groups, rows, named, strict=True)
        ]
        return Report(tuple(lines), as_of, left_out)

    async def _shade(self, moment: Executor, question: Question, as_of: datetime | None) -> Shade:
        return await cast_shadows(
            moment, question.gateways, across=question.sums_tenants, as_of=as_of, timeout_s=REPORT_TIMEOUT_S
        )

    async def _settled(self, as_of: datetime | None) -> datetime | None:
        if as_of is None:
            return None
        horizon: datetime = await self._db.fetchval(_HORIZON)
        # Strictly before the horizon: a flush that began at that very instant may still be open.
        return min(as_of, horizon - timedelta(microseconds=1))

    async def unpriced(self, question: Question) -> list[tuple[str | None, int]]:
        """(model, rows) that `spend` would add now if their price were known, most rows first."""
        async with one_moment(self._db, REPORT_TIMEOUT_S) as moment:
            shade = await self._shade(moment, question, None)
            rows = await moment.fetch(
                _UNPRICED, question.since, question.until, *shade.arguments, timeout_s=REPORT_TIMEOUT_S
            )
        return [(row["model"], row["rows"]) for row in rows]

    async def gaps(self, *, tenant: str | None = None, stale: timedelta = STALE) -> list[Gap]:
        """What the ledger does not hold though it should: by tenant, connection and source."""
        return [Gap(**row) for row in await self._db.fetch(_GAPS, tenant, stale)]

    async def status(self, *, ticks: int = 5, complete_ratio: float = 1.0) -> Status:
        """Args:
        complete_ratio: the share of a tick's batches that makes it complete.
        """
        row = await self._db.fetchrow(_STATUS)
        assert row is not None  # a select without `from` has one row
        last = await read_ticks(self._db, ticks, None, complete_ratio)
        slots = [tick.slot_at for tick in last]
        handovers = tuple(Handovers(**found) for found in await self._db.fetch(_HANDOVERS, slots))
        states = msgspec.json.decode(row["connections"], type=dict[str, int])
        return Status(**{**row, "connections": states}, ticks=last, handovers=handovers)

    async def laws(self) -> list[Check]:
        """Every law that SQL can check, each in one statement."""
        checks = []
        for name, sql, fix in _LAWS:
            rows = await self._db.fetch(sql, timeout_s=REPORT_TIMEOUT_S)
            checks.append(Check(name, not rows, await self._described(rows) if rows else "holds", fix if rows else ""))
        return checks

    async def clock_skew(self) -> Check:
        """The middle of the round trip against the database's clock. Only logs and deadlines depend on it."""
        before = datetime.now(UTC)
        there: datetime = await self._db.fetchval("select clock_timestamp()")
        skew_s = abs((there - (before + (datetime.now(UTC) - before) / 2)).total_seconds())
        is_ok = skew_s <= SKEW_S_MAX
        return Check("clock", is_ok, f"{skew_s:.3f} s from the database's", "" if is_ok else "set the clock by NTP")

    async def _described(self, rows: Sequence[Record]) -> str:
        ids = [row["stream_id"] for row in rows if row.get("stream_id") is not None]
        labels = {row["id"]: row["label"] for row in await self._db.fetch(_LABELS, ids)} if ids else {}
        shown = []
        for row in rows[:5]:
            values = dict(row)
            stream_id = values.pop("stream_id", None)
            where = "" if stream_id is None else f"{labels.get(stream_id, f'stream {stream_id}')}: "
            shown.append(where + ", ".join(f"{key} {_plain(value)}" for key, value in values.items()))
        return "; ".join(shown) + (f"; and {len(rows) - 5} more" if len(rows) > 5 else "")


_Found = tuple[Group, tuple[Any, ...], Group]
_MONEY = "u.amount is not null and u.basis = case when x.is_cost then 'provider' else 'local' end"
# Only texts of this module get into a statement; a dimension's name has passed its pattern.
_JOINED = (
    "from u join stream s on s.id = u.stream_id join connection c on c.id = s.connection_id\n"
    "join tenant t on t.id = c.tenant_id\n"
    "cross join lateral (select exists (select from unnest($4::text[], $5::text[]) as x(provider, source)"
    " where x.provider = c.provider and x.source = s.source) as is_cost) x\n"
)


async def _grouped(
    moment: Executor,
    question: Question,
    as_of: datetime | None,
    expressions: Sequence[str],
    sums: str,
    shade: Shade,
    *,
    where: str,
) -> list[Record]:
    columns = "".join(f"{expression} as k{i}, " for i, expression in enumerate(expressions))
    places = ", ".join(str(i + 1) for i in range(len(expressions)))
    lit = f" and not exists (select from {Shade.relation(6)} where {Shade.falls_on('u')})" if shade.shadows else ""
    sql = (
        f"with u as ({_CURRENT if as_of is None else _AS_OF})\n"
        f"select {columns}{sums}\n{_JOINED}where {where}{lit}\n"
        + (f"group by {places} order by {places}" if places else "having count(*) > 0")
    )
    given = (*_arguments(question, as_of), *(shade.arguments if shade.shadows else ()))
    return await moment.fetch(sql, *given, timeout_s=REPORT_TIMEOUT_S)


async def _left_out(
    moment: Executor, question: Question, as_of: datetime | None, shade: Shade, *, where: str
) -> tuple[LeftOut, ...]:
    if not shade.shadows:
        return ()
    # Summed by stream first: nobody can estimate how many rows the shadows fall on, and a plan for one would join a
    # million of them one by one.
    sql = (
        f"with r as ({_CURRENT if as_of is None else _AS_OF} and stream_id = any($6::bigint[])),\n"
        "u as materialized (select r.stream_id, o.by_id, o.vendor is null as is_twin, r.currency, r.basis,"
        " trim_scale(sum(r.amount)) as amount, count(*) as rows\n"
        f"from r join {Shade.relation(6)} on {Shade.falls_on('r')} group by 1, 2, 3, 4, 5, r.amount is null)\n"
        "select t.name, c.name, s.source, u.by_id, u.amount, u.currency, u.basis, u.rows,"
        f" case when u.is_twin then 'duplicate' else 'gateway' end\n{_JOINED}where {where}\n"
        "order by 1, 2, 3, 4, 6, 7, 9"
    )
    rows = await moment.fetch(sql, *_arguments(question, as_of), *shade.arguments, timeout_s=REPORT_TIMEOUT_S)
    known = await labels(moment, {row["by_id"] for row in rows})
    found = []
    for row in rows:
        tenant, connection, source, by, amount, currency, basis, count, reason = row.values()
        found.append(LeftOut(tenant, connection, source, known[by], amount, currency, basis, count, reason))
    return tuple(found)


def _arguments(question: Question, as_of: datetime | None) -> tuple[object, ...]:
    providers = [provider for provider, _ in question.cost_sources]
    sources = [source for _, source in question.cost_sources]
    return question.since, question.until, as_of, providers, sources


async def _named(moment: Executor, keys: Sequence[str], groups: Sequence[Group]) -> list[Group]:
    """For each group what its ids are called now, or were called last. The sums are made before: nothing multiplies."""
    if not any(key in _NAMED for key in keys):
        return [()] * len(groups)
    told = {(key, id_) for group in groups for key, id_ in group if key in _NAMED and id_ is not None}
    wanted = {(kind, id_) for key, id_ in told for kind in _NAMED[key]}
    book = await names.look_up(moment, wanted)
    return [
        tuple(
            (f"{key}_name", None if id_ is None else book.name_of(_NAMED[key], id_, dict(group)))
            for key, id_ in group
            if key in _NAMED
        )
        for group in groups
    ]


async def read_ticks(db: Database, limit: int, slot: datetime | None, complete_ratio: float) -> tuple[Tick, ...]:
    """The newest ticks, or the one of `slot`, newest first and judged."""
    return tuple(Tick(**row).judged(complete_ratio) for row in await db.fetch(_TICKS, limit, slot))


def _grouping(group_by: Sequence[str]) -> tuple[list[str], list[str]]:
    keys: list[str] = []
    expressions: list[str] = []
    for key in group_by:
        dim = _DIM.fullmatch(key)
        if key in keys:
            raise UsageError("--group-by", f"{key} is there twice", "name each key once")
        if dim is None and key not in _KEYS:
            raise UsageError("--group-by", f"unknown key {key!r}", f"use {', '.join(_KEYS)} or dim:<name>")
        keys.append(key)
        expressions.append(_KEYS[key] if dim is None else f"u.dims ->> '{dim[1]}'")
    return keys, expressions


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return rfc3339(value)
    return format(value, "f") if isinstance(value, Decimal) else str(value)
