"""OpenAI's organization API as documented: usage, costs, projects, users, project keys.

Source: openai/openai-openapi of 21 August 2026 and the official SDK 3.54 for the newer fields (`decisions`,
`api_source`, cache writes). Answers that no document settles follow live behaviour that connectors have reported.
"""

from __future__ import annotations

from daemon.simulator import _openai_traffic, catalogue
from daemon.simulator.catalogue import CHAT, DAY, OPENAI, WIDTHS, Source
from daemon.simulator.traffic import IdKind, Vendor, token
from daemon.simulator.wire import (
    Headers,
    Json,
    Keep,
    Page,
    Query,
    RefusedError,
    Reply,
    Request,
    Service,
    bearer,
    encode,
    halves,
    matcher,
    money,
    read_cursor,
    write_cursor,
)
from daemon.simulator.world import Dims, Org, World, group

LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
COSTS_LIMIT = (7, 180)
COSTS_CLAMPED = 31
API_KEY_COSTS_FLOOR = 1764979200
"""2025-12-06: costs by api_key_id are refused before."""
PREFIX = "/v1/organization/"

_OBJECTS = {"file_search_calls": "file_searches", "web_search_calls": "web_searches"}
_FILTERS = {
    "project_id": "project_ids", "user_id": "user_ids", "api_key_id": "api_key_ids", "model": "models",
    "size": "sizes", "source": "sources", "vector_store_id": "vector_store_ids", "context_level": "context_levels",
    "line_item": "line_items", "batch": "batch",
}  # fmt: skip
_REPORT_PARAMS = ("start_time", "end_time", "bucket_width", "limit", "page", "group_by")
_NAMES = {"requests": "num_model_requests"}
# What this API calls the kinds of error that the others have, too.
_KINDS = {
    "rate_limit_error": "requests", "authentication_error": "invalid_request_error",
    "permission_error": "invalid_request_error", "api_error": "server_error", "timeout_error": "server_error",
    "overloaded_error": "server_error",
}  # fmt: skip
_OPTIONAL_TOKENS = (
    "input_cached_tokens", "input_cache_write_tokens", "input_cache_write_30m_tokens", "input_cache_write_12h_tokens",
    "input_uncached_tokens", "input_text_tokens", "input_audio_tokens", "input_image_tokens",
    "input_cached_text_tokens", "input_cached_audio_tokens", "input_cached_image_tokens", "output_text_tokens",
    "output_audio_tokens", "output_image_tokens", "api_source", "service_tier",
)  # fmt: skip


def answer(world: World, request: Request, headers: Headers) -> Reply:
    """One request below `/v1/organization/`."""
    headers += [("x-request-id", "req_" + token(request.path, request.query, world.clock.now(), length=32))]
    org = _authenticate(world, request)
    headers.append(("openai-organization", org.cast.org_id))
    if request.method != "GET":
        raise RefusedError(405, "invalid_request_error", f"Not allowed to {request.method} here.")
    parts = request.path.removeprefix(PREFIX).strip("/").split("/")
    query = Query(request.query)
    match parts:
        case ["usage", name] if name in OPENAI and not OPENAI[name].is_cost:
            page = _report(org, OPENAI[name], query)
        case ["costs"]:
            page = _report(org, OPENAI["costs"], query)
        case ["projects"]:
            return Reply(headers=headers, body=encode(_projects(org, query)))
        case ["users"]:
            return Reply(headers=headers, body=encode(_users(org, query)))
        case ["projects", project, "api_keys"] if project in org.cast.projects:
            return Reply(headers=headers, body=encode(_keys(org, project, query)))
        case _:
            raise RefusedError(404, "invalid_request_error", f"Unknown request URL: GET {request.path}.")
    return Reply(headers=headers, page=page)


def error_body(refused: RefusedError, _: Reply) -> bytes:
    kind = _KINDS.get(refused.kind, refused.kind)
    error = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return encode({"error": error})


def _authenticate(world: World, request: Request) -> Org:
    key = bearer(request)
    if not key:
        raise RefusedError(401, "invalid_request_error", "Missing bearer authentication in header", code=None)
    if "noscope" in key or key.startswith("sk-proj-"):
        raise RefusedError(
            403,
            "invalid_request_error",
            "You have insufficient permissions for this operation. Missing scopes: api.usage.read.",
            code="missing_scope",
        )
    if not key.startswith("sk-admin-"):
        raise RefusedError(
            401, "invalid_request_error", f"Incorrect API key provided: {key[:6]}***.", code="invalid_api_key"
        )
    return world.org(VENDOR, key)


