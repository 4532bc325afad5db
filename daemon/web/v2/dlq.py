"""`/v2/dlq`: messages that failed for good."""

from __future__ import annotations

import msgspec

from daemon.domain.errors import UsageError
from daemon.queue.letters import Letter, LetterFilter, NoSuchLetterError
from daemon.queue.message import Published
from daemon.web.v2.call import JSON_BYTES_MAX, Answer, Call, NotFound, parsed, segment
from daemon.web.v2.drafts import read_changes
from daemon.web.v2.filters import COMMON, cursor_in, is_any, read_filter
from daemon.web.v2.shapes import Shown, body_shown, message_shown, present

COUNT_MAX = 100
_KNOWN = COMMON | {"messageId", "responseStatus", "dlqIds", "count", "cursor", "trimBody", "order"}
_RETRY = "retry"


class _Ids(msgspec.Struct, rename="camel"):
    dlq_ids: list[str] | None = None


async def get(call: Call) -> Answer:
    """`GET /v2/dlq`, `GET /v2/dlq/{id}`."""
    letters, account = call.services.letters, call.account.id
    if call.rest:
        name = segment(call.rest, "dlqId")
        letter = await letters.get(account, name)
        if letter is None:
            raise NotFound(f"dlq message {name[:80]}")
        return Answer(_shown(letter))
    call.check_parameters(_KNOWN)
    if "dlqIds" in call.parameters:
        return Answer({"messages": [_shown(one) for one in await letters.these(account, call.values("dlqIds"))]})
    found, next_ = await letters.page(account, _filter(call), cursor_in(call), _count(call))
    return Answer({"messages": [_shown(letter) for letter in found]} | present({"cursor": next_}))


async def delete(call: Call) -> Answer:
    """`DELETE /v2/dlq/{id}`; `DELETE /v2/dlq` those that are named, or that match."""
    letters, account = call.services.letters, call.account.id
    if call.rest:
        name = segment(call.rest, "dlqId")
        if not await letters.drop(account, [name]):
            raise NotFound(f"dlq message {name[:80]}")
        return Answer({"deleted": 1})
    names = await _names(call)
    if names is not None:
        return Answer({"deleted": await letters.drop(account, names)})
    deleted, next_ = await letters.drop_matching(account, _filter(call), cursor_in(call), _count(call))
    return Answer({"deleted": deleted} | present({"cursor": next_}))


async def post(call: Call) -> Answer:
    """`POST /v2/dlq/retry/{id}`; `POST /v2/dlq/retry` those that are named, or that match: each under a new id."""
    verb, slash, rest = call.rest.partition("/")
    if verb != _RETRY:
        raise NotFound("this path was")
    letters, account = call.services.letters, call.account.id
    changes = read_changes(call.headers, call.limits)
    try:
        if slash:
            made = await letters.retry(account, [segment(rest, "dlqId")], call.limits, changes)
            return Answer(_made(made[0]), 201)
        names = await _names(call)
        if names is not None:
            made = await letters.retry(account, names, call.limits, changes)
            return Answer({"responses": [_made(one) for one in made]}, 201)
    except NoSuchLetterError as error:
        raise NotFound(f"dlq message {', '.join(error.names)[:200]}") from error
    made, next_ = await letters.retry_matching(
        account, _filter(call), call.limits, cursor_in(call), _count(call), changes
    )
    return Answer({"responses": [_made(one) for one in made]} | present({"cursor": next_}), 201)


async def _names(call: Call) -> list[str] | None:
    """The letters that are named, in the body or by parameters; None: none are, and filters count."""
    call.check_parameters(_KNOWN)
    text = await call.read(JSON_BYTES_MAX)
    named = parsed(text, _Ids).dlq_ids if text.strip() else None
    if named is None and "dlqIds" not in call.parameters:
        if text.strip() and is_any(read_filter(call, "messageId")):
            raise UsageError("dlqIds", "is missing in the body", "name dead letters, or give filters as parameters")
        return None
    return [*(named or []), *call.values("dlqIds")]


def _filter(call: Call) -> LetterFilter:
    statuses = []
    for text in call.values("responseStatus"):
        if not (text.isascii() and text.isdecimal() and len(text) < 6):
            raise UsageError("responseStatus", f"is {text[:40]!r}", "give an HTTP status")
        statuses.append(int(text))
    return LetterFilter(read_filter(call, "messageId"), tuple(statuses))


def _count(call: Call) -> int:
    return call.number("count", 1, COUNT_MAX) or COUNT_MAX


def _made(one: Published) -> Shown:
    return {"messageId": str(one.id), "url": one.url}


def _shown(letter: Letter) -> Shown:
    return {
        **message_shown(letter.message, letter.body),
        "dlqId": letter.id,
        "responseStatus": letter.status,
        **present({"responseHeader": letter.response_header, "error": letter.error}),
        **body_shown(letter.response_body, "responseBody"),
    }


METHODS = {"GET": get, "DELETE": delete, "POST": post}
