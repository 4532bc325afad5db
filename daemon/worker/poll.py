"""A `poll` job: up to a hundred connections, read side by side, booked in bulk.

The smallest unit that fails is one source of one connection. A transient failure that outlives tier 1 leaves the batch
as a `poll_one` job of its own (tier 2); what trying again cannot mend goes to the dead letters (tier 3). The batch
settles in its last flush, so that after any crash it simply runs again.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple, cast

import anyio
import msgspec
import structlog
from anyio.streams.memory import MemoryObjectSendStream

from daemon.db import ledger, pauses, streams, ticks
from daemon.db.ledger import StreamEnd
from daemon.db.pool import Database
from daemon.db.secrets import Keyring
from daemon.domain.collection import Collected
from daemon.domain.connection import Connection, ConnectionId, Stream
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    ForbiddenError,
    HistoryFloorError,
    PermanentError,
    SchemaDriftError,
    TransientError,
)
from daemon.domain.job import Completed, Discarded, Job, NewJob, Outcome, Retryable, Settlement, Snoozed, Summary
from daemon.domain.ports import Collector, Poller, Report, SourceSpec
from daemon.domain.record import Grain, GrainId, Totals
from daemon.domain.window import Window, floor_to
from daemon.queue.postgres import PostgresQueue
from daemon.records.identity import Keyer, grain_id
from daemon.records.normalize import Price, ready_buckets
from daemon.records.restate import Witness
from daemon.sinks.ledger import LedgerSink, Lot, Piece
from daemon.telemetry.traces import span
from daemon.worker.bookkeeper import Bookkeeper, SourceEnd, Turn
from daemon.worker.caller import CountingCaller, Http, RetrySettings
from daemon.worker.failures import as_one_error
from daemon.worker.governor import Governor
from daemon.worker.ladder import Chunk, Mode, is_due, plan
from daemon.worker.seqs import SeqSource

POLL, POLL_ONE = "poll", "poll_one"
SPLIT_AFTER_LOSSES = 2
"""A batch that lost its worker this often is split: one of its connections may be what kills them."""
RETRY_DELAYS_S = (30.0, 120.0, 480.0, 1200.0)
"""Between the five tries of a `poll_one`, which so has about half an hour; `Retry-After` counts if it is longer."""
POLL_ATTEMPTS_MAX = 50
"""Of a batch, whose sources have attempts of their own: what fails it as a whole is Postgres, sooner or later back."""
RETRY_DEDUP = timedelta(days=1)
"""As long as a `Retry-After` may be: while a source's `poll_one` waits, another failure adds none."""
EVIDENCE_BYTES_MAX = 1_000
BUDGET_RATIO = 0.8
"""Of a job's time-out: what is not read by then leaves the batch as `poll_one` jobs."""
TURN_S = 5.0
"""How soon a poll that waits for its turn looks again."""
NOT_FOUND = 404
INBOX_ITEMS = 32

log = structlog.get_logger()


