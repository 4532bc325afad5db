"""Messages out over real sockets: the bytes that leave, where they may go, and what a peer can do to us.

Everything runs on both event loops, since they fail differently below aiohttp.
"""

import asyncio
import base64
import gzip
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from daemon import http_push
from daemon.domain.destination import check_url
from daemon.domain.errors import PermanentError, UpstreamUnavailableError
from daemon.domain.network import Guard, parse_allow
from daemon.http_push import BlockedError, PushClient, PushRequest, PushSettings, describe

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Script = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]
OPEN = Guard(allows_all=True)


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request):
    return "asyncio", {"use_uvloop": request.param}


class Peer:
    """A server that records each request to the byte and does what its script says."""

    def __init__(self, port: int, scheme: str) -> None:
        self.authority = f"127.0.0.1:{port}"
        self.port = port
        self.url = f"{scheme}://{self.authority}"
        self.requests: list[bytes] = []
        self.connections = 0
        self.open = 0
        self.changed = asyncio.Condition()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)

    async def count(self, opened: int) -> None:
        async with self.changed:
            self.connections += opened > 0
            self.open += opened
            self.changed.notify_all()


class Serving(asyncio.StreamReaderProtocol):
    """Ends its script when the client hangs up, whatever the script waits for."""

    def eof_received(self):
        super().eof_received()
        return False

    def connection_lost(self, exc):
        super().connection_lost(exc)
        if self.task is not None:
            self.task.cancel()

    task = None


@asynccontextmanager
async def peer(script: Script, tls: ssl.SSLContext | None = None, greeting: bytes = b""):
    tasks = set()
    loop = asyncio.get_running_loop()

    def accept() -> Serving:
        reader = asyncio.StreamReader(limit=1 << 28)

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            protocol.task = asyncio.create_task(serve(reader, writer))
            tasks.add(protocol.task)

        protocol = Serving(reader, connected)
        return protocol

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await there.count(1)
        try:
            writer.write(greeting)
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                size = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(size[0].split(b":")[1])) if size else b""
                there.requests.append(head + body)
                await there.count(0)
                await script(writer, head + body)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the client hung up, or the test is over
        finally:
            writer.transport.abort()
            with anyio.CancelScope(shield=True):
                await there.count(-1)

    server = await loop.create_server(accept, "127.0.0.1", 0, ssl=tls)
    there = Peer(server.sockets[0].getsockname()[1], "https" if tls else "http")
    try:
        yield there
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def says(answer: bytes, *, then_close: bool = False) -> Script:
    async def script(writer: asyncio.StreamWriter, _request: bytes) -> None:
        writer.write(answer)
        await writer.drain()
        if then_close:
            writer.close()

    return script


async def hang(_writer: asyncio.StreamWriter, _request: bytes) -> None:
    await anyio.sleep_forever()


async def hang_up(writer: asyncio.StreamWriter, _request: bytes) -> None:
    writer.close()


async def reset(writer: asyncio.StreamWriter, _request: bytes) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def push(settings: PushSettings | None = None, resolver=None, **changes) -> PushClient:
    settings = settings or PushSettings(**{"guard": OPEN, **changes})
    return PushClient(settings, resolver) if resolver else PushClient(settings)


def request(url, *headers, method="POST", body=b"x", timeout_s=5.0):
    return PushRequest(method, url, headers, body, timeout_s)


async def failure(client, sent) -> UpstreamUnavailableError:
    with pytest.raises(UpstreamUnavailableError) as caught:
        await client.send(sent)
    return caught.value


# What leaves


@pytest.mark.parametrize(
    ("published", "target"),
    [
        ("", "/"),
        ("/", "/"),
        ("?x=1", "/?x=1"),
        ("#top", "/"),
        ("/a?", "/a?"),
        ("/a/", "/a/"),
        ("/a//b///", "/a//b///"),
        ("//a", "//a"),
        ("/a/./b/../c", "/a/./b/../c"),
        ("/%7Eme/~me/%7e", "/%7Eme/~me/%7e"),
        ("/a%2Fb%2fc", "/a%2Fb%2fc"),
        ("/a;b='c'&d=[2]", "/a;b='c'&d=[2]"),
        ("/?x[2]=[2]&y=a+b%20c&z=;", "/?x[2]=[2]&y=a+b%20c&z=;"),
        ("/?a=1&a=1?b=/?", "/?a=1&a=1?b=/?"),
        ("/%", "/%"),
        ("/%zz?%", "/%zz?%"),
        ('/"<>^`{|}', '/"<>^`{|}'),
        ("/@a:b@", "/@a:b@"),
        ("/http://example.com/x", "/http://example.com/x"),
    ],
)
async def test_the_request_is_what_was_published_to_the_byte(published, target):
    headers = [
        ("Upstash-Message-Id", "msg_1"),
        ("x-lower", "a"),
        ("X-Twice", "1"),
        ("Content-Type", "application/json"),
        ("X-Twice", "2"),
        ("X-UTF8", "grüße ☃"),
        ("x-EMPTY", ""),
        ("User-Agent", "Upstash-QStash"),
    ]
    async with peer(says(OK)) as there, push() as client:
        await client.send(request(there.url + published, *headers, body=b'{"a": 1}'))
    lines = [f"POST {target} HTTP/1.1", f"Host: {there.authority}", *(f"{name}: {value}" for name, value in headers)]
    assert there.requests == ["\r\n".join([*lines, "Content-Length: 8", "", '{"a": 1}']).encode()]


