"""Storing messages, loading them for an attempt, and writing how it ended: each for many at once.

Publishing is one transaction: deduplication, gates, job, message, body and the log's first line commit together, and an
answer is given after that. The end of an attempt is one too: the lease, the log, the dead letter and the callbacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum

import msgspec
import structlog

from daemon.db.pool import Database, Record, Session, query
from daemon.db.text import storable
from daemon.domain.account import AccountId, Limits
from daemon.domain.errors import DataRejectedError, TransientError, UsageError
from daemon.domain.job import (
    PUSH_KEY,
    Completed,
    Discarded,
    Job,
    JobId,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
    Snoozed,
)
from daemon.queue.budget import portions
from daemon.queue.callbacks import callbacks_of
from daemon.queue.gates import GateKey, Wanted
from daemon.queue.message import (
    PUSH,
    Attempted,
    Message,
    MessageId,
    Publication,
    Published,
    authority_of,
    host_of,
    message_of,
    new_salt,
)
from daemon.queue.postgres import Columns, PostgresQueue, deduplicate

TIMEOUT_MARGIN_S = 60.0
"""A job outlives its attempt, so that it is the attempt that ends with a time-out, and tells so."""
SMALL_BYTES = 64 << 10
"""Bodies up to here are loaded with their messages, larger ones by themselves."""
SETTLE_BYTES_MAX = 16 << 20
"""What one statement about the ends of attempts may hold of bodies."""
UNMOURNED_S = 3.0
UNREAD_SNOOZE_S = 30.0
UNLIMITED = Limits()
"""What callbacks ask for was checked with their message."""

_RESERVE = query("queue_reserve")
_INSERT = query("message_insert")
_NAMES = query("message_names")
_LOAD = query("message_load")
_BODY = query("message_body")
_EVENTS = query("event_insert")
_SHARE = query("slot_share")
_UNMOURNED = query("message_unmourned")
_MOURN = query("message_mourn")
_SIZES = query("letter_sizes")

_encode = msgspec.json.Encoder().encode

log = structlog.get_logger(__name__)


class State(IntEnum):
    """What happened to a message, as `event.state` stores it and the log's `state` names it."""

    CREATED = 1
    ACTIVE = 2
    ERROR = 3
    RETRY = 4
    DELIVERED = 5
    FAILED = 6
    CANCEL_REQUESTED = 7
    CANCELED = 8


@dataclass(frozen=True, slots=True)
class Load:
    """A message under way. `body` is None where it is large and has to be fetched."""

    message: Message
    body: bytes | None
    body_bytes: int
    key_id: str
    sealed_keys: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended: the outcome for the queue, and what there is to tell. The load's body is whole."""

    job: Job
    load: Load
    body: bytes
    outcome: Outcome
    attempted: Attempted
    took_ms: int


@dataclass(frozen=True, slots=True)
class _Event:
    message: JobId
    account: AccountId
    state: State
    retried: int = 0
    next_s: float | None = None
    status: int | None = None
    error: str | None = None
    header: str | None = None
    body: bytes | None = None


