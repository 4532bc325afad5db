"""The door through which messages leave: to URLs that tenants choose, byte for byte, and never into our own network.

`http_client` speaks to a few providers that we trust; here the other side is anybody, and so is whoever chose the URL.
Three things follow. The address is judged where the socket is made, so that no name, rebinding or spelling gets past
the guard. The request goes out exactly as it was published and signed. And a failure says honestly whether the request
may have been acted on: it cannot have been for as long as there was no connection to write to.

It is asyncio and the parser of Node.js (`httptools`), for HTTP/1.1, and it is small because of what it does not do:
no redirects, cookies, proxies, decompression, retries. aiohttp, on which `http_client` stands, was tried first: it took
0.22 ms of a core for a send, against 0.06 ms here (uvloop, loopback); it lost a good response when its server sent
something after it (a 204 with a body, say), which means delivering that message again; and it sends a GET, PUT or
DELETE a second time, without telling, when the first got no answer.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import math
import os
import select
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Self, cast
from urllib.parse import unquote_to_bytes

import httptools

from daemon.domain.destination import Destination, check_url
from daemon.domain.errors import PermanentError, UpstreamUnavailableError
from daemon.domain.headers import NO_VALUE, OF_CONNECTION, TOKEN
from daemon.domain.network import Guard, literal_host

CHECK_AGE_S_MAX = 30.0
"""How old an answer of the resolver may be when a message is published."""

SEND_AGE_S_MAX = 3.0
"""And when it is delivered: one lookup serves a burst, and a name that moves is followed at once."""

NAMES_MAX = 10_000
LOOKUPS_MAX = 1_000
LOOKUP_THREADS = 32
"""Slow name servers hold one thread for each host, so many more than asyncio's own few."""

HEAD_BYTES_MAX = 65_536
"""Of a response: its status line and headers, and the interim responses before it."""

HEADERS_MAX = 500

STAGGER_S = 0.25
"""How long one address of a host has before the next is tried beside it (RFC 8305)."""

_JOINED_BYTES_MAX = 65_536  # beyond this, copying a body behind its head costs more than a second write

_NO_BODY = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_NO_SUCH_HOST = frozenset(
    code for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if (code := getattr(socket, name, None)) is not None
)

Resolver = Callable[[str], Sequence[str]]
"""From a name to its addresses, blocking; raises socket.gaierror as `socket.getaddrinfo` does."""


class BlockedError(PermanentError):
    """No message may go there: the operator's guard forbids the address, or, when publishing, the host does not exist.

    A delivery that meets it never left, and no other try would.
    """

    def __init__(self, host: str, reason: str, problem: str) -> None:
        self.host = host
        self.reason = reason
        super().__init__(problem)


@dataclass(frozen=True, slots=True)
class PushSettings:
    """How messages are delivered.

    Attributes:
        connect_timeout_s: for name, TCP and TLS together, over all addresses of a host.
        response_bytes_max: of a response's body, as it comes over the wire: nothing is decompressed.
        connections_max: how many connections are kept open for the next message. None waits for another: beyond this
            many, a connection is closed after its one use, and how many are in use is for the caller to bound. So a
            dead host holds up nobody else's messages.
        keep_alive_s: how long an unused connection stays open. Short, since a server that closes it while we write
            makes an attempt of which nobody knows whether it was acted on.
        ssl_context: the trusted roots; without it the system's.
    """

    guard: Guard
    connect_timeout_s: float = 5.0
    response_bytes_max: int = 1 << 20
    connections_max: int = 512
    keep_alive_s: float = 15.0
    ssl_context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class PushRequest:
    """One attempt.

    Attributes:
        method: sent as given.
        url: as published. Userinfo becomes Basic authentication, unless there is an `Authorization` among the headers.
        headers: sent in this order and spelling, with duplicates, values as UTF-8. `Host`, `Content-Length` and what
            belongs to the connection are ours and are left out.
        timeout_s: for all of it, to the last byte of the response.
    """

    method: str
    url: str
    headers: Sequence[tuple[str, str]]
    body: bytes
    timeout_s: float


