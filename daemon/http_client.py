"""The one door out: deadlines, size limits, `Retry-After`, and every failure under a name of ours.

httpx is the interface and aiohttp the engine: httpx's own connection pool slows down with its size, and aiohttp left to
itself rewrites URLs, shares cookies between tenants and follows redirects. `AiohttpTransport` takes only its sockets.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import Self
from urllib.parse import quote

import aiohttp
import httpx
import msgspec
import yarl

from daemon import __version__
from daemon.domain.errors import (
    BadRequestError,
    ConfigError,
    CredentialError,
    DaemonError,
    ForbiddenError,
    PermanentError,
    RateLimitedError,
    SchemaDriftError,
    TransientError,
    UpstreamUnavailableError,
)
from daemon.domain.ports import Answer
from daemon.http_exits import Exits, Terms

USER_AGENT = f"tallyd/{__version__} (+https://github.com/tallyd/tallyd)"
RETRY_AFTER_S_MAX = 86_400.0
LEAVE_JOB_S = 60.0
"""What `x-should-retry: false` waits at least: longer than the time budget of a job, so that the retry queue has it."""

ERROR_BODY_BYTES_MAX = 65_536
_RETRYABLE = frozenset({408, 409, 425})
_THROTTLED = frozenset({"ThrottlingException", "TooManyRequestsException", "LimitExceededException"})
"""What AWS answers with 400 and means as 429."""
_CONDITIONS = frozenset({"if-none-match", "if-modified-since"})
_PROXY = "tallyd.proxy"
"""Names, among a request's extensions, the proxy that it takes in place of the client's own."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How tallyd talks to providers.

    Attributes:
        connect_timeout_s: for the TCP and TLS handshakes.
        read_timeout_s: for the first byte of the answer, and between any two reads of it.
        total_timeout_s: for the whole request, waiting for a free connection included.
        body_bytes_max: of one answer, after decompression.
        connections_per_host_max: 0 means: no limit of its own.
        proxy_url: an HTTP proxy for everything; the environment's `*_PROXY` are not read.
        ca_bundle: a PEM file; without it `SSL_CERT_FILE` and `SSL_CERT_DIR` count, then certifi's roots.
    """

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    total_timeout_s: float = 60.0
    connections_max: int = 200
    connections_per_host_max: int = 0
    body_bytes_max: int = 32 * 1024 * 1024
    proxy_url: str | None = None
    ca_bundle: str | None = None
    user_agent: str = USER_AGENT


def ssl_context(settings: HttpSettings) -> ssl.SSLContext:
    """The trusted roots, read once a process. Raises ConfigError for a bundle that cannot be read."""
    try:
        return _trusting(settings.ca_bundle, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            [f"CA bundle {settings.ca_bundle or 'in SSL_CERT_FILE'}: {error.strerror or error}"]
        ) from error


@cache
def _trusting(bundle: str | None, cert_file: str | None, cert_dir: str | None) -> ssl.SSLContext:  # noqa: ARG001
    """The variables are httpx's to read; here they only tell one context from another."""
    return httpx.create_ssl_context(trust_env=True) if bundle is None else ssl.create_default_context(cafile=bundle)


# Which of httpx's names each failure of aiohttp has, first match wins. aiohttp's classes say where in the exchange it
# failed, and that is what decides whether the request may have been acted on.
_AIOHTTP: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (aiohttp.ClientProxyConnectionError, httpx.ProxyError),
    (aiohttp.ClientHttpProxyError, httpx.ProxyError),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.ServerFingerprintMismatch, httpx.ConnectError),
    (aiohttp.ClientConnectorCertificateError, httpx.ConnectError),
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
    (TimeoutError, httpx.ReadTimeout),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientPayloadError, httpx.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.ClientError, httpx.ReadError),
    (OSError, httpx.ReadError),
)


def as_httpx(error: Exception) -> httpx.TransportError:
    """The name that httpx gives a failure of aiohttp, told without the URL, the headers or the proxy's password."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    reason = getattr(cause, "strerror", None) or getattr(cause, "verify_message", None)
    for theirs, ours in _AIOHTTP:
        if isinstance(error, theirs):
            return ours(f"{type(error).__name__}: {reason}" if reason else type(error).__name__)
    return httpx.TransportError(type(error).__name__)


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise as_httpx(error) from error

    async def aclose(self) -> None:
        # Whole answers have given their connection back already; a part that was not read costs the connection.
        self._response.close()


class AiohttpTransport(httpx.AsyncBaseTransport):
    """httpx's transport over one tamed aiohttp session. Belongs to the event loop of its first request."""

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._ssl = ssl_context(settings)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        settings = self._settings
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=settings.connections_max,
                limit_per_host=settings.connections_per_host_max,
                ssl=self._ssl,
                ttl_dns_cache=30,
            ),
            timeout=aiohttp.ClientTimeout(
                total=settings.total_timeout_s,
                sock_connect=settings.connect_timeout_s,
                sock_read=settings.read_timeout_s,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
            trust_env=False,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._session is None:
            self._session = self._open()
        try:
            response = await self._session.request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=[(name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers.raw],
                data=request.content or None,
                allow_redirects=False,
                proxy=request.extensions.get(_PROXY, self._settings.proxy_url),
            )
        except (aiohttp.ClientError, OSError) as error:
            raise as_httpx(error) from error
        # aiohttp has undone the encoding; httpx must not try again.
        headers = [pair for pair in response.raw_headers if pair[0].lower() != b"content-encoding"]
        return httpx.Response(response.status, headers=headers, stream=_Body(response), request=request)

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.LocalProtocolError)


