"""The signed routes under `/api`: read a bounded body, prove the signature, do it, answer.

What an answer asks of QStash: 200 done; 400 and 413 never to try again; 401, 408 and 503 to try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from uuid import uuid4

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from daemon.domain.errors import DaemonError, SignatureError, TransientError, UsageError
from daemon.queue.qstash import CALLBACK_PATH, FAILURE_PATH, WORKER_PATH
from daemon.telemetry import metrics
from daemon.telemetry.traces import span
from daemon.triggers.qstash import (
    ORCHESTRATE_PATH,
    QUOTA_PATH,
    QUOTA_PATH_ALIAS,
    SKEW_S,
    Deliveries,
    Door,
    message_id,
)

RETRY_AFTER_S = 15
ANSWER_S = 10.0
"""The work of a delivery is one short transaction; a database that takes longer is not there."""
DISCARD_RATIO = 4
"""A body that is too large is read on for so many times its limit, so that its sender gets to read our answer."""
ID_CHARS_MAX = 200

log = structlog.get_logger()

Routes = list[BaseRoute]
_BY_THE_HUNDRED = frozenset({WORKER_PATH, CALLBACK_PATH, FAILURE_PATH})
"""Each tick brings so many of these."""

Action = Callable[[bytes, str, str], Awaitable[Mapping[str, object]]]
"""(body, message id, request id) to the fields of the answer."""


@dataclass(frozen=True, slots=True)
class DeliverySettings:
    """Bounds of one delivery: its body, and how long the body may take to arrive."""

    body_bytes_max: int = 1 << 20
    body_s: float = 10.0


class _Refused(Exception):  # noqa: N818 - an answer, not an error of ours
    def __init__(self, status: int, reason: str, **headers: str) -> None:
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(reason)


def delivery_routes(door: Door, deliveries: Deliveries, settings: DeliverySettings | None = None) -> Routes:
    """`POST` only; without signing keys each answers 503, since nobody could be let in."""
    actions: dict[str, Action] = {
        ORCHESTRATE_PATH: deliveries.orchestrate,
        WORKER_PATH: deliveries.release,
        CALLBACK_PATH: deliveries.callback,
        FAILURE_PATH: deliveries.failure,
        QUOTA_PATH: deliveries.sync_quotas,
        QUOTA_PATH_ALIAS: deliveries.sync_quotas,
    }
    limits = settings or DeliverySettings()
    return [_route(path, action, door, limits) for path, action in actions.items()]


def _route(path: str, action: Action, door: Door, limits: DeliverySettings) -> Route:
    accepted = metrics.DELIVERIES.labels(path, "200")
    seconds = metrics.DELIVERY_SECONDS.labels(path)

    async def answer(request: Request) -> Response:
        began = perf_counter()
        headers_in = dict(request.headers)  # looked at often, and Starlette's search anew each time
        request_id = _request_id(headers_in)
        trace = span(
            "delivery",
            parent=headers_in.get("traceparent"),
            kind="server",
            http__route=path,
            tallyd__request__id=request_id,
        )
        with structlog.contextvars.bound_contextvars(request_id=request_id), trace:
            try:
                fields = await _act(request, headers_in, path, action, door, limits, request_id)
            except _Refused as refusal:
                log.warning(
                    "delivery.refused",
                    route=path,
                    status=refusal.status,
                    reason=str(refusal),
                    duration_s=round(perf_counter() - began, 4),
                )
                status, headers = refusal.status, refusal.headers
                metrics.DELIVERIES.labels(path, str(status)).inc()
                fields = {"error": str(refusal)}
            else:
                status, headers = 200, {}
                accepted.inc()
                level = log.debug if path in _BY_THE_HUNDRED else log.info
                level("delivery.accepted", route=path, duration_s=round(perf_counter() - began, 4), **fields)
            trace.set(http__response__status_code=status)
        seconds.observe(perf_counter() - began)
        return json_response(fields, status, {**headers, "X-Request-Id": request_id})

    return Route(path, answer, methods=["POST"])


async def _act(
    request: Request,
    headers: Mapping[str, str],
    path: str,
    action: Action,
    door: Door,
    limits: DeliverySettings,
    request_id: str,
) -> Mapping[str, object]:
    """Turn whatever can go wrong into the answer that makes QStash do the right thing."""
    if not door.is_open:
        raise _Refused(
            503,
            "no signing keys are configured; set QSTASH_CURRENT_SIGNING_KEY, QSTASH_NEXT_SIGNING_KEY and "
            "TALLYD_PUBLIC_URL",
            Retry_After="300",
        )
    try:
        body = await _body(request, headers, limits)
        await door.verify(path, body, headers)
        async with asyncio.timeout(ANSWER_S + SKEW_S):
            return await action(body, message_id(headers), request_id)
    except TimeoutError as error:
        raise _Refused(503, "the database is slow; what was begun is undone", Retry_After=str(RETRY_AFTER_S)) from error
    except SignatureError as error:
        raise _Refused(401, str(error)) from error
    except UsageError as error:
        raise _Refused(400, str(error), Upstash_NonRetryable_Error="true") from error
    except TransientError as error:
        wait_s = RETRY_AFTER_S if error.retry_after_s is None else max(1, round(error.retry_after_s))
        raise _Refused(503, str(error), Retry_After=str(wait_s)) from error
    except DaemonError as error:
        log.exception("delivery.crashed", route=path)
        raise _Refused(500, "tallyd failed at it; its log has more") from error
    except ClientDisconnect as error:
        raise _Refused(400, "the sender went away before its body was whole") from error
    except _Refused:
        raise
    except Exception as error:
        log.exception("delivery.crashed", route=path)
        raise _Refused(500, "this is a defect of tallyd; its log has more") from error


async def _body(request: Request, headers: Mapping[str, str], limits: DeliverySettings) -> bytes:
    body = bytearray()
    received = 0
    most = limits.body_bytes_max
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > DISCARD_RATIO * most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(limits.body_s):  # on each delivery, and a third of the cost of anyio's
            async for chunk in request.stream():
                received += len(chunk)
                if received <= most:
                    body += chunk
                elif received > DISCARD_RATIO * most:
                    break
    except TimeoutError as error:
        reason = f"the body did not arrive within {limits.body_s:g} s"
        raise _Refused(408, reason, Connection="close") from error
    if received > most:
        raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> _Refused:
    reason = f"the body is larger than {most} bytes"
    return _Refused(413, reason, Upstash_NonRetryable_Error="true", Connection="close")


def _request_id(headers: Mapping[str, str]) -> str:
    """What the sender calls its request, if it can be printed, else a new id."""
    given = headers.get("upstash-message-id") or headers.get("x-request-id") or ""
    return given if given.isascii() and given.isprintable() and 0 < len(given) <= ID_CHARS_MAX else uuid4().hex


def json_response(
    fields: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer that no cache keeps."""
    return Response(
        msgspec.json.encode(fields),
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        media_type="application/json",
    )