@dataclass(frozen=True, slots=True)
class PushResponse:
    """What came back, whatever its status.

    Attributes:
        headers: in their order and spelling, with duplicates. Values are UTF-8, or Latin-1 where they are not.
        body: at most `response_bytes_max`.
        is_truncated: the body was longer; the rest was dropped, and the connection was closed.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_truncated: bool


def system_resolver(host: str) -> list[str]:
    """The addresses of a name, in the system's order of preference."""
    # As bytes, since Python's own IDNA would change or refuse what has been encoded already.
    found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


def _blocked(host: str, reason: str, address: str) -> BlockedError:
    article = "an" if reason[0] in "aeiou" else "a"
    return BlockedError(host, reason, f"endpoint resolves to {article} {reason}: {address}")


class _Name(NamedTuple):
    """What a lookup found: addresses that are allowed, else the first that is not, else nothing at all."""

    looked_up_at: float
    allowed: tuple[str, ...]
    blocked: tuple[str, str] | None = None


class _Names:
    """Lookups in threads, each host once at a time, remembered for as long as the caller trusts them."""

    def __init__(self, guard: Guard, resolver: Resolver) -> None:
        self._guard = guard
        self._resolver = resolver
        self._known: dict[str, _Name] = {}
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}
        self._threads = ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="tallyd-dns")

    def known(self, host: str, age_s_max: float) -> _Name | None:
        name = self._known.get(host)
        if name is None or name.looked_up_at + age_s_max < asyncio.get_running_loop().time():
            return None
        return name

    async def lookup(self, host: str, age_s_max: float) -> _Name:
        """What is known of a host. Raises OSError where the resolver could not say; no such host is an answer."""
        if (name := self.known(host, age_s_max)) is not None:
            return name
        running = self._running.get(host)
        if running is None:
            if len(self._running) >= LOOKUPS_MAX:
                raise socket.gaierror(socket.EAI_AGAIN, "too many lookups at once")
            running = asyncio.get_running_loop().run_in_executor(self._threads, self._resolver, host)
            self._running[host] = running
            running.add_done_callback(functools.partial(self._remember, host))
        try:
            addresses = await asyncio.shield(running)
        except socket.gaierror as error:
            if error.errno not in _NO_SUCH_HOST:
                raise
            addresses = ()
        return self.known(host, math.inf) or self._judge(addresses)

    def _remember(self, host: str, done: asyncio.Future[Sequence[str]]) -> None:
        del self._running[host]
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            name = self._judge(done.result())
        elif isinstance(error, socket.gaierror) and error.errno in _NO_SUCH_HOST:
            name = self._judge(())
        else:
            return  # the resolver is away: the next one asks again
        self._known.pop(host, None)
        if len(self._known) >= NAMES_MAX:
            del self._known[next(iter(self._known))]
        self._known[host] = name

    def _judge(self, addresses: Sequence[str]) -> _Name:
        allowed: list[str] = []
        blocked = None
        for address in addresses:
            problem = self._guard.problem(address)
            if problem is None:
                allowed.append(address)
            elif blocked is None:
                blocked = (problem, address)
        return _Name(asyncio.get_running_loop().time(), tuple(allowed), blocked)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


_Key = tuple[str, str, int]
"""Scheme, host, port: what a connection can be used for again."""


class _BrokenError(Exception):
    """The other side broke off, or does not speak HTTP. Its text is for the operator."""


