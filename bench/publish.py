"""Publishing over HTTP: one by one and in batches, against routes that insert a row and do nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from statistics import median
from urllib.parse import urlsplit

import anyio.to_thread
import msgspec
import psutil  # type: ignore[import-untyped]  # it has no types

from bench.mail import Mail, body, settings
from bench.replica import PostgresCpu, Replica, cpu_s, replica
from bench.report import Line, Target
from bench.sender import Shipped, post, sender
from bench.stage import Stage, process, summarise

CONNECTIONS = 16
BATCH = 100
BATCH_CONNECTIONS = 4
DESTINATION = "http://127.0.0.1:9/in"


async def accepted(stage: Stage) -> list[Line]:
    """One `tallyd run --role listener` and one bare server on one database; a message counts when its 200 has come."""
    count, batches = stage.size(2_000, 100), stage.size(30, 4)
    async with stage.database() as url, Mail.open(stage, url) as mail:
        token = (await mail.accounts.add_token(mail.account, "bench")).reveal()
        async with replica(settings(stage, url), stage.folder / "publish.log", "--role", "listener") as listener:
            with process("-m", "bench.insert_server", url) as (child, ready), sender() as pool:
                sides = _Sides(mail, listener, psutil.Process(child.pid), int(ready), pool, token)
                sides.postgres = await PostgresCpu.find(url)
                singles = [body(number) for number in range(count)]
                lists = [
                    msgspec.json.encode(
                        [
                            {"destination": DESTINATION, "body": body(number).decode()}
                            for number in range(at, at + BATCH)
                        ]
                    )
                    for at in range(0, batches * BATCH, BATCH)
                ]
                path = f"/v2/publish/{DESTINATION}"
                one = partial(sides.ours, path, 1, CONNECTIONS, singles)
                many = partial(sides.ours, "/v2/batch", BATCH, BATCH_CONNECTIONS, lists)
                bare_one = partial(sides.bare, "/v2/one", 1, CONNECTIONS, singles)
                bare_group = partial(sides.bare, "/v2/group", 1, CONNECTIONS, singles)
                bare_many = partial(sides.bare, "/v2/bulk", BATCH, BATCH_CONNECTIONS, lists)
                for each in (one, many, bare_one, bare_group, bare_many):  # what is loaded or connected on first use
                    await each.func(*each.args[:-1], each.args[-1][: stage.size(500, 10)])
                sides.waits_ms.clear()
                sides.micros.clear()
                found = []
                for number in range(stage.size(3, 1)):
                    order = (one, bare_one, bare_group, many, bare_many)
                    taken = {each: await each() for each in (order if number % 2 == 0 else order[::-1])}
                    found.append([taken[each] for each in order])
    single = summarise([(row[0], row[1]) for row in found])
    grouped = summarise([(row[0], row[2]) for row in found])
    batch = summarise([(row[3], row[4]) for row in found])
    p50, p99 = (median(each) for each in zip(*sides.waits_ms[path], strict=True))
    one_us, many_us = (
        ", ".join(
            f"{name} {median(each):.0f} µs"
            for name, each in zip(("server", "Postgres"), zip(*sides.micros[key], strict=True), strict=True)
        )
        for key in (path, "/v2/batch")
    )
    name = f"publish one by one on {CONNECTIONS} connections"
    return [
        Line(
            name, single.ours, "messages/s", single.reference, "bare route, a row and a commit each", single.ratio,
            Target("≥", 0.5), f"p50 {p50:.1f} ms, p99 {p99:.1f} ms; processor time a message: {one_us}",
        ),
        Line(name, grouped.ours, "messages/s", grouped.reference, "bare route, commits shared", grouped.ratio),
        Line(
            f"publish in batches of {BATCH} on {BATCH_CONNECTIONS} connections", batch.ours, "messages/s",
            batch.reference, "bare bulk insert of a row each", batch.ratio, None,
            f"processor time a message: {many_us}",
        ),
    ]  # fmt: skip


class _Sides:
    postgres: PostgresCpu

    def __init__(
        self, mail: Mail, listener: Replica, reference: psutil.Process, port: int, pool: ProcessPoolExecutor, token: str
    ) -> None:
        self._mail = mail
        self._listener = listener
        self._port = port
        self._pool = pool
        self._token = token
        self.reference = reference
        self.waits_ms: dict[str, list[tuple[float, float]]] = {}
        self.micros: dict[str, list[tuple[float, float]]] = {}

    async def ours(self, path: str, each: int, connections: int, bodies: Sequence[bytes]) -> float:
        """Messages per second; all of them are stored, and each has a name of its own."""
        await self._mail.clear()
        port = urlsplit(self._listener.url).port
        assert port is not None
        server, postgres = cpu_s(self._listener.process), self.postgres.cpu_s()
        done = await self._post(port, path, bodies, connections)
        messages = len(bodies) * each
        server, postgres = cpu_s(self._listener.process) - server, self.postgres.cpu_s() - postgres
        self.waits_ms.setdefault(path, []).append(done.waits_ms)
        self.micros.setdefault(path, []).append((server / messages * 1e6, postgres / messages * 1e6))
        assert {status for status, _ in done.answers} == {200}, done.answers.most_common(2)
        assert len(done.answers) == len(bodies), done.answers.most_common(2)
        stored = await self._mail.watch.fetchrow(
            "select (select count(*) from message), (select count(*) from ready), (select count(*) from payload)"
        )
        assert tuple(stored or ()) == (messages,) * 3, stored
        return messages / done.took_s

    async def bare(self, path: str, each: int, connections: int, bodies: Sequence[bytes]) -> float:
        await self._mail.watch.execute("truncate bare")
        done = await self._post(self._port, path, bodies, connections)
        assert {status for status, _ in done.answers} == {200}, done.answers.most_common(2)
        assert await self._mail.watch.fetchval("select count(*) from bare") == len(bodies) * each
        return len(bodies) * each / done.took_s

    async def _post(self, port: int, path: str, bodies: Sequence[bytes], connections: int) -> Shipped:
        return await anyio.to_thread.run_sync(
            self._pool.submit(post, port, path, bodies, connections, self._token).result
        )
