"""The filters that lists of messages, log lines and dead letters share, from parameters."""

from __future__ import annotations

from daemon.domain.errors import UsageError
from daemon.queue.listing import Filter
from daemon.queue.message import MessageId
from daemon.web.v2.call import Call

MS_MAX = 1 << 53
COMMON = frozenset(
    {"url", "topicName", "scheduleId", "queueName", "label", "flowControlKey", "callerIp", "callerIP", "fromDate",
     "toDate", "qstash_token"}
)  # fmt: skip
PLACES = frozenset({"host", "path"})


def read_filter(call: Call, *ids: str) -> Filter:
    """Args:
    ids: the parameters that name messages.
    """
    if call.method != "GET":
        _check_filled(call)
    return Filter(
        ids=message_ids(call.values(*ids)) if ids and any(name in call.parameters for name in ids) else None,
        urls=tuple(call.exact_values("url")),
        hosts=tuple(call.values("host")),
        paths=tuple(call.exact_values("path")),
        topics=tuple(call.values("topicName")),
        schedules=tuple(call.values("scheduleId")),
        queues=tuple(call.values("queueName")),
        labels=tuple(call.values("label")),
        flow_keys=tuple(call.exact_values("flowControlKey")),
        caller_ips=tuple(call.values("callerIp", "callerIP")),
        from_ms=call.number("fromDate", 0, MS_MAX),
        to_ms=call.number("toDate", 0, MS_MAX),
    )


def _check_filled(call: Call) -> None:
    """Who cancels or deletes by an empty filter, such as a variable that was never set, does not mean everything."""
    for name in call.parameters.keys() & (COMMON | PLACES | {"responseStatus"}):
        if not call.values(name):
            raise UsageError(name, "is empty", "give a value, or leave it out")


def is_any(wanted: Filter) -> bool:
    """Whether nothing was asked for in particular."""
    return wanted == Filter()


def message_ids(texts: list[str]) -> tuple[MessageId, ...]:
    """Those of them that could be ids at all; the others name nothing."""
    return tuple(id_ for text in texts if (id_ := MessageId.parse(text)) is not None)


def cursor_in(call: Call) -> str | None:
    cursor = call.value("cursor")
    if cursor is not None and len(cursor) > 200:
        raise UsageError("cursor", "is not one that this list has given", "leave it out to begin with the newest")
    return cursor
