"""The claim loop: keeps the slots of one worker full, runs its jobs, settles what they return.

Services in one task group: a claim for each lane, settle, heartbeat, rescue, promote, and the two halves of waking up.
Each outlives an outage of Postgres; any other failure of one of them ends the loop with that failure. What the loop
holds in memory is leased in Postgres, so that losing it costs time and no work.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import pairwise
from time import monotonic, perf_counter
from typing import Protocol

import anyio
import structlog
from anyio.abc import TaskGroup

from daemon.domain.errors import DaemonError, TransientError
from daemon.domain.job import KEY_END, Completed, Job, JobId, Lane, Outcome, Retryable, Settlement, WorkerId
from daemon.worker.failures import only

CLAIM_MAX = 500
GATHER_S = 0.02
FLUSH_AT = 500
FLUSH_AFTER_S = 0.003
RESULTS_MAX = 5_000
POLL_S = (0.5, 2.0)
BEAT_S = 5.0
BEAT_TIMEOUT_S = 3.0
LOST_AFTER_S = 12.0
FIT_AFTER_S = 15.0
RESCUE_S = (1.5, 2.5)
PROMOTE_S_MAX = 1.0
BACKOFF_S = (0.1, 5.0)
FAREWELL_S = 10.0

log = structlog.get_logger(__name__)

RunJob = Callable[[Job], Awaitable[Outcome]]
"""Runs one job and never raises; what escapes it all the same is a defect, and ends the loop."""


class _Claimed(Protocol):
    @property
    def jobs(self) -> list[Job]: ...
    @property
    def last_key(self) -> int: ...
    @property
    def is_held_back(self) -> bool: ...


class _Promotion(Protocol):
    @property
    def moved(self) -> int: ...
    @property
    def next_s(self) -> float | None: ...


class _Waker(Protocol):
    async def run(self) -> None: ...
    async def listen(self, on_wake: Callable[[], None]) -> None: ...


class Queue(Protocol):
    """What the loop needs of a queue; `queue.postgres.PostgresQueue` says what each does."""

    @property
    def waker(self) -> _Waker: ...
    async def register_worker(self, info: str = "") -> WorkerId: ...
    async def stop_worker(self, worker: WorkerId) -> None: ...
    def heart(self, worker: WorkerId) -> AbstractAsyncContextManager[Callable[[], Awaitable[bool]]]: ...
    async def claim(
        self, worker: WorkerId, limit: int, after_key: int, lane: Lane, busy: Mapping[int, int]
    ) -> _Claimed: ...
    async def settle(self, settlements: Iterable[Settlement]) -> set[JobId]: ...
    async def release(self, jobs: Iterable[Job]) -> set[JobId]: ...
    async def release_others(self, worker: WorkerId, known: Iterable[JobId]) -> set[JobId]: ...
    async def rescue(self) -> object: ...
    async def promote(self) -> _Promotion: ...


@dataclass(slots=True)
class Pulse:
    """What a worker's own heartbeats allow it to do. Instants are monotonic seconds.

    Attributes:
        last: the newest beat that succeeded.
        since: from when on none has failed.
    """

    last: float
    since: float

    def beat(self, now: float) -> None:
        if now - self.last >= LOST_AFTER_S:  # the process itself was stopped: others took us for lost
            self.since = now
        self.last = now

    def miss(self, now: float) -> None:
        self.since = now

    def is_lost(self, now: float) -> bool:
        """Others will soon take our jobs, so they must not go on here."""
        return now - self.last >= LOST_AFTER_S

    def may_rescue(self, now: float) -> bool:
        """After an outage everyone looks stale: living peers get the time to beat first."""
        return now - self.since >= FIT_AFTER_S and now - self.last < LOST_AFTER_S


class _Signal:
    """Wakes the one task that waits for it; what comes before the wait counts too."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._is_set = False

    def set(self) -> None:
        if not self._is_set:
            self._is_set = True
            self._event.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        with anyio.move_on_after(timeout_s):
            await self._event.wait()
        self._event = anyio.Event()
        self._is_set = False


