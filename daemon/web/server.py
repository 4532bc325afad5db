"""uvicorn inside our own task group: it binds nothing, catches no signal, and never waits for ever."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from daemon.domain.address import Address
from daemon.domain.errors import ConfigError
from daemon.web.delivery import json_response
from daemon.web.v2.app import PREFIX, V2, Receive, Send

V2_PREFIX = PREFIX.encode()

BACKLOG = 512
CONNECTIONS_MAX = 512
"""Open at once; the next one is told 503. Times 1 MiB of body it is also what strangers can make us hold."""
HEAD_S = 10.0
HEAD_BYTES_MAX = 64 << 10
TOO_LARGE_HEAD = (
    b"431 Request Header Fields Too Large", f"the request's head is larger than {HEAD_BYTES_MAX} bytes",
)  # fmt: skip
MESSAGE_BYTES_MAX = 6 << 20
"""Of a request with everything, what is read on of a body that is too large included."""
KEEP_ALIVE_S = 75
FAREWELL_S = 5
LINGER_S = 5.0
LINGER_BYTES = 64 << 20
"""What is read and thrown away of a request that was answered early, so that its sender gets to read the answer."""


def bind(setting: str, address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken, not ours to take, or the host is not one of this machine's.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except UnicodeError as error:
        raise ConfigError([f"{setting}: {address} is no host name; give an address of this machine"]) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = "is in use; stop what listens there, or choose another port (0 picks a free one)"
        elif error.errno == errno.EACCES:
            problem = "may not be opened by this user; choose a port above 1023"
        else:
            problem = f"cannot be opened: {error.strerror or error}; give an address of this machine"
        raise ConfigError([f"{setting}: {address} {problem}"]) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a bound socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told, not bound
    return f"http://{Address(host, port)}"


class Listener:
    """One socket and what is served on it."""

    def __init__(self, listener: socket.socket, routes: Sequence[BaseRoute], v2: V2 | None = None) -> None:
        self._socket = listener
        self._ended = anyio.Event()
        self.url = url_of(listener)
        self._server = _Server(
            uvicorn.Config(
                _Front(_app(routes), v2) if v2 is not None else _app(routes),
                http=_Protocol if v2 is None else _V2Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=FAREWELL_S,
            )
        )

    async def run(self) -> None:
        """Serve until `stop`."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._socket.close()
            self._ended.set()

    async def stop(self) -> None:
        """Accept nothing more, let what is being answered end within 5 s, and return when all is closed."""
        self._server.should_exit = True
        await self._ended.wait()


class _Front:
    """`/v2` goes by its raw target, all else through Starlette."""

    def __init__(self, app: Starlette, v2: V2) -> None:
        self._app = app
        self._v2 = v2

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        app = self._v2 if scope["raw_path"].startswith(V2_PREFIX) else self._app
        await app(scope, receive, send)  # type: ignore[arg-type]  # the same protocol, typed apart


def _app(routes: Sequence[BaseRoute]) -> Starlette:
    app = Starlette(routes=list(routes), exception_handlers={HTTPException: _refuse})
    app.router.redirect_slashes = False  # it would send people to whatever host their request names
    return app


async def _refuse(_request: Request, error: Exception) -> Response:
    """What is not there, or not asked for in that way, as JSON too."""
    assert isinstance(error, HTTPException)
    return json_response({"error": error.detail.lower()}, error.status_code, error.headers)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the daemon's."""
        yield


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds that it lacks: on heads, whole messages, silence, and the number of connections.

    Who is answered before the body was read may send it on for a while, and nobody reads it: a connection that is closed
    on unread bytes is reset, and with it goes the answer.
    """

    _message_bytes_max = MESSAGE_BYTES_MAX
    _timer: asyncio.TimerHandle | None = None
    _is_in_head = False
    _is_in_body = False
    _is_refused = False
    _linger_bytes: int | None = None
    _head_bytes = 0
    _header_bytes = 0
    _message_bytes = 0
    _problem = "this is no valid HTTP request"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(b"503 Service Unavailable", f"more than {CONNECTIONS_MAX} connections are open")
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or (self._linger_bytes is not None and not self._lets_linger(len(data))):
            return
        super().data_received(data)
        self._message_bytes += len(data)
        if self._is_in_head:
            self._head_bytes += len(data)
        if self._linger_bytes is not None:
            return
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(*TOO_LARGE_HEAD)
        elif self._message_bytes > self._message_bytes_max:
            self._refuse(b"413 Content Too Large", f"the request is larger than {self._message_bytes_max} bytes")
        elif not self._is_in_body and (self.cycle is None or self.cycle.response_complete):  # type: ignore[redundant-expr]  # uvicorn begins with None there
            # Any byte stops uvicorn's own timer for silent connections, also one that begins no request.
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes, self._header_bytes, self._message_bytes = True, 0, 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_body:
            raise ValueError("trailers are not taken")  # they would join the headers of a request that is under way
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > HEAD_BYTES_MAX:  # all of it may have come in one piece
            self._refuse(*TOO_LARGE_HEAD)
            raise ValueError(TOO_LARGE_HEAD[1])
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.url.isascii():
            self._problem = "the URL holds characters outside ASCII; percent-encode them"
            raise ValueError(self._problem)
        self._stop_waiting()
        self._is_in_head, self._is_in_body, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body, self._message_bytes = False, 0
        if self._linger_bytes is not None:  # the answer was given; what comes now is the next request
            self._linger_bytes = None
            self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_in_body and not self.transport.is_closing():
            self._linger()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - ours says more
        """What uvicorn answers where the parser fails."""
        self._refuse(b"400 Bad Request", self._problem)

    def _await_head(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(
                HEAD_S, self._refuse, b"408 Request Timeout", f"no whole head came within {HEAD_S:g} s"
            )

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes, problem: str) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]  # as above
            self.cycle.disconnected = True  # nothing that it could still say would be read as its answer
            self.cycle.message_event.set()
        body = msgspec.json.encode({"error": problem})
        self.transport.write(
            b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (status, len(body), body)
        )
        if self._is_in_head or self._is_in_body:
            self._linger()
        else:
            self._stop_waiting()
            self.transport.close()

    def _linger(self) -> None:
        self._stop_waiting()
        self._linger_bytes = LINGER_BYTES
        self._timer = self.loop.call_later(LINGER_S, self.transport.close)
        self.flow.resume_reading()
        if self._is_refused:
            self.transport.write_eof()

    def _lets_linger(self, count: int) -> bool:
        """Whether these bytes are worth parsing; closes the connection when there were too many to throw away."""
        assert self._linger_bytes is not None
        self._linger_bytes -= count
        if self._linger_bytes < 0:
            self.transport.close()
            return False
        return not self._is_refused


class _V2Protocol(_Protocol):
    """The same for a listener with `/v2`, whose resources bound the bodies that they read, large ones too."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        is_v2 = self.scope["raw_path"].startswith(V2_PREFIX)
        self._message_bytes_max = sys.maxsize if is_v2 else MESSAGE_BYTES_MAX
        # Ours too: a body that has come with its head needs no deadline.
        self.scope["is_whole"] = False  # type: ignore[typeddict-unknown-key]
        self.scope["target"] = self.url  # type: ignore[typeddict-unknown-key]  # ours: uvicorn drops an empty query

    def on_message_complete(self) -> None:
        self.scope["is_whole"] = True  # type: ignore[typeddict-unknown-key]
        super().on_message_complete()