@pytest.mark.parametrize(
    ("method", "body", "told"),
    [
        ("POST", b"", b"Content-Length: 0\r\n"),
        ("PUT", b"", b"Content-Length: 0\r\n"),
        ("PATCH", b"", b"Content-Length: 0\r\n"),
        ("GET", b"", b""),
        ("HEAD", b"", b""),
        ("GET", b"abc", b"Content-Length: 3\r\n"),
        ("DELETE", b"abc", b"Content-Length: 3\r\n"),
        ("POST", b"\x00\r\n\r\n\xff", b"Content-Length: 6\r\n"),
        ("PURGE", b"abc", b"Content-Length: 3\r\n"),
    ],
)
async def test_every_method_carries_its_body_and_nothing_is_added(method, body, told):
    async with peer(says(b"HTTP/1.1 204 No Content\r\n\r\n")) as there, push() as client:
        response = await client.send(request(there.url, method=method, body=body))
    assert response.status == 204
    expected = b"%b / HTTP/1.1\r\nHost: %b\r\n%b\r\n%b" % (method.encode(), there.authority.encode(), told, body)
    assert there.requests == [expected]


async def test_a_large_binary_body_arrives_whole():
    body = bytes(range(256)) * 4 * 3_000
    async with peer(says(OK)) as there, push() as client:
        await client.send(request(there.url, body=body))
    assert there.requests[0].endswith(b"Content-Length: %d\r\n\r\n" % len(body) + body)


async def test_what_belongs_to_the_connection_is_not_for_the_publisher_to_say():
    """A second length or another framing would let one message smuggle a second one past us."""
    headers = [
        ("Content-Length", "999"),
        ("content-length", "1"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "close"),
        ("Expect", "100-continue"),
        ("Host", "internal.example"),
        ("Upgrade", "h2c"),
        ("X-Kept", "1"),
    ]
    async with peer(says(OK)) as there, push() as client:
        await client.send(request(there.url, *headers, body=b"abc"))
    assert there.requests == [
        b"POST / HTTP/1.1\r\nHost: %b\r\nX-Kept: 1\r\nContent-Length: 3\r\n\r\nabc" % there.authority.encode()
    ]


async def test_accept_encoding_is_sent_when_published_and_the_answer_stays_as_it_came():
    packed = gzip.compress(b"plain")
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed)
    async with peer(says(head + packed)) as there, push() as client:
        response = await client.send(request(there.url, ("Accept-Encoding", "gzip")))
    assert b"Accept-Encoding: gzip\r\n" in there.requests[0]
    assert response.body == packed


async def test_names_that_differ_in_case_are_both_sent():
    async with peer(says(OK)) as there, push() as client:
        await client.send(request(there.url, ("X-A", "1"), ("x-a", "2"), ("X-B", "3")))
    assert b"X-A: 1\r\nx-a: 2\r\nX-B: 3\r\n" in there.requests[0]


@pytest.mark.parametrize(
    ("userinfo", "plain"),
    [("me:hunter2", b"me:hunter2"), ("me", b"me:"), ("m%40e:p%3Aw%C3%A4", b"m@e:p:w\xc3\xa4"), (":", b":"), ("a:b:c", b"a:b:c")],
)  # fmt: skip
async def test_userinfo_becomes_basic_authentication(userinfo, plain):
    async with peer(says(OK)) as there, push() as client:
        await client.send(request(f"http://{userinfo}@{there.authority}/x"))
        await client.send(request(f"http://{userinfo}@{there.authority}/x", ("authorization", "Bearer k")))
    first, second = there.requests
    assert first.startswith(b"POST /x HTTP/1.1\r\nHost: %b\r\n" % there.authority.encode())
    assert b"\r\nAuthorization: Basic %b\r\n" % base64.b64encode(plain) in first
    assert b"\r\nauthorization: Bearer k\r\n" in second
    assert second.lower().count(b"authorization") == 1