class Messages:
    """Safe to share between tasks; every method may be called for many messages at once."""

    def __init__(self, db: Database, queue: PostgresQueue) -> None:
        self._db = db
        self._queue = queue

    # Publish

    async def publish(
        self, calls: Sequence[tuple[Limits, Sequence[Publication]]]
    ) -> list[list[Published] | UsageError | DataRejectedError]:
        """Store what several calls publish, each call as a whole or not at all; for each its messages, or its error."""
        try:
            return [*await self._publish(calls)]
        except (UsageError, DataRejectedError) as error:
            if len(calls) == 1:
                return [error]
        return [result for call in calls for result in await self.publish([call])]

    async def _publish(self, calls: Sequence[tuple[Limits, Sequence[Publication]]]) -> list[list[Published]]:
        is_plain = all(
            limits.parallelism is None
            and all(p.dedup is None and p.queue is None and p.spec.flow is None for p in publications)
            for limits, publications in calls
        )
        if is_plain:
            published, _ = await self._insert(self._db, calls, {}, [])
        else:
            async with self._db.transaction() as tx:
                published, gates = await self.publish_in(tx, calls)
            await self._queue.open_up(gates)
        self._queue.waker.wake()
        return published

    async def publish_in(
        self, tx: Session, calls: Sequence[tuple[Limits, Sequence[Publication]]]
    ) -> tuple[list[list[Published]], set[int]]:
        """The same in the caller's transaction: what was published, and the gates to admit at once it has committed.

        Raises:
            UsageError: a limit of the account.  DataRejectedError: Postgres cannot hold what a publication says.
        """
        wishes = [wish for limits, publications in calls for p in publications for wish in _wishes(p, limits)]
        most = {p.account: limits.queues for limits, publications in calls for p in publications}
        gates = await self._queue.gates.find(tx, wishes, most)
        owners: list[tuple[JobId, bool]] = []
        if any(p.dedup is not None for _, publications in calls for p in publications):
            owners = await deduplicate(tx, [_dedup(limits, p) for limits, publications in calls for p in publications])
        return await self._insert(tx, calls, gates, owners)

    async def _insert(
        self,
        db: Database | Session,
        calls: Sequence[tuple[Limits, Sequence[Publication]]],
        gates: Mapping[GateKey, int],
        owners: Sequence[tuple[JobId, bool]],
    ) -> tuple[list[list[Published]], set[int]]:
        count = sum(len(publications) for _, publications in calls)
        if not owners:
            owners = [(JobId(row["id"]), True) for row in await db.fetch(_RESERVE, count)]
        rows: list[tuple[object, ...]] = []
        salts: dict[JobId, int] = {}
        places: list[list[int]] = []
        at = 0
        for limits, publications in calls:
            place = range(at, at + len(publications))
            places.append([*place])
            at += len(publications)
            bodies = _bodies(publications, [owners[index] for index in place])
            for index, publication, (payload, body) in zip(place, publications, bodies, strict=True):
                job, is_new = owners[index]
                if is_new:
                    salts[job] = new_salt()
                    rows.append(_row(job, salts[job], publication, limits, gates, payload, body))
        if rows:
            await db.execute(_INSERT, *(list(column) for column in zip(*rows, strict=True)))
        copies = [job for job, is_new in owners if not is_new and job not in salts]
        if copies:
            salts.update((JobId(row["id"]), row["salt"]) for row in await db.fetch(_NAMES, copies))
        flat = [p for _, publications in calls for p in publications]
        published = [
            Published(MessageId(job, salts.get(job, 0)), p.url, not is_new)
            for p, (job, is_new) in zip(flat, owners, strict=True)
        ]
        return [[published[index] for index in place] for place in places], {*gates.values()}

    # An attempt

    async def load(self, jobs: Sequence[Job]) -> list[Load | None]:
        """What the attempts of these jobs need, and the note that they have begun. None: the lease is not ours."""
        rows = await self._db.fetch(_LOAD, [job.id for job in jobs], [job.token for job in jobs], SMALL_BYTES)
        found: dict[JobId, Load] = {}
        unread: dict[JobId, Outcome] = {}
        for row in rows:
            try:
                found[row["id"]] = _load(row)
            except msgspec.MsgspecError as error:  # a newer version's; one that knows it will take it
                log.error("push.unread", job_id=row["id"], reason=str(error))  # noqa: TRY400 - it is told
                unread[row["id"]] = Snoozed(UNREAD_SNOOZE_S, f"this version cannot read it: {error}")
        if unread:
            await self._queue.settle([Settlement(job, unread[job.id], 0) for job in jobs if job.id in unread])
        return [found.get(job.id) for job in jobs]

    async def body(self, load: Load) -> bytes:
        """A large body."""
        return await self._db.fetchval(_BODY, load.message.payload) or b""

    async def settle(self, ends: Sequence[Ended]) -> list[bool]:
        """Write how attempts ended. False: the job is somebody else's by now, and nothing was written of it.

        One whose response or callback Postgres refuses is written without them, and holds up none of the others.
        """
        accepted: set[JobId] = set()
        ordered = sorted(ends, key=lambda end: end.job.id)  # as everybody locks leases
        for portion in portions(ordered, _bytes, SETTLE_BYTES_MAX):
            accepted |= await self._settle(portion)
        return [end.job.id in accepted for end in ends]

    async def _settle(self, ends: Sequence[Ended]) -> set[JobId]:
        try:
            return await self._settle_together(ends)
        except TransientError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is about one of them
            if len(ends) == 1:
                return await self._settle_bare(ends[0], error)
        half = len(ends) // 2
        return await self._settle(ends[:half]) | await self._settle(ends[half:])

    async def _settle_bare(self, end: Ended, error: Exception) -> set[JobId]:
        """One end without what may be to blame: what came back; and if need be, without its callbacks."""
        message_id, status = str(end.load.message.id), end.attempted.status
        bare = replace(end, attempted=Attempted(status, error=end.attempted.error))
        try:
            log.error("push.stored_without_response", message_id=message_id, reason=str(error))
            return await self._settle_together([bare])
        except TransientError:
            raise
        except Exception as still:  # noqa: BLE001 - the callbacks are all that is left
            log.error("push.stored_without_callbacks", message_id=message_id, reason=str(still))  # noqa: TRY400 - it is told
            return await self._settle_together([bare], with_reports=False)

    async def _settle_together(self, ends: Sequence[Ended], *, with_reports: bool = True) -> set[JobId]:
        has_reports = False
        if with_reports and any(_may_report(end) for end in ends):
            accepted, has_reports = await self._settle_and_report(ends)
        else:  # one statement is a transaction too, for one way there and back in place of six
            accepted = await self._queue.settle(*_endings(ends))
        if has_reports or any(isinstance(e.outcome, Retryable) for e in ends if e.job.id in accepted):
            self._queue.waker.wake()
        return accepted

    async def _settle_and_report(self, ends: Sequence[Ended]) -> tuple[set[JobId], bool]:
        async with self._db.transaction() as tx:
            accepted = await self._queue.lock_leases(tx, [end.job for end in ends])
            ours = [end for end in ends if end.job.id in accepted]
            now = await tx.fetchval("select now()")
            reports = [
                report
                for end in ours
                for report in callbacks_of(
                    end.load.message, end.body, end.attempted, end.job.attempt - 1,
                    died_at=now if _is_dead(end) else None,
                    timeout_s=int(end.job.timeout_s - TIMEOUT_MARGIN_S),
                )
            ]  # fmt: skip
            await self._report(tx, reports)
            settled = await self._queue.settle_many_in(tx, *_endings(ours))
        await self._queue.open_up(settled.gates)
        return settled.jobs, bool(reports)

    async def _report(self, tx: Session, reports: Sequence[Publication]) -> None:
        if not reports:
            return
        published, _ = await self.publish_in(tx, [(UNLIMITED, reports)])
        ids = [made.id.job for made in published[0]]
        await tx.execute(_SHARE, ids, [report.source for report in reports])

    async def mourn(self, within: timedelta = timedelta(minutes=10)) -> int:
        """Log, and report to their failure callbacks, messages that died with nobody to tell of it. Returns how many.

        Args:
            within: how long ago, at most.
        """
        lost = [row["id"] for row in await self._db.fetch(_UNMOURNED, UNMOURNED_S, within)]
        if not lost:
            return 0
        sizes = {row["id"]: row["bytes"] for row in await self._db.fetch(_SIZES, lost)}
        return sum([
            await self._mourn(portion, within) for portion in portions(lost, sizes.__getitem__, SETTLE_BYTES_MAX)
        ])  # fmt: skip

    async def _mourn(self, lost: Sequence[JobId], within: timedelta, *, with_reports: bool = True) -> int:
        try:
            return await self._mourn_together(lost, within, with_reports=with_reports)
        except TransientError:
            raise
        except Exception as error:
            if not with_reports:
                raise
            if len(lost) == 1:
                log.exception("push.mourned_without_callback", job_id=lost[0], reason=str(error))
                return await self._mourn(lost, within, with_reports=False)
        return sum([await self._mourn([job], within) for job in lost])

    async def _mourn_together(self, lost: Sequence[JobId], within: timedelta, *, with_reports: bool) -> int:
        async with self._db.transaction() as tx:
            rows = await tx.fetch(_MOURN, lost)
            still = {
                row["id"] for row in await tx.fetch(_UNMOURNED, UNMOURNED_S, within)
            }  # another replica may have told
            rows = [row for row in rows if row["id"] in still]
            reports: list[Publication] = []
            for row in rows if with_reports else ():
                attempted = Attempted(error=row["reason"])
                reports += callbacks_of(
                    message_of(row), row["body"] or b"", attempted, max(0, row["attempt"] - 1),
                    died_at=row["at"],
                )  # fmt: skip
            await self._report(tx, reports)
            await _tell(
                tx,
                [
                    _Event(row["id"], row["account_id"], State.FAILED, max(0, row["attempt"] - 1), error=row["reason"])
                    for row in rows
                ],
            )
        if reports:
            self._queue.waker.wake()
        return len(rows)


