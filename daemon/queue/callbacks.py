"""What is reported of an attempt, and to whom: callbacks are messages of their own."""

from __future__ import annotations

import base64
from datetime import datetime

import msgspec

from daemon.domain.redaction import Redaction, parse_redaction
from daemon.queue.message import Attempted, Callback, Headers, Message, Publication, Spec, dead_name, ms

NOTHING = Redaction(body=False, all_headers=False, headers=frozenset())

_encode = msgspec.json.Encoder().encode


class _Report(msgspec.Struct, omit_defaults=True, rename="camel"):
    """The body of a callback. Times are Unix milliseconds, bodies base64; what is empty is left out."""

    status: int
    source_message_id: str
    url: str
    method: str
    max_retries: int
    not_before: int
    created_at: int
    header: Headers = {}
    body: str = ""
    retried: int = 0
    dlq_id: str = ""
    topic_name: str = ""
    endpoint_name: str = ""
    schedule_id: str = ""
    source_header: Headers = {}
    source_body: str = ""
    caller_ip: str = msgspec.field(default="", name="callerIP")


def callbacks_of(
    message: Message,
    body: bytes,
    attempted: Attempted,
    retried: int,
    *,
    died_at: datetime | None,
    timeout_s: int | None = None,
) -> list[Publication]:
    """The callback of an attempt, and the failure callback where it was the last.

    Args:
        body: of the message.
        retried: 0 for the first attempt.
        died_at: when the message became a dead letter; None: it did not.
        timeout_s: of an attempt to deliver the callback, where neither it nor the message says.
    """
    spec = message.spec
    if message.source is not None:
        return []  # a callback has none itself
    wanted = [spec.callback, spec.failure_callback if died_at is not None else None]
    if not any(wanted):
        return []
    redaction = parse_redaction(spec.redact) if spec.redact else NOTHING
    report = _Report(
        status=attempted.status,
        source_message_id=str(message.id),
        url=message.url,
        method=spec.method,
        max_retries=spec.retries,
        not_before=ms(message.not_before),
        created_at=ms(message.created_at),
        header=attempted.header,
        body=_base64(attempted.body),
        retried=retried,
        topic_name=message.topic or "",
        endpoint_name=spec.endpoint or "",
        schedule_id=message.schedule or "",
        source_header=redaction.of_headers(spec.header),
        source_body=_base64(redaction.of_body(body)),
        caller_ip=message.caller_ip or "",
    )
    made = []
    for callback, is_failure in zip(wanted, (False, True), strict=True):
        if callback is not None:
            report.dlq_id = dead_name(died_at, message.id.job) if is_failure and died_at is not None else ""
            made.append(_publication(message, callback, _encode(report), timeout_s))
    return made


def _publication(message: Message, callback: Callback, body: bytes, timeout_s: int | None) -> Publication:
    spec = message.spec
    follows = callback.retries is None  # then its whole rhythm is the message's
    return Publication(
        message.account,
        callback.url,
        Spec(
            method=callback.method,
            header={"Content-Type": ["application/json"], **callback.header},
            retries=spec.retries if callback.retries is None else callback.retries,
            retry_delay=callback.retry_delay or (spec.retry_delay if follows else None),
            timeout_s=callback.timeout_s or spec.timeout_s or timeout_s,
            delay_s=callback.delay_s,
            redact=spec.redact,  # what it carries may be as secret
        ),
        body,
        labels=message.labels,
        caller_ip=message.caller_ip,
        source=message.id.job,
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