@pytest.mark.parametrize(
    "script", [hang, hang_up, reset, says(b"nonsense\r\n\r\n")], ids=["hang", "close", "reset", "no"]
)
async def test_userinfo_is_in_no_error(script):
    async with peer(script) as there, push() as client:
        error = await failure(client, request(f"http://me:hunter2@{there.authority}/x?token=t0ken", timeout_s=0.1))
    seen = []
    while error is not None:
        seen.append(str(error))
        error = error.__cause__ or error.__context__
    assert "hunter2" not in " ".join(seen)
    assert base64.b64encode(b"me:hunter2").decode() not in " ".join(seen)
    assert "t0ken" not in seen[0]


@pytest.mark.parametrize(
    "header",
    [("X-A", "a\r\nX-B: b"), ("X-A", "\x00"), ("X-A", "\ud800"), ("X\n", "a"), ("X A", "a"), ("X:", "a"), ("", "a"), ("é", "a")],
)  # fmt: skip
async def test_a_header_that_cannot_be_sent_is_permanent_and_nothing_leaves(header):
    async with peer(says(OK)) as there, push() as client:
        with pytest.raises(PermanentError, match="no HTTP header can carry"):
            await client.send(request(there.url, header))
    assert there.connections == 0


@pytest.mark.parametrize("method", ["", "P OST", "GET\r\n", "CONNECT", "é"])
async def test_a_method_that_cannot_be_sent_is_permanent(method):
    async with peer(says(OK)) as there, push() as client:
        with pytest.raises(PermanentError, match="no method"):
            await client.send(request(there.url, method=method))
    assert there.connections == 0


async def test_a_url_that_cannot_be_used_is_permanent():
    async with push() as client:
        with pytest.raises(PermanentError, match=r"^invalid destination url: endpoint has invalid port"):
            await client.send(request("http://h:0/"))


# What comes back


@pytest.mark.parametrize("status", [200, 299, 400, 404, 410, 429, 489, 500, 503, 599])
async def test_every_status_is_an_answer(status):
    async with peer(says(b"HTTP/1.1 %d Whatever\r\nContent-Length: 2\r\n\r\nok" % status)) as there, push() as client:
        assert (await client.send(request(there.url))).status == status


async def test_response_headers_come_as_they_were_sent():
    head = b"HTTP/1.1 200 OK\r\nx-lower: 1\r\nSet-Cookie: a=b\r\nX-Twice: 1\r\nSet-Cookie: c=d\r\nX-Utf: \xc3\xa9\r\nX-Latin: \xe9\r\nContent-Length: 0\r\n\r\n"
    async with peer(says(head)) as there, push() as client:
        response = await client.send(request(there.url))
        await client.send(request(there.url))
    assert response.headers == (
        ("x-lower", "1"),
        ("Set-Cookie", "a=b"),
        ("X-Twice", "1"),
        ("Set-Cookie", "c=d"),
        ("X-Utf", "é"),
        ("X-Latin", "é"),
        ("Content-Length", "0"),
    )
    assert b"cookie" not in there.requests[1].lower(), "one tenant's cookies are not for the next"


async def test_a_redirect_is_an_answer_and_is_not_followed():
    async with peer(says(OK)) as elsewhere:
        answer = (
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % elsewhere.url.encode()
        )
        async with peer(says(answer)) as there, push() as client:
            response = await client.send(request(there.url))
    assert response.status == 307
    assert elsewhere.requests == []


async def test_environment_proxies_are_not_read(monkeypatch):
    async with peer(says(OK)) as there, peer(says(OK)) as proxy, push() as client:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        await client.send(request(there.url))
    assert (len(there.requests), len(proxy.requests)) == (1, 0)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "is_truncated"), [(999, False), (1_000, False), (1_001, True), (500_000, True)])
async def test_a_response_is_cut_at_the_limit_and_its_status_counts(size, is_truncated, chunked):
    body = bytes(range(256)) * 2_000
    body = body[:size]
    if chunked:
        answer = b"HTTP/1.1 418 T\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    else:
        answer = b"HTTP/1.1 418 T\r\nContent-Length: %d\r\n\r\n%b" % (size, body)
    async with peer(says(answer)) as there, push(response_bytes_max=1_000) as client:
        for _ in range(2):
            response = await client.send(request(there.url))
            assert (response.status, response.body) == (418, body[:1_000])
            assert response.is_truncated is is_truncated
    assert there.connections == (2 if is_truncated else 1)