def key_of(account: AccountId, url: str) -> int:
    """The fairness key of a message: one for each account and host, so that a dead host holds up only what is for it."""
    digest = hashlib.blake2b(f"{account}\0{authority_of(url)}".encode(), digest_size=8).digest()
    return PUSH_KEY | int.from_bytes(digest, "big") >> 2


def _wishes(publication: Publication, limits: Limits) -> Iterable[Wanted]:
    if publication.source is not None:
        return  # a callback counts at the lane of its source alone
    if publication.queue is not None:
        yield Wanted(publication.account, "queue", publication.queue, 1)
    if (flow := publication.spec.flow_control) is not None:
        yield Wanted(publication.account, "flow", flow.key, flow.parallelism, flow.rate, flow.period_s)
    if limits.parallelism is not None:
        yield Wanted(publication.account, "all", "", limits.parallelism)


def _dedup(limits: Limits, publication: Publication) -> NewJob:
    key = None if publication.dedup is None else f"v2:{publication.account}:{publication.dedup}"
    return NewJob(PUSH, dedup_id=key, dedup_window=timedelta(seconds=limits.dedup_s))


def _bodies(
    publications: Sequence[Publication], owners: Sequence[tuple[JobId, bool]]
) -> Iterable[tuple[JobId | None, bytes | None]]:
    """For each where its body lies, and the body itself where it is the first that has it."""
    first: dict[int, JobId] = {}
    for index, (publication, (job, is_new)) in enumerate(zip(publications, owners, strict=True)):
        shared = index if publication.body_of is None else publication.body_of
        if not is_new or not publication.body:
            yield None, None
        elif shared in first:
            yield first[shared], None
        else:
            first[shared] = job
            yield job, publication.body


