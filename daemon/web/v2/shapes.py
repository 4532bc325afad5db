"""How messages look in answers. What is empty is left out; what is redacted shows as its hash."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from daemon.domain.redaction import Redaction, parse_redaction
from daemon.queue.callbacks import NOTHING
from daemon.queue.message import Callback, Headers, Message, Spec, ms

Shown = dict[str, Any]


def present(fields: Mapping[str, Any]) -> Shown:
    """Without what is None, empty, or an empty list or map. 0 and false stay."""
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


def redaction_of(spec: Spec) -> Redaction:
    return parse_redaction(spec.redact) if spec.redact else NOTHING


def message_shown(message: Message, body: bytes | None) -> Shown:
    """The Message object; `body` None when it is not to be shown."""
    spec = message.spec
    redaction = redaction_of(spec)
    return {
        "messageId": str(message.id),
        "url": message.url,
        "method": spec.method,
        "maxRetries": spec.retries,
        "notBefore": ms(message.not_before),
        "createdAt": ms(message.created_at),
        **present(
            {
                "topicName": message.topic,
                "endpointName": spec.endpoint,
                "queueName": message.queue,
                "scheduleId": message.schedule,
                "callerIP": message.caller_ip,
            }
        ),
        **spec_shown(spec, redaction),
        **labels_shown(message.labels),
        **({} if body is None else body_shown(redaction.of_body(body))),
    }


def spec_shown(spec: Spec, redaction: Redaction) -> Shown:
    """What messages, schedules and dead letters have in common."""
    return present(
        {
            "header": redaction.of_headers(spec.header),
            "callback": spec.callback and spec.callback.url,
            "failureCallback": spec.failure_callback and spec.failure_callback.url,
            "callbackHeader": callback_header(spec.callback, redaction),
            "failureCallbackHeader": callback_header(spec.failure_callback, redaction),
            "retryDelayExpression": spec.retry_delay,
            "timeout": spec.timeout_s,
        }
    ) | flow_shown(spec)


def flow_shown(spec: Spec) -> Shown:
    """With flow control the period is always there, the others as they were given."""
    if spec.flow is None:
        return {}
    key, parallelism, rate, period_s = spec.flow
    return present({"flowControlKey": key, "parallelism": parallelism, "rate": rate, "period": period_s})


def labels_shown(labels: tuple[str, ...]) -> Shown:
    return {"label": labels[0], "labels": list(labels)} if labels else {}


def body_shown(body: bytes, name: str = "body") -> Shown:
    """As text where it is UTF-8, else as base64 under another name; nothing where it is empty."""
    if not body:
        return {}
    try:
        return {name: body.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{name}Base64": base64.b64encode(body).decode()}


def callback_header(callback: Callback | None, redaction: Redaction) -> Headers | None:
    """What a callback carries: it may be as secret as the message's own."""
    return None if callback is None else redaction.of_headers(callback.header)
