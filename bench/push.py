"""Messages on their way out: how fast a worker delivers them, and how fast a client does that does nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from time import perf_counter, process_time

import anyio.to_thread

from bench.mail import IN_FLIGHT, Endpoint, Mail, body, endpoint, settings, worker
from bench.replica import PostgresCpu, Replica, cpu_s
from bench.report import Line, Target
from bench.sender import sender
from bench.stage import Rounds, Stage, has_uvloop, summarise

Post = Callable[[bytes], Awaitable[None]]


async def deliver(stage: Stage) -> list[Line]:
    """One `tallyd run --role worker`, from the commit of the messages to the last settling, against bare clients."""
    count = stage.size(3_000, 200)
    async with (
        stage.database() as url,
        endpoint() as there,
        Mail.open(stage, url) as mail,
        worker(settings(stage, url), stage.folder / "push.log") as replica,
    ):
        sides = _Sides(mail, there, replica, await PostgresCpu.find(url))
        with sender() as pool:
            await sides.ours(stage.size(500, 100))  # what is loaded or connected on first use
            for kind in CLIENTS:
                await sides.bare(pool, kind, stage.size(500, 100))
            sides.micros.clear()
            ours: list[float] = []
            others: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
            micros: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
            for number in range(stage.size(5, 1)):
                if number % 2 == 0:
                    ours.append(await sides.ours(count))
                for kind in CLIENTS:
                    rate, used = await sides.bare(pool, kind, count)
                    others[kind].append(rate)
                    micros[kind].append(used)
                if number % 2:
                    ours.append(await sides.ours(count))
    mine, theirs, postgres = (median(each) for each in zip(*sides.micros, strict=True))
    note = (
        f"processor time a message: worker {mine:.0f} µs, Postgres {postgres:.0f}, endpoint {theirs:.0f}; "
        f"bare aiohttp {median(micros['aiohttp']):.0f}, bare on our client {median(micros['push']):.0f}"
    )
    rounds = {kind: summarise([*zip(ours, others[kind], strict=True)]) for kind in CLIENTS}
    return [
        _line("push of small messages", rounds["aiohttp"], "bare aiohttp loop", Target("≥", 0.6), note),
        _line("push of small messages", rounds["push"], "bare loop on our own client"),
    ]


def _line(name: str, rounds: Rounds, reference: str, target: Target | None = None, note: str = "") -> Line:
    return Line(
        f"{name}, {IN_FLIGHT} in flight", rounds.ours, "messages/s", rounds.reference, reference, rounds.ratio, target,
        note,
    )  # fmt: skip


class _Sides:
    def __init__(self, mail: Mail, there: Endpoint, replica: Replica, postgres: PostgresCpu) -> None:
        self._mail = mail
        self._there = there
        self._replica = replica
        self._postgres = postgres
        self.micros: list[tuple[float, float, float]] = []

    async def ours(self, count: int) -> float:
        """Messages per second, each of which arrived once and was settled."""
        await self._there.reset(count)
        await self._mail.clear()
        publications = self._mail.publications(f"{self._there.url}/in", [body(number) for number in range(count)])
        used = cpu_s(self._replica.process), cpu_s(self._there.process), self._postgres.cpu_s()
        await self._mail.publish(publications)
        published = self._postgres.cpu_s()
        began = perf_counter()
        await self._there.until_all(count, every_s=0.05)
        await self._mail.until_settled()
        took_s = perf_counter() - began
        mine, theirs = cpu_s(self._replica.process) - used[0], cpu_s(self._there.process) - used[1]
        postgres = self._postgres.cpu_s() - published
        self.micros.append((mine / count * 1e6, theirs / count * 1e6, postgres / count * 1e6))
        await self._mail.check_delivered(count)
        return count / took_s

    async def bare(self, pool: ProcessPoolExecutor, kind: str, count: int) -> tuple[float, float]:
        """Posts per second, and microseconds of a processor for each."""
        await self._there.reset(count)
        bodies = [body(number) for number in range(count)]
        future = pool.submit(post_all, kind, f"{self._there.url}/in", bodies, IN_FLIGHT)
        took_s, used_s = await anyio.to_thread.run_sync(future.result)
        await self._there.until_all(count)
        return count / took_s, used_s / count * 1e6


def post_all(kind: str, url: str, bodies: Sequence[bytes], in_flight: int) -> tuple[float, float]:
    """Post each body once, so many at a time: seconds, and seconds of a processor."""
    main = CLIENTS[kind](url, bodies, in_flight)
    if has_uvloop():
        import uvloop

        return uvloop.run(main)
    return asyncio.run(main)


async def _aiohttp(url: str, bodies: Sequence[bytes], in_flight: int) -> tuple[float, float]:
    import aiohttp

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=in_flight, limit_per_host=in_flight, ttl_dns_cache=30),
        timeout=aiohttp.ClientTimeout(total=30, sock_connect=5, sock_read=30),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        trust_env=False,
    ) as session:

        async def post(each: bytes) -> None:
            async with session.post(url, data=each, headers={"Content-Type": "application/json"}) as answer:
                await answer.read()
                assert answer.status == 200

        return await _all(post, bodies, in_flight)


async def _push(url: str, bodies: Sequence[bytes], in_flight: int) -> tuple[float, float]:
    from daemon.domain.network import Guard
    from daemon.http_push import PushClient, PushRequest, PushSettings

    headers = [("Content-Type", "application/json")]
    guard = Guard((), allows_all=True)
    async with PushClient(PushSettings(guard, connections_max=in_flight)) as client:

        async def post(each: bytes) -> None:
            assert (await client.send(PushRequest("POST", url, headers, each, 30))).status == 200

        return await _all(post, bodies, in_flight)


async def _all(post: Post, bodies: Sequence[bytes], in_flight: int) -> tuple[float, float]:
    left = iter(bodies)

    async def lane() -> None:
        for each in left:
            await post(each)

    began, used = perf_counter(), process_time()
    await asyncio.gather(*(lane() for _ in range(in_flight)))
    return perf_counter() - began, process_time() - used


CLIENTS = {"aiohttp": _aiohttp, "push": _push}