def _row(
    job: JobId,
    salt: int,
    publication: Publication,
    limits: Limits,
    gates: Mapping[GateKey, int],
    payload: JobId | None,
    body: bytes | None,
) -> tuple[object, ...]:
    account, spec = publication.account, publication.spec
    gate = {wish.kind: gates[GateKey(wish.account, wish.kind, wish.name)] for wish in _wishes(publication, limits)}
    return (
        job, account, salt, key_of(account, publication.url), spec.retries + 1,
        (spec.timeout_s or limits.timeout_s) + TIMEOUT_MARGIN_S, publication.url, host_of(publication.url), spec.method,
        _encode(spec).decode(), payload, body, publication.not_before, float(spec.delay_s),
        gate.get("queue"), gate.get("flow"), gate.get("all"), publication.source, publication.queue,
        publication.schedule, publication.topic, ",".join(publication.labels) or None, publication.caller_ip,
    )  # fmt: skip


def _load(row: Record) -> Load:
    return Load(
        message_of(row), row["body"] if row["body_bytes"] else b"", row["body_bytes"],
        row["key_id"], row["keys"],
    )  # fmt: skip


def _is_dead(end: Ended) -> bool:
    match end.outcome:
        case Discarded():
            return True
        case Retryable():
            return end.job.attempt >= end.job.max_attempts
        case _:
            return False


def _events(end: Ended) -> Iterable[_Event]:
    message, account, retried = end.load.message.id.job, end.load.message.account, end.job.attempt - 1
    attempted, status = end.attempted, end.attempted.status or None
    outcome = end.outcome
    if isinstance(outcome, Completed):
        yield _Event(message, account, State.DELIVERED, retried, status=status)
    if not isinstance(outcome, Retryable | Discarded):
        return
    header = _encode(attempted.header).decode() if attempted.header else None
    told = (status, attempted.error, header, attempted.body or None)
    yield _Event(message, account, State.ERROR, retried, None, *told)
    if _is_dead(end):
        yield _Event(message, account, State.FAILED, retried, None, *told)
    elif isinstance(outcome, Retryable):
        yield _Event(message, account, State.RETRY, retried, outcome.delay_s)


def _bytes(end: Ended) -> int:
    """About what the statements hold of it that write its end: a failure tells of the response twice, each callback
    carries both bodies as base64.
    """
    spec, response = end.load.message.spec, len(end.attempted.body)
    reports = sum(callback is not None for callback in (spec.callback, spec.failure_callback))
    return 2 * response + reports * (response + len(end.body)) * 4 // 3


def _may_report(end: Ended) -> bool:
    message = end.load.message
    return message.source is None and (message.spec.callback or message.spec.failure_callback) is not None


def _endings(ends: Sequence[Ended]) -> tuple[list[Settlement], Columns]:
    """What the queue needs to settle them."""
    settlements = [Settlement(end.job, end.outcome, end.took_ms) for end in ends]
    return settlements, _columns([event for end in ends for event in _events(end)])


def _columns(events: Sequence[_Event]) -> Columns:
    return (
        [event.account for event in events],
        [event.message for event in events],
        [event.state for event in events],
        [event.retried for event in events],
        [event.next_s for event in events],
        [event.status for event in events],
        [None if event.error is None else storable(event.error) for event in events],
        [None if event.header is None else event.header.replace("\\u0000", "\\ufffd") for event in events],
        [event.body for event in events],
    )


async def _tell(tx: Session, events: Sequence[_Event]) -> None:
    if events:
        await tx.execute(_EVENTS, *_columns(events))
