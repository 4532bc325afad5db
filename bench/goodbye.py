"""SIGTERM under load: how long a replica takes to go, what it leaves behind, and that another one ends it all, once."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import aiohttp
import anyio
import msgspec

from bench.fleet import environment
from bench.replica import Replica, replica
from bench.report import Line, Target
from bench.sender import ENV, headers
from bench.stage import Stage
from bench.ticking import Provider, Tick, connections_template, copied_provider
from daemon.queue.qstash import WORKER_PATH

DRAIN_S = 30
"""The default of `drain_s`."""
BOUND_S = DRAIN_S + 5
TEMPLATE = "goodbye"
LOAD_S = 3.0
DELIVERY_S = 0.05
RELEASED_AT_ONCE = 8
"""Twice as many batches as run at once; after that every second delivery releases one more, the others come again."""
SHORT_S, LONG_S, SMOKE_LONG_S = 0.05, 2.0, 10.0
"""How long the provider takes for an answer: so that batches end while draining, or that none does."""


@dataclass
class _Postman:
    """Delivers at a steady rate until nobody answers any more."""

    url: str
    jobs: Sequence[int]
    is_leaving: bool = False
    accepted: int = 0
    while_leaving: int = 0
    lost: int = 0
    released: set[int] = field(default_factory=set)

    async def walk(self) -> None:
        waiting, number = iter(self.jobs), 0
        first = self.jobs[0]
        async with aiohttp.ClientSession() as client:
            while not self.lost:
                is_early = number < RELEASED_AT_ONCE
                batch = next(waiting, first) if is_early or number % 2 else first
                number += 1
                await self._deliver(client, batch, f"msg_goodbye_{number}")
                if not is_early:
                    await anyio.sleep(DELIVERY_S)

    async def _deliver(self, client: aiohttp.ClientSession, batch: int, message: str) -> None:
        body = b'{"batch":%d}' % batch
        try:
            async with client.post(
                self.url + WORKER_PATH, data=body, headers=headers(WORKER_PATH, body, message)
            ) as answer:
                told = await answer.read()
                assert answer.status == 200, (answer.status, told)
        except (aiohttp.ClientError, OSError):
            assert self.is_leaving  # until the signal nothing may fail
            self.lost += 1
            return
        self.accepted += 1
        self.while_leaving += self.is_leaving
        if msgspec.json.decode(told)["released"]:
            assert batch not in self.released, batch
            self.released.add(batch)


@dataclass(frozen=True, slots=True)
class _Left:
    took_s: float
    note: str


async def under_load(stage: Stage) -> list[Line]:
    """Once with batches that end while draining, once with batches that have to be given back."""
    count = stage.size(10_000, 400)
    lines = []
    async with copied_provider() as provider:
        await connections_template(stage, TEMPLATE, provider, count)
        long_s = SMOKE_LONG_S if stage.is_quick else LONG_S
        for name, delay_s, rounds in (
            ("its batches end in time", SHORT_S, stage.size(3, 1)),
            ("its batches outlast that", long_s, 1),
        ):
            left = [await _round(stage, provider, count, delay_s, ends=number == 0) for number in range(rounds)]
            lines.append(
                Line(
                    f"SIGTERM to exit under load, drain_s {stage.size(DRAIN_S, 2)}, {name}",
                    median(each.took_s for each in left), "s", target=Target("≤", BOUND_S, "ours"),
                    note=left[0].note + (f"; slowest of {rounds}: {max(e.took_s for e in left):.1f} s" if rounds > 1 else ""),
                )
            )  # fmt: skip
    return lines


async def _round(stage: Stage, provider: Provider, count: int, delay_s: float, *, ends: bool) -> _Left:
    async with stage.database(TEMPLATE) as url, Tick.in_database(url, stage.size(100, 10)) as tick:
        env = {
            **environment(stage, url),
            **ENV,
            "TALLYD_TRIGGER": "qstash",
            "TALLYD_DRAIN_S": f"{stage.size(DRAIN_S, 2)}",
        }
        await tick.make(count, hands_over=True)
        await provider.wait_before_answers(delay_s)
        async with replica(env, stage.folder / "goodbye.log") as leaving:
            postman = _Postman(leaving.url, tick.jobs)
            async with anyio.create_task_group() as group:
                group.start_soon(postman.walk)
                await anyio.sleep(LOAD_S)
                running = await tick.watch.fetchval("select count(*) from lease")
                assert running > 0
                postman.is_leaving = True
                took_s = await _said_goodbye(leaving)
        await _assert_left_in_order(tick, postman)
        done = await tick.watch.fetchval("select count(*) from batch_summary")
        given_back = await tick.watch.fetchval("select count(*) from attempt where outcome = 8")
        if not stage.is_quick or delay_s > SHORT_S:  # a smoke run drains for so short that either may happen
            assert (given_back > 0) is (delay_s > SHORT_S), given_back
        if ends:
            await provider.wait_before_answers(0)
            async with replica(env, stage.folder / "heir.log"):
                await tick.finished_s()
            assert sum(await tick.shares()) == len(tick.jobs)
            await tick.assert_booked_once(count)
    return _Left(
        took_s,
        f"{running} batches ran, {done} of {len(tick.jobs)} had ended at the exit, {given_back} were given back; "
        f"{postman.accepted} deliveries accepted, {postman.while_leaving} of them after the signal",
    )


async def _said_goodbye(leaving: Replica) -> float:
    began = perf_counter()
    leaving.child.send_signal(signal.SIGTERM)
    await leaving.ended()
    return perf_counter() - began


async def _assert_left_in_order(tick: Tick, postman: _Postman) -> None:
    """Nothing is leased, no batch is lost or doubled, and what was answered with 200 is in the database."""
    watch = tick.watch
    assert await watch.fetchval("select count(*) from lease") == 0
    assert await watch.fetchval("select count(*) from worker where stopped_at is null") == 0
    places = await watch.fetch(
        "select id from ready union all select id from due union all select id from dead "
        "union all select job_id from batch_summary"
    )
    assert sorted(row["id"] for row in places) == tick.jobs, len(places)
    stored = {row["job_id"] for row in await watch.fetch("select job_id from handover where released_at is not null")}
    assert postman.released <= stored, postman.released - stored
    assert len(stored - postman.released) <= 1, stored  # the one whose answer was on its way
