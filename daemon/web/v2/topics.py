"""`/v2/topics`: URL groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from daemon.domain.errors import PermanentError, UsageError
from daemon.queue.groups import Endpoint, Group, TooManyEndpointsError
from daemon.queue.message import ms
from daemon.web.v2.call import Answer, Call, NotFound
from daemon.web.v2.drafts import check_name, destination, read_draft
from daemon.web.v2.shapes import Shown

NAME_CHARS_MAX = 200
_ENDPOINTS = "endpoints"


class _Endpoint(msgspec.Struct):
    url: str | None = None
    name: str | None = None


class _Endpoints(msgspec.Struct):
    endpoints: list[_Endpoint]


class _Defaults(msgspec.Struct):
    headers: Mapping[str, str | list[str]]


async def get(call: Call) -> Answer:
    """`GET /v2/topics`, `GET /v2/topics/{name}`."""
    if not call.rest:
        return Answer([_shown(group) for group in await call.services.groups.list(call.account.id)])
    name = check_name("urlGroup", call.rest)
    group = await call.services.groups.get(call.account.id, name)
    if group is None:
        raise NotFound(f"url group {name}")
    return Answer(_shown(group))


async def post(call: Call) -> Answer:
    """`POST /v2/topics/{name}/endpoints`: add endpoints, or change those of the same name."""
    name = _group(call)
    wanted = (await call.json(_Endpoints)).endpoints
    if not wanted:
        raise UsageError(_ENDPOINTS, "is empty", 'give at least one {"url": ...}')
    if len({one.name or one.url for one in wanted}) > call.limits.endpoints:
        raise TooManyEndpointsError(call.limits.endpoints)  # before each of them is looked up
    endpoints = []
    for index, one in enumerate(wanted):
        if one.url is None:
            raise UsageError(f"{_ENDPOINTS}[{index}].url", "is missing")
        if one.name is not None and not (one.name.isprintable() and len(one.name) <= NAME_CHARS_MAX):
            raise UsageError(
                f"{_ENDPOINTS}[{index}].name", f"use at most {NAME_CHARS_MAX} characters that can be printed"
            )
        try:
            await call.services.check(destination(one.url))
        except (UsageError, PermanentError) as error:
            reason = str(error).removeprefix("invalid destination url: ")
            raise UsageError(f"{_ENDPOINTS}[{index}].url", f"invalid destination url: {reason}") from error
        endpoints.append(Endpoint(one.url, one.name or None))
    await call.services.groups.upsert_endpoints(call.account.id, name, endpoints, call.limits)
    return Answer()


async def delete(call: Call) -> Answer:
    """`DELETE /v2/topics/{name}`, which need not be there; `DELETE /v2/topics/{name}/endpoints` takes some out."""
    if "/" not in call.rest:
        await call.services.groups.delete(call.account.id, check_name("urlGroup", call.rest))
        return Answer()
    name = _group(call)
    wanted = (await call.json(_Endpoints)).endpoints
    for index, one in enumerate(wanted):
        if not one.url and not one.name:
            raise UsageError(f"{_ENDPOINTS}[{index}]", "names nothing", "give its url or its name")
    if not await call.services.groups.remove_endpoints(call.account.id, name, [(one.url, one.name) for one in wanted]):
        raise NotFound(f"url group {name}")
    return Answer()


async def patch(call: Call) -> Answer:
    """`PATCH /v2/topics/{name}`: headers for every publish to the group that does not have them itself."""
    name = check_name("urlGroup", call.rest)
    given = (await call.json(_Defaults)).headers
    headers = {key: [values] if isinstance(values, str) else values for key, values in given.items()}
    read_draft(_pairs(headers), (), call.limits)  # what is wrong in them should not wait for the next publish
    if not await call.services.groups.set_headers(call.account.id, name, headers):
        raise NotFound(f"url group {name}")
    return Answer()


def _pairs(headers: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, values in headers.items() for value in values]


def _group(call: Call) -> str:
    name, _, rest = call.rest.partition("/")
    if rest != _ENDPOINTS:
        raise NotFound("this path was")
    return check_name("urlGroup", name)


def _shown(group: Group) -> Shown:
    return {
        "name": group.name,
        "createdAt": ms(group.created_at),
        "updatedAt": ms(group.updated_at),
        "endpoints": [
            {"name": endpoint.name, "url": endpoint.url} if endpoint.name else {"url": endpoint.url}
            for endpoint in group.endpoints
        ],
    } | ({"headers": group.headers} if group.headers else {})


METHODS = {"GET": get, "POST": post, "DELETE": delete, "PATCH": patch}