class _Connection(asyncio.Protocol):
    """One socket: one request at a time, and the response to it.

    A response is whole when the parser says so, or when the connection ends and nothing had told its length. Whatever
    comes after it, or while nothing was asked, makes the connection useless, but never takes the response back.
    """

    def __init__(self, pool: _Pool, key: _Key) -> None:
        self.key = key
        self.idle_since = 0.0
        self.is_reusable = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.chunks: list[bytes] = []
        self.is_truncated = False
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answered: asyncio.Future[None] | None = None
        self._limit = 0
        self._size = 0
        self._head_bytes = 0
        self._received_bytes = 0
        self._is_head = False
        self._is_interim = False
        self._has_end = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        self._pool.open.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        if error is None and self.status and not self._has_end:
            self._finish()
        elif error is None:
            self._fail(
                _BrokenError(
                    "the response broke off"
                    if self.status
                    else "the server closed the connection without a whole response"
                )
            )
        else:
            self._fail(error)

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if parser is None:
            self.abort()
            return
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # a 101: it has been told as the response that it is
        except httptools.HttpParserError as error:
            self.is_reusable = False
            self._fail(_BrokenError(f"no valid HTTP response: {str(error)[:200]}"))
        if not self.status:
            self._received_bytes += len(data)
            self._check_head(self._received_bytes)

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.is_answered:
            self.is_reusable = False
            return
        if self.status:  # a trailer, which nobody reads
            return
        self._head_bytes += len(name) + len(value) + 4
        self.headers.append((name, value))
        match name.lower():
            case b"content-length":
                self._has_end = True
            case b"transfer-encoding":
                self._has_end = value.lower().rstrip().endswith(b"chunked")
        self._check_head(self._head_bytes)

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self.is_answered:
            self.is_reusable = False
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._is_interim = True
            return
        self.status = status
        if self._is_head:
            self.is_reusable = self._parser.should_keep_alive()
            self._finish()

    def on_body(self, data: bytes) -> None:
        if self.is_answered:
            self.is_reusable = False
            return
        self._size += len(data)
        if self._size > self._limit:
            self.is_truncated = True
            self.chunks.append(data[: len(data) - (self._size - self._limit)])
            self._finish()
            return
        self.chunks.append(data)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self.is_answered:
            return
        if self._is_interim:
            self._is_interim = False
            self._has_end = False
            self.headers.clear()
            return
        self.is_reusable = self.status != 101 and self._parser.should_keep_alive()
        self._finish()

    # What the client calls.

    @property
    def is_answered(self) -> bool:
        return self._answered is None or self._answered.done()

    @property
    def is_sending(self) -> bool:
        """Whether a part of the request still waits for the other side to read it."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    @property
    def is_silent(self) -> bool:
        """Whether an idle connection can still be written to: it is open, and the kernel holds nothing to be read.

        Neither the end of a connection nor a response that nobody asked for has to wait for the event loop to be seen.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    def ask(self, head: bytes, body: bytes, *, is_head: bool, limit: int) -> asyncio.Future[None]:
        """Send a request. The future ends when the response is whole, cut, or cannot come any more.

        Raises:
            _BrokenError: the connection has ended; nothing was sent.
        """
        if self._transport is None or self._transport.is_closing():
            raise _BrokenError("the server closed the connection before it was asked")
        self._parser = httptools.HttpResponseParser(self)
        # Servers that end lines with a bare LF, or pad a chunk's size, are old but no danger to whoever asks them.
        self._parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True)
        self.status = 0
        self.headers = []
        self.chunks = []
        self.is_truncated = False
        self.is_reusable = False
        self._limit = limit
        self._size = 0
        self._head_bytes = 0
        self._received_bytes = 0
        self._is_head = is_head
        self._is_interim = False
        self._has_end = False
        self._answered = asyncio.get_running_loop().create_future()
        if len(body) > _JOINED_BYTES_MAX:
            self._transport.write(head)
            self._transport.write(body)
        else:
            self._transport.write(head + body)
        return self._answered

    def rest(self) -> None:
        """Let go of the exchange; from here on, nothing may come."""
        self._parser = None
        self._answered = None
        self.headers = []
        self.chunks = []

    def abort(self) -> None:
        """Close at once: unsent parts of a request are dropped, and a peer that does not read cannot hold us."""
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _check_head(self, byte_count: int) -> None:
        if byte_count > HEAD_BYTES_MAX:
            self._fail(_BrokenError(f"no valid HTTP response: its head is longer than {HEAD_BYTES_MAX} bytes"))
            self.abort()
        elif len(self.headers) > HEADERS_MAX:
            self._fail(_BrokenError(f"no valid HTTP response: it has more than {HEADERS_MAX} headers"))
            self.abort()

    def _finish(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def _fail(self, error: Exception) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)


