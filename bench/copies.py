"""A provider that answers at once, leaner than the simulator: `python -m bench.copies`. Says its port, then serves.

What the simulator answers for one organisation of each provider is made once for each request line, and copied to
everybody who asks the same. Its clock stands still, so that all connections of a provider are to be booked alike.
`GET /_copies` tells how many answers there were, and takes `?delay_s=` for those that follow.
"""

from __future__ import annotations

import asyncio
from typing import cast
from urllib.parse import parse_qs

import msgspec

from bench.stage import serve
from daemon.simulator.server import Simulator
from daemon.simulator.traffic import Profile
from daemon.simulator.wire import Request
from daemon.simulator.world import Clock, World

PROFILE = Profile(history_days=0, requests_per_hour=1, projects=1, keys=1)
CREDENTIALS = {"authorization": "Bearer sk-admin-copies", "x-api-key": "sk-ant-admin01-copies"}


class _Copies:
    def __init__(self) -> None:
        world = World(1, Clock(None, frozen=True))
        world.profiles["openai", None] = world.profiles["anthropic", None] = PROFILE
        self._simulator = Simulator(world)
        self._answers: dict[bytes, bytes] = {}
        self.asked = 0
        self.delay_s = 0.0

    def answer(self, head: bytes) -> bytes:
        line, _, rest = head.partition(b"\r\n")
        found = self._answers.get(line)
        if found is None:
            found = self._answers[line] = self._made(line, rest)
        self.asked += 1
        return found

    def _made(self, line: bytes, rest: bytes) -> bytes:
        method, target, _ = line.decode().split(" ")
        path, _, query = target.partition("?")
        pairs = (field.partition(": ") for field in rest.decode("latin-1").split("\r\n") if field)
        headers = {name.lower(): value for name, _, value in pairs}
        mine = {name: value for name, value in CREDENTIALS.items() if name in headers}
        reply = self._simulator.respond(Request(method, path, query, headers | mine))
        return _written(reply.status, reply.encoded(), reply.headers)

    def control(self, head: bytes) -> bytes:
        query = head.split(b" ", 2)[1].decode().partition("?")[2]
        if given := parse_qs(query).get("delay_s"):
            self.delay_s = float(given[0])
        return _written(200, msgspec.json.encode({"asked": self.asked}), [])


def _written(status: int, body: bytes, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"HTTP/1.1 {status} Copied", "content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Answers(asyncio.Protocol):
    def __init__(self, copies: _Copies) -> None:
        self._copies = copies
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._seen += data
        while (end := self._seen.find(b"\r\n\r\n")) >= 0:
            head, self._seen = self._seen[:end], self._seen[end + 4 :]
            if head.startswith(b"GET /_copies"):
                self._transport.write(self._copies.control(head))
            elif self._copies.delay_s:
                answer = self._copies.answer(head)
                asyncio.get_running_loop().call_later(self._copies.delay_s, self._write, answer)
            else:
                self._transport.write(self._copies.answer(head))

    def _write(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


if __name__ == "__main__":
    copies = _Copies()
    serve(lambda: _Answers(copies))
