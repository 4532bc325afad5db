"""An endpoint for messages that notes each number it is sent, and when: `python -m bench.receiver`.

Says its port, then serves. A body begins with its number, `{"n":00000042`. `GET /_reset/COUNT` begins anew, `/_seen`
tells how many of the numbers have come, `/_times` when each came first. A path `/hold/SECONDS` is answered so much later.
"""

from __future__ import annotations

import asyncio
from time import time
from typing import cast

import msgspec

from bench.stage import serve

PREFIX = b'{"n":'
DIGITS = 8
_OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok"


class _Notes:
    """What came since the last reset."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.distinct = 0
        self.arrived = 0
        self.waiting = 0
        self.waiting_most = 0

    def reset(self, count: int) -> None:
        self.times = [0.0] * count
        self.distinct = self.arrived = self.waiting_most = 0

    def note(self, number: int) -> None:
        self.arrived += 1
        if self.times[number] == 0.0:
            self.times[number] = time()
            self.distinct += 1


class _Endpoint(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes
        self._head = b""
        self._body: list[bytes] = []
        self._missing = -1
        self._path = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        if self._missing < 0:
            self._head += data
            head, blank, data = self._head.partition(b"\r\n\r\n")
            if not blank:
                return
            self._head = b""
            self._path = head.split(b" ", 2)[1]
            at = head.lower().find(b"\r\ncontent-length: ")
            self._missing = 0 if at < 0 else int(head[at + 18 :].split(b"\r\n", 1)[0])
            self._body = []
        self._body.append(data)
        self._missing -= len(data)
        if self._missing <= 0:
            self._missing = -1
            self._answer()

    def _answer(self) -> None:
        notes = self._notes
        if self._path.startswith(b"/_"):
            self._tell()
            return
        head = self._body[0] if len(self._body[0]) >= 32 else b"".join(self._body)
        self._body = []
        assert head.startswith(PREFIX), head[:50]
        notes.note(int(head[len(PREFIX) : len(PREFIX) + DIGITS]))
        if not self._path.startswith(b"/hold/"):
            self._transport.write(_OK)
            return
        notes.waiting += 1
        notes.waiting_most = max(notes.waiting_most, notes.waiting)
        asyncio.get_running_loop().call_later(float(self._path[6:]), self._release)

    def _release(self) -> None:
        self._notes.waiting -= 1
        self._transport.write(_OK)

    def _tell(self) -> None:
        notes, told = self._notes, b"{}"
        match self._path.split(b"/")[1:]:
            case [b"_reset", count]:
                notes.reset(int(count))
            case [b"_seen"]:
                told = msgspec.json.encode([notes.distinct, notes.arrived, notes.waiting_most])
            case [b"_times"]:
                told = msgspec.json.encode(notes.times)
        self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(told) + told)


if __name__ == "__main__":
    notes = _Notes()
    serve(lambda: _Endpoint(notes))
