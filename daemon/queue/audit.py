"""Whether endpoints answer: asked without side effects, each URL once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

import anyio

from daemon.domain.errors import DaemonError

if TYPE_CHECKING:
    from daemon.http_push import PushClient

AT_ONCE = 32
METHOD = "OPTIONS"
"""Safe by definition, and unlike HEAD not handed to whatever answers a GET."""
DEAD = {410: "gone", 502: "bad gateway", 503: "unavailable", 504: "gateway time-out"}
"""Statuses of a door with nobody behind it. Any other one is an answer, a refusal of the method among them."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of asking a URL.

    Attributes:
        problem: why a message to it would fail now; None: somebody answers.
        status: None where no response came.
    """

    status: int | None
    problem: str | None
    took_ms: int

    @property
    def is_alive(self) -> bool:
        return self.problem is None


async def probe(client: PushClient, urls: Iterable[str], *, timeout_s: float) -> dict[str, Probe]:
    """One request to each URL, a bounded number at a time, each with this deadline."""
    places = anyio.CapacityLimiter(AT_ONCE)
    found: dict[str, Probe] = {}

    async def ask(url: str) -> None:
        async with places:
            found[url] = await _ask(client, url, timeout_s)

    async with anyio.create_task_group() as group:
        for url in dict.fromkeys(urls):
            group.start_soon(ask, url)
    return found


async def _ask(client: PushClient, url: str, timeout_s: float) -> Probe:
    from daemon.http_push import PushRequest  # noqa: PLC0415 - takes 0.3 s to import

    start = monotonic()
    status, problem = None, None
    try:
        response = await client.send(PushRequest(METHOD, url, (("User-Agent", "tallyd"),), b"", timeout_s))
    except DaemonError as error:
        problem = str(error)
    else:
        status = response.status
        if status in DEAD:
            problem = f"answers {status} ({DEAD[status]})"
    return Probe(status, problem, round((monotonic() - start) * 1000))
