"""`/v2/logs`, and `/v2/events` as the SDKs call it: what happened to messages, newest first."""

from __future__ import annotations

import base64

from daemon.domain.errors import UsageError
from daemon.queue.logs import IN_PROGRESS, LogFilter, LogLine
from daemon.queue.message import ms
from daemon.queue.messages import State
from daemon.web.v2.call import Answer, Call, NotFound
from daemon.web.v2.filters import COMMON, PLACES, cursor_in, read_filter
from daemon.web.v2.shapes import Shown, callback_header, flow_shown, labels_shown, present, redaction_of

COUNT = 100
COUNT_MAX = 1_000
GROUPS = 10
GROUPS_MAX = 100
_KNOWN = COMMON | PLACES | {"messageId", "messageIds", "state", "count", "cursor", "groupBy", "trimBody", "order"}


async def events(call: Call) -> Answer:
    """`GET /v2/events`."""
    return await _page(call, "events")


async def logs(call: Call) -> Answer:
    """`GET /v2/logs`."""
    return await _page(call, "logs")


async def _page(call: Call, key: str) -> Answer:
    if call.rest:
        raise NotFound("this path was")
    call.check_parameters(_KNOWN)
    wanted = LogFilter(read_filter(call, "messageId", "messageIds"), _states(call.values("state")))
    cursor, body_bytes = cursor_in(call), call.number("trimBody", 0, 1 << 40)
    account, log = call.account.id, call.services.logs
    if (group_by := call.value("groupBy")) is not None:
        if group_by != "messageId":
            raise UsageError("groupBy", f"is {group_by[:40]!r}", "only messageId is known")
        count = call.number("count", 1, GROUPS_MAX) or GROUPS
        groups, next_ = await log.grouped(account, wanted, cursor, count, body_bytes=body_bytes)
        shown = [{"messageId": str(group.id), "events": [_shown(line) for line in group.lines]} for group in groups]
        return Answer({"messages": shown} | present({"cursor": next_}))
    count = call.number("count", 1, COUNT_MAX) or COUNT
    lines, next_ = await log.page(account, wanted, cursor, count, body_bytes=body_bytes)
    return Answer({key: [_shown(line) for line in lines]} | present({"cursor": next_}))


def _states(texts: list[str]) -> tuple[State, ...]:
    found: list[State] = []
    for text in texts:
        name = text.upper().replace("CANCELLED", "CANCELED")
        if name == "IN_PROGRESS":
            found += IN_PROGRESS
        elif name in State.__members__:
            found.append(State[name])
        else:
            raise UsageError("state", f"is {text[:40]!r}", f"choose of {', '.join(State.__members__)}, IN_PROGRESS")
    return tuple(dict.fromkeys(found))


def _shown(line: LogLine) -> Shown:
    message, spec = line.message, line.message.spec
    redaction = redaction_of(spec)
    return {
        "time": ms(line.at),
        "messageId": str(message.id),
        "state": line.state.name,
        "url": message.url,
        "method": spec.method,
        "maxRetries": spec.retries,
        **present(
            {
                "error": line.error,
                "nextDeliveryTime": None if line.next_at is None else ms(line.next_at),
                "topicName": message.topic,
                "endpointName": spec.endpoint,
                "queueName": message.queue,
                "scheduleId": message.schedule,
                "header": redaction.of_headers(spec.header),
                "body": _base64(redaction.of_body(line.body)),
                "responseStatus": line.status,
                "responseBody": _base64(line.response_body),
                # The SDKs read one name, the documentation has the other.
                "responseHeader": line.response_header,
                "responseHeaders": line.response_header,
                "timeout": None if spec.timeout_s is None else spec.timeout_s * 1000,
                "callback": spec.callback and spec.callback.url,
                "callbackHeaders": callback_header(spec.callback, redaction),
                "failureCallback": spec.failure_callback and spec.failure_callback.url,
                "failureCallbackHeaders": callback_header(spec.failure_callback, redaction),
                "retryDelayExpr": spec.retry_delay,
                "retryDelayExpression": spec.retry_delay,
            }
        ),
        **flow_shown(spec),
        **labels_shown(message.labels),
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
