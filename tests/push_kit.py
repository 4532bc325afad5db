"""An endpoint for messages, on a real socket: it keeps each request byte for byte, verifies it with the SDK's Receiver, and
answers as a test wants.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from daemon.db.accounts import AccountStore
from daemon.db.pool import Database
from daemon.db.secrets import Keyring, parse_keys
from daemon.domain.account import AccountId, Limits, SigningKeys
from daemon.domain.job import KEY_END, PUSH_KEY, Job, Lane, Outcome
from daemon.domain.network import Guard, parse_allow
from daemon.http_push import PushClient, PushSettings
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.message import PUSH, Publication, Published, Spec
from daemon.queue.messages import Messages, State
from daemon.queue.postgres import PostgresQueue
from daemon.worker.loop import WorkerLoop
from daemon.worker.push import Pusher
from daemon.worker.run import run_job
from tests.books_kit import SECRET_KEY, until

KEYRING = Keyring(parse_keys(SECRET_KEY))


@dataclass(frozen=True, slots=True)
class Arrived:
    """One request: the request line's parts, header lines in order, the body."""

    method: str
    target: str
    lines: list[tuple[str, str]]
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.lines}

    @property
    def message_id(self) -> str:
        return self.headers["upstash-message-id"]

    @property
    def retried(self) -> int:
        return int(self.headers["upstash-retried"])


@dataclass(frozen=True, slots=True)
class Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"ok"


Judge = Callable[[Arrived], Awaitable[Reply | None] | Reply | None]
"""What to answer; None: hang up without an answer."""


class Endpoint:
    """Where messages go. `arrived` grows with each request; `running` counts those that are not answered yet."""

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.judge: Judge = lambda _arrived: Reply()
        self.running = 0
        self.running_most = 0
        self.connections = 0
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()

    def at(self, path: str) -> list[Arrived]:
        return [one for one in self.arrived if one.target.split("?")[0] == path]

    async def has(self, count: int, path: str | None = None, *, wait_s: float = 15.0) -> list[Arrived]:
        """Wait for `count` requests (of a path), and return them."""

        def found() -> list[Arrived]:
            return self.arrived if path is None else self.at(path)

        async def is_so() -> bool:
            return len(found()) >= count

        await until(is_so, f"{count} requests at {path or 'the endpoint'}, of which {len(found())} came", wait_s=wait_s)
        return found()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while await self._answer_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):  # at the end of a test
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("utf-8")
        first, *rest = head.rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        lines = [(line.partition(": ")[0], line.partition(": ")[2]) for line in rest]
        length = int({name.lower(): value for name, value in lines}.get("content-length", "0"))
        one = Arrived(method, target, lines, await reader.readexactly(length))
        self.arrived.append(one)
        self.running += 1
        self.running_most = max(self.running_most, self.running)
        try:
            reply = self.judge(one)
            if isinstance(reply, Awaitable):
                reply = await reply
        finally:
            self.running -= 1
        if reply is None:
            return False
        headers = {"Content-Length": str(len(reply.body)), **reply.headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {reply.status} Because\r\n{text}\r\n".encode() + reply.body)
        await writer.drain()
        return True

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@asynccontextmanager
async def open_endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    server = await asyncio.start_server(endpoint.serve, "127.0.0.1", 0)
    endpoint.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield endpoint
    finally:
        server.close()
        endpoint.hang_up()
        with anyio.move_on_after(2):
            await server.wait_closed()


class Pushing:
    """The queue with messages, and workers that deliver them, in this process."""

    def __init__(self, db: Database, client: PushClient, account: AccountId) -> None:
        self.db = db
        self.queue = PostgresQueue(db)
        self.messages = Messages(db, self.queue)
        self.accounts = AccountStore(db, KEYRING)
        self.client = client
        self.account = account
        self.limits = Limits()
        self.keys = SigningKeys("", "")

    async def publish(self, *publications: Publication) -> list[Published]:
        """One call. Raises what it is refused with."""
        (made,) = await self.messages.publish([(self.limits, publications)])
        if isinstance(made, Exception):
            raise made
        return made

    def publication(self, url: str, body: bytes = b"{}", **fields: Any) -> Publication:
        """A message; what is no field of a publication is one of its spec."""
        spec = {name: fields.pop(name) for name in [*fields] if name in Spec.__struct_fields__}
        return Publication(self.account, url, Spec(**spec), body, **fields)

    def worker(self, pusher: Pusher | None = None) -> WorkerLoop:
        run = (pusher or Pusher(self.messages, self.accounts, self.client)).run

        async def run_push(job: Job) -> Outcome:
            return await run_job(job, {PUSH: run})

        lane = Lane("push", PUSH_KEY, KEY_END, 64, 32)
        return WorkerLoop(self.queue, run_push, lanes=[lane], drain_s=0)

    @asynccontextmanager
    async def working(self, *loops: WorkerLoop) -> AsyncIterator[None]:
        """Workers run inside; by default one."""
        loops = loops or (self.worker(),)
        async with anyio.create_task_group() as group:
            for loop in loops:
                group.start_soon(loop.run)
            try:
                yield
            finally:
                for loop in loops:
                    loop.stop()

    async def states(self, message: Published) -> list[str]:
        """The message's log, oldest first."""
        rows = await self.db.fetch("select state from event where message_id = $1 order by at, id", message.id.job)
        return [State(row["state"]).name for row in rows]

    async def logs(self, message: Published, state: str, *, wait_s: float = 15.0) -> None:
        """Wait until the log holds this state."""

        async def is_so() -> bool:
            return state in await self.states(message)

        await until(is_so, f"{state} in the log", wait_s=wait_s)

    async def is_quiet(self) -> None:
        """Wait until nothing is left to do, and check that every job is where it belongs."""

        async def is_so() -> bool:
            return not await self.db.fetchval(
                "select (select count(*) from ready) + (select count(*) from due) + (select count(*) from held)"
                " + (select count(*) from lease)"
            )

        await until(is_so, "nothing is left to do", wait_s=20)
        assert not await self.db.fetchval("select count(*) from slot")
        assert await QueueMaintenance(self.db).conservation() == []


@asynccontextmanager
async def open_pushing(database_url: str, **settings: Any) -> AsyncIterator[Pushing]:
    """An account, and a client that may reach this machine."""
    db = await Database.open(database_url, pool_max=8)
    try:
        guard = settings.pop("guard", Guard(parse_allow("127.0.0.0/8"), allows_all=False))
        async with PushClient(PushSettings(guard, **settings)) as client:
            accounts = AccountStore(db, KEYRING)
            account = await accounts.add("acme")
            pushing = Pushing(db, client, account)
            pushing.keys = await accounts.keys(account)
            yield pushing
    finally:
        await db.close()