class _ExitFailedError(UpstreamUnavailableError):
    """It is the exit that failed, not what lies behind it."""


def _place(exit_url: str) -> str:
    """Host and port of an exit, without its credential."""
    url = httpx.URL(exit_url)
    return f"exit {url.host}:{url.port or 80}"


_BAD_URL = "the base URL cannot be used: it must be an absolute http or https URL"


def as_ours(error: Exception, host: str) -> DaemonError:
    """Our name for a failure of httpx."""
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return PermanentError(_BAD_URL)
    kind = type(error).__name__
    text = str(error)
    problem = f"{host}: {text if text.startswith(kind) else f'{kind}: {text}' if text else kind}"
    return UpstreamUnavailableError(problem, maybe_sent=not isinstance(error, _NOT_SENT))


class _ErrorDetail(msgspec.Struct):
    message: object = None
    type: object = None
    code: object = None
    param: object = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | str | None = None
    aws_type: str | None = msgspec.field(default=None, name="__type")
    request_id: object = None


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def _text(value: object) -> str | None:
    return str(value) if isinstance(value, str | int) and value != "" else None


def _parse_error(body: bytes) -> tuple[str, str | None, str | None]:
    """The message, code and param of an error body, as OpenAI, Anthropic and the gateways before them write it."""
    try:
        told = _decode_error(body)
        detail = told.error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        # A gateway's HTML page, most often: its status says enough.
        return "", None, None
    if detail is None or isinstance(detail, str):
        return detail or "", told.aws_type and told.aws_type.rpartition("#")[2], None
    return _text(detail.message) or "", _text(detail.code) or _text(detail.type), _text(detail.param)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long the other side asks us to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date counts from the answer's own `Date`, so that neither clock needs to be right. At most a day.
    """
    try:
        if (text := headers.get("retry-after-ms")) is not None:
            seconds = float(text) / 1000
        elif (text := headers.get("retry-after")) is None:
            return None
        elif text.strip().replace(".", "", 1).isdecimal():
            seconds = float(text)
        else:
            until = _http_date(text)
            date = headers.get("date")
            seconds = (until - (_http_date(date) if date else datetime.now(UTC))).total_seconds()
    except (ValueError, OverflowError):
        return None
    if not seconds >= 0:  # also not a number
        return 0.0 if seconds < 0 else None
    return min(seconds, RETRY_AFTER_S_MAX)


def _http_date(text: str) -> datetime:
    parsed = parsedate_to_datetime(text)
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def error_for(status: int, headers: Mapping[str, str], body: bytes, secrets: Sequence[str] = ()) -> DaemonError:
    """What a status other than 2xx means for the caller.

    `x-should-retry: false` on a passing failure keeps it a TransientError that waits at least `LEAVE_JOB_S`;
    `true` makes a refusal (but 401 and 403) a passing one.
    """
    message, code, param = _parse_error(body)
    for secret in secrets:
        message = message.replace(secret, "***")
    if 300 <= status < 400:
        return BadRequestError(status, "redirects are not followed; give the final base URL")
    told = f"answered {status}" + (f" ({code})" if code else "") + (f": {message[:300]}" if message else "")
    if status == 401:
        return CredentialError(told)
    if status == 403:
        return ForbiddenError(told)
    if status == 400 and code in _THROTTLED:
        status = 429
    verdict = headers.get("x-should-retry")
    wait_s = retry_after_s(headers)
    if status == 429 or status >= 500 or status in _RETRYABLE or verdict == "true":
        if verdict == "false":
            wait_s = max(wait_s or 0.0, LEAVE_JOB_S)
        if status == 429:
            return RateLimitedError(told, retry_after_s=wait_s)
        return UpstreamUnavailableError(told, retry_after_s=wait_s, status=status)
    return BadRequestError(status, message or "no reason given", code=code, param=param)


def build_url(base_url: str, path: str, params: Sequence[tuple[str, str]]) -> str:
    """`base_url + path?params` in the order given, everything but unreserved characters percent-encoded."""
    url = base_url.rstrip("/") + path
    if not params:
        return url
    return url + "?" + "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in params)


def _usable(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise PermanentError(_BAD_URL) from error
    if url.scheme not in {"http", "https"} or not url.host or (url.port or 0) > 65_535:
        raise PermanentError(_BAD_URL)
    return url


class HttpClient:
    """One per process, used by every connection at once.

    It speaks to the transport itself: `httpx.AsyncClient` would add cookies, redirects, the environment's proxies and
    a second set of headers, all of which we do not want, and costs 40 % of the requests per second.

    Args:
        transport: any httpx transport in place of the network, for tests.
    """

    def __init__(self, settings: HttpSettings | None = None, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings or HttpSettings()
        self._transport = transport or AiohttpTransport(self._settings)
        self._rests: dict[str, float] = {}
        self._headers = {
            "user-agent": self._settings.user_agent,
            "accept": "application/json",
            "accept-encoding": "gzip, deflate",
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One GET, tried once. `headers` may be `Terms`; then an exit that fails is passed over for the next one.

        A 304 is an answer where the headers ask for one.

        Raises:
            CredentialError: 401.  ForbiddenError: 403.  BadRequestError: any other 4xx, and 3xx.
            RateLimitedError: 429.  UpstreamUnavailableError: 408, 409, 425, 5xx, and no whole answer.
            SchemaDriftError: the answer is larger than `body_bytes_max`.
            PermanentError: the base URL cannot be used at all.
        """
        exits = headers.exits if isinstance(headers, Terms) else None
        if exits is None:
            return await self._ask(base_url, path, params, headers)
        for _ in exits:
            async with exits.hold(self._rests) as exit_url:
                try:
                    return await self._ask(base_url, path, params, headers, exit_url)
                except _ExitFailedError as error:
                    exits.rest(exit_url, self._rests)
                    failed = error
        raise failed

    async def post(self, base_url: str, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """One POST, tried once. Raises as `get`."""
        return await self._ask(base_url, path, (), headers, body=body)

    async def _ask(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]],
        headers: Mapping[str, str] | None,
        exit_url: str | None = None,
        body: bytes | None = None,
    ) -> Answer:
        url = _usable(build_url(base_url, path, params))
        host = url.host
        sent = headers or {}
        if any(not value.isascii() or not value.isprintable() for value in sent.values()):
            raise CredentialError("the key holds a line break or another character that no HTTP header can carry")
        extensions = {} if exit_url is None else {_PROXY: exit_url}
        try:
            method = "GET" if body is None else "POST"
            request = httpx.Request(method, url, headers={**self._headers, **sent}, content=body, extensions=extensions)
            response = await self._transport.handle_async_request(request)
        except httpx.ProxyError as error:
            if exit_url is None:
                raise as_ours(error, host) from error
            raise _ExitFailedError(f"{host}: {_place(exit_url)} fails: {error}", maybe_sent=False) from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise as_ours(error, host) from error
        try:
            if response.is_success:
                limit = headers.body_bytes_max if isinstance(headers, Terms) else None
                return Answer(response.status_code, response.headers, await self._read(response, host, limit))
            if response.status_code == httpx.codes.NOT_MODIFIED and not _CONDITIONS.isdisjoint(sent):
                return Answer(response.status_code, response.headers, b"")
            refusal = await self._read_error(response)
        finally:
            await response.aclose()
        if exit_url is not None and response.status_code == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
            raise _ExitFailedError(f"{host}: {_place(exit_url)} refuses our credential", maybe_sent=False)
        failure = error_for(
            response.status_code,
            response.headers,
            refusal,
            [value.split()[-1] for value in sent.values() if value.strip()],
        )
        if isinstance(failure, TransientError):
            failure.args = (f"{host} {failure}",)
        raise failure

    async def _read(self, response: httpx.Response, host: str, limit: int | None) -> bytes:
        limit = min(limit or self._settings.body_bytes_max, self._settings.body_bytes_max)
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                chunks.append(chunk)
                if size > limit:
                    raise SchemaDriftError(f"{host}: the answer is larger than the limit of {limit} bytes", chunks[0])
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise as_ours(error, host) from error
        return b"".join(chunks)

    async def _read_error(self, response: httpx.Response) -> bytes:
        """The first bytes of a refusal. Its status counts even where the text is cut."""
        body = b""
        with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > ERROR_BODY_BYTES_MAX:
                    break
        return body


__all__ = [
    "AiohttpTransport",
    "Exits",
    "HttpClient",
    "HttpSettings",
    "Terms",
    "as_httpx",
    "as_ours",
    "build_url",
    "error_for",
    "retry_after_s",
    "ssl_context",
]
