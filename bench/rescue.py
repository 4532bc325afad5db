"""A replica is killed: how soon its jobs run elsewhere, and that each is settled once."""

from __future__ import annotations

from time import monotonic

import anyio
import anyio.to_thread
import asyncpg

from bench.drain import in_loop, spawn
from bench.report import Line, Target
from bench.stage import Stage
from daemon.db.pool import Database
from daemon.domain.job import Completed, Job, NewJob, Outcome
from daemon.queue.postgres import PostgresQueue
from daemon.worker.loop import FIT_AFTER_S, WorkerLoop

JOBS = 50


def hang(url: str) -> None:
    """A replica whose jobs never end."""

    async def forever(_job: Job) -> Outcome:
        await anyio.sleep_forever()
        raise AssertionError("unreachable")

    async def main() -> None:
        db = await Database.open(url)
        await WorkerLoop(PostgresQueue(db), forever, concurrency=JOBS, drain_s=1).run()

    in_loop(main)


async def lost_replica(stage: Stage) -> list[Line]:
    """Measured once: fifty jobs of a replica that dies by SIGKILL, beside one that has been up for long enough."""
    async with stage.database() as url:
        db = await Database.open(url)
        watch: asyncpg.Connection = await asyncpg.connect(url)
        queue = PostgresQueue(db)
        replica = spawn.Process(target=hang, args=(url,), daemon=True)
        replica.start()
        await queue.enqueue([NewJob("noop", b"{}") for _ in range(JOBS)])
        while await watch.fetchval("select count(*) from lease") < JOBS:  # noqa: ASYNC110
            await anyio.sleep(0.05)
        elsewhere = 0
        all_ran = anyio.Event()

        async def run(_job: Job) -> Outcome:
            nonlocal elsewhere
            elsewhere += 1
            if elsewhere == JOBS:
                all_ran.set()
            return Completed()

        loop = WorkerLoop(queue, run, concurrency=JOBS, drain_s=5)
        async with anyio.create_task_group() as group:
            group.start_soon(loop.run)
            await anyio.sleep(
                FIT_AFTER_S + 1
            )  # before that it rescues nobody, since an outage makes everyone look lost
            replica.kill()
            killed = monotonic()
            await all_ran.wait()
            took = monotonic() - killed
            loop.stop()
        await anyio.to_thread.run_sync(replica.join)
        settled = await watch.fetchval("select count(*) from attempt where outcome = 1")
        assert (settled, elsewhere) == (JOBS, JOBS), (settled, elsewhere)
        await watch.close()
        await db.close()
    return [
        Line(
            f"replica killed, its {JOBS} jobs run elsewhere", took, "s", target=Target("≤", 20, "ours"),
            note="once each; measured once",
        )
    ]  # fmt: skip