async def test_an_endless_response_is_cut_and_hung_up_on():
    async def pour(writer: asyncio.StreamWriter, _request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    async with peer(pour) as there, push(response_bytes_max=100_000) as client:
        response = await client.send(request(there.url))
        assert (len(response.body), response.is_truncated) == (100_000, True)
        await there.until(lambda: there.open == 0)


async def test_a_body_without_length_ends_with_the_connection():
    async with peer(says(b"HTTP/1.0 200 OK\r\n\r\nto the end", then_close=True)) as there, push() as client:
        response = await client.send(request(there.url))
    assert (response.body, response.is_truncated) == (b"to the end", False)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 20 + OK, 200, b"ok"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok", 204, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", 304, b""),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nxxx", 101, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
        (OK + b"HTTP/1.1 500 Stale\r\nContent-Length: 0\r\n\r\n", 200, b"ok"),
        (OK + b"left over", 200, b"ok"),
    ],
    ids=["100", "103", "204 body", "204", "304", "101", "empty", "no reason", "close", "pipelined", "left over"],
)
async def test_odd_answers_do_not_spoil_the_next(answer, status, body):
    async with peer(says(answer)) as there, push() as client:
        for _ in range(3):
            response = await client.send(request(there.url))
            assert (response.status, response.body) == (status, body)
    assert len(there.requests) == 3


async def test_headers_of_interim_answers_are_not_those_of_the_answer():
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    async with peer(says(hints + OK)) as there, push() as client:
        assert (await client.send(request(there.url))).headers == (("Content-Length", "2"),)


async def test_a_connection_that_the_server_wants_closed_is_closed():
    """Although the server itself leaves it open."""
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with peer(says(answer)) as there, push() as client:
        await client.send(request(there.url))
        await there.until(lambda: there.open == 0)


