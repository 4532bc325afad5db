"""Who calls, what they may, where it goes, and what an error looks like: everything before and after a resource.

The destination of a message is a part of the path and must arrive as it was sent, so that requests are routed by their raw
target and not by a framework, which would decode it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from secrets import token_hex
from time import perf_counter
from typing import Any

import msgspec
import structlog

from daemon.domain.errors import (
    ConfigError,
    CredentialError,
    DaemonError,
    DataRejectedError,
    QuotaError,
    TransientError,
    UsageError,
)
from daemon.queue.budget import ByteBudget
from daemon.telemetry import metrics
from daemon.telemetry.traces import span
from daemon.web.v2 import dlq, flow, keys, logs, messages, publish, queues, schedules, topics
from daemon.web.v2.call import SETTING_PREFIX, TOKEN_PARAMETER, Answer, Call, NotFound, Refusal, pairs
from daemon.web.v2.services import Services

PREFIX = "/v2/"
BODY_S = 30.0
BODY_BYTES_S = 64 << 10
"""A body has `BODY_S` to arrive, and this much more time the larger it may be."""
ROOM_S = 30.0
"""How long to wait until other bodies have left room for one."""
COPIES = 4
"""Of a body on its way into the database, each in memory at the same time: as received, as one, as parsed, as sent."""
SMALL_BYTES = 16 << 10
"""What is not larger needs no room of its own: the connection has buffered it already."""
RETRY_AFTER_S = "5"

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
Resource = Callable[[Call], Awaitable[Answer]]

RESOURCES: dict[str, Mapping[str, Resource]] = {
    "publish": {"POST": publish.publish},
    "enqueue": {"POST": publish.enqueue},
    "batch": {"POST": publish.batch},
    "messages": messages.METHODS,
    "queues": queues.METHODS,
    "schedules": schedules.METHODS,
    "topics": topics.METHODS,
    "dlq": dlq.METHODS,
    "events": {"GET": logs.events},
    "logs": {"GET": logs.logs},
    "flowControl": flow.METHODS,
    "globalParallelism": {"GET": flow.whole},
    "keys": keys.METHODS,
}
"""By the first piece of the path; what follows is the resource's own business."""

_ALSO_WITH_SLASH = frozenset({("queues", "POST"), ("publish", "POST"), ("enqueue", "POST"), ("schedules", "POST")})
"""Queues as the documentation has them; the others say themselves that a destination is missing."""
_OURS = frozenset({"authorization", "content-type"})

log = structlog.get_logger()


class V2:
    """An ASGI application. `bytes_max` bounds what bodies in flight hold in memory, all together."""

    def __init__(self, services: Services, *, bytes_max: int) -> None:
        self._services = services
        self.budget = ByteBudget(bytes_max)
        self._counters: dict[tuple[str, int], Any] = {}
        self._seconds = {name: metrics.API_SECONDS.labels(name) for name in [*RESOURCES, "unknown"]}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        resource, slash, rest = _path(scope)[len(PREFIX) :].partition("/")
        known = resource if resource in RESOURCES else "unknown"
        # Not bound for all that is logged on the way, which would cost more than most requests log.
        request_id = token_hex(8)
        headers: Mapping[str, str] = {}
        with span("api", kind="server", http__route=PREFIX + known, tallyd__request__id=request_id) as trace:
            try:
                answer = await self._answer(scope, receive, resource, rest if rest or not slash else None, request_id)
                status, body = answer.status, b"" if answer.body is None else _encode(answer.body)
            except Refusal as refusal:
                status, headers, body = refusal.status, refusal.headers, _encode({"error": str(refusal)})
                log.info(
                    "api.refused", route=PREFIX + known, status=status, reason=str(refusal), request_id=request_id
                )  # fmt: skip
            trace.set(http__response__status_code=status)
        self._count(known, status, perf_counter() - began)
        await _respond(send, status, request_id, headers, body)

    def _count(self, resource: str, status: int, seconds: float) -> None:
        counter = self._counters.get((resource, status))
        if counter is None:
            counter = metrics.API_REQUESTS.labels(resource, str(status))
            self._counters[resource, status] = counter  # looking it up by its labels takes longer than counting
        counter.inc()
        self._seconds[resource].observe(seconds)

    async def _answer(self, scope: Scope, receive: Receive, resource: str, rest: str | None, request_id: str) -> Answer:
        """Turn whatever can go wrong into a Refusal.

        Args:
            rest: of the path; None where it ends with the slash behind the resource's name.
        """
        try:
            methods = RESOURCES.get(resource)
            if methods is None:
                raise NotFound("this path was")
            method = scope["method"]
            if method not in methods:
                raise Refusal(
                    405, f"{method} does not go with {PREFIX}{resource}", {"Allow": ", ".join(sorted(methods))}
                )
            if rest is None and (resource, method) not in _ALSO_WITH_SLASH:
                # Somebody's id or name was empty: never take that for all there are.
                raise Refusal(400, f"what follows {PREFIX}{resource}/ in the path is empty; name it, or drop the slash")
            headers = _headers(scope)
            query = _query(scope)
            token = _token(headers, query)
            caller = await self._services.accounts.authenticate(token) if token else None
            if caller is None:
                raise Refusal(401, "unable to authenticate: invalid token")
            if caller.is_read_only and method != "GET":
                raise Refusal(403, "this token may only read; use another one")
            client = scope.get("client")
            body = _Body(receive, headers, self.budget, is_whole=scope.get("is_whole", False))
            try:
                call = Call(
                    self._services,
                    caller.account,
                    method,
                    rest or "",
                    query,
                    headers,
                    client[0] if client else None,
                    body.read,
                    caller.is_read_only,
                )
                return await methods[method](call)
            finally:
                await body.release()
        except Refusal:
            raise
        except QuotaError as error:
            raise Refusal(412, str(error)) from error
        except UsageError as error:
            raise Refusal(400, str(error)) from error
        except DataRejectedError as error:
            raise Refusal(400, f"the database cannot hold this: {error}") from error
        except TransientError as error:
            log.warning("api.unavailable", reason=str(error), request_id=request_id)
            raise Refusal(503, "the database is away; try again", {"Retry-After": RETRY_AFTER_S}) from error
        except (ConfigError, CredentialError) as error:
            log.error("api.unavailable", reason=str(error), request_id=request_id)  # noqa: TRY400 - it is told
            problem = "this process cannot open the account's signing keys; its log says which secret key is missing"
            raise Refusal(503, problem, {"Retry-After": RETRY_AFTER_S}) from error
        except DaemonError as error:
            log.exception("api.crashed", route=PREFIX + resource[:40], request_id=request_id)
            raise Refusal(500, "tallyd failed at it; its log has more") from error
        except Exception as error:
            log.exception("api.crashed", route=PREFIX + resource[:40], request_id=request_id)
            raise Refusal(500, "this is a defect of tallyd; its log has more") from error


