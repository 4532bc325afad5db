"""What passes one by one: a FIFO queue, and a flow-control key with parallelism 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import anyio.to_thread

from bench.mail import Endpoint, Mail, body, endpoint, settings, worker
from bench.push import post_all
from bench.report import Line
from bench.sender import sender
from bench.stage import Stage, alternate

PARALLELISM = 10


async def one_by_one(stage: Stage) -> list[Line]:
    """Each side has as many under way as the gate lets pass; the bare one is a client that posts and does nothing else."""
    lines = []
    async with (
        stage.database() as url,
        endpoint() as there,
        Mail.open(stage, url) as mail,
        worker(settings(stage, url), stage.folder / "gates.log"),
    ):
        with sender() as pool:
            for name, lanes, count, fields in (
                ("FIFO queue, one lane", 1, stage.size(60, 10), {"queue": "lane"}),
                (f"flow-control key, parallelism {PARALLELISM}", PARALLELISM, stage.size(300, 30),
                 {"flow": ("key", PARALLELISM, None, 1)}),
            ):  # fmt: skip
                sides = _Sides(mail, there, pool, lanes, count, fields)
                await sides.ours()
                rounds = await alternate(stage.size(3, 1), sides.ours, sides.bare)
                lines.append(
                    Line(
                        f"{name}: messages one after another", rounds.ours, "messages/s", rounds.reference,
                        f"bare aiohttp loop, {lanes} in flight", rounds.ratio,
                        note=f"{1000 * lanes / rounds.ours:.1f} ms from one message of a lane to its next",
                    )
                )  # fmt: skip
    return lines


class _Sides:
    def __init__(
        self,
        mail: Mail,
        there: Endpoint,
        pool: ProcessPoolExecutor,
        lanes: int,
        count: int,
        fields: Mapping[str, object],
    ) -> None:
        self._mail = mail
        self._there = there
        self._pool = pool
        self._lanes = lanes
        self._count = count
        self._fields = fields

    async def ours(self) -> float:
        await self._mail.clear()
        await self._there.reset(self._count)
        bodies = [body(number) for number in range(self._count)]
        publications = self._mail.publications(f"{self._there.url}/hold/0", bodies, **self._fields)
        await self._mail.publish(publications)
        await self._there.until_all(self._count, every_s=0.05)
        await self._mail.until_settled()
        await self._mail.check_delivered(self._count)
        assert (await self._there.seen())[2] <= self._lanes
        times = await self._there.times()
        assert self._lanes > 1 or times == sorted(times)
        return _rate(times)

    async def bare(self) -> float:
        await self._there.reset(self._count)
        bodies = [body(number) for number in range(self._count)]
        future = self._pool.submit(post_all, "aiohttp", f"{self._there.url}/hold/0", bodies, self._lanes)
        await anyio.to_thread.run_sync(future.result)
        await self._there.until_all(self._count)
        return _rate(await self._there.times())


def _rate(times: Sequence[float]) -> float:
    """Arrivals a second, from the first to the last."""
    return (len(times) - 1) / (max(times) - min(times))