async def test_head_has_no_body():
    async with peer(says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")) as there, push() as client:
        for _ in range(2):
            assert (await client.send(request(there.url, method="HEAD", body=b""))).body == b""
    assert there.connections == 1


async def test_an_answer_that_nobody_asked_for_is_not_taken_for_the_next_one():
    """A late second response, on a connection that already waits for its next request, must not acknowledge a message."""
    writers = []

    async def script(writer: asyncio.StreamWriter, _request: bytes) -> None:
        writers.append(writer)
        writer.write(OK)

    async with peer(script) as there, push() as client:
        await client.send(request(there.url))
        writers[0].write(b"HTTP/1.1 299 Stale\r\nContent-Length: 0\r\n\r\n")
        idle = next(iter(client._pool.open))
        while idle.is_silent:  # noqa: ASYNC110 -- the kernel sets no event
            await asyncio.sleep(0)
        assert (await client.send(request(there.url))).status == 200
    assert there.connections == 2


async def test_a_server_that_talks_first_gets_no_request():
    async with peer(says(OK), greeting=b"220 smtp.example ESMTP\r\n") as there, push() as client:
        error = await failure(client, request(there.url, timeout_s=2))
    assert "closed the connection before it was asked" in str(error) or "no valid HTTP response" in str(error)


# Connections


async def test_two_sends_share_a_connection():
    async with peer(says(OK)) as there, push() as client:
        for _ in range(3):
            await client.send(request(there.url))
    assert (there.connections, len(there.requests)) == (1, 3)


async def test_a_connection_that_the_server_closed_while_idle_is_replaced():
    async with peer(says(OK, then_close=True)) as there, push() as client:
        for _ in range(5):
            assert (await client.send(request(there.url))).status == 200
            await there.until(lambda: there.open == 0)
    assert there.connections == 5


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
@pytest.mark.parametrize("script", [hang_up, reset], ids=["close", "reset"])
async def test_a_request_that_got_no_answer_is_not_sent_again(method, script):
    """Over a fresh connection and over one that worked before: aiohttp would repeat all but the POST."""
    turns = []

    async def first_answers(writer: asyncio.StreamWriter, got: bytes) -> None:
        turns.append(got)
        await (says(OK) if len(turns) == 1 else script)(writer, got)

    async with peer(first_answers) as there, push() as client:
        await client.send(request(there.url, method=method))
        error = await failure(client, request(there.url, method=method))
        assert error.maybe_sent
        assert (there.connections, len(there.requests)) == (1, 2)
        error = await failure(client, request(there.url, method=method))
        assert error.maybe_sent
        assert (there.connections, len(there.requests)) == (2, 3)


async def test_a_dead_host_holds_up_nobody_else():
    async with peer(hang) as dead, peer(says(OK)) as alive, push(connections_max=2) as client:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(client.send, request(dead.url))
            await dead.until(lambda: len(dead.requests) == 50)
            for _ in range(5):
                assert (await client.send(request(alive.url))).status == 200
            group.cancel_scope.cancel()
        await dead.until(lambda: dead.open == 0)


async def test_idle_connections_stay_below_their_maximum():
    gate = asyncio.Event()

    async def wait(writer: asyncio.StreamWriter, _request: bytes) -> None:
        await gate.wait()
        writer.write(OK)

    async with peer(wait) as there, push(connections_max=3) as client:
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(client.send, request(there.url))
            await there.until(lambda: len(there.requests) == 10)
            gate.set()
        await there.until(lambda: there.open <= 3)
        assert there.open > 0
        assert (await client.send(request(there.url))).status == 200
        assert there.connections == 10


async def test_an_unused_connection_is_closed_after_its_time():
    async with peer(says(OK)) as there, push(keep_alive_s=0.02) as client:
        await client.send(request(there.url))
        await there.until(lambda: there.open == 0)
        await client.send(request(there.url))
    assert there.connections == 2


async def test_closing_the_client_closes_its_connections():
    async with peer(says(OK)) as there:
        async with push() as client:
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(client.send, request(there.url))
            assert there.open > 0
        await there.until(lambda: there.open == 0)


async def test_an_answer_before_the_end_of_the_request_counts_and_costs_the_connection():
    """A 413, say: what is still unsent must not stand before the next request."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        reader._transport.pause_reading()
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await done.wait()
        writer.transport.abort()

    seen = []
    done = asyncio.Event()
    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    try:
        async with push() as client:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for _ in range(2):
                assert (await client.send(request(url, body=b"x" * 50_000_000))).status == 413
        assert len(seen) == 2
    finally:
        done.set()
        server.close()


async def test_a_cancelled_send_hangs_up():
    async with peer(hang) as there, push() as client:
        async with anyio.create_task_group() as group:
            group.start_soon(client.send, request(there.url))
            await there.until(lambda: len(there.requests) == 1)
            group.cancel_scope.cancel()
        await there.until(lambda: there.open == 0)


# Failures


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "the server closed the connection without a whole response"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the server closed the connection without a whole response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "the response broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "the response broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "the response broke off|no valid HTTP response"),
        (b"not HTTP at all\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 abc\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_048_576 + b"\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\n" + b"a" * 1_048_576 + b": x\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 " + b"a" * 1_048_576 + b"\r\n\r\n", "no valid HTTP response: "),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", "no valid HTTP response: "),
        (b"\x16\x03\x01\x00\x05hello", "no valid HTTP response: "),
    ],
    ids=["nothing", "cut head", "short body", "cut chunks", "bad chunk", "no HTTP", "no status", "negative", "two lengths", "no colon", "long value", "long name", "long reason", "many headers", "TLS"],
)  # fmt: skip
async def test_an_answer_that_is_not_whole_may_have_been_acted_on(answer, told):
    async with peer(says(answer, then_close=True)) as there, push() as client:
        error = await failure(client, request(there.url))
    assert error.maybe_sent
    text = str(error)
    assert any(text.startswith(f"{there.authority}: {each}") for each in told.split("|")), text
    assert len(text) < 300
    assert text.isprintable()


async def test_a_reset_before_the_answer_may_have_been_acted_on():
    async with peer(reset) as there, push() as client:
        error = await failure(client, request(there.url))
    assert error.maybe_sent
    assert str(error) == f"{there.authority}: connection reset by peer"


async def test_a_refused_connection_was_not_sent():
    async with peer(hang) as gone:
        pass
    async with push() as client:
        error = await failure(client, request(gone.url))
    assert not error.maybe_sent
    assert str(error) == f"{gone.authority}: connection refused"


async def test_an_unknown_host_was_not_sent():
    def nobody(_host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with push(resolver=nobody) as client:
        error = await failure(client, request("http://nobody.invalid/"))
    assert not error.maybe_sent
    assert str(error) == "nobody.invalid: no such host"


async def test_a_resolver_that_is_away_was_not_sent():
    def away(_host):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async with push(resolver=away) as client:
        error = await failure(client, request("http://example.com/"))
    assert not error.maybe_sent
    assert str(error) == "example.com: host lookup failed: Temporary failure in name resolution"


async def test_silence_meets_the_deadline_and_may_have_been_acted_on():
    async with peer(hang) as there, push() as client:
        error = await failure(client, request(there.url, timeout_s=0.1))
        assert error.maybe_sent
        assert str(error) == f"{there.authority}: timed out after 0.1 s, waiting for the response"
        await there.until(lambda: there.open == 0)


async def test_an_answer_may_take_longer_than_a_connection():
    async def think(writer: asyncio.StreamWriter, _request: bytes) -> None:
        await anyio.sleep(0.2)
        writer.write(OK)

    async with peer(think) as there, push(connect_timeout_s=0.1) as client:
        assert (await client.send(request(there.url))).status == 200


async def test_a_drip_meets_the_deadline_although_its_status_is_known():
    async def drip(writer: asyncio.StreamWriter, _request: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await anyio.sleep(0.005)

    async with peer(drip) as there, push() as client:
        error = await failure(client, request(there.url, timeout_s=0.1))
    assert error.maybe_sent
    assert str(error) == f"{there.authority}: timed out after 0.1 s, reading the response (200)"


async def test_endless_interim_answers_are_not_read_for_ever():
    async def stall(writer: asyncio.StreamWriter, _request: bytes) -> None:
        while True:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
            await writer.drain()

    async with peer(stall) as there, push() as client:
        error = await failure(client, request(there.url))
    assert error.maybe_sent
    assert str(error) == f"{there.authority}: no valid HTTP response: its head is longer than 65536 bytes"


async def test_slow_interim_answers_meet_the_deadline():
    async def stall(writer: asyncio.StreamWriter, _request: bytes) -> None:
        while True:
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await anyio.sleep(0.01)

    async with peer(stall) as there, push() as client:
        error = await failure(client, request(there.url, timeout_s=0.1))
    assert error.maybe_sent
    assert str(error) == f"{there.authority}: timed out after 0.1 s, waiting for the response"


async def test_a_body_that_nobody_reads_meets_the_deadline():
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            reader._transport.pause_reading()
            await done.wait()
        finally:
            writer.transport.abort()

    done = asyncio.Event()
    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    try:
        async with push() as client:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            error = await failure(client, request(url, body=b"x" * 50_000_000, timeout_s=0.3))
        assert error.maybe_sent
        assert str(error).endswith("timed out after 0.3 s, sending the request")
    finally:
        done.set()
        server.close()


def errors_of(*roots):
    """Every class below some exceptions, made without the arguments that differ from one to the next."""
    found = {*roots}
    while new := {child for kind in found for child in kind.__subclasses__()} - found:
        found |= new
    return sorted(found, key=lambda kind: (kind.__module__, kind.__name__))


@pytest.mark.parametrize("kind", errors_of(ConnectionError, ssl.SSLError, socket.gaierror, TimeoutError))
def test_every_failure_below_http_has_words_without_its_address(kind):
    for arguments in ((), (111, "('10.1.2.3', 80) secret")):
        error = kind.__new__(kind, *arguments)
        error.verify_message = ""
        error.reason = None
        assert describe(error)
        assert issubclass(kind, socket.gaierror) or "secret" not in describe(error)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1 and hook.example, the server's context, and the roots that trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("hook.example")]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=str(folder / "ca.pem"))


async def test_an_untrusted_certificate_means_not_sent(certificate):
    async with peer(says(OK), certificate[0]) as there, push() as client:
        error = await failure(client, request(there.url))
    assert not error.maybe_sent
    assert str(error).startswith(f"{there.authority}: TLS: self")  # "-signed", or " signed" in an older OpenSSL
    assert there.requests == []


async def test_a_trusted_certificate_must_also_bear_the_name(certificate):
    server, roots = certificate
    async with peer(says(OK), server) as there:
        async with push(ssl_context=roots, resolver=lambda _host: ["127.0.0.1"]) as client:
            for host in ("127.0.0.1", "127.1", "hook.example", "HOOK.example", "hook.example."):
                assert (await client.send(request(f"https://{host}:{there.port}/"))).status == 200
            error = await failure(client, request(f"https://other.example:{there.port}/"))
        assert not error.maybe_sent
        assert "TLS: Hostname mismatch" in str(error)
    assert len(there.requests) == 5


async def test_a_server_without_tls_means_not_sent():
    async with peer(says(OK), greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n") as there, push() as client:
        error = await failure(client, request(there.url.replace("http:", "https:")))
    assert not error.maybe_sent
    assert "TLS: " in str(error)


@pytest.mark.parametrize(
    ("connect_timeout_s", "timeout_s", "told"), [(0.1, 5.0, "0.1 s"), (5.0, 0.2, "0.2 s"), (0.15, 0.15, "0.15 s")]
)
async def test_a_handshake_that_hangs_meets_the_first_deadline_and_was_not_sent(connect_timeout_s, timeout_s, told):
    async with peer(hang) as there, push(connect_timeout_s=connect_timeout_s) as client:
        error = await failure(client, request(there.url.replace("http:", "https:"), timeout_s=timeout_s))
    assert not error.maybe_sent
    assert str(error) == f"{there.authority}: timed out after {told}, connecting"


async def test_a_peer_that_hangs_up_in_the_handshake_means_not_sent():
    async def drop(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(drop, "127.0.0.1", 0)
    async with push() as client:
        error = await failure(client, request(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"))
    assert not error.maybe_sent
    server.close()


# The guard


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.0.0.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("[::ffff:127.0.0.1]", "::ffff:7f00:1"),
        ("[::ffff:7f00:1]", "::ffff:7f00:1"),
        ("[::127.0.0.1]", "::7f00:1"),
        ("[64:ff9b::127.0.0.1]", "64:ff9b::7f00:1"),
    ],
)
async def test_no_spelling_of_an_address_gets_past_the_guard(host, address):
    """aiohttp asks no resolver about an address, so the socket itself is guarded."""
    async with peer(says(OK)) as there, push(guard=Guard()) as client:
        url = f"http://{host}:{there.port}/"
        with pytest.raises(BlockedError) as caught:
            await client.send(request(url))
        assert str(caught.value) == f"endpoint resolves to a loopback address: {address}"
        assert caught.value.reason == "loopback address"
        with pytest.raises(BlockedError) as caught:
            await client.check(check_url(url))
        assert str(caught.value) == f"endpoint resolves to a loopback address: {address}"
    assert there.connections == 0


async def test_an_odd_spelling_that_is_allowed_is_sent_as_published():
    async with peer(says(OK)) as there, push() as client:
        await client.check(check_url(f"http://127.1:{there.port}/"))
        await client.send(request(f"http://127.1:{there.port}/"))
    assert b"\r\nHost: 127.1:%d\r\n" % there.port in there.requests[0]


async def test_a_name_of_a_blocked_address_is_blocked():
    async with peer(says(OK)) as there, push(guard=Guard(), resolver=lambda _host: ["127.0.0.1"]) as client:
        with pytest.raises(BlockedError, match=r"^endpoint resolves to a loopback address: 127.0.0.1$") as caught:
            await client.send(request(f"http://rebound.example:{there.port}/"))
    assert caught.value.host == "rebound.example"
    assert there.connections == 0


async def test_a_name_that_moves_after_publishing_is_judged_again(monkeypatch):
    """DNS rebinding: public when checked, ours when delivered."""
    monkeypatch.setattr(http_push, "SEND_AGE_S_MAX", -1.0)
    answers = [["8.8.8.8"], ["169.254.169.254"], ["127.0.0.1"]]
    async with push(guard=Guard(), resolver=lambda _host: answers.pop(0)) as client:
        await client.check(check_url("http://rebound.example/"))
        await client.check(check_url("http://rebound.example/"))
        with pytest.raises(BlockedError, match="a metadata address"):
            await client.send(request("http://rebound.example/"))
        with pytest.raises(BlockedError, match="a loopback address"):
            await client.send(request("http://rebound.example/"))


async def test_only_the_allowed_addresses_of_a_name_are_used():
    guard = Guard(allowed=parse_allow("127.0.0.1"))
    addresses = ["127.0.0.2", "10.0.0.1", "127.0.0.1", "::1"]
    async with peer(says(OK)) as there, push(guard=guard, resolver=lambda _host: addresses) as client:
        await client.check(check_url(f"http://mixed.example:{there.port}/"))
        assert (await client.send(request(f"http://mixed.example:{there.port}/"))).status == 200
        # The server listens on 127.0.0.1 alone: another address would have been refused.
        addresses.remove("127.0.0.1")
        with pytest.raises(BlockedError, match=r"^endpoint resolves to a loopback address: 127.0.0.2$"):
            await client.send(request(f"http://blocked.example:{there.port}/"))


async def test_the_next_address_is_tried_when_one_is_dead():
    async with peer(says(OK)) as there, push(resolver=lambda _host: ["127.0.0.9", "127.0.0.1"]) as client:
        assert (await client.send(request(f"http://two.example:{there.port}/"))).status == 200


# The check at publish time


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["::1", "127.0.0.1"], "endpoint resolves to a loopback address: ::1"),
        (["0.0.0.0"], "endpoint resolves to an unspecified address: 0.0.0.0"),
        (["10.0.0.1"], "endpoint resolves to a private address: 10.0.0.1"),
        ([], "unable to resolve host: lookup host.example: no such host"),
    ],
)
async def test_the_check_says_where_a_host_leads(addresses, told):
    async with push(guard=Guard(), resolver=lambda _host: addresses) as client:
        for _ in range(2):
            with pytest.raises(BlockedError) as caught:
                await client.check(check_url("http://HOST.example/"))
            assert str(caught.value) == told


async def test_localhost_is_blocked_by_the_real_resolver():
    async with push(guard=Guard()) as client:
        with pytest.raises(BlockedError, match=r"^endpoint resolves to a loopback address: (::1|127.0.0.1)$"):
            await client.check(check_url("http://localhost:8080/"))
    async with push() as client:
        await client.check(check_url("http://localhost:8080/"))


@pytest.mark.parametrize("name", ["EAI_NONAME", "EAI_NODATA"])
async def test_an_unknown_host_fails_the_check_and_is_remembered(name):
    asked = []

    def nobody(host):
        asked.append(host)
        raise socket.gaierror(getattr(socket, name), "unknown")

    async with push(resolver=nobody) as client:
        for _ in range(3):
            with pytest.raises(BlockedError) as caught:
                await client.check(check_url("http://nobody.invalid/"))
            assert str(caught.value) == "unable to resolve host: lookup nobody.invalid: no such host"
    assert asked == ["nobody.invalid"]


async def test_a_resolver_that_is_away_passes_and_is_asked_again():
    asked = []

    def away(host):
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async with push(resolver=away) as client:
        await client.check(check_url("http://example.com/"))
        await client.check(check_url("http://example.com/"))
    assert len(asked) == 2


class SlowResolver:
    """Answers when it is told to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked: list[str] = []
        self.loop = asyncio.get_running_loop()
        self.release = self.loop.create_future()

    def __call__(self, host: str) -> list[str]:
        self.asked.append(host)
        asyncio.run_coroutine_threadsafe(self._wait(), self.loop).result()
        return [self.address]

    async def _wait(self) -> None:
        await asyncio.shield(self.release)


async def test_a_slow_resolver_passes_the_check_and_times_a_send_out():
    slow = SlowResolver("127.0.0.1")
    async with push(connect_timeout_s=0.05, resolver=slow) as client:
        await client.check(check_url("http://slow.example/"))
        error = await failure(client, request("http://slow.example/"))
        assert not error.maybe_sent
        assert str(error) == "slow.example: timed out after 0.05 s, connecting"
        assert slow.asked == ["slow.example"], "the second joined the first"
        slow.release.set_result(None)
        await client._names.lookup("slow.example", 30)


async def test_lookups_of_one_host_are_joined_and_remembered():
    slow = SlowResolver("8.8.8.8")
    async with push(guard=Guard(), resolver=slow) as client:
        async with anyio.create_task_group() as group:
            for path in range(100):
                group.start_soon(client.check, check_url(f"http://burst.example/{path}"))
            group.start_soon(client.check, check_url("http://other.example/"))
            await asyncio.sleep(0)
            slow.release.set_result(None)
        await client.check(check_url("http://burst.example/"))
    assert sorted(slow.asked) == ["burst.example", "other.example"]


async def test_a_cancelled_check_does_not_cancel_the_others():
    slow = SlowResolver("127.0.0.1")
    async with push(guard=Guard(), resolver=slow) as client:
        first = asyncio.create_task(client.check(check_url("http://a.example/")))
        second = asyncio.create_task(client.check(check_url("http://a.example/")))
        await asyncio.sleep(0)
        first.cancel()
        slow.release.set_result(None)
        with pytest.raises(BlockedError):
            await second
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_names_are_forgotten_beyond_their_maximum(monkeypatch):
    monkeypatch.setattr(http_push, "NAMES_MAX", 3)
    asked = []
    async with push(resolver=lambda host: asked.append(host) or ["127.0.0.1"]) as client:
        for host in ("a", "b", "c", "d", "d", "c", "b", "a"):
            await client.check(check_url(f"http://{host}.example/"))
        assert len(client._names._known) == 3
    assert [host[0] for host in asked] == ["a", "b", "c", "d", "a"]


async def test_old_answers_are_not_used(monkeypatch):
    monkeypatch.setattr(http_push, "CHECK_AGE_S_MAX", -1.0)
    asked = []
    async with push(resolver=lambda host: asked.append(host) or ["127.0.0.1"]) as client:
        for _ in range(3):
            await client.check(check_url("http://a.example/"))
    assert len(asked) == 3


async def test_too_many_lookups_at_once_are_not_queued(monkeypatch):
    monkeypatch.setattr(http_push, "LOOKUPS_MAX", 1)
    slow = SlowResolver("127.0.0.1")
    async with push(guard=Guard(), resolver=slow) as client:
        waiting = asyncio.create_task(client.check(check_url("http://a.example/")))
        await asyncio.sleep(0)
        await client.check(check_url("http://b.example/"))
        error = await failure(client, request("http://b.example/"))
        assert not error.maybe_sent
        assert str(error) == "b.example: host lookup failed: too many lookups at once"
        slow.release.set_result(None)
        with pytest.raises(BlockedError):
            await waiting
