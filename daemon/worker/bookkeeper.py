"""The writer of a poll batch: gathers what the sub-jobs read, flushes it in bulk, and closes the batch (law 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import anyio
import stamina
from anyio.streams.memory import MemoryObjectReceiveStream

from daemon.db import ledger
from daemon.db.pool import Session
from daemon.domain.connection import Connection, Stream, StreamId
from daemon.domain.errors import DataRejectedError, StorageUnavailableError
from daemon.domain.job import Cancelled, Completed, Job, NewJob, Outcome, Settlement, Summary
from daemon.queue.burial import bury, mourn
from daemon.queue.postgres import PostgresQueue
from daemon.sinks.ledger import Effect, Effects, Flush, LedgerSink, Lot, Piece, Step
from daemon.telemetry import metrics
from daemon.telemetry.traces import span

FLUSH_ROWS = 5_000
FLUSH_S = 2.0

Status = Literal["unchanged", "read", "absent", "retry", "dead", "parked", "dead_key"]


@dataclass(frozen=True, slots=True)
class SourceEnd:
    """How one source's turn ended.

    Attributes:
        status: "read" is told apart by what booking it changed; "absent" means that the provider does not offer it
            (404), "parked" that it refuses it (403), "dead_key" that it refuses the key (401): then the connection is
            parked, not the source.
        end: fence, cursors and stamps; set when at least the trailing window was read or found unchanged.
        reason: for a person; with the first bytes of an answer that broke its contract.
    """

    stream: Stream
    status: Status
    end: ledger.StreamEnd | None = None
    reason: str = ""
    retry_after_s: float | None = None


@dataclass(slots=True)
class Turn:
    """How one connection's turn ended. `is_proven`: at least one request was answered well."""

    connection: Connection
    ends: list[SourceEnd] = field(default_factory=list)
    parked_reason: str | None = None
    is_proven: bool = False
    requests: int = 0
    requests_saved: int = 0


FollowUp = Callable[[Connection, SourceEnd], NewJob]
"""The `poll_one` job that goes on where a source's turn ended."""


