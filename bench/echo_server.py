"""A provider that answers everything at once with one page: `python -m bench.echo_server`. Says its port, then serves."""

from __future__ import annotations

import asyncio
from typing import cast

from bench.stage import serve

_BODY = (
    b'{"object":"page","data":['
    + b",".join([b'{"start_time":1,"end_time":2,"results":[]}'] * 40)
    + b'],"has_more":false}'
)
_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: req_bench\r\ncontent-length: %d\r\n\r\n"
    % len(_BODY)
) + _BODY


class _Answers(asyncio.Protocol):
    def __init__(self) -> None:
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self._seen += data
        while (end := self._seen.find(b"\r\n\r\n")) >= 0:
            self._seen = self._seen[end + 4 :]
            self._transport.write(_ANSWER)


if __name__ == "__main__":
    serve(_Answers)
