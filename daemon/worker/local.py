"""Jobs that a command runs in its own process: leased from the start, so that a killed command loses no work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import anyio
import structlog

from daemon.domain.errors import LeaseLostError, StorageUnavailableError
from daemon.domain.job import Job, Outcome, Settlement, WorkerId
from daemon.queue.postgres import PostgresQueue
from daemon.worker.loop import BEAT_S, BEAT_TIMEOUT_S

FAREWELL_S = 10.0

log = structlog.get_logger()


class LocalWorker:
    """A worker without a claim loop. Use it as a context manager: it is registered inside, and beats."""

    def __init__(self, queue: PostgresQueue, run_job: Callable[[Job], Awaitable[Outcome]], concurrency: int) -> None:
        self._queue = queue
        self._run_job = run_job
        self._places = anyio.CapacityLimiter(concurrency)
        self._unsettled: dict[int, Job] = {}
        self.id = WorkerId(0)

    async def run(self, lease: Callable[[WorkerId], Awaitable[Sequence[Job]]]) -> list[tuple[Job, Outcome]]:
        """Register, lease the jobs, run them all, and say goodbye.

        Args:
            lease: enqueues the jobs under the given worker.
        """
        self.id = await self._queue.register_worker("command")
        ended: list[tuple[Job, Outcome]] = []
        try:
            async with anyio.create_task_group() as services:
                services.start_soon(self._beat)
                jobs = await lease(self.id)
                self._unsettled = {job.id: job for job in jobs}
                async with anyio.create_task_group() as runners:
                    for job in jobs:
                        runners.start_soon(self._run, job, ended)
                services.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(FAREWELL_S, shield=True), _tolerating_absence():
                await self._queue.release(self._unsettled.values())
                await self._queue.stop_worker(self.id)
        return ended

    async def _run(self, job: Job, ended: list[tuple[Job, Outcome]]) -> None:
        async with self._places:
            began = perf_counter()
            outcome = await self._run_job(job)
            with anyio.CancelScope(shield=True):
                await self._queue.settle([Settlement(job, outcome, int((perf_counter() - began) * 1000))])
            del self._unsettled[job.id]
            ended.append((job, outcome))

    async def _beat(self) -> None:
        """A beat that fails is only told: when others take the jobs over, the fence keeps us from booking."""
        while True:
            await anyio.sleep(BEAT_S)
            try:
                with anyio.fail_after(BEAT_TIMEOUT_S):
                    if not await self._queue.heartbeat(self.id):
                        raise LeaseLostError("this worker's row is gone")
            except (StorageUnavailableError, TimeoutError) as error:
                log.warning("worker.beat_missed", problem=str(error))


@contextmanager
def _tolerating_absence() -> Iterator[None]:
    try:
        yield
    except StorageUnavailableError as error:
        log.warning("worker.left_without_goodbye", problem=str(error))  # the rescue takes over what is leased
