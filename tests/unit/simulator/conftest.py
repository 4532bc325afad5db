"""A simulator on a real socket, in this process, with a frozen clock; and small readers of its reports."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import httpx
import msgspec
import pytest

from daemon.domain.window import parse_rfc3339, to_epoch
from daemon.simulator.server import Simulator, serve
from daemon.simulator.world import Clock, World
from tests.http_kit import local_client

NOW = "2026-11-22T10:20:00Z"
OPENAI_KEY = "sk-admin-test"
ANTHROPIC_KEY = "sk-ant-admin01-test"
OPENAI_HEADERS = {"authorization": f"Bearer {OPENAI_KEY}"}
ANTHROPIC_HEADERS = {
    "x-api-key": ANTHROPIC_KEY,
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "analytics-usage-cost-2026-08-24, fast-mode-2026-02-01",
}
PAGES_MAX = 500


def at(text: str) -> int:
    return to_epoch(parse_rfc3339(text))


def instant(text: str) -> datetime:
    return parse_rfc3339(text)


class Sim:
    """Both sides of one simulator: the wire and the control interface."""

    def __init__(self, simulator: Simulator, client: httpx.AsyncClient) -> None:
        self.simulator = simulator
        self.client = client

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """A provider request; the provider follows from the path."""
        base = ANTHROPIC_HEADERS if "/organizations/" in path else OPENAI_HEADERS
        return await self.client.get(path, headers=base | headers)

    async def json(self, path: str) -> Any:
        """The body of a 200, decimals as they were written."""
        answer = await self.get(path)
        assert answer.status_code == 200, answer.text
        return json.loads(answer.content, parse_float=Decimal)

    async def chain(self, path: str) -> list[Any]:
        """All pages, joined."""
        data: list[Any] = []
        page = await self.json(path)
        for _ in range(PAGES_MAX):
            data += page["data"]
            if not page["has_more"]:
                return data
            page = await self.json(f"{path}&page={page['next_page']}")
        raise AssertionError("the chain does not end")

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else msgspec.json.encode(body)
        answer = await self.client.request(method, f"/_sim/{path}", content=content)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def truth(self, provider: str, **params: Any) -> dict[str, list[dict[str, Any]]]:
        key = OPENAI_KEY if provider == "openai" else ANTHROPIC_KEY
        answer = await self.client.get("/_sim/truth", params={"provider": provider, "key": key, **params})
        assert answer.status_code == 200, answer.text
        return answer.json()["sources"]

    async def scenario(self, provider: str, action: str, **more: Any) -> Any:
        key = OPENAI_KEY if provider == "openai" else ANTHROPIC_KEY
        return await self.control("POST", "scenario", {"provider": provider, "key": key, "action": action, **more})

    async def fault(self, kind: str, **more: Any) -> None:
        await self.control("POST", "faults/next", {"kind": kind, **more})


@pytest.fixture
async def sim() -> AsyncIterator[Sim]:
    simulator = Simulator(World(1, Clock(instant(NOW), frozen=True)))
    server, connections = await serve(simulator, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with local_client(base_url=url, timeout=5) as client:
        yield Sim(simulator, client)
    server.close()
    for connection in list(connections):
        connection.transport.abort()
    await server.wait_closed()