class PollOrder(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a `poll` or `poll_one` job. A poll_seq never travels in it (law 4).

    `request_id` names the delivery that asked for the tick; `trace` is its W3C traceparent. `in_turn`: not while another
    job polls the connection, since the newer reading of a collection bars the older one.
    """

    connections: list[int]
    slot: datetime | None = None
    request_id: str | None = None
    trace: str | None = None
    mode: Mode = Mode.TICK
    source: str | None = None
    start: datetime | None = None
    end: datetime | None = None
    in_turn: bool = False

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


@dataclass(frozen=True, slots=True)
class PollSettings:
    """Limits of one poll job.

    Attributes:
        connections: polled side by side in one job; each makes one request at a time.
        history_chunks: page chains of unread history per source and tick, so that catching up never starves the rest.
        keep: how far back the ledger is kept; what it has dropped must not be read again. None: for ever.
    """

    connections: int = 50
    history_chunks: int = 8
    keep: timedelta | None = None
    retry: RetrySettings = field(default_factory=RetrySettings)


@dataclass(frozen=True, slots=True)
class PollDeps:
    """What a poll job works with."""

    db: Database
    queue: PostgresQueue
    keyring: Keyring
    pollers: Mapping[str, Poller]
    http: Http
    governor: Governor
    sink: LedgerSink
    price: Price
    seqs: SeqSource
    settings: PollSettings
    monotonic: Callable[[], float]

    def caller(self, connection: Connection, http: Http | None = None) -> CountingCaller:
        """A connection's door to its provider, for one job.

        Args:
            http: in place of the process's own door.
        """
        org = connection.org_id or f"connection-{connection.id}"
        return CountingCaller(http or self.http, self.governor, connection.target, org, self.settings.retry)


class _Context(NamedTuple):
    """What the reads of one connection share."""

    deps: PollDeps
    order: PollOrder
    connection: Connection
    poller: Poller
    caller: CountingCaller
    now: datetime
    outbox: MemoryObjectSendStream[Piece | Lot | Turn]
    turn: Turn


async def run_poll(job: Job, deps: PollDeps) -> Outcome:
    """Run a `poll` or `poll_one` job to its end; see the module for what becomes of failures.

    Raises:
        LeaseLostError: another replica has the job; nothing more was written.
        StorageUnavailableError: Postgres stayed away; what was booked is booked, the rest is done by the next run.
    """
    order = msgspec.json.decode(job.body, type=PollOrder)
    if job.losses >= SPLIT_AFTER_LOSSES and len(order.connections) > 1:
        return await _split(job, order, deps)
    began = deps.monotonic()
    now = await deps.db.now()
    ids = [ConnectionId(id_) for id_ in order.connections]
    if order.in_turn and not await ticks.take_turn(deps.db, job.id, ids):
        return Snoozed(TURN_S, "another job polls it")
    loaded, now = await streams.load(
        deps.db, deps.keyring, ids, lambda c: grains_of(deps.pollers, c), floor_to(now - _held_reach(deps), 3600)
    )
    deps.governor.learn(await pauses.load(deps.db))
    takes_streams = order.mode in (Mode.TICK, Mode.POLL)
    keeper = Bookkeeper(
        job, order.slot, deps.sink, deps.queue, takes_streams=takes_streams, request_id=order.request_id
    )
    outbox, inbox = anyio.create_memory_object_stream[Piece | Lot | Turn](INBOX_ITEMS)
    places = anyio.CapacityLimiter(deps.settings.connections)
    deadline = anyio.current_time() + job.timeout_s * BUDGET_RATIO
    async with as_one_error(), anyio.create_task_group() as group:
        group.start_soon(keeper.run, inbox)
        async with outbox, anyio.create_task_group() as polls:
            for item in loaded:
                polls.start_soon(_take_turn, item, order, deps, now, places, deadline, outbox)
    await pauses.store(deps.db, deps.governor.take_news())

    def seconds() -> float:
        return deps.monotonic() - began

    if order.source is not None:
        summary, bad = await keeper.close_one(seconds)
        _log_batch(job, order, summary, keeper)
        if bad is None:
            return Completed(is_settled=True)
        if bad.status == "dead":
            return Discarded(bad.reason)
        delay = RETRY_DELAYS_S[min(job.attempt, len(RETRY_DELAYS_S)) - 1]
        return Retryable(bad.reason, max(delay, bad.retry_after_s or 0.0))
    summary = await keeper.close(lambda c, end: _poll_one(order, c, end), seconds)
    _log_batch(job, order, summary, keeper)
    return Completed(is_settled=True)


async def _split(job: Job, order: PollOrder, deps: PollDeps) -> Outcome:
    """Hand every connection of a batch that keeps losing its worker to a job of its own.

    For its tick the batch is done: the jobs that follow belong to none, or they would count as batches.
    """
    alone = [
        NewJob(
            job.kind,
            msgspec.structs.replace(order, connections=[id_], slot=None).encode(),
            max_attempts=job.max_attempts,
            timeout_s=job.timeout_s,
        )
        for id_ in order.connections
    ]
    async with deps.db.transaction() as tx:
        await deps.queue.lock_lease(tx, job)
        heirs = await deps.queue.enqueue(alone, tx)
        await ticks.hand_over(tx, job.id, [ConnectionId(id_) for id_ in order.connections], heirs)
        await ledger.write_summary(tx, job.id, job.kind, order.slot, Summary(), order.request_id)
        await deps.queue.settle_in(tx, Settlement(job, Completed(note="split after lost workers"), 0))
    log.warning("batch.split", connections=len(alone), losses=job.losses)
    return Completed(is_settled=True)


def _log_batch(job: Job, order: PollOrder, summary: Summary, keeper: Bookkeeper) -> None:
    fields = asdict(summary) | {"withheld": keeper.withheld, "refused": keeper.refused}
    log.info("batch.finished", job_id=job.id, slot=order.slot, mode=order.mode.value, **fields)


def _poll_one(order: PollOrder, connection: Connection, end: SourceEnd) -> NewJob:
    """The same read, of one source, as a job of its own."""
    body = msgspec.structs.replace(order, connections=[connection.id], source=end.stream.source)
    delay = max(RETRY_DELAYS_S[0], end.retry_after_s or 0.0)
    return NewJob(
        POLL_ONE,
        body.encode(),
        key=connection.tenant_id,
        delay=timedelta(seconds=delay),
        dedup_id=f"{POLL_ONE} {end.stream.id} {order.mode.value} {order.start} {order.end}",
        dedup_window=RETRY_DEDUP,
        only_unclaimed=True,
        max_attempts=len(RETRY_DELAYS_S) + 1,
        timeout_s=600.0,
    )


def grains_of(pollers: Mapping[str, Poller], connection: Connection) -> dict[str, tuple[GrainId, Grain]]:
    """Each source of the connection's provider, with the grain that the connection's settings ask for."""
    poller = pollers.get(connection.provider)
    if poller is None:
        return {}
    grains = {source: poller.grain(source, connection.target.settings) for source in poller.sources}
    return {source: (grain_id(grain), grain) for source, grain in grains.items()}


def _held_reach(deps: PollDeps) -> timedelta:
    probing = [
        spec.ladder.young for poller in deps.pollers.values() for spec in poller.sources.values() if spec.can_probe
    ]
    return max(probing, default=timedelta(0))


async def _take_turn(
    item: streams.Loaded,
    order: PollOrder,
    deps: PollDeps,
    now: datetime,
    places: anyio.CapacityLimiter,
    deadline: float,
    outbox: MemoryObjectSendStream[Piece | Lot | Turn],
) -> None:
    """Poll one connection, its sources one after the other, and report the turn, whatever happens in it."""
    connection = item.connection
    poller = deps.pollers.get(connection.provider)
    turn = Turn(connection)
    due = _due(item, poller, order, now)
    if due and order.source is None:
        turn.requests_saved = len(item.streams) - len(due)
    problem: str | None = None
    if isinstance(item.problem, CredentialError):
        turn.parked_reason = str(item.problem)
    elif item.problem is not None:
        problem = str(item.problem)
    elif poller is not None:
        caller = deps.caller(connection)
        context = _Context(deps, order, connection, poller, caller, now, outbox, turn)
        try:
            with anyio.CancelScope(deadline=deadline):
                async with places:
                    for stream, spec in due:
                        turn.ends.append(await _take_source(context, stream, spec))
        except CredentialError as error:
            turn.parked_reason = str(error)
        turn.is_proven = caller.answers > 0
        turn.requests = caller.requests
    for stream, _ in due[len(turn.ends) :]:
        if turn.parked_reason is not None:
            turn.ends.append(SourceEnd(stream, "dead_key", reason=turn.parked_reason))
        else:
            turn.ends.append(SourceEnd(stream, "retry", reason=problem or "the batch's time ran out"))
    await outbox.send(turn)


def _due(
    item: streams.Loaded, poller: Poller | None, order: PollOrder, now: datetime
) -> list[tuple[Stream, SourceSpec]]:
    """The sources to read now, costs last: what they reveal counts for the next tick."""
    if item.connection.state in ("paused", "archived") or poller is None:
        return []
    specs = [spec for name, spec in poller.sources.items() if name in item.streams]
    if order.source is not None:
        return [(item.streams[spec.name], spec) for spec in specs if spec.name == order.source]
    moved = [
        stream.changed_at for spec in specs if spec.kind == "cost" and (stream := item.streams[spec.name]).changed_at
    ]
    costs_changed_at = max(moved, default=None)
    return [
        (stream, spec)
        for spec in sorted(specs, key=lambda spec: spec.kind == "cost")
        if is_due(spec, stream := item.streams[spec.name], order.mode, now, costs_changed_at)
    ]


async def _take_source(context: _Context, stream: Stream, spec: SourceSpec) -> SourceEnd:
    """Read one source, and say how it ended. Raises CredentialError alone: that ends the connection's turn.

    This catches every exception of a poller, as `run_job` does for a job: a source is the unit that fails, and a bug in
    one (it may be a third party's) must not cost the other 99 connections their turn.
    """
    reading = _Reading(context, stream, spec) if spec.is_report else _Collecting(context, stream, spec)
    connection = context.connection
    try:
        with span(
            "poll.source",
            tallyd__provider=connection.provider,
            tallyd__source=stream.source,
            tallyd__connection__id=connection.id,
        ):
            await reading.run()
    except CredentialError:
        raise
    except ForbiddenError as error:
        return SourceEnd(stream, "parked", reason=str(error))
    except TransientError as error:
        return SourceEnd(stream, "retry", reading.end(), str(error), error.retry_after_s)
    except SchemaDriftError as error:
        excerpt = error.body[:EVIDENCE_BYTES_MAX].decode("utf-8", "replace")
        return SourceEnd(stream, "dead", reading.end(), f"{error}; it began: {excerpt}" if excerpt else str(error))
    except BadRequestError as error:
        if error.status == NOT_FOUND:
            return SourceEnd(stream, "absent", reason=f"the provider does not offer it: {error}")
        return SourceEnd(stream, "dead", reading.end(), str(error))
    except PermanentError as error:
        return SourceEnd(stream, "dead", reading.end(), str(error))
    except Exception as error:
        log.exception("source.crashed", source=stream.source, connection=context.connection.label)
        return SourceEnd(stream, "dead", reading.end(), f"the poller crashed: {type(error).__name__}: {error}")
    return SourceEnd(stream, "read" if reading.has_read else "unchanged", reading.end())


async def _fresh_seq(context: _Context, stream: Stream) -> int:
    seq = await context.deps.seqs.next()
    if seq <= stream.last_seq:  # drawn after the stream was loaded, so it has to be greater
        raise PermanentError(f"poll_seq has fallen behind ({seq}); stop tallyd and run `tallyd doctor --fix`")
    return seq


class _Collecting:
    """One attempt on a collection: its parts are handed over as they come."""

    def __init__(self, context: _Context, stream: Stream, spec: SourceSpec) -> None:
        self._context = context
        self._stream = stream
        self._spec = spec
        self._seq = 0
        self._digest: bytes | None = None
        self._is_whole = False
        self.has_read = False

    async def run(self) -> None:
        context, stream = self._context, self._stream
        self._seq = await _fresh_seq(context, stream)
        collector = cast("Collector", context.poller)
        parts = collector.collect(context.connection.target, stream.source, stream.probe_digest, context.caller)
        async with aclosing(
            cast("AsyncGenerator[Collected]", parts)
        ):  # or what a cancelled poll leaves open is closed some time later
            async for part in parts:
                self._digest = part.digest or self._digest
                await context.outbox.send(Lot(context.connection, stream, self._spec.kind, self._seq, part))
        self._is_whole = self.has_read = True

    def end(self) -> StreamEnd | None:
        """The stream's new stamps once the collection was read to its end; None before."""
        if not self._is_whole:
            return None
        now = self._context.now
        return StreamEnd(
            stream_id=self._stream.id,
            seq=self._seq,
            window=Window(now, now),
            covered_from=self._context.connection.since,
            covered_to=now,
            floor=None,
            pages=None,
            probe_digest=self._digest,
            is_hourly=True,
            is_daily=True,
            kind=self._spec.kind,
        )


class _Reading:
    """One attempt on a report: it probes, reads chunk by chunk, and knows how far it came."""

    def __init__(self, context: _Context, stream: Stream, spec: SourceSpec) -> None:
        self._context = context
        self._stream = stream
        self._spec = spec
        asked = Window(context.order.start, context.order.end) if context.order.start and context.order.end else None
        since, keep = context.connection.since, context.deps.settings.keep
        if keep is not None:
            since = max(since, context.now - keep)
            asked = asked and Window(max(asked.start, min(since, asked.end)), asked.end)
        self._plan = plan(spec, stream, context.order.mode, context.now, since, asked)
        self._seq = 0
        self._floor = stream.floor
        self._fence: Window | None = None
        self._covered_from = stream.covered_from
        self._covered_to = stream.epochs[-1].grain.width.floor(context.now)
        self._pages = 0
        self._probe_digest: bytes | None = None
        self._mark: bytes | None = None
        self._is_whole = False
        self.has_read = False

    async def run(self) -> None:
        self._seq = await _fresh_seq(self._context, self._stream)
        live = self._plan.live
        probed: Mapping[datetime, Totals] = {}
        if self._plan.probe is not None:
            window, probed = await self._probe(self._plan.probe)
            if window is None:
                self._fence = self._plan.probe.window
                self._context.turn.requests_saved += self._stream.last_pages
            live = () if window is None else (Chunk(window, self._plan.probe.epoch),)
        end = max((chunk.window.end for chunk in live), default=None)
        for chunk in live:
            read = await self._read(chunk, self._seq, probed, is_live=True)
            if read is not None and read.end < chunk.window.end:
                end = self._covered_to = min(read.end, self._covered_to)
        if end is not None:
            start = self._plan.live[-1].window.start if self._plan.probe is None else self._plan.probe.window.start
            self._fence = Window(start, max(start, end))
            self._reach(self._fence)
        limit = self._context.deps.settings.history_chunks if self._context.order.mode is Mode.TICK else None
        for chunk in self._plan.history[:limit]:
            # Each chunk is an attempt of its own: ticks read on beside a long history, and would fence it off.
            window = await self._read(chunk, await self._context.deps.seqs.next(), {})
            if window is not None:
                self._reach(window)
        self._is_whole = True

    async def _probe(self, chunk: Chunk) -> tuple[Window | None, Mapping[datetime, Totals]]:
        """Compare a cheap look with what the ledger holds.

        Returns:
            The part of the window that has to be read, from the first bucket that differs, or None; and the totals.
        """
        context, stream = self._context, self._stream
        probe = await context.poller.probe(
            context.connection.target, self._spec.name, chunk.epoch.grain, chunk.window, context.caller
        )
        if probe.totals is None:
            self._mark = probe.digest
            return (None if probe.digest == stream.probe_digest else chunk.window), {}
        nothing = Totals()
        for start in chunk.window.buckets(chunk.epoch.grain.width):
            if probe.totals.get(start, nothing) != stream.held.get(start, nothing):
                return Window(start, chunk.window.end), probe.totals
        return None, probe.totals

    async def _read(
        self, chunk: Chunk, seq: int, probed: Mapping[datetime, Totals], *, is_live: bool = False
    ) -> Window | None:
        """Read one page chain and hand it over.

        Returns:
            What was read: the chunk's window, less what lies before the provider's history floor, or after the end of
            its answer.
        """
        context, width = self._context, chunk.epoch.grain.width
        call = (context.connection.target, self._spec.name, chunk.epoch.grain)
        window = chunk.window
        while True:
            if self._floor is not None and self._floor > window.start:
                start = width.ceil(self._floor)
                if start >= window.end:
                    return None
                window = Window(start, window.end)
            try:
                snapshot = await context.poller.fetch(*call, window, context.caller)
            except HistoryFloorError as error:
                if error.earliest <= window.start:
                    raise PermanentError(f"the provider refuses its own history floor {error.earliest}") from error
                self._floor = error.earliest
                continue
            break
        if is_live and self._probe_digest is None:
            # The first answer has the oldest stamp: what is newer than that is read again. A report that has no stamp of
            # its own was read after the probe, and has at least what that told of.
            self._probe_digest = snapshot.digest or self._mark
        witness: Witness
        totals, witness = probed, "totals"
        if context.order.mode is Mode.FULL and self._spec.has_totals:
            totals, witness = await context.poller.totals(*call, window, context.caller), "full"
        keyer = Keyer(context.connection.id, self._spec.name, chunk.epoch.grain)
        buckets = tuple(ready_buckets(snapshot, keyer, cast("Report", self._spec.kind), context.deps.price))
        witnesses: dict[datetime, Witness] = {}
        if totals or witness == "full":
            nothing = Totals()
            witnesses = {b.start: witness for b in buckets if totals.get(b.start, nothing) == b.totals}
        await context.outbox.send(
            Piece(
                context.connection,
                self._stream,
                seq,
                chunk.epoch.grain_id,
                width,
                buckets,
                witnesses,
            )
        )
        self.has_read = True
        self._pages += snapshot.pages
        return snapshot.window

    def _reach(self, window: Window) -> None:
        """History is read newest first: it is covered back to here when nothing is left out in between."""
        if self._covered_from is None or window.end >= self._covered_from:
            self._covered_from = min(window.start, self._covered_from or window.start)

    def end(self) -> StreamEnd | None:
        """The stream's new fence and cursors, as far as this attempt came; None before the trailing window was read."""
        if self._fence is None:
            return None
        is_full = self._context.order.mode is Mode.FULL and self._is_whole
        return StreamEnd(
            stream_id=self._stream.id,
            seq=self._seq,
            window=self._fence,
            covered_from=self._covered_from,
            covered_to=self._covered_to,
            floor=self._floor,
            pages=self._pages or None,
            probe_digest=self._probe_digest,
            is_hourly=self._plan.is_hourly or is_full,
            is_daily=self._plan.is_daily or is_full,
        )
