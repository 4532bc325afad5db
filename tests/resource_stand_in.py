"""A REST API over a real socket, with faults, and counts of everything it was asked: `python -m tests.resource_stand_in`.

GET /orders                    the list: limit, cursor | page | offset | link paging, fields, since or If-Modified-Since
GET /orders?ids=a,b            many at once
GET /orders/{id}               one, with ETag and Last-Modified; fields; conditional
POST /_set?count=&changed=     make so many resources, or change every n-th of them
GET /_counts                   what it was asked
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BASE_TIME = 1_790_000_000
SECRET = "resource-key"


@dataclass
class Answer:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    cuts: bool = False
    """The connection ends in the midst of the body."""

    def encoded(self) -> bytes:
        body = self.raw if self.raw is not None else b"" if self.body is None else json.dumps(self.body).encode()
        head = [f"HTTP/1.1 {self.status} X", "content-type: application/json", f"content-length: {len(body)}"]
        head += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + (body[: len(body) // 2] if self.cuts else body)


@dataclass
class Ask:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


Fault = Callable[[Ask], Answer | None]


class Api:
    """The resources, and what was asked. `faults` may answer in place of the API; `gate` holds answers back, and
    `filled` tells that `wanted` requests wait behind it.
    """

    def __init__(self, count: int = 0) -> None:
        self.versions: dict[str, int] = {f"r{n}": 1 for n in range(count)}
        self.contents: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.asked: Counter[str] = Counter()
        self.by_id: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.bodies = 0
        self.in_flight = 0
        self.in_flight_max = 0
        self.delay_s = 0.0
        self.is_unauthorised = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.wanted = 0
        self.filled = asyncio.Event()
        self.paging = "cursor"
        self.asks: list[Ask] = []
        self.keeps_asks = False

    def change(self, *ids: str) -> None:
        for id_ in ids:
            self.versions[id_] += 1

    def forget_counts(self) -> None:
        self.asked.clear()
        self.by_id.clear()
        self.asks.clear()
        self.bodies = self.in_flight_max = 0

    @property
    def calls(self) -> int:
        return self.asked.total()

    def resource(self, id_: str) -> dict[str, Any]:
        version = self.versions[id_]
        return {
            "id": id_,
            "updated_at": BASE_TIME + version,
            "name": f"Order {id_}",
            "total": f"{version}.10",
            "lines": [{"sku": f"{id_}-{n}", "quantity": n} for n in range(3)],
            **self.contents.get(id_, {}),
        }

    def answer(self, ask: Ask) -> Answer:
        if self.keeps_asks:
            self.asks.append(ask)
        for fault in self.faults:
            if (found := fault(ask)) is not None:
                self.asked["fault"] += 1
                return found
        if self.is_unauthorised or SECRET not in _credential(
            ask.headers.get("authorization", ask.headers.get("x-key", ""))
        ):
            self.asked["refused"] += 1
            return Answer(401, {"error": {"message": "who are you?"}})
        if ask.path == "/orders":
            return self._many(ask)
        if ask.path.startswith("/orders/"):
            return self._one(ask, unquote(ask.path.removeprefix("/orders/")))
        return Answer(404, {"error": {"message": "no such path"}})

    def _projected(self, ask: Ask, resource: dict[str, Any]) -> dict[str, Any]:
        names = ask.query.get("fields")
        if names == "served":
            return {"served": self.calls}
        return {name: resource[name] for name in names.split(",") if name in resource} if names else resource

    def _many(self, ask: Ask) -> Answer:
        query = ask.query
        if "ids" in query:
            self.asked["ids"] += 1
            wanted = [id_ for id_ in query["ids"].split(",") if id_ in self.versions]
            return Answer(200, {"data": [self._projected(ask, self.resource(id_)) for id_ in wanted]})
        self.asked["list"] += 1
        limit = int(query.get("limit", "500"))
        ids = list(self.versions)
        since = int(query["since"]) if "since" in query else None
        if "if-modified-since" in ask.headers:
            since = int(parsedate_to_datetime(ask.headers["if-modified-since"]).timestamp())
        if since is not None:
            ids = [id_ for id_ in ids if BASE_TIME + self.versions[id_] >= since]
        if not ids and "if-modified-since" in ask.headers:
            return Answer(304)
        at = int(query.get("cursor") or query.get("offset") or 0)
        if "page" in query:
            at = (int(query["page"]) - 1) * limit
        page, rest = ids[at : at + limit], ids[at + limit :]
        body: dict[str, Any] = {"data": [self._projected(ask, self.resource(id_)) for id_ in page], "meta": {}}
        headers = {}
        if rest and self.paging == "cursor":
            body["meta"]["next"] = str(at + limit)
        if rest and self.paging == "link":
            headers["link"] = (
                f'</orders?limit={limit}&cursor=0>; rel="first", </orders?limit={limit}&cursor={at + limit}>; rel="next"'
            )
        if rest and self.paging == "url":
            body["meta"]["next"] = f"/orders?limit={limit}&cursor={at + limit}"
        return Answer(200, body, headers)

    def _one(self, ask: Ask, id_: str) -> Answer:
        kind = "check" if "fields" in ask.query else "detail"
        self.asked[kind] += 1
        self.by_id[id_][kind] += 1
        if id_ not in self.versions:
            return Answer(404, {"error": {"message": "no such order"}})
        tags = {"etag": f'"{id_}-{self.versions[id_]}"', "last-modified": f"version {self.versions[id_]}"}
        if (
            ask.headers.get("if-none-match") == tags["etag"]
            or ask.headers.get("if-modified-since") == tags["last-modified"]
        ):
            return Answer(304, None, tags)
        self.bodies += 1
        return Answer(200, self._projected(ask, self.resource(id_)), tags)

    def control(self, ask: Ask) -> Answer:
        query = ask.query
        if "count" in query:
            self.versions = {f"r{n}": 1 for n in range(int(query["count"]))}
        if "changed" in query:
            self.change(*(id_ for n, id_ in enumerate(self.versions) if n % 100 < int(query["changed"])))
        if "bad" in query:
            bad = set(query["bad"].split(","))
            self.faults = [lambda ask: Answer(500) if ask.path.rpartition("/")[2] in bad else None]
        if "delay_s" in query:
            self.delay_s = float(query["delay_s"])
        told = {"calls": self.calls, "bodies": self.bodies, "in_flight_max": self.in_flight_max, **self.asked}
        if "forget" in query:
            self.forget_counts()
        return Answer(200, told)


def _credential(header: str) -> str:
    kind, _, text = header.partition(" ")
    return base64.b64decode(text).decode() if kind == "Basic" else header


@dataclass
class Server:
    api: Api
    url: str
    through: Counter[str] = field(default_factory=Counter)


@asynccontextmanager
async def serving(api: Api) -> AsyncIterator[Server]:
    """The API on a socket of this process."""
    there = Server(api, "")
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
                target = first.split(" ")[1]
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                parts = urlsplit(target)
                ask = Ask(parts.path, {name: value[-1] for name, value in parse_qs(parts.query).items()}, headers)
                if ask.path == "/_control":
                    writer.write(api.control(ask).encoded())
                    continue
                api.in_flight += 1
                api.in_flight_max = max(api.in_flight_max, api.in_flight)
                if api.in_flight == api.wanted:
                    api.filled.set()
                try:
                    if api.delay_s:
                        await asyncio.sleep(api.delay_s)
                    await api.gate.wait()
                    answer = api.answer(ask)
                finally:
                    api.in_flight -= 1
                writer.write(answer.encoded())
                await writer.drain()
                if answer.cuts:
                    return
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the client hung up, or the test is over
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1_024)
    there.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield there
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Exit:
    """A plain HTTP proxy, with counts. `is_down`: it closes each connection at once."""

    url: str = ""
    asked: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    credential: str | None = None
    is_down: bool = False


@asynccontextmanager
async def exiting() -> AsyncIterator[Exit]:
    """A forward proxy on a socket of this process."""
    there = Exit()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if there.is_down:
                    writer.write(b"HTTP/1.1 407 No\r\ncontent-length: 0\r\n\r\n")
                    continue
                there.asked += 1
                there.in_flight += 1
                there.in_flight_max = max(there.in_flight_max, there.in_flight)
                try:
                    line, _, rest = head.partition(b"\r\n")
                    method, target, _ = line.decode().split(" ")
                    for field_ in rest.decode("latin-1").split("\r\n"):
                        name, _, value = field_.partition(":")
                        if name.lower() == "proxy-authorization":
                            there.credential = base64.b64decode(value.strip().removeprefix("Basic ")).decode()
                    parts = urlsplit(target)
                    onward, back = await asyncio.open_connection(parts.hostname, parts.port)
                    path = parts.path + (f"?{parts.query}" if parts.query else "")
                    back.write(f"{method} {path} HTTP/1.1\r\n".encode() + rest)
                    answer = await onward.readuntil(b"\r\n\r\n")
                    length = next(
                        int(f.split(b":")[1]) for f in answer.split(b"\r\n") if f.lower().startswith(b"content-length")
                    )
                    writer.write(answer + await onward.readexactly(length))
                    back.close()
                finally:
                    there.in_flight -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    there.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield there
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def main() -> None:
    async with serving(Api()) as server:
        print(server.url, flush=True)  # noqa: T201 - whoever started it reads this
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
