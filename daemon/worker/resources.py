"""Resources of REST collections: what a listing leaves to be read, and the batches that read it in two steps.

A listing compares in the database and enqueues `resources` jobs of up to a hundred ids each, in the transaction that
notes it: only ids that are new, changed or of unknown version, and that no open batch has. A batch makes the cheap first
call where the list did not tell the version, the expensive second one only where the version differs, and one bulk
write. A resource that keeps failing leaves its batch as a `resources` job of its own (tier 2); what trying again cannot
mend goes to the dead letters (tier 3). The others are written.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import NamedTuple

import anyio
import msgspec
import stamina
import structlog

from daemon.db import ledger, pauses, resources, streams
from daemon.db.pool import Session
from daemon.db.resources import Counts, Handed, Known, ListedItem, Noted, Write
from daemon.domain.collection import Listed
from daemon.domain.connection import Connection, ConnectionId, Stream, StreamId, TenantId
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    DataRejectedError,
    DeadlockError,
    PermanentError,
    StorageUnavailableError,
    TransientError,
)
from daemon.domain.job import (
    Cancelled,
    Completed,
    Job,
    JobId,
    NewJob,
    Outcome,
    Retryable,
    Settlement,
    Snoozed,
    Summary,
)
from daemon.domain.ports import Answer
from daemon.http_exits import Exits
from daemon.pollers._resource_spec import Spec, parse_settings
from daemon.pollers.http_resource import SOURCE, Look, Reader, Reading, digest_of, exits_of
from daemon.queue.burial import bury, mourn
from daemon.queue.postgres import PostgresQueue
from daemon.sinks.ledger import Effect, Lot
from daemon.telemetry.traces import span
from daemon.worker.caller import Http
from daemon.worker.failures import as_one_error
from daemon.worker.poll import (
    BUDGET_RATIO,
    POLL_ATTEMPTS_MAX,
    RETRY_DEDUP,
    RETRY_DELAYS_S,
    SPLIT_AFTER_LOSSES,
    PollDeps,
    grains_of,
)

RESOURCES = "resources"
BATCH_IDS = 100
BATCH_TIMEOUT_S = 300.0
BATCH_BYTES_MAX = 64 * 1024 * 1024
"""Of contents that a batch holds at once; what is left then has a batch of its own."""
TAKE_IDS = 5_000
SLOT_WAIT_S = 2.0
"""How soon a batch looks again whether another one of its collection has given up its slot, where few wait for one."""
SLOT_LOOKS = 2.0
"""Where many wait, for each slot so many a second look whether it is free."""
EXITS_S = 30.0
"""How soon a batch is tried again whose worker lacks the credential of its exits."""
STILL_S = 300.0
"""How soon a batch looks again whether its connection is active."""
LOST_RATIO = 0.5
"""A listing that lacks more of what is stored than this is believed when the next whole one lacks it too."""
SUSPICIOUS_IDS = 10
"""From this size on a batch most of which is not found looks a second time: its path may be wrong."""
OUTAGE_IDS = 20
"""So many resources that fail for now, with none between that does not, are no longer their own failure but the API's."""
NO_BREAKER = 1 << 31
"""Failures in a row that open the governor's circuit: the tries of a bad resource in each of many batches come in a row
too, so a batch tells an outage itself.
"""
REASON_LENGTH = 200

_Looking = Callable[[list[str]], Awaitable[None]]

log = structlog.get_logger()


