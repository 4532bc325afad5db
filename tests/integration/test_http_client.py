"""The door out over real sockets: what a peer can do to a connection, and what aiohttp would do to a request."""

import asyncio
import gzip
import ssl
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

from daemon.domain.errors import BadRequestError, SchemaDriftError, UpstreamUnavailableError
from daemon.http_client import HttpClient, HttpSettings

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
Script = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


class Peer:
    """A server that reads one request head at a time and does what its script says."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.requests: list[bytes] = []
        self.connections = 0


@asynccontextmanager
async def peer(script: Script, tls: ssl.SSLContext | None = None):
    tasks = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        there.connections += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                there.requests.append(head.removesuffix(b"\r\n\r\n"))
                await script(writer, head)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the client hung up, or the test is over
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    there = Peer(f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield there
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


def says(answer: bytes, *, then_close: bool = False) -> Script:
    async def script(writer: asyncio.StreamWriter, _head: bytes) -> None:
        writer.write(answer)
        await writer.drain()
        if then_close:
            writer.close()

    return script


async def hang(_writer: asyncio.StreamWriter, _head: bytes) -> None:
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"not HTTP at all\r\n\r\n",
    ],
    ids=["nothing", "cut head", "short body", "cut chunks", "bad chunk", "bad gzip", "no HTTP"],
)
async def test_answer_that_is_not_whole_is_transient_and_maybe_acted_on(answer):
    async with peer(says(answer, then_close=True)) as there, HttpClient() as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.get(there.base_url, "/x")
    assert caught.value.maybe_sent


async def test_truncated_gzip_is_not_a_whole_answer():
    whole = gzip.compress(b'{"data": []}' * 100)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(whole)
    async with peer(says(head + whole[: len(whole) // 2], then_close=True)) as there, HttpClient() as client:
        with pytest.raises(UpstreamUnavailableError):
            await client.get(there.base_url, "/x")


async def test_refused_connection_was_not_sent():
    async with peer(hang) as gone:
        pass
    async with HttpClient() as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.get(gone.base_url, "/x")
    assert not caught.value.maybe_sent


async def test_unknown_name_was_not_sent():
    async with HttpClient() as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.get("http://nobody.invalid", "/x")
    assert not caught.value.maybe_sent
    assert "nobody.invalid" in str(caught.value)


async def test_peer_that_never_answers_meets_the_read_deadline():
    async with peer(hang) as there, HttpClient(HttpSettings(read_timeout_s=0.05)) as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.get(there.base_url, "/x")
    assert caught.value.maybe_sent


async def test_slow_drip_meets_the_total_deadline():
    """Each byte arrives well within the read deadline; only the total one ends it."""

    async def drip(writer: asyncio.StreamWriter, _head: bytes) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await anyio.sleep(0.005)

    settings = HttpSettings(read_timeout_s=10, total_timeout_s=0.1)
    async with peer(drip) as there, HttpClient(settings) as client:
        with pytest.raises(UpstreamUnavailableError) as caught:
            await client.get(there.base_url, "/x")
    assert caught.value.maybe_sent


async def test_limit_counts_bytes_after_decompression():
    bomb = gzip.compress(b" " * 5_000_000)
    assert len(bomb) < 10_000
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    async with peer(says(head + bomb)) as there, HttpClient(HttpSettings(body_bytes_max=100_000)) as client:
        with pytest.raises(SchemaDriftError, match="larger than the limit"):
            await client.get(there.base_url, "/x")


async def test_compressed_answer_arrives_plain():
    body = gzip.compress(b'{"a": 1}')
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with peer(says(head + body)) as there, HttpClient() as client:
        answer = await client.get(there.base_url, "/x")
    assert answer.body == b'{"a": 1}'


async def test_request_on_the_wire_is_what_was_asked_for():
    answer = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: tenant=a; Path=/\r\n\r\n")
    async with peer(says(answer)) as there, HttpClient() as client:
        for _ in range(2):
            await client.get(
                there.base_url,
                "/v1/~a%7E",
                [("group_by[]", "x"), ("page", "p+/=")],
                {"authorization": "Bearer k"},
            )
    assert there.connections == 1
    line, *headers = there.requests[1].decode().split("\r\n")
    assert line == "GET /v1/~a%7E?group_by%5B%5D=x&page=p%2B%2F%3D HTTP/1.1"
    names = [header.split(":")[0].lower() for header in headers]
    assert sorted(names) == ["accept", "accept-encoding", "authorization", "host", "user-agent"]


async def test_redirect_is_refused_and_not_followed():
    async with (
        peer(says(OK)) as elsewhere,
        peer(
            says(b"HTTP/1.1 302 Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % elsewhere.base_url.encode())
        ) as there,
        HttpClient() as client,
    ):
        with pytest.raises(BadRequestError, match="redirects are not followed"):
            await client.get(there.base_url, "/x", headers={"authorization": "Bearer k"})
    assert elsewhere.requests == []


async def test_environment_proxies_are_not_read_and_the_setting_is(monkeypatch):
    async with peer(says(OK)) as there, peer(says(OK)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.base_url)
        async with HttpClient() as client:
            await client.get(there.base_url, "/x")
        assert (len(there.requests), len(proxy.requests)) == (1, 0)
        async with HttpClient(HttpSettings(proxy_url=proxy.base_url)) as client:
            await client.get(there.base_url, "/x")
        assert (len(there.requests), len(proxy.requests)) == (1, 1)
        assert proxy.requests[0].startswith(f"GET {there.base_url}/x ".encode())


async def test_failing_proxy_means_not_sent_and_hides_its_password():
    async with peer(says(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")) as proxy:
        url = proxy.base_url.replace("http://", "http://me:hunter2@")
        async with HttpClient(HttpSettings(proxy_url=url)) as client:
            with pytest.raises(UpstreamUnavailableError) as caught:
                await client.get("https://api.example.com", "/x")
    assert not caught.value.maybe_sent
    assert "hunter2" not in str(caught.value)


async def test_connections_stay_below_their_maximum():
    """Twenty requests at once over three connections: all are answered, and no fourth is opened."""
    async with peer(says(OK)) as there, HttpClient(HttpSettings(connections_max=3)) as client:
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(client.get, there.base_url, "/x")
        assert len(there.requests) == 20
        assert there.connections <= 3


async def test_cancelled_request_frees_its_connection():
    async with peer(hang) as there, HttpClient(HttpSettings(connections_max=1)) as client:
        for _ in range(3):
            with anyio.move_on_after(0.05) as scope:
                await client.get(there.base_url, "/x")
            assert scope.cancelled_caught
    assert len(there.requests) == 3


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1, and the server's context that holds it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "ca.pem"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = tmp_path / "key.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem, private)
    return context, str(pem)


async def test_certificate_is_checked_against_the_bundle(certificate, monkeypatch):
    context, bundle = certificate
    async with peer(says(OK), context) as there:
        async with HttpClient() as client:
            with pytest.raises(UpstreamUnavailableError) as caught:
                await client.get(there.base_url, "/x")
        assert not caught.value.maybe_sent
        assert "certificate" in str(caught.value).lower()
        async with HttpClient(HttpSettings(ca_bundle=bundle)) as client:
            assert (await client.get(there.base_url, "/x")).status == 200
        monkeypatch.setenv("SSL_CERT_FILE", bundle)
        async with HttpClient() as client:
            assert (await client.get(there.base_url, "/x")).status == 200
