"""The QStash-compatible API of this process on a real socket, with the official SDK as its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx
from qstash import AsyncQStash

from daemon.domain.address import Address
from daemon.domain.connection import Secret
from daemon.queue.gather import Gatherer
from daemon.queue.groups import Groups
from daemon.queue.letters import Letters
from daemon.queue.logs import Logs
from daemon.queue.pending import Pending
from daemon.queue.schedules import Schedules
from daemon.web.server import Listener, bind
from daemon.web.v2.app import V2
from daemon.web.v2.services import Services
from tests.http_kit import local_client
from tests.push_kit import Pushing, open_pushing


@dataclass
class Api:
    """A server, its tokens, and clients of it.

    Attributes:
        client: plain HTTP with the token of the account `acme`.
        sdk: the official SDK, with the same.
        v2: what serves.
    """

    url: str
    token: Secret
    pushing: Pushing
    client: httpx.AsyncClient
    sdk: AsyncQStash
    schedules: Schedules
    v2: V2

    async def token_of(self, account: str, **options: Any) -> str:
        """A fresh token of an account, which is made if need be."""
        accounts = self.pushing.accounts
        return (await accounts.add_token(await accounts.add(account), f"t{id(options)}", **options)).reveal()

    async def stored(self) -> int:
        """Messages and schedules that there are, of whomever."""
        count: int = await self.pushing.db.fetchval(
            "select (select count(*) from message) + (select count(*) from job) + (select count(*) from schedule)"
        )
        return count

    async def raw(self, head: str, body: bytes = b"") -> tuple[int, bytes]:
        """A request as these very bytes, for what no client would send."""
        place = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            text = f"{head}\r\nHost: x\r\nAuthorization: Bearer {self.token.reveal()}\r\nConnection: close\r\n"
            writer.write(text.encode("utf-8", "surrogateescape") + b"\r\n" + body)
            await writer.drain()
            with anyio.fail_after(10):
                answer = await reader.read()
        finally:
            writer.close()
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


@asynccontextmanager
async def open_api(database_url: str, *, bytes_max: int = 64 << 20, **settings: Any) -> AsyncIterator[Api]:
    """An account `acme` with a token, and a server that takes it."""
    async with open_pushing(database_url, **settings) as pushing:
        db, queue = pushing.db, pushing.queue
        schedules = Schedules(db, queue, pushing.messages, pushing.accounts.limits_of)
        services = Services(
            pushing.accounts,
            Gatherer(pushing.messages.publish),
            pushing.client.check,
            queue.gates,
            Groups(db),
            schedules,
            Logs(db),
            Letters(db, queue, pushing.messages),
            Pending(db, queue),
        )
        token = await pushing.accounts.add_token(pushing.account, "test")
        v2 = V2(services, bytes_max=bytes_max)
        listener = Listener(bind("listen", Address("127.0.0.1", 0)), [], v2)
        sdk = AsyncQStash(token.reveal(), retry=False, base_url=listener.url)
        headers = {"Authorization": f"Bearer {token.reveal()}"}
        async with anyio.create_task_group() as group:
            group.start_soon(listener.run)
            async with local_client(base_url=listener.url, headers=headers, timeout=20) as client:
                try:
                    yield Api(listener.url, token, pushing, client, sdk, schedules, v2)
                finally:
                    await sdk.http._client.aclose()
                    await listener.stop()