class _Pool:
    """Connections that wait for their next request: the last one used goes first, the longest unused is closed first."""

    def __init__(self, kept_max: int, keep_alive_s: float) -> None:
        self.open: set[_Connection] = set()
        self._kept_max = kept_max
        self._keep_alive_s = keep_alive_s
        self._idle: dict[_Key, list[_Connection]] = {}
        self._by_age: OrderedDict[_Connection, None] = OrderedDict()
        self._sweep: asyncio.TimerHandle | None = None
        self._emptied: asyncio.Event | None = None

    def take(self, key: _Key) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        while (waiting := self._idle.get(key)) is not None:
            connection = waiting[-1]
            self._drop(connection)
            if connection.idle_since + self._keep_alive_s >= now and connection.is_silent:
                return connection
            connection.abort()
        return None

    def give(self, connection: _Connection) -> None:
        if self._emptied is not None or self._kept_max <= 0:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(connection.key, []).append(connection)
        self._by_age[connection] = None
        if len(self._by_age) > self._kept_max:
            oldest = next(iter(self._by_age))
            self._drop(oldest)
            oldest.abort()
        if self._sweep is None:
            self._sweep = loop.call_later(self._keep_alive_s, self._close_old)

    def forget(self, connection: _Connection) -> None:
        self.open.discard(connection)
        if connection in self._by_age:
            self._drop(connection)
        if self._emptied is not None and not self.open:
            self._emptied.set()

    def _drop(self, connection: _Connection) -> None:
        del self._by_age[connection]
        waiting = self._idle[connection.key]
        waiting.remove(connection)
        if not waiting:
            del self._idle[connection.key]

    def _close_old(self) -> None:
        self._sweep = None
        loop = asyncio.get_running_loop()
        while self._by_age:
            oldest = next(iter(self._by_age))
            ends_at = oldest.idle_since + self._keep_alive_s
            if ends_at > loop.time():
                self._sweep = loop.call_at(ends_at, self._close_old)
                return
            self._drop(oldest)
            oldest.abort()

    async def aclose(self) -> None:
        self._emptied = asyncio.Event()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in [*self.open]:
            connection.abort()
        if self.open:
            await self._emptied.wait()


