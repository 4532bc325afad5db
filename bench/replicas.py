"""More replicas on one database: how long a tick takes, and how evenly they share it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from statistics import median

from bench.fleet import environment
from bench.replica import PostgresCpu, cpu_s, replica
from bench.report import Line
from bench.sender import ENV
from bench.stage import Stage
from bench.ticking import Provider, Tick, connections_template, copied_provider

REPLICAS = (1, 2, 4)
TEMPLATE = "replicas"


async def one_tick(stage: Stage) -> list[Line]:
    """From the creation of a tick to its end, with one replica, two and four, in turn and back again."""
    count = stage.size(10_000, 400)
    took: dict[int, list[float]] = {number: [] for number in REPLICAS}
    notes: dict[int, str] = {}
    async with copied_provider() as provider:
        await connections_template(stage, TEMPLATE, provider, count)
        orders = (REPLICAS, REPLICAS[::-1])[: stage.size(2, 1)]
        for number in (number for order in orders for number in order):
            seconds, notes[number] = await _tick(stage, provider, number, count)
            took[number].append(seconds)
    alone = took[1]
    return [
        Line(
            f"tick of {count:,} connections never read, {number} replica{'s' * (number > 1)}", median(seconds), "s",
            None if number == 1 else median(alone), "" if number == 1 else "one replica",
            None if number == 1 else median(a / b for a, b in zip(seconds, alone, strict=True)), note=notes[number],
        )
        for number, seconds in took.items()
    ]  # fmt: skip


async def _tick(stage: Stage, provider: Provider, number: int, count: int) -> tuple[float, str]:
    """Returns the seconds, and who did what."""
    async with stage.database(TEMPLATE) as url, Tick.in_database(url, stage.size(100, 10)) as tick:
        env = {**environment(stage, url), **ENV, "TALLYD_TRIGGER": "qstash"}  # so that no replica makes the tick
        async with AsyncExitStack() as stack:
            replicas = [
                await stack.enter_async_context(replica(env, stage.folder / f"replica-{which}.log", "--role", "worker"))
                for which in range(number)
            ]
            postgres = await PostgresCpu.find(url)
            asked, server = await provider.asked(), postgres.cpu_s()
            used = [cpu_s(each.process) for each in replicas]
            await tick.make(count)
            took_s = await tick.finished_s()
            used = [cpu_s(each.process) - before for each, before in zip(replicas, used, strict=True)]
            server, asked = postgres.cpu_s() - server, await provider.asked() - asked
        shares = await tick.shares()
        assert len(shares) <= number, shares
        await tick.assert_booked_once(count)
    shares += [0] * (number - len(shares))
    of_core = ", ".join(f"{seconds / took_s:.0%}" for seconds in used)
    return took_s, (
        f"{asked:,} requests; batches a replica {min(shares)} to {max(shares)} of {len(tick.jobs)}, each once; "
        f"of a core: replicas {of_core}, Postgres {server / took_s:.0%}"
    )
