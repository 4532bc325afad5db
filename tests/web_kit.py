"""The listener of the daemon in this process, on a real socket, and what it takes to talk to it as QStash does."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import anyio
import httpx
import msgspec
from anyio.abc import SocketAttribute, SocketStream

from daemon.db.pool import Database
from daemon.domain.address import Address
from daemon.domain.connection import Secret
from daemon.orchestrate import TickSettings
from daemon.queue.postgres import PostgresQueue
from daemon.triggers.qstash import Deliveries, Door
from daemon.web.delivery import DeliverySettings, delivery_routes
from daemon.web.server import Listener, bind, url_of
from tests.http_kit import local_client
from tests.qstash_stand_in import signature

PUBLIC_URL = "https://tallyd.example/behind/a/proxy"
CURRENT, NEXT = "sig_current_key_of_the_tests_0000", "sig_next_key_of_the_tests_0000000"
ORCHESTRATE, WORKER = "/api/poll/orchestrate", "/api/poll/worker"
CALLBACK, FAILURE = "/api/qstash/callback", "/api/qstash/failure"
QUOTA, QUOTA_ALIAS = "/api/quota/sync", "/api/cron/update-usage"
ROUTES = (ORCHESTRATE, WORKER, CALLBACK, FAILURE, QUOTA, QUOTA_ALIAS)
SETTINGS = TickSettings(tick_s=86_400, batch_size=10)


def keys(current: str = CURRENT, following: str = NEXT) -> tuple[Secret, Secret]:
    return Secret(current), Secret(following)


@dataclass
class Web:
    """A listener and a client that signs."""

    url: str
    db: Database
    queue: PostgresQueue
    client: httpx.AsyncClient
    slept: list[float] = field(default_factory=list)

    async def deliver(
        self,
        path: str,
        body: object = b"{}",
        /,
        *,
        message: str = "msg_1",
        key: str = CURRENT,
        signed_body: bytes | None = None,
        signed_url: str | None = None,
        headers: dict[str, str] | None = None,
        **claims: Any,
    ) -> httpx.Response:
        """One delivery, signed well unless told otherwise."""
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        token = signature(
            PUBLIC_URL + path if signed_url is None else signed_url,
            raw if signed_body is None else signed_body,
            key=key,
            **claims,
        )
        sent = {"upstash-signature": token, "upstash-message-id": message, "content-type": "application/json"}
        return await self.client.post(path, content=raw, headers={**sent, **(headers or {})})

    async def raw(self, *parts: bytes) -> bytes:
        """Send bytes as they are, and read until the other side closes. One that closes early may take its answer along."""
        place = urlsplit(self.url)
        assert place.hostname is not None
        assert place.port is not None
        answer = b""
        async with await anyio.connect_tcp(place.hostname, place.port) as stream:
            try:
                for part in parts:
                    await stream.send(part)
                while True:
                    answer += await stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return answer

    async def counts(self) -> dict[str, int]:
        """What deliveries may have left behind."""
        return {
            table: await self.db.fetchval(f"select count(*) from {table}")
            for table in ("tick", "delivery", "handover", "job", "ready", "due")
        }


@asynccontextmanager
async def open_web(
    db: Database,
    *,
    given: dict[str, tuple[Secret, Secret]] | None = None,
    public_url: str | None = PUBLIC_URL,
    is_direct: bool = False,
    hands_over: bool = True,
    tick: TickSettings = SETTINGS,
    limits: DeliverySettings | None = None,
) -> AsyncIterator[Web]:
    """
    Args:
        is_direct: the public URL is the socket's own.
    """
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await anyio.sleep(seconds)

    queue = PostgresQueue(db)
    bound = bind("listen", Address("127.0.0.1", 0))
    door = Door({"": keys()} if given is None else given, url_of(bound) if is_direct else public_url, sleep)
    deliveries = Deliveries(db, queue, tick, hands_over=hands_over)
    listener = Listener(bound, delivery_routes(door, deliveries, limits))
    async with anyio.create_task_group() as group:
        group.start_soon(listener.run)
        async with local_client(base_url=listener.url, timeout=20) as client:
            yield Web(listener.url, db, queue, client, slept)
        await listener.stop()


# ── A database that can be taken away ───────────────────────────────────────────────────────────


class Relay:
    """A TCP relay in front of Postgres. `cut` ends every connection and refuses new ones, until `mend`."""

    def __init__(self, url: str) -> None:
        self._there = urlsplit(url)
        self._streams: set[SocketStream] = set()
        self._is_cut = False
        self.url = ""

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(SocketAttribute.local_port)
            user, _, _ = self._there.netloc.rpartition("@")
            self.url = urlunsplit(self._there._replace(netloc=f"{user}@127.0.0.1:{port}", query=""))
            task_status.started()
            await listener.serve(self._serve)

    async def _serve(self, client: SocketStream) -> None:
        async with client:
            if self._is_cut:
                return
            async with await self._connect() as server, anyio.create_task_group() as group:
                self._streams |= {client, server}
                for source, target in ((client, server), (server, client)):
                    group.start_soon(self._copy, source, target, group.cancel_scope)
            self._streams -= {client, server}

    async def _connect(self) -> SocketStream:
        port = self._there.port or 5432
        folder = parse_qs(self._there.query).get("host")
        if folder:
            return await anyio.connect_unix(f"{folder[0]}/.s.PGSQL.{port}")
        return await anyio.connect_tcp(self._there.hostname or "127.0.0.1", port)

    async def _copy(self, source: SocketStream, target: SocketStream, scope: anyio.CancelScope) -> None:
        try:
            while True:
                await target.send(await source.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            scope.cancel()

    async def cut(self) -> None:
        self._is_cut = True
        for stream in list(self._streams):
            # Abruptly, as a server that is killed.
            stream.extra(SocketAttribute.raw_socket).setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            await stream.aclose()

    def mend(self) -> None:
        self._is_cut = False


@asynccontextmanager
async def relay_to(url: str) -> AsyncIterator[Relay]:
    relay = Relay(url)
    async with anyio.create_task_group() as group:
        await group.start(lambda *, task_status: relay.run(task_status=task_status))
        yield relay
        group.cancel_scope.cancel()
