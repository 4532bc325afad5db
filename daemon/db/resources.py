"""Resources of REST collections: what is stored, what the newest listing said, and which batches are open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from daemon.db.pool import Executor, Session, query
from daemon.domain.connection import ConnectionId, StreamId, TenantId
from daemon.domain.job import JobId

_TAKE = query("resource_take")
_HAND_OUT = query("resource_hand_out")
_BEGIN_RUN = query("resource_begin_run")
_NOTE_LISTED = query("resource_note_listed")
_ENDED = query("resource_ended")
_MISSING = query("resource_missing")
_GO = query("resource_go")
_FORGET = query("resource_forget")
_TIDY = query("resource_tidy_batches")
_END_RUN = query("resource_end_run")
_STORED_IDS = query("resource_stored_ids")
_CONNECTION = query("resource_connection")
_STREAM = query("resource_streams")
_KNOWN = query("resource_known")
_LOCK_RUN = query("resource_lock_run")
_OPEN_BATCH = query("resource_open_batch")
_WAITING = query("resource_waiting")
_WRITE = query("resource_write")
_LETTERS = query("resource_letters")
_COUNT = query("resource_count")
_CLOSE_BATCH = query("resource_close_batch")
_BATCH_SEQ = query("resource_batch_seq")
_OPEN_BATCHES = query("resource_open_batches")
_RUNS = query("resource_runs")

SLOTS_MAX = 32_767


class ListedItem(NamedTuple):
    """One id of a listing."""

    stream: StreamId
    id: str
    version: str | None
    seq: int


class News(NamedTuple):
    """What a part of a listing says about one collection.

    Attributes:
        listed: ids that this listing had not held before.
        unchanged: those of them whose version is stored already.
        due: ids to look at, in the order listed, with their versions: they are new, changed or of unknown version, and no
            open batch has them.
    """

    listed: int
    unchanged: int
    due: Sequence[tuple[str, str | None]]


class Handed(NamedTuple):
    """An id in the hands of a job, which is of the listing with that seq. `is_retry`: it has failed before."""

    stream: StreamId
    id: str
    job: JobId
    seq: int
    is_retry: bool = False


class Noted(NamedTuple):
    """What a part of a listing adds to the run of its collection."""

    stream: StreamId
    tenant: TenantId
    seq: int
    is_whole: bool
    listed: int
    unchanged: int
    batches: int
    calls_saved: int


class Ended(NamedTuple):
    """A listing that came to its end. `is_listed`: its API can list."""

    stream: StreamId
    tenant: TenantId
    is_listed: bool
    is_whole: bool
    whole_seq: int


class Known(NamedTuple):
    """What is stored of a resource: its version, unless it was never read, and the newest attempt that asked for it."""

    version: str | None
    is_gone: bool
    read_seq: int


class Write(NamedTuple):
    """What a batch learned of one resource.

    Attributes:
        version, content: where it changed; else None.
        dead_job: its dead letter, where it cannot be read.
    """

    id: str
    version: str | None = None
    content: str | None = None
    is_gone: bool = False
    dead_job: JobId | None = None


class Written(NamedTuple):
    """Rows written, rows marked as gone, and ids of which a newer attempt is known."""

    changed: int
    gone: int
    refused: int


class Counts(NamedTuple):
    """What a batch adds to the run of its listing."""

    changed: int = 0
    unchanged: int = 0
    failed: int = 0
    gone: int = 0
    calls: int = 0
    calls_saved: int = 0
    batches_done: int = 0


class Run(NamedTuple):
    """A collection with its newest listing and what came of it. Figures are None before the first one."""

    connection_id: ConnectionId
    tenant: str
    name: str
    base_url: str
    state: str
    every_s: int
    seq: int | None
    began_at: datetime | None
    ended_at: datetime | None
    listed: int | None
    unchanged: int | None
    changed: int | None
    failed: int | None
    gone: int | None
    withheld: int | None
    calls: int | None
    calls_saved: int | None
    batches: int | None
    batches_done: int | None
    stored: int
    stored_gone: int


async def take(tx: Session, items: Sequence[ListedItem]) -> dict[StreamId, News]:
    """Note the items of a listing, and say which of them are to be looked at."""
    rows = await tx.fetch(_TAKE, *_columns(items, 4))
    return {
        row["stream_id"]: News(row["listed"], row["unchanged"], list(zip(row["ids"], row["versions"], strict=True)))
        for row in rows
    }


async def hand_out(tx: Session, handed: Sequence[Handed]) -> None:
    """Note which job has which ids in hand."""
    if handed:
        jobs = list({(h.job, h.stream, h.seq, h.is_retry) for h in handed})
        streams, ids, owners, *_ = _columns(handed, 5)
        await tx.execute(_HAND_OUT, *_columns(jobs, 4), streams, ids, owners)


async def note_listed(tx: Session, noted: Sequence[Noted]) -> None:
    streams, tenants, seqs, wholes, *figures = _columns(noted, 8)
    await tx.execute(_BEGIN_RUN, streams, tenants, seqs, wholes)
    await tx.execute(_NOTE_LISTED, streams, *figures)


async def ended(tx: Session, ends: Mapping[StreamId, int]) -> list[Ended]:
    return [Ended(*row) for row in await tx.fetch(_ENDED, list(ends), list(ends.values()))]


async def missing(tx: Session, stream: StreamId, seq: int) -> tuple[int, int]:
    """How many resources are stored as being there, and how many of them the listing did not hold."""
    row = await tx.fetchrow(_MISSING, stream, seq)
    assert row is not None
    return row["known"], row["missing"]


async def go(tx: Session, stream: StreamId, listed_before: int, seq: int) -> int:
    """Mark as gone what no listing has held since `listed_before`, by the word of the listing `seq`."""
    count: int = await tx.fetchval(_GO, stream, listed_before, seq)
    await tx.execute(_FORGET, stream, listed_before)
    return count


async def tidy_batches(tx: Session, streams: Iterable[StreamId]) -> None:
    await tx.execute(_TIDY, list(streams))


async def end_run(tx: Session, end: Ended, seq: int, gone: int, withheld: int) -> None:
    await tx.execute(_BEGIN_RUN, [end.stream], [end.tenant], [seq], [end.is_whole])
    await tx.execute(_END_RUN, end.stream, gone, withheld)


async def stored_ids(tx: Session, stream: StreamId, seq: int, after: str, limit: int) -> list[str]:
    """Ids that are stored and were not named by the listing `seq`, from `after` on."""
    return [row["id"] for row in await tx.fetch(_STORED_IDS, stream, seq, after, limit)]


async def connection_of(tx: Session, stream: StreamId) -> ConnectionId:
    found: ConnectionId = await tx.fetchval(_CONNECTION, stream)
    return found


async def stream_of(db: Executor, connection: ConnectionId, source: str) -> StreamId | None:
    found: StreamId | None = await db.fetchval(_STREAM, connection, source)
    return found


async def known(db: Executor, stream: StreamId, ids: Sequence[str]) -> dict[str, Known]:
    rows = await db.fetch(_KNOWN, stream, list(ids))
    return {row["id"]: Known(row["version"], row["is_gone"], row["read_seq"]) for row in rows}


async def open_batch(
    tx: Session, job: JobId, token: int, stream: StreamId, tenant: TenantId, slots: int | None, *, is_retry: bool
) -> bool:
    """Take one of the collection's slots for a batch. False: all of them are taken, here or in another replica."""
    await tx.execute(_LOCK_RUN, stream, tenant)
    limit = min(slots or SLOTS_MAX, SLOTS_MAX)
    return await tx.fetchval(_OPEN_BATCH, job, stream, token, limit, is_retry) is not None


