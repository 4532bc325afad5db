"""A client that delivers as QStash does, lean enough to wait for the server: requests signed beforehand, bare sockets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter, process_time
from typing import cast

import jwt

from bench.drain import spawn
from bench.stage import has_uvloop

PUBLIC_URL = "https://tallyd.example"
CURRENT_KEY, NEXT_KEY = "sig_" + "c" * 28, "sig_" + "n" * 28
ENV = {
    "TALLYD_PUBLIC_URL": PUBLIC_URL,
    "QSTASH_CURRENT_SIGNING_KEY": CURRENT_KEY,
    "QSTASH_NEXT_SIGNING_KEY": NEXT_KEY,
}
"""What a replica needs to let our deliveries in."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """Messages to one route; their ids are the prefix and their number."""

    port: int
    path: str
    bodies: Sequence[bytes]
    message_prefix: str
    connections: int


@dataclass(frozen=True, slots=True)
class Shipped:
    """How it went.

    Attributes:
        answers: how often each (status, body).
        cpu_s: of the client.
        waits_ms: p50 and p99 from a request's sending to its answer.
    """

    took_s: float
    cpu_s: float
    answers: Counter[tuple[int, bytes]]
    waits_ms: tuple[float, float]


def headers(path: str, body: bytes, message: str) -> dict[str, str]:
    """Those of QStash that matter, and its signature of this body for our public URL."""
    now = int(time.time())
    claims = {
        "iss": "Upstash",
        "sub": PUBLIC_URL + path,
        "exp": now + 300,
        "nbf": 0,
        "iat": now,
        "jti": f"jwt_{message}",
        "body": base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode(),
    }
    return {
        "content-type": "application/json",
        "user-agent": "Upstash-QStash",
        "upstash-message-id": message,
        "upstash-retried": "0",
        "upstash-signature": jwt.encode(claims, CURRENT_KEY, algorithm="HS256"),
    }


def _request(path: str, body: bytes, message: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: tallyd.example", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers(path, body, message).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextmanager
def sender() -> Iterator[ProcessPoolExecutor]:
    """A process that can be given `ship`."""
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield pool


def ship(shipment: Shipment) -> Shipped:
    """Deliver each message once, as fast as the answers come."""
    requests = [
        _request(shipment.path, body, f"{shipment.message_prefix}-{number}")
        for number, body in enumerate(shipment.bodies)
    ]
    return send(shipment.port, requests, shipment.connections)


def post(port: int, path: str, bodies: Sequence[bytes], connections: int, token: str = "") -> Shipped:
    """Post each body once to one path, as fast as the answers come."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: tallyd.example\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {token}\r\ncontent-length: "
    ).encode()
    return send(port, [b"%s%d\r\n\r\n%s" % (head, len(body), body) for body in bodies], connections)


def send(port: int, requests: Sequence[bytes], connections: int) -> Shipped:
    """Send requests as they are, each once."""
    if has_uvloop():
        import uvloop

        return uvloop.run(_send(port, requests, connections))
    return asyncio.run(_send(port, requests, connections))


async def _send(port: int, requests: Sequence[bytes], connections: int) -> Shipped:
    run = _Run(requests)
    loop = asyncio.get_running_loop()
    lanes = [
        (await loop.create_connection(lambda: _Lane(run), "127.0.0.1", port))[1]
        for _ in range(min(connections, len(requests)))
    ]
    began, cpu_began = perf_counter(), process_time()
    for lane in lanes:
        lane.send()
    await run.ended
    took_s, cpu_s = perf_counter() - began, process_time() - cpu_began
    for lane in lanes:
        lane.close()
    cuts = quantiles(run.waits, n=100) if len(run.waits) > 1 else run.waits * 99
    return Shipped(took_s, cpu_s, Counter(run.answers), (cuts[49] * 1000, cuts[98] * 1000))


class _Run:
    """What all connections share: what is left to send, and what came back."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self.left = iter(requests)
        self.missing = len(requests)
        self.answers: list[tuple[int, bytes]] = []
        self.waits: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, error: Exception | None = None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error) if error else self.ended.set_result(None)


class _Lane(asyncio.Protocol):
    """One connection, kept alive, with one request on its way."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._seen = b""
        self._sent_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def send(self) -> None:
        request = next(self._run.left, None)
        if request is not None:
            self._sent_at = perf_counter()
            self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, blank, body = self._seen.partition(b"\r\n\r\n")
        if not blank:
            return
        at = head.index(b"content-length: ") + 16
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        run = self._run
        run.waits.append(perf_counter() - self._sent_at)
        run.answers.append((int(head[9:12]), body))
        self._seen = b""
        run.missing -= 1
        if run.missing == 0:
            run.end()
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._run.missing:
            self._run.end(exc or ConnectionError("the server closed a connection"))