def _close_late(task: asyncio.Task[socket.socket]) -> None:
    """A connection that was made although another one had won."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


class _Route(NamedTuple):
    """What a URL means on the wire."""

    key: _Key
    target: str
    authority: str
    literal: str | None
    authorization: str | None


@functools.lru_cache(maxsize=1_024)
def _route(url: str) -> _Route:
    """Raises ValueError for a URL that cannot be used. Cached, since a burst goes to few URLs."""
    destination = check_url(url)
    literal = literal_host(destination.host)
    return _Route(
        (destination.scheme, destination.host, destination.port),
        destination.target,
        destination.authority,
        None if literal is None else str(literal),
        None if destination.userinfo is None else _basic(destination.userinfo),
    )


def _basic(userinfo: str) -> str:
    user, _, password = userinfo.partition(":")
    return "Basic " + base64.b64encode(unquote_to_bytes(user) + b":" + unquote_to_bytes(password)).decode("ascii")


def _head(route: _Route, request: PushRequest) -> bytes:
    """The request up to its body. Raises PermanentError for what no request can hold."""
    if TOKEN.fullmatch(request.method) is None or request.method == "CONNECT":
        raise PermanentError(f"{request.method[:20]!r} is no method that can be sent to a URL")
    lines = [f"{request.method} {route.target} HTTP/1.1\r\nHost: {route.authority}\r\n"]
    authorization = route.authorization
    for name, value in request.headers:
        lower = name.lower()
        # With `Expect` the body would be held back, and a `Host` would pick a virtual host that the guard has not seen.
        if lower in OF_CONNECTION:
            continue
        if TOKEN.fullmatch(name) is None or NO_VALUE.search(value) is not None:
            raise PermanentError(f"header {name[:100]!r} holds a character that no HTTP header can carry")
        if lower == "authorization":
            authorization = None
        lines.append(f"{name}: {value}\r\n")
    if authorization is not None:
        lines.append(f"Authorization: {authorization}\r\n")
    if request.body or request.method not in _NO_BODY:
        lines.append(f"Content-Length: {len(request.body)}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode()


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def describe(error: BaseException) -> str:
    """A failure below HTTP in a few words."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"TLS: {error.verify_message or 'certificate refused'}"
        case ssl.SSLError():
            return f"TLS: {(error.reason or 'handshake failed').lower().replace('_', ' ')}"
        case socket.gaierror():
            return "no such host" if error.errno in _NO_SUCH_HOST else f"host lookup failed: {error.strerror}"
        case OSError() if error.errno is not None:
            return os.strerror(error.errno).lower()  # asyncio writes the address into the error's own text
        case _BrokenError():
            return str(error)
        case _:
            return f"connection failed: {type(error).__name__}"