async def waiting(db: Executor, stream: StreamId) -> int:
    """How many batches of the collection wait or run."""
    count: int = await db.fetchval(_WAITING, stream)
    return count


async def write(tx: Session, stream: StreamId, tenant: TenantId, seq: int, writes: Sequence[Write]) -> Written:
    """Write what a batch learned, in one statement."""
    rows = [(w.id, w.version, w.content, w.is_gone, w.dead_job) for w in writes]
    row = await tx.fetchrow(_WRITE, stream, *_columns(rows, 5), seq, tenant)
    assert row is not None
    return Written(row["written"], row["gone"], row["refused"])


async def letters(tx: Session, stream: StreamId, ids: Sequence[str]) -> dict[str, JobId]:
    """The dead letters in which these ids lie."""
    return {row["id"]: JobId(row["dead_job"]) for row in await tx.fetch(_LETTERS, stream, list(ids))}


async def close_batch(tx: Session, job: JobId, counts: Counts) -> None:
    """Add what a batch did to the run of its listing, if that is still the newest, and give its slot back."""
    await tx.execute(_COUNT, job, *counts)
    await tx.execute(_CLOSE_BATCH, job)


async def batch_seq(tx: Session, job: JobId) -> int:
    """The listing that a batch is of."""
    seq: int = await tx.fetchval(_BATCH_SEQ, job)
    return seq


async def open_batches(db: Executor, connections: Sequence[ConnectionId]) -> list[JobId]:
    """Batches of active connections that run, or wait for a worker or a slot."""
    return [JobId(row["job_id"]) for row in await db.fetch(_OPEN_BATCHES, list(connections))]


async def runs(db: Executor, provider: str, source: str, tenant: str | None, name: str | None) -> list[Run]:
    """The collections by tenant and name."""
    return [Run(*row) for row in await db.fetch(_RUNS, provider, tenant, name, source)]


def _columns(rows: Sequence[Sequence[object]], width: int) -> list[list[object]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