class _Body:
    """The body of a request, read at most once, and its share of what all bodies may hold.

    Args:
        is_whole: all of it has arrived already.
    """

    def __init__(self, receive: Receive, headers: list[tuple[str, str]], budget: ByteBudget, *, is_whole: bool) -> None:
        self._receive = receive
        self._is_whole = is_whole
        self._headers = headers
        self._budget = budget
        self._hold: AbstractAsyncContextManager[None] | None = None

    async def release(self) -> None:
        """Let others have its room: it is forgotten by now."""
        if self._hold is not None:
            hold, self._hold = self._hold, None
            await hold.__aexit__(None, None, None)

    async def read(self, bytes_max: int) -> bytes:
        """Raises Refusal: 413 for a body that is larger, without reading it; 408 for one that does not come; 503 where
        there is no room for it.
        """
        declared = self._declared()
        if declared is not None and declared > bytes_max:
            raise _too_large(bytes_max)
        if declared == 0:
            return b""
        needed = bytes_max if declared is None else declared
        if needed > SMALL_BYTES:
            await self._make_room(needed * COPIES)
        if self._is_whole:
            return await self._read(bytes_max)
        most_s = BODY_S + needed / BODY_BYTES_S
        try:
            async with asyncio.timeout(most_s):
                return await self._read(bytes_max)
        except TimeoutError as error:
            raise Refusal(408, f"the body did not arrive within {most_s:.0f} s", {"Connection": "close"}) from error

    def _declared(self) -> int | None:
        """How long it is; None: only its end will tell."""
        length, is_chunked = 0, False
        for name, value in self._headers:
            if name == "content-length":
                length = int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else 1 << 62
            elif name == "transfer-encoding":
                is_chunked = True
        return None if is_chunked else length

    async def _make_room(self, needed: int) -> None:
        hold = self._budget.hold(needed)
        try:
            async with asyncio.timeout(ROOM_S):
                await hold.__aenter__()
        except TimeoutError as error:
            raise Refusal(
                503, "too many large bodies are under way; try again", {"Retry-After": RETRY_AFTER_S}
            ) from error
        self._hold = hold

    async def _read(self, bytes_max: int) -> bytes:
        message = await self._receive()
        body = message.get("body", b"")
        if message.get("more_body") or message["type"] == "http.disconnect":
            body = bytearray(body)
            while message.get("more_body"):
                message = await self._receive()
                body += message.get("body", b"")
                if len(body) > bytes_max:
                    raise _too_large(bytes_max)
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the sender went away before its body was whole")
        if len(body) > bytes_max:
            raise _too_large(bytes_max)
        return bytes(body)


def _too_large(bytes_max: int) -> Refusal:
    return Refusal(413, f"body: quota maxMessageSize exceeded, current limit: {bytes_max}")


def _path(scope: Scope) -> str:
    return str(scope["raw_path"].decode("ascii"))


def _query(scope: Scope) -> str | None:
    """As it was sent. uvicorn does not tell an empty one from none; the target does."""
    query: bytes = scope["query_string"]
    if not query and not scope.get("target", b"").partition(b"#")[0].endswith(b"?"):
        return None
    try:
        return query.decode("ascii")
    except UnicodeDecodeError as error:
        raise UsageError("query", "holds bytes that are no ASCII", "percent-encode them") from error


def _headers(scope: Scope) -> list[tuple[str, str]]:
    """Names in lower case. What others put on the way may be Latin-1; what is meant for us is UTF-8."""
    found = []
    for name, value in scope["headers"]:
        try:
            found.append((name.decode("ascii"), value.decode("utf-8")))
        except UnicodeDecodeError as error:
            shown = name.decode("ascii", "replace")
            if shown.startswith(SETTING_PREFIX) or shown in _OURS or not name.isascii():
                raise UsageError(shown[:80], "holds bytes that are no UTF-8", "encode it as UTF-8") from error
            found.append((shown, value.decode("latin-1")))
    return found


def _token(headers: list[tuple[str, str]], query: str | None) -> str:
    for name, value in headers:
        if name == "authorization":
            kind, _, token = value.partition(" ")
            return token.strip() if kind.lower() == "bearer" else ""
    if query:
        for name, value in pairs(query):
            if name == TOKEN_PARAMETER:
                return value
    return ""


def _encode(body: object) -> bytes:
    return msgspec.json.encode(body)


async def _respond(send: Send, status: int, request_id: str, headers: Mapping[str, str], body: bytes) -> None:
    lines = [
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id.encode()),
    ]
    if body:
        lines.append((b"content-type", b"application/json"))
    if headers:
        lines += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})
