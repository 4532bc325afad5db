"""`/v2/publish`, `/v2/enqueue`, `/v2/batch`, and the making of a schedule: whatever names a destination in its path."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import anyio
import msgspec

from daemon.domain.account import Limits
from daemon.domain.destination import Destination
from daemon.domain.errors import PermanentError, UsageError
from daemon.queue.groups import Endpoint, Group
from daemon.queue.message import Publication, Published
from daemon.web.v2.call import Answer, Call, Refusal, pairs, parsed
from daemon.web.v2.drafts import Draft, check_name, destination, read_draft, without_settings
from daemon.web.v2.services import Services

BATCH_MAX = 10_000
CHECKS_AT_ONCE = 32
CHECKS_S = 20.0
_DESTINATION = "invalid destination url"
"""QStash's own words."""
_NO_SCHEME = "endpoint has invalid scheme, add http:// or https://"
_SCHEME = re.compile(r"https?:/", re.ASCII | re.IGNORECASE)
_MERGED = re.compile(r"(https?:/)(?!/)", re.ASCII | re.IGNORECASE)


_Urls = dict[str, tuple[str, Destination]]
"""By host: what names it in the request, and a URL of it."""


class _Item(msgspec.Struct, forbid_unknown_fields=True):
    """One element of a batch."""

    destination: str
    headers: Mapping[str, str] | None = None
    body: str | None = None
    queue: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """A publish as it was asked for: a URL, or the name of a group."""

    target: str
    headers: Sequence[tuple[str, str]]
    query: Sequence[tuple[str, str]]
    body: bytes
    queue: str | None = None

    @property
    def is_url(self) -> bool:
        return _SCHEME.match(self.target) is not None


async def publish(call: Call) -> Answer:
    """`POST /v2/publish/{destination}`. With a cron it makes a schedule instead."""
    target = target_of(call)
    if any(name == "upstash-cron" for name, _ in [*call.headers, *_settings(call)]):
        return await put_schedule(call)
    return await _publish_one(call, target, None)


async def enqueue(call: Call) -> Answer:
    """`POST /v2/enqueue/{queue}/{destination}`."""
    queue, slash, rest = call.rest.partition("/")
    if not slash:
        raise Refusal(404, "not found; the path is /v2/enqueue/QUEUE/DESTINATION")
    return await _publish_one(call, target_of(dataclasses.replace(call, rest=rest)), check_name("queue", queue))


async def batch(call: Call) -> Answer:
    """`POST /v2/batch`: all of it or nothing."""
    if call.rest:
        raise Refusal(404, "not found")
    items = parsed(await call.read(call.limits.batch_bytes), list[_Item])
    if len(items) > BATCH_MAX:
        raise UsageError("body", f"has {len(items)} messages", f"send at most {BATCH_MAX}")
    wanted = []
    for index, item in enumerate(items):
        body = (item.body or "").encode()
        if len(body) > call.limits.message_bytes:
            raise _too_large(call.limits, f"[{index}].body")
        queue = None if item.queue is None else check_name(f"[{index}].queue", item.queue)
        headers = [(name.lower(), value) for name, value in (item.headers or {}).items()]
        wanted.append(_Wanted(_url_or_group(item.destination), headers, (), body, queue))
    answers = await _publish(call, wanted, [f"[{index}]" for index in range(len(wanted))])
    return Answer([_shown(made, one.is_url) for made, one in zip(answers, wanted, strict=True)])


async def put_schedule(call: Call) -> Answer:
    """`POST /v2/schedules/{destination}`."""
    target = target_of(call)
    body = await call.read(call.limits.message_bytes)
    group = None if _SCHEME.match(target) else await _group(call, target)
    draft = read_draft(call.headers, _settings(call), call.limits, None if group is None else group.headers)
    if draft.cron is None:
        raise UsageError("Upstash-Cron", "is missing", "write five fields such as */5 * * * *")
    if draft.not_before is not None:
        raise UsageError("Upstash-Not-Before", "does not go with a schedule", "use Upstash-Delay")
    urls = {url.host: (name, url) for name, url in draft.urls}
    if group is None:
        found = destination(target)
        urls[found.host] = (_DESTINATION, found)
    await _check(call.services, urls)
    schedule_id = await call.services.schedules.put(
        call.account.id,
        draft.schedule_id,
        draft.cron,
        target,
        draft.spec,
        call.limits,
        body=body,
        queue=draft.queue,
        labels=draft.labels,
        caller_ip=call.caller_ip,
    )
    return Answer({"scheduleId": schedule_id})


def target_of(call: Call) -> str:
    """The destination that a path and its query name: byte for byte as it was sent, without our own parameters."""
    if not call.rest:
        raise Refusal(400, f"{_DESTINATION}: {_NO_SCHEME}")
    target = _url_or_group(call.rest)
    query = without_settings(call.query)
    return target if query is None or not _SCHEME.match(target) else f"{target}?{query}"


def _url_or_group(text: str) -> str:
    # Some proxies and frameworks merge slashes.
    return _MERGED.sub(r"\1/", text, count=1) if _MERGED.match(text) else text


