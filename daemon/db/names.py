"""What people call the ids in the reports: dated, and kept after they are gone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from daemon.db.pool import Executor, Record, query
from daemon.domain.connection import ConnectionId, StreamId, TenantId

_SEEN = query("names_seen")
_OPEN = query("names_open")
_KEEP = query("names_keep")
_GONE = query("names_gone")
_LOOK_UP = query("names_look_up")
_LIST = query("names_list")


class NameRow(NamedTuple):
    """A name as a reading saw it."""

    tenant_id: TenantId
    connection_id: ConnectionId
    kind: str
    id: str
    name: str
    seq: int


class NameSpan(NamedTuple):
    """What something was called from `since` on; `until` is None while it still is."""

    tenant: str
    connection: str
    kind: str
    id: str
    name: str
    since: datetime
    until: datetime | None


@dataclass(frozen=True, slots=True)
class NameBook:
    """The newest names of some ids, by (kind, id). The same id may mean something else in another connection."""

    entries: Mapping[tuple[str, str], Sequence[Record]]

    def name_of(self, kinds: Iterable[str], id_: str, group: Mapping[str, str | None]) -> str | None:
        """The newest name of an id, in the tenant, connection and provider of the report's line, where it tells them."""
        told = [(key, group[key]) for key in ("tenant", "connection", "provider") if key in group]
        fitting = [
            entry
            for kind in kinds
            for entry in self.entries.get((kind, id_), ())
            if all(entry[key] == value for key, value in told)
        ]
        newest = max(fitting, key=lambda entry: entry["since"], default=None)
        return (newest["name"] or None) if newest else None


async def take(tx: Executor, rows: Collection[NameRow]) -> dict[ConnectionId, tuple[int, int]]:
    """Write what a reading saw; every (connection, kind, id) at most once. What is called as before only moves its seq.

    Returns:
        (first names, later ones) that were opened, by connection.
    """
    if not rows:
        return {}
    at: datetime = await tx.fetchval("select clock_timestamp()")
    tenants, connections, kinds, ids, called, seqs = map(list, zip(*rows, strict=True))
    await tx.execute(_SEEN, connections, kinds, ids, called, seqs, at)
    opened: dict[ConnectionId, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in await tx.fetch(_OPEN, tenants, connections, kinds, ids, called, seqs, at):
        first, later = opened[row["connection_id"]]
        opened[row["connection_id"]] = (first + row["is_new"], later + (not row["is_new"]))
    return dict(opened)


async def keep(tx: Executor, kinds: Collection[tuple[ConnectionId, str, int]]) -> None:
    """These kinds were not read, by (connection, kind, seq): what is stored of them counts as seen."""
    if kinds:
        await tx.execute(_KEEP, *map(list, zip(*sorted(kinds), strict=True)))


async def close(tx: Executor, ends: Mapping[StreamId, int]) -> dict[StreamId, int]:
    """What the whole reading of that seq did not see is gone. Returns how many, by stream."""
    at: datetime = await tx.fetchval("select clock_timestamp()")
    gone: dict[StreamId, int] = defaultdict(int)
    for row in await tx.fetch(_GONE, list(ends), list(ends.values()), at):
        gone[row["stream_id"]] += 1
    return dict(gone)


async def look_up(db: Executor, wanted: Collection[tuple[str, str]]) -> NameBook:
    """The newest names of these (kind, id), in whichever connection."""
    entries: dict[tuple[str, str], list[Record]] = defaultdict(list)
    if wanted:
        kinds, ids = map(list, zip(*sorted(wanted), strict=True))
        for row in await db.fetch(_LOOK_UP, kinds, ids):
            entries[row["kind"], row["id"]].append(row)
    return NameBook(entries)


async def listed(db: Executor, *, tenant: str | None, kind: str | None, with_history: bool) -> list[NameSpan]:
    """By tenant, connection, kind and id: the newest name of each, or every one that it ever had."""
    return [NameSpan(**row) for row in await db.fetch(_LIST, tenant, kind, with_history)]
