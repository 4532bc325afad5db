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
"""Open at once; above it answers are 503. Times 1 MiB of body it is also what strangers can make us hold."""
HEAD_S = 10.0
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
                limit_concurrency=CONNECTIONS_MAX,
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
    return Starlette(routes=list(routes), exception_handlers={HTTPException: _refuse})


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
    """uvicorn's, which waits for ever for the head of a request; this one says 408 after a while."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._await_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()
