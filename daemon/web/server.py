"""uvicorn inside our own task group: it binds nothing, catches no signal, and never waits for ever."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import anyio
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

BACKLOG = 512
CONNECTIONS_MAX = 512
"""Open at once; the next one is told 503. Times 1 MiB of body it is also what strangers can make us hold."""
HEAD_S = 10.0
HEAD_BYTES_MAX = 64 << 10
MESSAGE_BYTES_MAX = 6 << 20
"""Of a request with everything, what is read on of a body that is too large included."""
KEEP_ALIVE_S = 75
FAREWELL_S = 5


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

    def __init__(self, listener: socket.socket, routes: Sequence[BaseRoute]) -> None:
        self._socket = listener
        self._ended = anyio.Event()
        self.url = url_of(listener)
        self._server = _Server(
            uvicorn.Config(
                _app(routes),
                http=_Protocol,
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
    """uvicorn's, with bounds that it lacks: on heads, whole messages, silence, and the number of connections."""

    _timer: asyncio.TimerHandle | None = None
    _is_in_head = False
    _is_in_body = False
    _head_bytes = 0
    _message_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(b"503 Service Unavailable")
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._message_bytes += len(data)
        if self._is_in_head:
            self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES_MAX:
            self._refuse(b"431 Request Header Fields Too Large")
        elif self._message_bytes > MESSAGE_BYTES_MAX:
            self._refuse(b"413 Content Too Large")
        elif not self._is_in_body and (self.cycle is None or self.cycle.response_complete):  # type: ignore[redundant-expr]  # uvicorn begins with None there
            # Any byte stops uvicorn's own timer for silent connections, also one that begins no request.
            self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes, self._message_bytes = True, 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_body:
            raise ValueError("trailers are not taken")  # they would join the headers of a request that is under way
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._is_in_head, self._is_in_body, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_body, self._message_bytes = False, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_in_body and not self.transport.is_closing():
            self.transport.close()  # answered before its body was read: what is still to come is nobody's

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(HEAD_S, self._refuse, b"408 Request Timeout")

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