class _Fault:
    """Logs a fault as it begins and as it ends, not on each try."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._is_on = False

    def begin(self, error: Exception) -> None:
        if not self._is_on:
            log.warning("worker.storage_lost", service=self._service, problem=str(error))
        self._is_on = True

    def end(self) -> None:
        if self._is_on:
            log.info("worker.storage_regained", service=self._service)
        self._is_on = False


class _Slots:
    """The slots of one lane, and the jobs in hand: those that fill them, and those in the inbox, which are about to."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.free = lane.concurrency
        self.worth_claiming = max(1, lane.concurrency // 4)
        self.inbox: deque[Job] = deque()
        self.busy: Counter[int] = Counter()  # jobs in hand by key, where keys have a limit
        self.is_claiming = False
        self.is_held_back = False  # the last claim left jobs behind whose keys were full
        self.is_runner_starting = False
        self.work = _Signal()  # there may be something to claim, or room for it
        self.batch = _Signal()  # there is room for as many as are worth a claim

    @property
    def running(self) -> int:
        return self.lane.concurrency - self.free - len(self.inbox)

    def take(self, jobs: Sequence[Job]) -> None:
        self.inbox.extend(jobs)
        self.free -= len(jobs)
        if self.lane.per_key is not None:
            self.busy.update(job.key for job in jobs)

    def let_go(self, job: Job) -> None:
        """A job is no longer in hand: wake the claim where that may let it find more."""
        self.free += 1
        is_key_free_again = False
        if self.lane.per_key is not None:
            # A claim that is under way takes the key for full, and may leave its jobs behind as the last one did.
            is_key_free_again = self.busy[job.key] >= self.lane.per_key and (self.is_held_back or self.is_claiming)
            self.busy[job.key] -= 1
            if not self.busy[job.key]:
                del self.busy[job.key]
        if self.free >= self.worth_claiming:
            self.batch.set()
            self.work.set()
        elif self.free == 1 or is_key_free_again:
            self.work.set()

    def clear_inbox(self) -> list[Job]:
        jobs = list(self.inbox)
        while self.inbox:
            self.let_go(self.inbox.popleft())
        return jobs


class WorkerLoop:
    """One worker. `run` ends after `stop`, when everything is settled or given back.

    Args:
        concurrency: jobs running at once, of any key.
        lanes: instead of it, ranges of keys that do not overlap, each with slots of its own.
        drain_s: how long `stop` lets running jobs go on before it cancels them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        queue: Queue,
        run_job: RunJob,
        *,
        concurrency: int | None = None,
        lanes: Sequence[Lane] = (),
        drain_s: float,
        info: str = "",
        listens: bool = True,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if concurrency is not None:
            lanes = [*lanes, Lane("all", 0, KEY_END, concurrency)]
        ends = sorted((lane.first_key, lane.end_key) for lane in lanes)
        if not ends or any(end > first for (_, end), (first, _) in pairwise(ends)):
            raise ValueError("a worker needs lanes, of which no two have a key in common")
        self._queue = queue
        self._run_job = run_job
        self._lanes = [_Slots(lane) for lane in lanes]
        self._drain_s = drain_s
        self._info = info
        self._listens = listens
        self._clock = clock
        self._worker = WorkerId(0)
        self._pulse = Pulse(0.0, 0.0)
        self._running: dict[JobId, tuple[anyio.CancelScope, float]] = {}  # with the deadline of each
        self._next_deadline = math.inf
        self._results: list[Settlement] = []
        self._settling: list[Settlement] = []
        self._given_back: list[Job] = []
        self._is_stopping = False
        self._stopped = anyio.Event()
        self._is_held_up = False
        self._may_hold_unknown = False
        self._release_turn = anyio.Lock()
        self._answered = _Signal()  # a claim has come back
        self._ended = _Signal()  # there is something to settle
        self._full = anyio.Event()
        self._settled = _Signal()
        self._due = _Signal()
        self._deadline_nearer = _Signal()
        self._beaten = anyio.Event()

    @property
    def worker(self) -> WorkerId:
        return self._worker

    @property
    def running(self) -> int:
        """Jobs that run here now, in all lanes."""
        return len(self._running)

    def running_by_lane(self) -> dict[str, int]:
        """Jobs that run here now, by the name of their lane."""
        return {slots.lane.name: slots.running for slots in self._lanes}

    @property
    def is_beating(self) -> bool:
        """Registered, and not taken for lost by the others."""
        return self._worker != 0 and not self._pulse.is_lost(self._clock())

    def stop(self) -> None:
        """Drain: claim nothing more, let running jobs end for `drain_s`, give the rest back."""
        self._is_stopping = True
        self._stopped.set()
        self._wake()

    async def run(self) -> None:
        """Work until `stop`.

        Raises:
            StorageUnavailableError: Postgres was away at the start. Whatever else a service or `run_job` raised.
        """
        self._worker = await self._queue.register_worker(self._info)
        now = self._clock()
        self._pulse = Pulse(now, now)
        concurrency = sum(slots.lane.concurrency for slots in self._lanes)
        log.info("worker.started", worker_id=self._worker, concurrency=concurrency)
        try:
            async with anyio.create_task_group() as services:
                for service in (self._beat, self._guard, self._cut_off, self._settle, self._rescue, self._promote):
                    services.start_soon(service, name=service.__name__)
                for slots in self._lanes:
                    services.start_soon(self._claim, slots, name=f"claim {slots.lane.name}")
                services.start_soon(self._queue.waker.run, name="notify")
                if self._listens:
                    services.start_soon(self._queue.waker.listen, self._on_wake, name="listen")
                async with anyio.create_task_group() as runners:
                    self._runners: TaskGroup = runners
                    await self._stopped.wait()
                    await self._drain()
                services.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise only(group) from group
        finally:
            await self._say_goodbye()

    # Claiming

    async def _claim(self, slots: _Slots) -> None:
        cursor = -1
        delay_s = BACKOFF_S[0]
        fault = _Fault("claim")
        while not self._is_stopping:
            if 0 < slots.free < slots.worth_claiming:
                # More may end soon, but others may hang: the slots that are free do not wait for them.
                await slots.batch.wait(GATHER_S)
            if not slots.free or not self._may_claim():
                await slots.work.wait(POLL_S[1])
                continue
            try:
                if self._may_hold_unknown:
                    await self._release_unknown()
                worker = self._worker
                claimed = await self._ask(worker, slots, cursor)
            except TransientError as error:
                fault.begin(error)
                await self._pause(delay_s)
                delay_s = min(BACKOFF_S[1], delay_s * 2)
                continue
            fault.end()
            delay_s = BACKOFF_S[0]
            cursor = claimed.last_key
            slots.is_held_back = claimed.is_held_back
            if not claimed.jobs:
                await slots.work.wait(random.uniform(*POLL_S))  # noqa: S311
            elif worker != self._worker or self._is_stopping:
                self._give_back(claimed.jobs)
            else:
                log.debug("worker.claimed", lane=slots.lane.name, jobs=len(claimed.jobs))
                slots.take(claimed.jobs)
                self._start_runner(slots)

    async def _ask(self, worker: WorkerId, slots: _Slots, cursor: int) -> _Claimed:
        slots.is_claiming = True
        try:
            return await self._queue.claim(worker, min(slots.free, CLAIM_MAX), cursor, slots.lane, slots.busy)
        except TransientError:
            # The claim may have taken place all the same, and only its answer was lost.
            self._may_hold_unknown = True
            raise
        finally:
            slots.is_claiming = False
            self._answered.set()

    async def _release_unknown(self) -> None:
        """Give back what is ours without our knowing. No claim goes on meanwhile: what it takes is not known yet."""
        async with self._release_turn:
            while any(slots.is_claiming for slots in self._lanes):
                await self._answered.wait()
            if self._may_hold_unknown:
                await self._queue.release_others(self._worker, self._known())
                self._may_hold_unknown = False

    def _may_claim(self) -> bool:
        waiting = len(self._results) + len(self._settling)
        self._is_held_up = waiting > (RESULTS_MAX // 2 if self._is_held_up else RESULTS_MAX)
        return self.is_beating and not (self._is_stopping or self._is_held_up)

    def _known(self) -> list[JobId]:
        waiting = (*self._results, *self._settling)
        return [
            *self._running,
            *(job.id for slots in self._lanes for job in slots.inbox),
            *(s.job.id for s in waiting),
            *(job.id for job in self._given_back),
        ]

    def _wake(self) -> None:
        for slots in self._lanes:
            slots.work.set()

    def _on_wake(self) -> None:
        self._wake()
        self._due.set()

    # Running

    def _start_runner(self, slots: _Slots) -> None:
        # A runner starts the next one when it takes a job, so that jobs which never wait share one task.
        if slots.inbox and not slots.is_runner_starting:
            slots.is_runner_starting = True
            self._runners.start_soon(self._run_jobs, slots)

    async def _run_jobs(self, slots: _Slots) -> None:
        slots.is_runner_starting = False
        while slots.inbox:
            running: Job | None = None
            # Entering a scope costs more than a job that does nothing, so a runner's jobs share one until it is cancelled.
            with anyio.CancelScope() as scope:
                while slots.inbox and not scope.cancel_called:
                    running = slots.inbox.popleft()
                    self._start_runner(slots)
                    await self._run_one(running, scope)
                    slots.let_go(running)
                    running = None
            if running is not None:
                if anyio.current_time() < scope.deadline:
                    self._give_back([running])  # cancelled by us
                else:
                    self._end(running, Retryable("deadline passed"), running.timeout_s)
                slots.let_go(running)

    async def _run_one(self, job: Job, scope: anyio.CancelScope) -> None:
        started = perf_counter()
        deadline = started + job.timeout_s
        self._running[job.id] = (scope, deadline)
        if deadline < self._next_deadline:
            self._next_deadline = deadline
            self._deadline_nearer.set()
        try:
            outcome = await self._run_job(job)
        finally:
            del self._running[job.id]
        self._end(job, outcome, perf_counter() - started)

    async def _cut_off(self) -> None:
        """Cancel jobs at their deadlines: one timer for all, since one for each costs more than a job that does nothing."""
        while True:
            await self._deadline_nearer.wait(self._next_deadline - perf_counter())
            now = perf_counter()
            self._next_deadline = math.inf
            for scope, deadline in self._running.values():
                if deadline <= now:
                    scope.deadline = -math.inf
                else:
                    self._next_deadline = min(self._next_deadline, deadline)

    def _end(self, job: Job, outcome: Outcome, took_s: float) -> None:
        if not (isinstance(outcome, Completed) and outcome.is_settled):
            self._results.append(Settlement(job, outcome, int(took_s * 1000)))
            if len(self._results) == FLUSH_AT:
                self._full.set()
        self._ended.set()

    def _give_back(self, jobs: Iterable[Job]) -> None:
        self._given_back.extend(jobs)
        self._ended.set()

    def _give_back_inboxes(self) -> None:
        for slots in self._lanes:
            self._give_back(slots.clear_inbox())

    def _cancel_jobs(self) -> None:
        self._give_back_inboxes()
        for scope, _ in self._running.values():
            scope.cancel()

    # Settling

    async def _settle(self) -> None:
        delay_s = BACKOFF_S[0]
        fault = _Fault("settle")
        while True:
            if not self._results and not self._given_back and not self._settling:
                await self._ended.wait()
            if len(self._results) < FLUSH_AT and not self._settling:
                self._full = anyio.Event()
                with anyio.move_on_after(FLUSH_AFTER_S):
                    await self._full.wait()
            try:
                await self._flush()
                fault.end()
                delay_s = BACKOFF_S[0]
            except TransientError as error:
                fault.begin(error)
                await self._pause(delay_s)
                delay_s = min(BACKOFF_S[1], delay_s * 2)

    async def _flush(self) -> None:
        """Write one batch. What fails stays, and is written again: the fence makes twice the same as once."""
        if not self._settling:
            self._settling, self._results = self._results[:FLUSH_AT], self._results[FLUSH_AT:]
        if self._settling:
            accepted = await self._queue.settle(self._settling)
            stale = len(self._settling) - len(accepted)
            if stale:
                log.warning("worker.settled_stale", jobs=stale)
            self._settling = []
        if self._given_back:
            released = self._given_back[:CLAIM_MAX]
            await self._queue.release(released)
            del self._given_back[: len(released)]
        if self._is_held_up:
            self._wake()
        self._settled.set()

    # Living

    async def _beat(self) -> None:
        delay_s = BACKOFF_S[0]
        fault = _Fault("beat")
        while True:
            try:
                async with self._queue.heart(self._worker) as beat:
                    while await self._beat_once(beat):
                        fault.end()
                        delay_s = BACKOFF_S[0]
                        await anyio.sleep(BEAT_S)
            except (TransientError, TimeoutError) as error:
                self._pulse.miss(self._clock())
                fault.begin(error)
                await anyio.sleep(delay_s)
                delay_s = min(BACKOFF_S[1], delay_s * 2)

    async def _beat_once(self, beat: Callable[[], Awaitable[bool]]) -> bool:
        with anyio.fail_after(BEAT_TIMEOUT_S):
            is_known = await beat()
        now = self._clock()
        if self._pulse.is_lost(now):
            self._cancel_jobs()  # the whole process was stopped, and this beat came before the guard
        if is_known:
            self._pulse.beat(now)
            self._beaten.set()
            return True
        # Our row is gone: what we hold belongs to others, and so would all that we claim until there is a new id.
        log.warning("worker.forgotten", worker_id=self._worker)
        self._worker = WorkerId(0)
        self._cancel_jobs()
        self._worker = await self._queue.register_worker(self._info)
        now = self._clock()
        self._pulse = Pulse(now, now)
        self._beaten.set()
        self._wake()
        return False

    async def _guard(self) -> None:
        # Apart from the beats, which may hang in a connection: no job may go on here once others can have it.
        while True:
            left_s = self._pulse.last + LOST_AFTER_S - self._clock()
            if left_s > 0:
                await anyio.sleep(left_s)
                continue
            self._beaten = anyio.Event()
            log.error("worker.lost", worker_id=self._worker, running=len(self._running))
            self._cancel_jobs()
            await self._beaten.wait()
            self._wake()

    async def _rescue(self) -> None:
        fault = _Fault("rescue")
        while True:
            await anyio.sleep(random.uniform(*RESCUE_S))  # noqa: S311
            if not self._pulse.may_rescue(self._clock()):
                continue
            try:
                await self._queue.rescue()
                fault.end()
            except TransientError as error:
                fault.begin(error)

    async def _promote(self) -> None:
        fault = _Fault("promote")
        while True:
            wait_s = PROMOTE_S_MAX
            try:
                promotion = await self._queue.promote()
                fault.end()
            except TransientError as error:
                fault.begin(error)
            else:
                if promotion.moved:
                    self._wake()
                    continue
                if promotion.next_s is not None:
                    wait_s = min(wait_s, max(0.01, promotion.next_s))
            await self._due.wait(wait_s)

    # Stopping

    async def _drain(self) -> None:
        waiting = sum(len(slots.inbox) for slots in self._lanes)
        log.info("worker.draining", running=len(self._running), waiting=waiting)
        self._give_back_inboxes()
        with anyio.move_on_after(self._drain_s):
            while not self._is_idle():
                await self._settled.wait(POLL_S[0])
        self._cancel_jobs()

    def _is_idle(self) -> bool:
        unsettled = self._results or self._settling or self._given_back
        is_at_work = any(slots.is_claiming or slots.inbox for slots in self._lanes)
        return not (self._running or unsettled or is_at_work)

    async def _say_goodbye(self) -> None:
        """Settle what ended, give back the rest. Without Postgres the others rescue it within 20 s."""
        with anyio.move_on_after(FAREWELL_S, shield=True):
            try:
                while self._results or self._settling or self._given_back:
                    await self._flush()
            except DaemonError:
                log.exception("worker.results_lost", waiting=len(self._results))
            try:
                await self._queue.stop_worker(self._worker)
            except DaemonError as error:
                log.warning("worker.goodbye_failed", problem=str(error))
            else:
                log.info("worker.stopped", worker_id=self._worker)

    async def _pause(self, longest_s: float) -> None:
        await anyio.sleep(random.uniform(longest_s / 2, longest_s))  # noqa: S311
