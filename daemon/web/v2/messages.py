"""`/v2/messages`: looking at a message that is under way, and cancelling it, or many."""

from __future__ import annotations

import msgspec

from daemon.domain.errors import UsageError
from daemon.queue.message import MessageId
from daemon.web.v2.call import JSON_BYTES_MAX, Answer, Call, NotFound, parsed, segment
from daemon.web.v2.filters import COMMON, PLACES, is_any, message_ids, read_filter
from daemon.web.v2.shapes import message_shown

COUNT_MAX = 500
_KNOWN = COMMON | PLACES | {"messageIds", "messageId", "count", "cursor"}


class _Ids(msgspec.Struct, rename="camel"):
    message_ids: list[str] | None = None


async def get(call: Call) -> Answer:
    """`GET /v2/messages/{id}`; one that has ended is shown for ten minutes more."""
    id_ = _id(call)
    stored = await call.services.pending.get(call.account.id, id_)
    if stored is None:
        raise NotFound(f"message {id_}")
    return Answer(message_shown(stored.message, stored.body))


async def delete(call: Call) -> Answer:
    """`DELETE /v2/messages/{id}` cancels one; `DELETE /v2/messages` those that are named, or that match, or all."""
    if call.rest:
        id_ = _id(call)
        cancelled = await call.services.pending.cancel(call.account.id, [id_])
        if not cancelled and await call.services.pending.get(call.account.id, id_) is None:
            raise NotFound(f"message {id_}")
        return Answer({"cancelled": cancelled})
    call.check_parameters(_KNOWN)
    text = await call.read(JSON_BYTES_MAX)
    named = parsed(text, _Ids).message_ids if text.strip() else None
    wanted = read_filter(call, "messageIds", "messageId")
    if named is not None or wanted.ids is not None:
        ids = [*message_ids(named or []), *(wanted.ids or ())]
        return Answer({"cancelled": await call.services.pending.cancel(call.account.id, ids)})
    if text.strip() and is_any(wanted):
        raise UsageError("messageIds", "is missing in the body", "name messages; an empty body means all")
    count = call.number("count", 1, COUNT_MAX)
    return Answer({"cancelled": await call.services.pending.cancel_matching(call.account.id, wanted, count)})


def _id(call: Call) -> MessageId:
    text = segment(call.rest, "messageId")
    id_ = MessageId.parse(text)
    if id_ is None:
        raise NotFound(f"message {text[:80]}")
    return id_


METHODS = {"GET": get, "DELETE": delete}