class ResourceOrder(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a `resources` job. A poll_seq never travels in it (law 4).

    Attributes:
        versions: as the list told them, in the order of `ids`; None where it did not.
        tries: how often these ids have failed already.
    """

    connection: int
    ids: list[str]
    versions: list[str | None] = []
    tries: int = 0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    def only(self, ids: Sequence[str], *, tries: int) -> ResourceOrder:
        """The same for some of the ids."""
        listed = self.listed
        return ResourceOrder(self.connection, [*ids], [listed.get(id_) for id_ in ids], tries)

    @property
    def listed(self) -> dict[str, str | None]:
        return dict(zip(self.ids, self.versions or [None] * len(self.ids), strict=True))


# ── Listings ────────────────────────────────────────────────────────────────────────────────────


class ResourceTaker:
    """Takes what a listing holds: notes it, and enqueues what is to be read."""

    def __init__(self, queue: PostgresQueue) -> None:
        self._queue = queue

    async def take(self, tx: Session, lots: Sequence[Lot]) -> Mapping[StreamId, Effect]:
        items = [
            ListedItem(lot.stream.id, item.id, item.version, lot.seq)
            for lot in lots
            for item in lot.part.items
            if isinstance(item, Listed)
        ]
        newest = {lot.stream.id: lot for lot in lots}
        noted: list[Noted] = []
        effects: dict[StreamId, Effect] = {}
        for stream, news in (await resources.take(tx, items)).items():
            lot = newest[stream]
            connection = lot.connection
            batches = await self._enqueue(tx, connection.id, connection.tenant_id, stream, lot.seq, news.due)
            saved = news.unchanged * parse_settings(connection.target.settings).calls_each
            is_whole = Reading.decode(lot.part.digest).is_whole
            noted.append(
                Noted(stream, connection.tenant_id, lot.seq, is_whole, news.listed, news.unchanged, batches, saved)
            )
            effects[stream] = Effect(items=news.listed)
        await resources.note_listed(tx, noted)
        return effects

    async def end(self, tx: Session, ends: Mapping[StreamId, int]) -> Mapping[StreamId, Effect]:
        effects: dict[StreamId, Effect] = {}
        for end in await resources.ended(tx, ends):
            seq = ends[end.stream]
            gone = withheld = listed = 0
            if not end.is_listed:
                listed = await self._enqueue_stored(tx, end, seq)
            elif end.is_whole:
                known, missing = await resources.missing(tx, end.stream, seq)
                # What the whole listing before did not hold either, is gone without doubt.
                is_believed = missing <= known * LOST_RATIO
                gone = await resources.go(tx, end.stream, seq if is_believed else min(seq, end.whole_seq), seq)
                withheld = 0 if is_believed else missing - gone
                if withheld:
                    log.warning("resources.vanished_withheld", stream=end.stream, known=known, missing=withheld)
            await resources.end_run(tx, end, seq, gone, withheld)
            effects[end.stream] = Effect(vanished=gone, withheld=withheld, items=listed)
        await resources.tidy_batches(tx, ends)
        return effects

    async def _enqueue_stored(self, tx: Session, end: resources.Ended, seq: int) -> int:
        """Where the API cannot list, what is stored stands for a list."""
        count, after = 0, ""
        connection = await resources.connection_of(tx, end.stream)
        while ids := await resources.stored_ids(tx, end.stream, seq, after, TAKE_IDS):
            news = (await resources.take(tx, [ListedItem(end.stream, id_, None, seq) for id_ in ids]))[end.stream]
            batches = await self._enqueue(tx, connection, end.tenant, end.stream, seq, news.due)
            await resources.note_listed(tx, [Noted(end.stream, end.tenant, seq, False, news.listed, 0, batches, 0)])
            count, after = count + len(ids), ids[-1]
        return count

    async def _enqueue(
        self,
        tx: Session,
        connection: ConnectionId,
        tenant: TenantId,
        stream: StreamId,
        seq: int,
        due: Sequence[tuple[str, str | None]],
    ) -> int:
        """Batches of what is due. Returns how many."""
        parts = [due[at : at + BATCH_IDS] for at in range(0, len(due), BATCH_IDS)]
        orders = [ResourceOrder(connection, [id_ for id_, _ in part], [v for _, v in part]) for part in parts]
        jobs = [_job(order, tenant, f"{RESOURCES} {stream} {seq} {digest_of(order.encode())}") for order in orders]
        ids = await self._queue.enqueue(jobs, tx)
        handed = [Handed(stream, id_, job, seq) for job, part in zip(ids, parts, strict=True) for id_, _ in part]
        await resources.hand_out(tx, handed)
        return len(jobs)


def _job(order: ResourceOrder, tenant: TenantId, dedup_id: str | None, delay_s: float = 0.0) -> NewJob:
    return NewJob(
        RESOURCES,
        order.encode(),
        key=tenant,
        delay=timedelta(seconds=delay_s),
        dedup_id=dedup_id,
        dedup_window=RETRY_DEDUP,
        max_attempts=POLL_ATTEMPTS_MAX,
        timeout_s=BATCH_TIMEOUT_S,
    )


# ── Batches ─────────────────────────────────────────────────────────────────────────────────────


async def run_resources(job: Job, deps: PollDeps) -> Outcome:
    """Run a `resources` job to its end; see the module for what becomes of failures.

    Raises:
        LeaseLostError: another replica has the job; nothing was written.
        StorageUnavailableError: Postgres stayed away; nothing was written, and the job runs again.
    """
    order = msgspec.json.decode(job.body, type=ResourceOrder)
    ids = [ConnectionId(order.connection)]
    loaded, _ = await streams.load(
        deps.db, deps.keyring, ids, lambda c: grains_of(deps.pollers, c), await deps.db.now()
    )
    if not loaded or loaded[0].connection.state == "archived" or SOURCE not in loaded[0].streams:
        return Cancelled("its connection is archived")
    connection, stream = loaded[0].connection, loaded[0].streams[SOURCE]
    if connection.state != "active" or loaded[0].problem is not None:
        return Snoozed(
            STILL_S, f"its connection is {connection.state}: {loaded[0].problem or 'it waits until resumed'}"
        )
    if job.losses >= SPLIT_AFTER_LOSSES and len(order.ids) > 1:
        return await _split(job, order, connection, stream, deps)
    spec = parse_settings(connection.target.settings)
    async with deps.db.transaction() as tx:
        has_slot = await resources.open_batch(
            tx, job.id, job.token, stream.id, connection.tenant_id, spec.share.batches, is_retry=order.tries > 0
        )
    if not has_slot:
        crowd_s = await resources.waiting(deps.db, stream.id) / (SLOT_LOOKS * (spec.share.batches or 1))
        wait_s = max(SLOT_WAIT_S, crowd_s) * random.uniform(0.5, 1.5)  # noqa: S311 (spreads load, guards nothing)
        return Snoozed(wait_s, "as many batches run as the limits allow")
    deps.governor.learn(await pauses.load(deps.db))
    try:
        exits = exits_of(spec)
    except PermanentError as error:  # another replica may have what this one lacks
        return Retryable(str(error), EXITS_S)
    batch = _Batch(job, order, connection, stream, spec, deps, exits)
    await batch.read()
    await pauses.store(deps.db, deps.governor.take_news())
    summary, counts = await batch.book()
    log.info(
        "resources.batch_finished",
        job_id=job.id,
        connection=connection.label,
        tries=order.tries,
        gone=counts.gone,
        refused=batch.refused,
        **asdict(summary),
    )
    return Completed(is_settled=True)


async def _split(job: Job, order: ResourceOrder, connection: Connection, stream: Stream, deps: PollDeps) -> Outcome:
    """Hand every id of a batch that keeps losing its worker to a job of its own: one of them may be what kills it."""
    alone = [_job(order.only([id_], tries=order.tries), connection.tenant_id, None) for id_ in order.ids]
    async with deps.db.transaction() as tx:
        await deps.queue.lock_lease(tx, job)
        heirs = await deps.queue.enqueue(alone, tx)
        seq = await resources.batch_seq(tx, job.id)
        await resources.hand_out(
            tx, [Handed(stream.id, id_, heir, seq, order.tries > 0) for id_, heir in zip(order.ids, heirs, strict=True)]
        )
        await resources.close_batch(tx, job.id, Counts())
        await deps.queue.settle_in(tx, Settlement(job, Completed(note="split after lost workers"), 0))
    log.warning("resources.split", ids=len(order.ids), losses=job.losses)
    return Completed(is_settled=True)


class _Failure(NamedTuple):
    """Why a resource could not be read. `is_final`: trying again changes nothing."""

    reason: str
    is_final: bool
    retry_after_s: float = 0.0


class _Paced:
    """The door out at a steady pace: every request, tries included, waits for its turn."""

    def __init__(self, http: Http, per_second: float) -> None:
        self._http = http
        self._interval_s = 1 / per_second
        self._next_at = 0.0

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        await self._turn()
        return await self._http.get(base_url, path, params, headers)

    async def post(self, base_url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        await self._turn()
        return await self._http.post(base_url, path, body, headers)

    async def _turn(self) -> None:
        now = anyio.current_time()
        start = max(now, self._next_at)
        self._next_at = start + self._interval_s
        await anyio.sleep(start - now)


class _Batch:
    """One attempt on a batch: `read` it, then `book` it once."""

    def __init__(
        self,
        job: Job,
        order: ResourceOrder,
        connection: Connection,
        stream: Stream,
        spec: Spec,
        deps: PollDeps,
        exits: Exits | None,
    ) -> None:
        share = spec.share
        self._job = job
        self._order = order
        self._connection = connection
        self._stream = stream
        self._spec = spec
        self._deps = deps
        self._concurrency = share.concurrency
        self._caller = deps.caller(
            connection, None if share.per_second is None else _Paced(deps.http, share.per_second)
        )
        self._reader = Reader(spec, connection.target, self._caller, exits)
        self._began = deps.monotonic()
        self._seq = 0
        self._versions = order.listed
        self._known: Mapping[str, Known] = {}
        self._writes: dict[str, Write] = {}
        self._failed: dict[str, _Failure] = {}
        self._bytes = 0
        self._parked: str | None = None
        self._outage: _Failure | None = None
        self._in_a_row = 0
        self._scope = anyio.CancelScope()
        self.refused = 0

    # Reading

    async def read(self) -> None:
        """Look at every id, `concurrency` of them at a time; what time, memory or the key do not allow stays unread."""
        self._known = await resources.known(self._deps.db, self._stream.id, self._order.ids)
        self._seq = await self._deps.seqs.next()
        if self._seq <= max((known.read_seq for known in self._known.values()), default=0):
            raise PermanentError(f"poll_seq has fallen behind ({self._seq}); stop tallyd and run `tallyd doctor --fix`")
        deadline = anyio.current_time() + self._job.timeout_s * BUDGET_RATIO
        with anyio.CancelScope(deadline=deadline) as self._scope:
            if self._spec.check is not None and self._spec.check.ids_param is not None:
                size = self._spec.check.ids_size
                unknown = [id_ for id_ in self._order.ids if self._versions[id_] is None]
                chunks = [unknown[at : at + size] for at in range(0, len(unknown), size)]
                await self._side_by_side(chunks, self._check_many)
            await self._side_by_side([[id_] for id_ in self._order.ids], self._look)

    async def _side_by_side(self, chunks: Sequence[list[str]], look: _Looking) -> None:
        left: Iterator[list[str]] = iter(chunks)

        async def work() -> None:
            for ids in left:
                if self._bytes >= BATCH_BYTES_MAX:
                    return
                await self._guarded(ids, look)

        async with as_one_error(), anyio.create_task_group() as group:
            for _ in range(min(self._concurrency, len(chunks))):
                group.start_soon(work)

    async def _guarded(self, ids: list[str], look: _Looking) -> None:
        """Note how it went wrong. It catches every exception, as a poll does for a source: one resource is the unit that
        fails. A key that is refused, and an API that is down, end the batch.
        """
        try:
            await look(ids)
            self._in_a_row = 0
            return
        except CredentialError as error:
            self._parked = str(error)
            self._scope.cancel()
            return
        except TransientError as error:
            failure = _Failure(str(error), is_final=False, retry_after_s=error.retry_after_s or 0.0)
            self._in_a_row += len(ids)
            if self._in_a_row >= OUTAGE_IDS:
                self._outage = failure
                self._scope.cancel()
        except PermanentError as error:
            failure = _Failure(str(error), is_final=True)
        except Exception as error:
            log.exception("resource.crashed", connection=self._connection.label, ids=ids[:3])
            failure = _Failure(f"reading it crashed: {type(error).__name__}: {error}", is_final=True)
        self._failed.update(dict.fromkeys(ids, failure))

    async def _check_many(self, ids: list[str]) -> None:
        """The first call for many. One id that the API refuses must not cost the others theirs: halves tell which."""
        try:
            self._versions |= await self._reader.check_many(ids)
        except BadRequestError as error:
            if len(ids) == 1 or error.status not in _PICKY:
                raise
            middle = len(ids) // 2
            await self._guarded(ids[:middle], self._check_many)
            await self._guarded(ids[middle:], self._check_many)

    async def _look(self, ids: list[str]) -> None:
        """The two steps for one resource."""
        (id_,) = ids
        if id_ in self._failed:
            return
        known = self._known.get(id_)
        stored = None if known is None or known.is_gone else known.version
        version = self._versions.get(id_)
        check = self._spec.check
        if version is None and check is not None and check.path is not None and check.ids_param is None:
            look = await self._reader.check(id_, stored)
            if look.is_same or look.is_gone:
                self._note(id_, look)
                return
            version = look.version
        if version is not None and version == stored:
            self._writes[id_] = Write(id_)
            return
        look = await self._reader.read(id_, stored)
        if look.content is not None:
            look = look._replace(version=look.version or version or digest_of(look.content))
            look = look._replace(is_same=look.version == stored)
        self._note(id_, look)

    def _note(self, id_: str, look: Look) -> None:
        if look.is_gone:
            self._writes[id_] = Write(id_, is_gone=True)
        elif look.is_same:
            self._writes[id_] = Write(id_)
        else:
            assert look.content is not None
            self._bytes += len(look.content)
            self._writes[id_] = Write(id_, look.version, look.content.decode())

    # Booking

    async def book(self) -> tuple[Summary, Counts]:
        """Write what was read, in one transaction with what follows from the rest, the summary and the settling."""
        self._suspect()
        try:
            return await self._commit()
        except DataRejectedError:
            culprits = await self._culprits([write for write in self._writes.values() if write.content is not None])
            if not culprits:
                raise
            for id_, error in culprits.items():
                del self._writes[id_]
                self._failed[id_] = _Failure(f"Postgres refuses it: {error}", is_final=True)
            return await self._commit()

    def _suspect(self) -> None:
        """Most of a batch is not found: looked at a second time before it is believed."""
        gone = [write.id for write in self._writes.values() if write.is_gone]
        if self._order.tries == 0 and len(self._order.ids) >= SUSPICIOUS_IDS and len(gone) * 2 > len(self._order.ids):
            for id_ in gone:
                del self._writes[id_]
                self._failed[id_] = _Failure(
                    "it is not found, as most of its batch; looked at again before that is believed", is_final=False
                )

    async def _culprits(self, writes: Sequence[Write]) -> dict[str, DataRejectedError]:
        """Bisect: which contents Postgres refuses. Nothing is written."""
        try:
            async with self._deps.db.transaction() as tx:
                await self._deps.queue.lock_lease(tx, self._job)
                await resources.write(tx, self._stream.id, self._connection.tenant_id, self._seq, writes)
                raise _Rollback
        except _Rollback:
            return {}
        except DataRejectedError as error:
            if len(writes) == 1:
                return {writes[0].id: error}
        middle = len(writes) // 2
        return await self._culprits(writes[:middle]) | await self._culprits(writes[middle:])

    async def _commit(self) -> tuple[Summary, Counts]:
        # Over a short absence of the database too: the fence makes a repeated commit harmless.
        async for attempt in stamina.retry_context(
            on=(StorageUnavailableError, DeadlockError), attempts=4, timeout=15.0
        ):
            with attempt, span("flush", tallyd__pieces=len(self._writes)):
                async with self._deps.db.transaction() as tx:
                    await self._deps.queue.lock_lease(tx, self._job)
                    return await self._write(tx)
        raise AssertionError("unreachable")

    async def _write(self, tx: Session) -> tuple[Summary, Counts]:
        order, stream, tenant = self._order, self._stream.id, self._connection.tenant_id
        again, dead, left = self._sorted_out()
        graves = await self._bury(tx, dead)
        writes = [*self._writes.values(), *(Write(id_, dead_job=job) for id_, job in graves.items())]
        written = await resources.write(tx, stream, tenant, self._seq, writes)
        await self._follow_up(tx, again, left)
        if self._parked is not None:
            end = ledger.ConnectionEnd(self._connection.id, False, self._parked, self._connection.sealed)
            await ledger.end_connections(tx, [end], self._job.id)
        self.refused = written.refused
        requests, duration_s = self._caller.requests, self._deps.monotonic() - self._began
        done = len(self._writes)
        saved = max(0, (done + len(dead) + len(again)) * self._spec.calls_each - requests)
        unchanged = sum(write.content is None and not write.is_gone for write in self._writes.values())
        was_failed = len(order.ids) if order.tries else 0
        failed = len(again) + len(dead) + (len(left) if order.tries else 0) - was_failed
        counts = Counts(written.changed, unchanged, failed, written.gone, requests, saved, 1 if order.tries == 0 else 0)
        await resources.close_batch(tx, self._job.id, counts)
        summary = Summary(
            connections=1,
            unchanged=unchanged,
            stored=written.changed,
            retried=len(again),
            dead=len(dead),
            requests=requests,
            requests_saved=saved,
            rows=written.changed + written.gone,
            duration_s=round(duration_s, 3),
            items=len(order.ids),
        )
        await ledger.write_summary(tx, self._job.id, self._job.kind, None, summary)
        settlement = Settlement(self._job, Completed(), int(duration_s * 1000))
        await self._deps.queue.settle_in(tx, settlement)
        return summary, counts

    def _sorted_out(self) -> tuple[dict[str, _Failure], dict[str, _Failure], list[str]]:
        """What is tried again, what is dead, and what was not looked at."""
        is_last = self._order.tries >= len(RETRY_DELAYS_S)
        dead = {id_: failure for id_, failure in self._failed.items() if failure.is_final or is_last}
        again = {id_: failure for id_, failure in self._failed.items() if id_ not in dead}
        left = [id_ for id_ in self._order.ids if id_ not in self._writes and id_ not in self._failed]
        failure = self._outage
        if self._parked is None and not self._writes and not self._failed:
            # Nothing at all was read in the time of a batch: that is a failure, not work that is left over.
            failure = _Failure("the batch's time ran out", is_final=is_last)
        if left and failure is not None:
            (dead if is_last else again).update(dict.fromkeys(left, failure))
            left = []
        return again, dead, left

    async def _bury(self, tx: Session, dead: Mapping[str, _Failure]) -> dict[str, JobId]:
        """One dead letter of those that have none yet; to the letters of the others the new failure is noted."""
        if not dead:
            return {}
        known = await resources.letters(tx, self._stream.id, list(dead))
        told: dict[JobId, list[str]] = defaultdict(list)
        for id_, job in known.items():
            told[job].append(id_)
        await mourn(tx, {job: _reason(ids, dead) for job, ids in told.items()})
        fresh = [id_ for id_ in dead if id_ not in known]
        if not fresh:
            return known
        letter = _job(self._order.only(fresh, tries=0), self._connection.tenant_id, None)
        (job,) = await bury(tx, [(letter, _reason(fresh, dead))])
        return known | dict.fromkeys(fresh, job)

    async def _follow_up(self, tx: Session, again: Mapping[str, _Failure], left: Sequence[str]) -> None:
        order, jobs = self._order, list[NewJob]()
        parts: list[tuple[list[str], bool]] = []
        tenant = self._connection.tenant_id
        if again:
            longest = max(failure.retry_after_s for failure in again.values())
            delay_s = max(RETRY_DELAYS_S[order.tries], longest)
            jobs.append(_job(order.only(list(again), tries=order.tries + 1), tenant, None, delay_s))
            parts.append((list(again), True))
        if left:
            delay_s = 0.0 if self._parked is None else RETRY_DELAYS_S[0]
            jobs.append(_job(order.only(left, tries=order.tries), tenant, None, delay_s))
            parts.append((list(left), order.tries > 0))
        if not jobs:
            return
        seq = await resources.batch_seq(tx, self._job.id)
        heirs = await self._deps.queue.enqueue(jobs, tx)
        handed = [
            Handed(self._stream.id, id_, heir, seq, is_retry)
            for heir, (ids, is_retry) in zip(heirs, parts, strict=True)
            for id_ in ids
        ]
        await resources.hand_out(tx, handed)


_PICKY = frozenset({400, 413, 414, 422})
"""Statuses with which a call for many may be refused for the sake of one, or for their number."""


class _Rollback(Exception):  # noqa: N818 - not an error: it ends a rehearsal
    pass


def _reason(ids: Sequence[str], failures: Mapping[str, _Failure]) -> str:
    """For a person: which resources, and why, as far as a note has room."""
    told = "; ".join(f"{id_}: {failures[id_].reason[:REASON_LENGTH]}" for id_ in ids)
    return f"{len(ids)} resource{'s' if len(ids) > 1 else ''}: {told}"