def _report(org: Org, source: Source, query: Query) -> Page:
    public = source.dims[: source.public]
    filters = {name: dim for dim, name in _FILTERS.items() if dim in public}
    query.only((*_REPORT_PARAMS, *filters))
    width = query.one("bucket_width") or "1d"
    if width not in (("1d",) if source.is_cost else WIDTHS):
        raise _invalid("bucket_width", width)
    step = WIDTHS[width]
    group_by = query.many("group_by")
    for dim in group_by:
        if dim not in public:
            raise _invalid("group_by", dim)
    start = query.whole("start_time")
    if start is None:
        raise RefusedError(
            400,
            "invalid_request_error",
            "Missing required parameter: 'start_time'.",
            param="start_time",
            code="missing_required_parameter",
        )
    now = org.clock.now()
    end = query.whole("end_time")
    if end is not None and end <= start:
        raise _invalid("end_time", end)
    if end is not None and end > now and org.wire.refuse_future_end:
        raise _invalid("end_time", end)
    _check_floor(org, source, start, now, group_by)
    limit = _limit(org, source, width, query)
    # An unaligned start clips the first bucket to the minute; every later one sits on the grid.
    first = start - start % 60
    stop = min(now // step * step + step, end if end is not None else 1 << 62)
    fingerprint = query.fingerprint(source.name, org.key)
    cursor = query.one("page")
    position = first if cursor is None else read_cursor(cursor, fingerprint)
    keep = matcher([(source.at(dim), frozenset(query.many(name))) for name, dim in filters.items() if query.many(name)])
    shown = (*group_by, "unit") if source.is_cost and "line_item" in group_by else tuple(group_by)
    data: list[Json] = []
    at = position
    while at < stop and len(data) < limit:
        grid = at // step * step + step
        data.append(_bucket(org, source, at, min(grid, stop), shown, keep))
        at = grid
    has_more = at < stop
    body: Json = {
        "object": "page",
        "data": data,
        "has_more": has_more,
        "next_page": write_cursor(fingerprint, at) if has_more else None,
    }
    return Page(org, body, position, at, lambda place: write_cursor(fingerprint, place))


def _invalid(param: str, value: object) -> RefusedError:
    return RefusedError(
        400, "invalid_request_error", f"Invalid value for '{param}': {value!r}.", param=param, code="invalid_value"
    )


def _check_floor(org: Org, source: Source, start: int, now: int, group_by: list[str]) -> None:
    if source.is_cost:
        if "api_key_id" in group_by and start < API_KEY_COSTS_FLOOR:
            raise RefusedError(
                400,
                "invalid_request_error",
                "start_time must be on or after 2025-12-06 when grouping by api_key_id.",
                param="start_time",
                code="invalid_request_error",
            )
    elif start < (now - org.profile.lookback_days * DAY) // DAY * DAY:
        raise RefusedError(
            400,
            "invalid_request_error",
            "The requested start_time exceeds the reporting lookback of this endpoint.",
            param="start_time",
            code="reporting_lookback_exceeded",
        )


def _limit(org: Org, source: Source, width: str, query: Query) -> int:
    default, most = COSTS_LIMIT if source.is_cost else LIMITS[width]
    limit = query.whole("limit")
    if limit is None:
        return default
    if limit > most and source.is_cost and org.wire.clamp_limit:
        return COSTS_CLAMPED
    if not 1 <= limit <= most:
        raise RefusedError(
            400,
            "invalid_request_error",
            f"Invalid 'limit': expected a value between 1 and {most}.",
            param="limit",
            code="integer_above_max_value" if limit > most else "integer_below_min_value",
        )
    return limit


def _bucket(org: Org, source: Source, start: int, end: int, shown: tuple[str, ...], keep: Keep) -> Json:
    cells = org.cells(source.name, start, end)
    rows = [_row(org, source, shown, dims, counts) for dims, counts in group(source, cells, shown, keep).items()]
    if org.wire.duplicate_rows:
        rows = [part for row in rows for part in halves(row)]
    for row in rows if org.wire.money_format != "number" and source.is_cost else ():
        row["amount"]["value"] = money(row["amount"]["value"], org.wire.money_format)
    return {"object": "bucket", "start_time": start, "end_time": end, "results": rows}


def _row(org: Org, source: Source, shown: tuple[str, ...], dims: Dims, counts: tuple[int, ...]) -> Json:
    row: Json = {"object": f"organization.usage.{_OBJECTS.get(source.name, source.name)}.result"}
    if source.is_cost:
        row["object"] = "organization.costs.result"
        row["amount"] = {"value": catalogue.dollars(counts[0]), "currency": "usd"}
        row["quantity"] = counts[1] if "line_item" in shown else None
        row["quantity_unit"] = None
    elif len(counts) == 12:
        row |= _tokens(counts)
    else:
        row |= {_NAMES.get(name, name): count for name, count in zip(source.counts, counts, strict=True)}
    row |= dict.fromkeys(source.dims[: source.public])
    for dim, value in zip(shown, dims, strict=True):
        if dim == "batch":
            row[dim] = None if value is None else value == "true"
        else:
            row["quantity_unit" if dim == "unit" else dim] = value
    if org.wire.missing_optional_fields:
        for name in _OPTIONAL_TOKENS:
            row.pop(name, None)
        # A dimension that is null is left out as well, and a cost's quantity.
        row = {name: value for name, value in row.items() if value is not None and name != "quantity"}
    if org.wire.unknown_fields:
        row |= {"input_hologram_tokens": 7, "organization_name": "Example", "billing_hint": {"nested": [1, None]}}
    return row


def _tokens(counts: tuple[int, ...]) -> Json:
    text, audio, image, cached_text, cached_audio, cached_image, write_30m, write_12h, *output, requests = counts
    return {
        "input_tokens": sum(counts[:8]),
        "input_cached_tokens": cached_text + cached_audio + cached_image,
        "input_cache_write_tokens": write_30m + write_12h,
        "input_cache_write_30m_tokens": write_30m,
        "input_cache_write_12h_tokens": write_12h,
        "input_uncached_tokens": text + audio + image,
        "input_text_tokens": text,
        "input_audio_tokens": audio,
        "input_image_tokens": image,
        "input_cached_text_tokens": cached_text,
        "input_cached_audio_tokens": cached_audio,
        "input_cached_image_tokens": cached_image,
        "output_tokens": sum(output),
        "output_text_tokens": output[0],
        "output_audio_tokens": output[1],
        "output_image_tokens": output[2],
        "num_model_requests": requests,
    }


def _listing(rows: list[Json], query: Query) -> Json:
    limit = query.whole("limit") or 20
    if not 1 <= limit <= 100:
        raise _invalid("limit", limit)
    after = query.one("after")
    ids = [row["id"] for row in rows]
    if after is not None and after not in ids:
        raise _invalid("after", after)
    start = 0 if after is None else ids.index(after) + 1
    shown = rows[start : start + limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + limit < len(rows),
    }


def _projects(org: Org, query: Query) -> Json:
    query.only(("limit", "after", "include_archived"))
    rows: list[Json] = [
        {
            "id": project,
            "object": "organization.project",
            "name": org.name_of(project, f"project {n}"),
            "created_at": org.history_from,
            "archived_at": org.created_at if project in org.gone else None,
            "status": "archived" if project in org.gone else "active",
        }
        for n, project in enumerate(org.cast.projects)
        if project not in org.gone or query.one("include_archived") == "true"
    ]
    return _listing(rows, query)


def _users(org: Org, query: Query) -> Json:
    query.only(("limit", "after", "emails"))
    people = {key.user: key.email for key in org.cast.keys if key.user not in org.gone}
    rows: list[Json] = [
        {
            "object": "organization.user",
            "id": user,
            "name": org.name_of(user, email.partition("@")[0]),
            "email": email,
            "role": "reader",
            "added_at": org.history_from,
        }
        for user, email in people.items()
    ]
    return _listing(rows, query)


def _keys(org: Org, project: str, query: Query) -> Json:
    query.only(("limit", "after"))
    rows: list[Json] = [
        {
            "object": "organization.project.api_key",
            "redacted_value": f"sk-proj-***{(key.id or '')[-4:]}",
            "name": org.name_of(key.id, key.name),
            "created_at": org.history_from,
            "last_used_at": org.history_from,
            "id": key.id,
            "owner_project_access": "active",
            "owner": {
                "type": "user",
                "user": {
                    "id": key.user,
                    "name": org.name_of(key.user, key.email.partition("@")[0]),
                    "email": key.email,
                    "role": "member",
                    "created_at": org.history_from,
                },
            },
        }
        for key in org.cast.keys
        if key.project == project and key.id not in org.gone
    ]
    return _listing(rows, query)


_PREFIXES: dict[IdKind, str] = {"organization": "org-", "project": "proj_", "key": "key_", "user": "user-"}
VENDOR = Vendor(
    "openai",
    lambda kind, digits: _PREFIXES[kind] + digits[:24],
    CHAT["openai"],
    OPENAI,
    main="completions",
    bill="costs",
    make=_openai_traffic.make,
    charge=_openai_traffic.charge,
    key_dim="api_key_id",
    unpriced={"model": "gpt-9-preview-2026-11-01"},
    novel={"service_tier": "turbo"},
    credit={"line_item": "credit grant", "api_source": "unlabeled"},
)
SERVICE = Service(VENDOR, (PREFIX,), answer, error_body)