class Bookkeeper:
    """Of one job: feed it with `run`, then `close` it once."""

    def __init__(
        self,
        job: Job,
        slot: datetime | None,
        sink: LedgerSink,
        queue: PostgresQueue,
        *,
        takes_streams: bool = True,
        request_id: str | None = None,
    ) -> None:
        self._takes_streams = takes_streams
        self._job = job
        self._slot = slot
        self._request_id = request_id
        self._sink = sink
        self._queue = queue
        self._pieces: list[Piece] = []
        self._lots: list[Lot] = []
        self._open_turns: list[Turn] = []
        self._turns: list[Turn] = []
        self._effects: dict[StreamId, Effect] = {}
        self._rejected: dict[StreamId, DataRejectedError] = {}

    async def run(self, inbox: MemoryObjectReceiveStream[Piece | Lot | Turn]) -> None:
        """Take pieces, lots and turns until their senders are gone; flush by rows, or `FLUSH_S` after the first of them."""
        deadline = None
        async with inbox:
            while True:
                try:
                    with anyio.fail_after(None if deadline is None else max(0.0, deadline - anyio.current_time())):
                        item = await inbox.receive()
                except anyio.EndOfStream:
                    return
                except TimeoutError:
                    await self._flush()
                    deadline = None
                    continue
                if deadline is None:
                    deadline = anyio.current_time() + FLUSH_S
                if isinstance(item, Turn):
                    self._open_turns.append(item)
                    continue
                for part in item.cut(FLUSH_ROWS):
                    if isinstance(part, Lot):
                        self._lots.append(part)
                    else:
                        self._pieces.append(part)
                    if sum(one.rows for one in self._parts) >= FLUSH_ROWS:
                        await self._flush()
                        deadline = None

    async def close(self, follow_up: FollowUp, seconds: Callable[[], float]) -> Summary:
        """The last flush of a batch: what is left, the follow-up jobs, the summary, and the settling of the job."""
        summary = Summary()

        async def finish(tx: Session, effects: Effects) -> None:
            nonlocal summary
            summary = self._summarise(effects, seconds())
            await self._follow_up(tx, follow_up)
            await self._write_summary(tx, summary)
            await self._queue.settle_in(tx, Settlement(self._job, Completed(), int(summary.duration_s * 1000)))

        await self._flush(finish)
        return summary

    async def close_one(self, seconds: Callable[[], float]) -> tuple[Summary, SourceEnd | None]:
        """The last flush of a `poll_one`. It settles the job when the source's turn ended well, or joins the stream's
        dead letter when there is one already.

        Returns:
            The summary, and the source's end when it is left to the queue to try again or to bury.
        """
        summary, bad = Summary(), None

        async def finish(tx: Session, effects: Effects) -> None:
            nonlocal summary, bad
            summary = self._summarise(effects, seconds())
            await self._write_summary(tx, summary)
            bad = next((end for _, end in self._ends() if end.status in ("retry", "dead")), None)
            outcome: Outcome = Completed()
            if bad is not None:
                if bad.status == "retry" and self._job.attempt < self._job.max_attempts:
                    return
                known = await ledger.dead_letters_of(tx, [bad.stream.id])
                if not known:
                    await ledger.remember_dead(tx, {bad.stream.id: self._job.id})
                    return
                await mourn(tx, dict.fromkeys(known.values(), bad.reason))
                outcome, bad = Cancelled(f"joined dead letter {known[bad.stream.id]}: {bad.reason}"), None
            await ledger.close_streams(tx, self._job.id)
            await self._queue.settle_in(tx, Settlement(self._job, outcome, int(summary.duration_s * 1000)))

        await self._flush(finish)
        return summary, bad

    async def _write_summary(self, tx: Session, summary: Summary) -> None:
        await ledger.write_summary(tx, self._job.id, self._job.kind, self._slot, summary, self._request_id)

    async def _flush(self, finish: Step | None = None) -> None:
        try:
            effects = await self._book(finish)
        except DataRejectedError:
            # Nothing was written. Find the streams whose data Postgres refuses; the others are booked without them.
            culprits = await self._sink.find_culprits(self._compose(None), self._lock_lease)
            if not culprits:
                raise
            self._rejected |= culprits
            effects = await self._book(finish)
        self._count(effects)
        self._effects = _merged(self._effects, effects)
        self._turns += self._open_turns
        self._open_turns, self._pieces, self._lots = [], [], []

    async def _book(self, finish: Step | None) -> Effects:
        """Book, over a short absence of the database too: the fences make a repeated commit harmless."""
        flush = self._compose(finish)
        with span("flush", tallyd__pieces=len(flush.pieces)) as trace:
            async for attempt in stamina.retry_context(on=StorageUnavailableError, attempts=4, timeout=15.0):
                with attempt:
                    effects = await self._sink.book(flush, self._lock_lease)
                    trace.set(tallyd__rows=sum(effect.rows for effect in effects.values()))
                    return effects
        raise AssertionError("unreachable")

    @property
    def _parts(self) -> list[Piece | Lot]:
        return [*self._pieces, *self._lots]

    def _count(self, effects: Effects) -> None:
        """Tell the metrics what a committed flush did to the rows that were read."""
        read: dict[StreamId, tuple[str, int]] = {}
        for piece in self._pieces:
            if piece.stream.id not in self._rejected:
                _, rows = read.get(piece.stream.id, ("", 0))
                read[piece.stream.id] = (piece.connection.provider, rows + piece.rows)
        for stream, (provider, rows) in read.items():
            effect = effects.get(stream, Effect())
            revised = effect.restated + effect.vanished
            metrics.ROWS.labels(provider, "inserted").inc(effect.new)
            metrics.ROWS.labels(provider, "revised").inc(revised)
            metrics.ROWS.labels(provider, "unchanged").inc(max(0, rows - effect.new - effect.restated))

    def _compose(self, finish: Step | None) -> Flush:
        flush = Flush(self._job.id, also=[finish] if finish else [])
        flush.pieces = [piece for piece in self._pieces if piece.stream.id not in self._rejected]
        flush.lots = [lot for lot in self._lots if lot.stream.id not in self._rejected]
        for turn in self._open_turns:
            ends = [self._verdict(end) for end in turn.ends]
            flush.ends += [end.end for end in ends if end.end is not None]
            flush.parked |= {end.stream.id: end.reason for end in ends if end.status in ("parked", "absent")}
            flush.connection_ends.append(
                ledger.ConnectionEnd(turn.connection.id, turn.is_proven, turn.parked_reason, turn.connection.sealed)
            )
        return flush

    async def _lock_lease(self, tx: Session) -> None:
        await self._queue.lock_lease(tx, self._job)

    def _verdict(self, end: SourceEnd) -> SourceEnd:
        error = self._rejected.get(end.stream.id)
        return end if error is None else replace(end, status="dead", end=None, reason=f"Postgres refuses it: {error}")

    def _ends(self) -> Iterator[tuple[Connection, SourceEnd]]:
        for turn in (*self._turns, *self._open_turns):
            for end in turn.ends:
                yield turn.connection, self._verdict(end)

    @property
    def withheld(self) -> int:
        """Rows that vanished from a read and stay until a second witness misses them too."""
        return sum(effect.withheld for effect in self._effects.values())

    @property
    def refused(self) -> int:
        """Buckets whose answer was older than what they hold."""
        return sum(effect.refused for effect in self._effects.values())

    def _summarise(self, effects: Effects, duration_s: float) -> Summary:
        total = _merged(self._effects, effects)
        turns = (*self._turns, *self._open_turns)
        summary = Summary(
            connections=len(turns),
            requests=sum(turn.requests for turn in turns),
            requests_saved=sum(turn.requests_saved for turn in turns),
            rows=sum(effect.rows for effect in total.values()),
            duration_s=round(duration_s, 3),
            items=sum(effect.items for effect in total.values()),
        )
        for _, end in self._ends():
            effect = total.get(end.stream.id, Effect())
            match end.status:
                case "retry":
                    summary.retried += 1
                case "dead" | "parked" | "dead_key":
                    summary.dead += 1
                case "unchanged" | "absent":
                    summary.unchanged += 1
                case "read" if effect.restated_closed:
                    summary.restated += 1
                case "read" if effect.rows:
                    summary.stored += 1
                case "read":
                    summary.unchanged += 1
        return summary

    async def _follow_up(self, tx: Session, follow_up: FollowUp) -> None:
        """Tiers 2 and 3: one waiting `poll_one` of each kind of poll, and one dead letter, per stream at the most.

        Only a tick's own retry takes the stream from the ticks that follow: a backfill that fails, or a full poll, must
        not keep the live window from being read.
        """
        retries = [(c, end) for c, end in self._ends() if end.status == "retry"]
        if retries:
            ids = await self._queue.enqueue([follow_up(c, end) for c, end in retries], tx)
            if self._takes_streams:
                await ledger.open_streams(tx, {end.stream.id: id_ for (_, end), id_ in zip(retries, ids, strict=True)})
        dead = {end.stream.id: (follow_up(c, end), end.reason) for c, end in self._ends() if end.status == "dead"}
        if dead:
            known = await ledger.dead_letters_of(tx, dead)
            await mourn(tx, {job: dead[stream][1] for stream, job in known.items()})
            fresh = [stream for stream in dead if stream not in known]
            ids = await bury(tx, [dead[stream] for stream in fresh])
            await ledger.remember_dead(tx, dict(zip(fresh, ids, strict=True)))


def _merged(a: Mapping[StreamId, Effect], b: Mapping[StreamId, Effect]) -> dict[StreamId, Effect]:
    return {stream: a.get(stream, Effect()) + b.get(stream, Effect()) for stream in a.keys() | b.keys()}
