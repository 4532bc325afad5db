"""The resident set of the tallyd process alone: at its peak in a large tick, and over many small ones."""

from __future__ import annotations

from statistics import linear_regression, median

import anyio
import asyncpg

from bench.fleet import Fleet, resident_bytes
from bench.replica import replica
from bench.report import Line, Target
from bench.stage import Stage, simulator

MIB = 2**20
WARM_TICKS = 20
GROWTH_MAX = 1.05
"""What counts as no growth: the last tenth of the ticks against those right after the warm-up."""


async def one_large_tick(stage: Stage) -> list[Line]:
    """`tallyd tick --wait` on connections that were never read before: the tick with the most to do."""
    count = stage.size(10_000, 20)
    async with stage.database() as url:
        with simulator() as sim:
            fleet = Fleet(stage, url, sim)
            await fleet.set_up(count, requests_per_hour=2)
            summary = await fleet.summary("tick", "--wait")
            peak, took_s = fleet.peak_bytes, fleet.took_s
    assert summary["connections"] == count, summary
    return [
        Line(
            f"memory, {count:,} connections polled in a tick", peak / MIB, "MiB", target=Target("≤", 300, "ours"),
            note=f"{summary['requests']:,} requests, {summary['rows']:,} rows, {summary['retried']} retried, "
            f"{summary['dead']} dead in {took_s:.0f} s",
        )
    ]  # fmt: skip


async def many_ticks(stage: Stage) -> list[Line]:
    """`tallyd run` with a tick a second on a hundred connections; its metrics are read and it is sampled after each."""
    ticks = WARM_TICKS + stage.size(100, 3)
    samples: list[float] = []
    async with stage.database() as url:
        with simulator() as sim:
            fleet = Fleet(stage, url, sim)
            await fleet.set_up(stage.size(100, 4), requests_per_hour=60)
            watch: asyncpg.Connection = await asyncpg.connect(url)
            env = {**fleet.env, "TALLYD_TICK_SECONDS": "1"}
            async with replica(env, stage.folder / "growth.log") as daemon:
                for _ in range(ticks):
                    await _next_tick(watch)
                    assert b"\ntallyd_build_info{" in await daemon.get("/metrics")
                    samples.append(resident_bytes(daemon.process) / MIB)
                requests = await watch.fetchval("select sum(requests) from batch_summary")
                assert requests > ticks, requests  # ticks without requests would prove nothing
            await watch.close()
    warm = samples[WARM_TICKS:]
    tenth = max(1, len(warm) // 10)
    slope, _ = linear_regression(range(len(warm)), warm)
    first, last = median(warm[:tenth]), median(warm[-tenth:])
    return [
        Line(
            f"memory after {len(warm)} ticks", last, "MiB", first, f"after {WARM_TICKS}", last / first,
            Target("≤", GROWTH_MAX), f"slope {slope * 1024:+.1f} KiB a tick",
        )
    ]  # fmt: skip


async def _next_tick(watch: asyncpg.Connection) -> None:
    count = await watch.fetchval("select count(*) from tick where finished_at is not null")
    while await watch.fetchval("select count(*) from tick where finished_at is not null") == count:  # noqa: ASYNC110
        await anyio.sleep(0.1)
