"""HTTP/1.1 on the socket, by hand: a server that keeps its promises could not truncate, stall or reset on request."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Coroutine
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

from daemon.simulator import control
from daemon.simulator.faults import Faults
from daemon.simulator.registry import SERVICES
from daemon.simulator.wire import Breakage, Reply, Request, bearer, encode
from daemon.simulator.world import World

_REASONS = {status.value: status.phrase for status in HTTPStatus}
_HEAD_BYTES_MAX = 64 * 1024
_BODY_BYTES_MAX = 16 * 1024 * 1024
_DRIP_PIECES = 12


class Simulator:
    """All providers and the control interface, behind one function from request to reply."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.faults = Faults()
        self.requests: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()

    def respond(self, request: Request) -> Reply:
        path = request.path
        if path.startswith("/_sim/"):
            return control.answer(self, request)
        for provider, service in SERVICES.items():
            plain = path.removeprefix("/" + provider)
            if not plain.startswith(service.prefixes):
                continue
            asked = Request(request.method, plain, request.query, request.headers, request.body)
            reply = service.respond(self.world, asked)
            key = request.headers.get("x-api-key", "") or bearer(request)
            self.faults.harm(service, key, asked, reply, self.world.clock.now())
            self.requests[plain] += 1
            self.statuses[str(reply.status)] += 1
            return reply
        return Reply(404, encode({"error": {"message": f"Nothing is simulated at {path}."}}))


class Connection(asyncio.Protocol):
    """One client connection, kept alive; one request at a time."""

    def __init__(self, simulator: Simulator, open_connections: set[Connection]) -> None:
        self._simulator = simulator
        self._open = open_connections
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._open.discard(self)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._drain()

    def _drain(self) -> None:
        while self._task is None and not self.transport.is_closing():
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                if len(self._buffer) > _HEAD_BYTES_MAX:
                    self._refuse(431)
                return
            head = self._buffer[:head_end].decode("latin-1").split("\r\n")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
            }
            length = headers.get("content-length", "0")
            words = head[0].split(" ")
            if len(words) != 3 or not length.isdigit() or "transfer-encoding" in headers:
                self._refuse(400)
                return
            body_end = head_end + 4 + int(length)
            if int(length) > _BODY_BYTES_MAX:
                self._refuse(413)
                return
            if len(self._buffer) < body_end:
                return
            body = bytes(self._buffer[head_end + 4 : body_end])
            del self._buffer[:body_end]
            path, _, query = words[1].partition("?")
            reply = self._simulator.respond(Request(words[0], path, query, headers, body))
            self._send(reply, keep_alive=headers.get("connection", "").lower() != "close")

    def _refuse(self, status: int) -> None:
        self._send(Reply(status, b"{}"), keep_alive=False)

    def _head(self, reply: Reply, length: int, skew_s: int) -> bytes:
        date = formatdate(self._simulator.world.clock.now() + skew_s, usegmt=True)
        lines = [
            f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Overloaded')}",
            f"date: {date}",
            f"content-type: {reply.content_type}",
            f"content-length: {length}",
            *(f"{name}: {value}" for name, value in reply.headers),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def _send(self, reply: Reply, *, keep_alive: bool) -> None:
        body = reply.encoded()
        broken = reply.breakage or Breakage()
        head = self._head(reply, len(body), broken.skew_s)
        if broken.hold_s:
            self._later(self._hold(broken.hold_s))
        elif broken.cut:
            self.transport.write(head + body[: len(body) // 2])
            self.transport.close()
        elif broken.reset:
            self._later(self._reset(head))
        elif broken.drip_s:
            self._later(self._drip(head, body, broken.drip_s, keep_alive=keep_alive))
        else:
            self.transport.write(head + body)
            if not keep_alive:
                self.transport.close()

    def _later(self, work: Coroutine[None, None, None]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)

    async def _hold(self, hold_s: float) -> None:
        await asyncio.sleep(hold_s)
        self._abort()

    async def _reset(self, head: bytes) -> None:
        self.transport.write(head)
        await asyncio.sleep(0.01)  # let the headers leave before the reset overtakes them
        self._abort()

    def _abort(self) -> None:
        """Close with a reset, not an orderly end."""
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    async def _drip(self, head: bytes, body: bytes, pause_s: float, *, keep_alive: bool) -> None:
        self.transport.write(head)
        size = max(1, -(-len(body) // _DRIP_PIECES))
        for at in range(0, len(body), size):
            await asyncio.sleep(pause_s)
            self.transport.write(body[at : at + size])
        self._task = None
        if keep_alive:
            self._drain()
        else:
            self.transport.close()


async def serve(simulator: Simulator, host: str, port: int) -> tuple[asyncio.Server, set[Connection]]:
    """Listen; the caller closes the server and aborts what is still open."""
    connections: set[Connection] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(simulator, connections), host, port, backlog=1024)
    return server, connections