class PushClient:
    """One per process, for every message at once. Belongs to the event loop of its first use.

    Args:
        resolver: in place of the system's, for tests; called in threads.
    """

    def __init__(self, settings: PushSettings, resolver: Resolver = system_resolver) -> None:
        self._settings = settings
        self._names = _Names(settings.guard, resolver)
        self._pool = _Pool(settings.connections_max, settings.keep_alive_s)
        self._ssl = settings.ssl_context

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection, those in use too: their sends end as if the peer had hung up."""
        await self._pool.aclose()
        self._names.close()

    async def check(self, destination: Destination) -> None:
        """Whether messages may be published to a destination, as far as its host tells now.

        A resolver that is away, or slower than `connect_timeout_s`, says nothing against it: each delivery asks again.

        Raises:
            BlockedError: no address of the host is allowed, or there is no such host. Its text goes behind
                `invalid destination url: `.
        """
        host = destination.host
        if (literal := literal_host(host)) is not None:
            if (problem := self._settings.guard.problem(literal)) is not None:
                raise _blocked(host, problem, str(literal))
            return
        name = self._names.known(host, CHECK_AGE_S_MAX)
        if name is None:
            try:
                async with asyncio.timeout(self._settings.connect_timeout_s):
                    name = await self._names.lookup(host, CHECK_AGE_S_MAX)
            except OSError:  # a TimeoutError is one
                return
        if name.allowed:
            return
        if name.blocked is not None:
            raise _blocked(host, *name.blocked)
        raise BlockedError(host, "no such host", f"unable to resolve host: lookup {host}: no such host")

    async def send(self, request: PushRequest) -> PushResponse:
        """One attempt, made once: no redirect, no cookie, no retry, not even over a connection that had gone stale.

        A response counts when all of it came in time, or as much of it as `response_bytes_max` asks for. One whose
        status is known but whose body breaks off or drips past the deadline is a failure: it may be anything.

        Raises:
            BlockedError: the guard forbids every address of the host.
            PermanentError: this URL, method or header cannot be sent at all.
            UpstreamUnavailableError: no whole response. `maybe_sent` is false only while there was no connection yet,
                over TCP and TLS, to write to.
        """
        try:
            route = _route(request.url)
        except ValueError as error:
            raise PermanentError(f"invalid destination url: {error}") from error
        head = _head(route, request)
        connection = self._pool.take(route.key)
        timeout_s = request.timeout_s
        is_sent = False
        ends_at = asyncio.get_running_loop().time() + timeout_s
        if connection is None:
            timeout_s = min(timeout_s, self._settings.connect_timeout_s)
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                if connection is None:
                    connection = await self._connect(route)
                    timeout_s = request.timeout_s
                    deadline.reschedule(ends_at)
                answered = connection.ask(
                    head, request.body, is_head=request.method == "HEAD", limit=self._settings.response_bytes_max
                )
                is_sent = True
                await answered
            return self._response(connection)
        except (OSError, _BrokenError) as error:
            if deadline.expired():
                problem = f"timed out after {timeout_s:g} s, {_phase(connection)}"
            else:
                problem = describe(error)
            raise UpstreamUnavailableError(f"{route.authority}: {problem}", maybe_sent=is_sent) from error
        finally:
            if connection is not None:
                connection.rest()
                if connection.is_reusable and not connection.is_sending:
                    self._pool.give(connection)
                else:
                    connection.abort()

    @staticmethod
    def _response(connection: _Connection) -> PushResponse:
        chunks = connection.chunks
        return PushResponse(
            connection.status,
            tuple([(_text(name), _text(value)) for name, value in connection.headers]),
            chunks[0] if len(chunks) == 1 else b"".join(chunks),
            connection.is_truncated,
        )

    async def _connect(self, route: _Route) -> _Connection:
        """A new connection to an address that is allowed. Raises BlockedError or OSError."""
        scheme, host, port = route.key
        if route.literal is not None:
            made = await self._socket(route.literal, port)
        else:
            name = await self._names.lookup(host, SEND_AGE_S_MAX)
            if not name.allowed:
                if name.blocked is not None:
                    raise _blocked(host, *name.blocked)
                raise socket.gaierror(socket.EAI_NONAME, "no such host")
            made = await self._race(name.allowed, port)
        loop = asyncio.get_running_loop()
        try:
            if scheme == "http":
                _, connection = await loop.create_connection(lambda: _Connection(self._pool, route.key), sock=made)
            else:
                if self._ssl is None:
                    self._ssl = ssl.create_default_context()
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._pool, route.key),
                    sock=made,
                    ssl=self._ssl,
                    server_hostname=route.literal or host.rstrip("."),
                )
        except BaseException:
            made.close()
            raise
        return connection

    async def _race(self, addresses: Sequence[str], port: int) -> socket.socket:
        """The first address that connects, each with a head start over the next. Raises the last one's OSError."""
        if len(addresses) == 1:
            return await self._socket(addresses[0], port)
        left = [*reversed(addresses)]
        running: set[asyncio.Task[socket.socket]] = set()
        error: BaseException | None = None
        try:
            while left or running:
                if left:
                    running.add(asyncio.create_task(self._socket(left.pop(), port)))
                done, _ = await asyncio.wait(
                    running, timeout=STAGGER_S if left else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    running.discard(task)
                    error = task.exception()
                    if error is None:
                        running |= done - {task}
                        return task.result()
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_close_late)
        assert error is not None
        raise error

    async def _socket(self, address: str, port: int) -> socket.socket:
        # The last word, whatever the road to here: this address is the one that gets connected.
        if (problem := self._settings.guard.problem(address)) is not None:
            raise _blocked(address, problem, address)
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            await asyncio.get_running_loop().sock_connect(made, (address, port))
        except BaseException:
            made.close()
            raise
        return made


def _phase(connection: _Connection | None) -> str:
    if connection is None:
        return "connecting"
    if connection.status:
        return f"reading the response ({connection.status})"
    return "sending the request" if connection.is_sending else "waiting for the response"


__all__ = [
    "BlockedError",
    "PushClient",
    "PushRequest",
    "PushResponse",
    "PushSettings",
    "Resolver",
    "describe",
    "system_resolver",
]