def check_group(name: str) -> str:
    """The name of a group, in a place where a URL could stand."""
    try:
        return check_name(_DESTINATION, name)
    except UsageError as error:
        raise UsageError(_DESTINATION, _NO_SCHEME) from error


async def _publish_one(call: Call, target: str, queue: str | None) -> Answer:
    body = await call.read(call.limits.message_bytes)
    wanted = _Wanted(target, call.headers, _settings(call), body, queue)
    made = (await _publish(call, [wanted], [""]))[0]
    is_copy = all(one.is_copy for one in made) and bool(made)
    return Answer(_shown(made, wanted.is_url), 202 if is_copy and wanted.is_url else 200)


async def _publish(call: Call, wanted: Sequence[_Wanted], places: Sequence[str]) -> list[list[Published]]:
    """Check everything, then store all of it at once. For each what was made of it."""
    groups: dict[str, Group] = {}
    publications: list[Publication] = []
    counts: list[int] = []
    urls: _Urls = {}
    for one, place in zip(wanted, places, strict=True):
        try:
            if not one.is_url and one.target not in groups:
                groups[one.target] = await _group(call, one.target)
            made = _publications(call, one, groups.get(one.target), len(publications), place, urls)
        except UsageError as error:
            raise _placed(error, place) from error
        publications += made
        if len(publications) > BATCH_MAX:
            raise UsageError("body", f"makes more than {BATCH_MAX} messages", "send it in parts")
        counts.append(len(made))
    await _check(call.services, urls)
    published = await call.services.publish((call.limits, publications))
    if isinstance(published, Exception):
        raise published
    rest = iter(published)
    return [[next(rest) for _ in range(count)] for count in counts]


def _publications(
    call: Call, one: _Wanted, group: Group | None, first: int, place: str, urls: _Urls
) -> list[Publication]:
    draft = read_draft(one.headers, one.query, call.limits, None if group is None else group.headers)
    if draft.cron is not None:
        raise UsageError(
            "Upstash-Cron", "makes a schedule, which this is no place for", "use /v2/schedules/DESTINATION"
        )
    if one.queue is not None and (draft.spec.delay_s or draft.not_before is not None):
        raise UsageError(
            "Upstash-Delay", "does not go with a queue, whose messages run in their order", "publish it instead"
        )
    for name, url in draft.urls:
        urls.setdefault(url.host, (_at(place, name), url))
    if group is None:
        found = destination(one.target)
        urls.setdefault(found.host, (_at(place, _DESTINATION), found))
        return [_publication(call, one, draft, one.target)]
    return [
        dataclasses.replace(
            _publication(call, one, draft, endpoint.url, endpoint, topic=one.target),
            spec=msgspec.structs.replace(draft.spec, endpoint=endpoint.name),
            body_of=None if index == 0 else first,
        )
        for index, endpoint in enumerate(group.endpoints)
    ]


def _publication(
    call: Call,
    one: _Wanted,
    draft: Draft,
    url: str,
    endpoint: Endpoint | None = None,
    *,
    topic: str | None = None,
) -> Publication:
    return Publication(
        call.account.id,
        url,
        draft.spec,
        one.body,
        not_before=draft.not_before,
        dedup=draft.dedup(url, one.body, "" if endpoint is None else endpoint.name or endpoint.url),
        queue=one.queue,
        topic=topic,
        labels=draft.labels,
        caller_ip=call.caller_ip,
    )


async def _group(call: Call, name: str) -> Group:
    group = await call.services.groups.get(call.account.id, check_group(name))
    if group is None:
        raise UsageError(_DESTINATION, _NO_SCHEME, f"there is no URL group {name!r} either")
    return group


async def _check(services: Services, urls: _Urls) -> None:
    """Refuse what may not be reached, before anything is stored.

    Names that nobody could look up in time are let pass: each delivery asks again.
    """
    if len(urls) == 1:
        await _check_one(services, *urls.values())
        return
    places = anyio.CapacityLimiter(CHECKS_AT_ONCE)
    problems: list[UsageError] = []

    async def check(what: tuple[str, Destination]) -> None:
        async with places:
            try:
                await _check_one(services, what)
            except UsageError as error:
                problems.append(error)

    with anyio.move_on_after(CHECKS_S):
        async with anyio.create_task_group() as group:
            for what in urls.values():
                group.start_soon(check, what)
    if problems:
        raise problems[0]


async def _check_one(services: Services, what: tuple[str, Destination]) -> None:
    name, url = what
    try:
        await services.check(url)
    except PermanentError as error:
        raise UsageError(name, str(error)) from error


def _settings(call: Call) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in pairs(call.query)] if call.query else []


def _shown(made: Sequence[Published], is_url: bool) -> object:
    shown = [
        {"messageId": str(one.id), "url": one.url} | ({"deduplicated": True} if one.is_copy else {}) for one in made
    ]
    return shown[0] if is_url else shown


def _placed(error: UsageError, place: str) -> UsageError:
    return error if not place else UsageError(_at(place, error.field), error.problem, error.fix)


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _too_large(limits: Limits, what: str = "body") -> Refusal:
    return Refusal(413, f"{what}: quota maxMessageSize exceeded, current limit: {limits.message_bytes}")
