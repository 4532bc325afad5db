"""Anthropic's Admin API as documented: the bucketed reports, Claude Code records, and the Usage and Cost Analytics beta.

Source: platform.claude.com (usage-cost-api of 25 September 2026) and the official SDK 2.12 for the analytics reports.
"""

from __future__ import annotations

import operator
from datetime import UTC, datetime
from decimal import Decimal

from daemon.domain.window import from_epoch, parse_rfc3339, rfc3339, to_epoch
from daemon.simulator import _anthropic_traffic, catalogue
from daemon.simulator.catalogue import ANTHROPIC, CHAT, DAY, HOUR, WIDTHS, Source
from daemon.simulator.traffic import IdKind, Vendor, token, uuid_of
from daemon.simulator.wire import (
    Headers,
    Json,
    Page,
    Query,
    RefusedError,
    Reply,
    Request,
    Service,
    bearer,
    encode,
    matcher,
    read_cursor,
    write_cursor,
)
from daemon.simulator.world import Cells, Dims, Org, World, group

PREFIX = "/v1/organizations/"
LIMITS = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
ANALYTICS_BETA = "analytics-usage-cost-2026-08-24"
SPEED_BETA = "fast-mode-2026-02-01"
ANALYTICS_FLOOR = to_epoch(datetime(2026, 1, 1, tzinfo=UTC))

_USAGE_FILTERS = {
    "api_key_ids": "api_key_id", "workspace_ids": "workspace_id", "models": "model", "service_tiers": "service_tier",
    "context_window": "context_window", "inference_geos": "inference_geo", "speeds": "speed",
    "account_ids": "account_id", "service_account_ids": "service_account_id",
}  # fmt: skip
_COST_PARSED = ("cost_type", "model", "service_tier", "token_type", "context_window", "inference_geo")
_ANALYTICS_DIMS = (
    "actor", "actor_type", "agent_id", "api_key_id", "claude_tag_category", "claude_tag_user_id", "context_window",
    "deployment_id", "environment_id", "inference_geo", "model", "organization_id", "product", "rbac_group_id",
    "service_tier", "session_id", "slack_channel_id", "speed", "user_profile_id", "workspace_id",
)  # fmt: skip
_FAN_OUT = ("cost_type", "token_type")
_ANALYTICS_FILTERS = {
    ("claude_tag_categories" if dim == "claude_tag_category" else dim + "s"): dim
    for dim in _ANALYTICS_DIMS
    if dim != "actor"
} | {"actor_ids": "actor_id"}
_USAGE_ORDERS = ("output_tokens", "requests", "time", "total_tokens", "uncached_input_tokens")
_COST_ORDERS = ("amount", "list_amount", "time")
_LISTING = ("limit", "after_id", "before_id")


def answer(world: World, request: Request, headers: Headers) -> Reply:
    """One request below `/v1/organizations/`."""
    request_id = "req_" + token(request.path, request.query, world.clock.now())
    headers += [("request-id", request_id)]
    org = _authenticate(world, request)
    headers.append(("anthropic-organization-id", org.cast.org_uuid))
    if "anthropic-version" not in request.headers:
        raise _invalid("anthropic-version: header is required")
    if request.method != "GET":
        raise RefusedError(405, "invalid_request_error", "Method Not Allowed")
    betas = {beta.strip() for beta in request.headers.get("anthropic-beta", "").split(",")}
    query = Query(request.query)
    match request.path.removeprefix(PREFIX).strip("/").split("/"):
        case ["me"]:
            me = {"id": org.cast.org_uuid, "type": "organization", "name": "Simulated " + org.cast.org_uuid[:8]}
            return Reply(headers=headers, body=encode(me))
        case ["users"]:
            return Reply(headers=headers, body=encode(_users(org, query)))
        case ["workspaces"]:
            return Reply(headers=headers, body=encode(_workspaces(org, query)))
        case ["api_keys"]:
            return Reply(headers=headers, body=encode(_api_keys(org, query)))
        case ["usage_report", "messages"]:
            return Reply(headers=headers, page=_messages(org, query, betas))
        case ["usage_report", "claude_code"]:
            return Reply(headers=headers, page=_claude_code(org, query))
        case ["cost_report"]:
            return Reply(headers=headers, page=_cost_report(org, query))
        case ["analytics", "usage" | "cost" as name]:
            if ANALYTICS_BETA not in betas:
                raise _invalid(f"This endpoint is in beta: send `anthropic-beta: {ANALYTICS_BETA}`.")
            return Reply(headers=headers, page=_analytics(org, "messages" if name == "usage" else "cost", query))
        case _:
            raise RefusedError(404, "not_found_error", "Not Found")


def error_body(refused: RefusedError, reply: Reply) -> bytes:
    request_id = dict(reply.headers).get("request-id", "")
    error = {"type": refused.kind, "message": refused.message}
    return encode({"type": "error", "error": error, "request_id": request_id})


def _invalid(message: str) -> RefusedError:
    return RefusedError(400, "invalid_request_error", message)


def _authenticate(world: World, request: Request) -> Org:
    key = request.headers.get("x-api-key", "").strip() or bearer(request)
    if "noscope" in key:
        raise RefusedError(403, "permission_error", "Your API key does not have permission to use this resource.")
    if not key.startswith("sk-ant-admin"):
        raise RefusedError(401, "authentication_error", "invalid x-api-key")
    return world.org(VENDOR, key)


def _instant(query: Query, name: str) -> int | None:
    text = query.one(name)
    if text is None:
        return None
    try:
        return to_epoch(parse_rfc3339(text))
    except ValueError:
        raise _invalid(f"{name}: expected an RFC 3339 timestamp with a time zone") from None


def _required_start(query: Query) -> int:
    start = _instant(query, "starting_at")
    if start is None:
        raise _invalid("starting_at: Field required")
    return start


def _limit(query: Query, default: int, most: int) -> int:
    limit = query.whole("limit")
    if limit is None:
        return default
    if not 1 <= limit <= most:
        raise _invalid(f"limit: expected a value between 1 and {most}")
    return limit


def _time(at: int) -> str:
    return rfc3339(from_epoch(at))


def _cents(pico: int) -> str:
    """Fractional cents with at least six decimals, as the report's own example has them."""
    cents = Decimal(pico) / (catalogue.PICO // 100)
    return format(cents, "f") if cents.as_tuple().exponent <= -6 else format(cents, ".6f")  # type: ignore[operator]  # finite


def _buckets(org: Org, query: Query, source: Source, width: str, shown: tuple[str, ...]) -> Page:
    """What the two bucketed reports have in common; starts snap down to the grid."""
    step = WIDTHS[width]
    start = _required_start(query) // step * step
    end = _instant(query, "ending_at")
    now = org.clock.now()
    if end is not None and end <= start:
        raise _invalid("ending_at: must be after starting_at")
    if source.is_cost and end is None and start >= now // DAY * DAY:
        raise _invalid("ending_at: must be after starting_at")  # seen live: the unfinished day alone has no end
    stop = min(now // step * step + step, (end // step * step) if end is not None else 1 << 62)
    fingerprint = query.fingerprint(source.name, org.key)
    cursor = query.one("page")
    position = start if cursor is None else read_cursor(cursor, fingerprint)
    filters = _USAGE_FILTERS if not source.is_cost else {}
    keep = matcher([(source.at(dim), frozenset(query.many(name))) for name, dim in filters.items() if query.many(name)])
    limit = _limit(query, *LIMITS[width])
    data: list[Json] = []
    at = position
    rows_total = 0
    while at < stop and len(data) < limit:
        cells = org.cells(source.name, at, at + step)
        write = _cost_row if source.is_cost else _usage_row
        rows = [write(org, shown, dims, counts) for dims, counts in group(source, cells, shown, keep).items()]
        if org.wire.duplicate_rows:
            rows = [part for row in rows for part in _halves(row)]
        rows_total += len(rows)
        data.append({"starting_at": _time(at), "ending_at": _time(at + step), "results": rows})
        at += step
    if rows_total > org.profile.row_cap:
        raise _invalid("The result has too many rows: lower `limit` or group by fewer dimensions.")
    has_more = at < stop
    body: Json = {
        "data": data,
        "has_more": has_more,
        "next_page": write_cursor(fingerprint, at) if has_more else None,
    }
    return Page(org, body, position, at, lambda place: write_cursor(fingerprint, place))


def _messages(org: Org, query: Query, betas: set[str]) -> Page:
    source = ANTHROPIC["messages"]
    query.only(("starting_at", "ending_at", "bucket_width", "limit", "page", "group_by", *_USAGE_FILTERS))
    width = query.one("bucket_width") or "1d"
    if width not in WIDTHS:
        raise _invalid("bucket_width: expected 1m, 1h or 1d")
    group_by = query.many("group_by")
    for dim in group_by:
        if dim not in source.dims[: source.public]:
            raise _invalid(f"group_by: unknown dimension {dim!r}")
    if ("speed" in group_by or query.many("speeds")) and SPEED_BETA not in betas:
        raise _invalid(f"speed: send `anthropic-beta: {SPEED_BETA}`")
    return _buckets(org, query, source, width, tuple(group_by))


def _usage_row(org: Org, shown: tuple[str, ...], dims: Dims, counts: tuple[int, ...]) -> Json:
    row = _token_counts(counts)
    known = dict(zip(shown, dims, strict=True))
    row |= {dim: known.get(dim) for dim in _USAGE_FILTERS.values() if dim != "speed" or "speed" in shown}
    return _bent(org, row, ("server_tool_use", "account_id", "service_account_id", "inference_geo"))


def _token_counts(counts: tuple[int, ...]) -> Json:
    uncached, cache_read, cache_5m, cache_1h, output, searches, _ = counts
    return {
        "uncached_input_tokens": uncached,
        "cache_read_input_tokens": cache_read,
        "cache_creation": {"ephemeral_5m_input_tokens": cache_5m, "ephemeral_1h_input_tokens": cache_1h},
        "output_tokens": output,
        "server_tool_use": {"web_search_requests": searches},
    }


def _bent(org: Org, row: Json, optional: tuple[str, ...]) -> Json:
    if org.wire.missing_optional_fields:
        row = {name: value for name, value in row.items() if name not in optional and value is not None}
    if org.wire.unknown_fields:
        row |= {"thinking_hologram_tokens": 7, "billing_hint": {"nested": [1, None]}}
    return row


def _halves(row: Json) -> tuple[Json, Json]:
    """The same dimensions twice, whose counts add up to `row`."""
    first, second = dict(row), dict(row)
    for name, value in row.items():
        if isinstance(value, dict):
            first[name], second[name] = _halves(value)
        elif name in {"amount", "list_amount"}:
            half = Decimal(value) / 2
            first[name], second[name] = format(half, "f"), format(Decimal(value) - half, "f")
        elif isinstance(value, int):
            first[name], second[name] = value // 2, value - value // 2
    return first, second


def _cost_report(org: Org, query: Query) -> Page:
    query.only(("starting_at", "ending_at", "bucket_width", "limit", "page", "group_by"))
    if (query.one("bucket_width") or "1d") != "1d":
        raise _invalid("bucket_width: expected 1d")
    group_by = query.many("group_by")
    for dim in group_by:
        if dim not in {"workspace_id", "description"}:
            raise _invalid(f"group_by: unknown dimension {dim!r}")
    shown = (*group_by, *_COST_PARSED) if "description" in group_by else tuple(group_by)
    return _buckets(org, query, ANTHROPIC["cost"], "1d", shown)


def _cost_row(org: Org, shown: tuple[str, ...], dims: Dims, counts: tuple[int, ...]) -> Json:
    known = dict(zip(shown, dims, strict=True))
    row: Json = {"currency": "USD", "amount": _cents(counts[0])}
    row |= {dim: known.get(dim) for dim in ("workspace_id", "description", *_COST_PARSED)}
    return _bent(org, row, ("inference_geo", "context_window"))


def _analytics(org: Org, name: str, query: Query) -> Page:
    """Flat rows, ranked; the cursor is a rank, so rows move between pages while data grows."""
    source = ANTHROPIC[name]
    is_cost = source.is_cost
    query.only(("starting_at", "ending_at", "time_bucket_width", "group_by", "limit", "page", "order_by", "order",
                "exclude_deleted_users", *_ANALYTICS_FILTERS))  # fmt: skip
    now = org.clock.now()
    start, end, width = _required_start(query), _instant(query, "ending_at"), query.one("time_bucket_width")
    if start < max(ANALYTICS_FLOOR, now - 365 * DAY):
        raise _invalid("starting_at: must be within the last 365 days and not before 2026-01-01")
    if width is not None and width not in WIDTHS:
        raise _invalid("time_bucket_width: expected 1m, 1h or 1d")
    if end is None:
        if width is not None:
            raise _invalid("ending_at: required with time_bucket_width")
        end = min(now, start + 31 * DAY)
    if end <= start or end - start > (DAY if width == "1m" else 31 * DAY):
        raise _invalid("ending_at: must be after starting_at, and at most 31 days (24 hours for 1m) later")
    group_by = query.many("group_by")
    known = (*_ANALYTICS_DIMS, *_FAN_OUT) if is_cost else _ANALYTICS_DIMS
    if any(dim not in known for dim in group_by) or len([dim for dim in group_by if dim not in _FAN_OUT]) > 5:
        raise _invalid("group_by: at most 5 of the documented dimensions")
    order_by = query.one("order_by") or ("amount" if is_cost else "total_tokens")
    order = query.one("order") or "desc"
    if order_by not in (_COST_ORDERS if is_cost else _USAGE_ORDERS) or order not in {"asc", "desc"}:
        raise _invalid("order_by, order: not one of the documented values")
    limit = _limit(query, 20, 1000)
    fingerprint = query.fingerprint("analytics", name, org.key)
    cursor = query.one("page")
    position = 0 if cursor is None else read_cursor(cursor, fingerprint)

    rows = _ranked(org, source, query, group_by, _spans(start, end, width, now), order_by, order)
    # The fan-out over cost and token types does not count toward the limit.
    counted = list(dict.fromkeys(_counted(row) for row in rows))
    shown = set(counted[position : position + limit])
    data = [row for row in rows if _counted(row) in shown]
    if org.wire.duplicate_rows:
        data = [
            row | {metrics: half}
            for row in data
            for metrics in ("cost" if is_cost else "usage",)
            for half in _halves(row[metrics])
        ]
    has_more = position + limit < len(counted)
    body: Json = {
        "data": data,
        "has_more": has_more,
        "next_page": write_cursor(fingerprint, position + limit) if has_more else None,
        "data_refreshed_at": _time(now),
    }
    return Page(org, body, position, position + limit, lambda place: write_cursor(fingerprint, place))


def _counted(row: Json) -> tuple[object, ...]:
    group_values = row["group"]
    return (row["starting_at"], *(str(value) for dim, value in group_values.items() if dim not in _FAN_OUT))


def _spans(start: int, end: int, width: str | None, now: int) -> list[tuple[int, int]]:
    if width is None:
        return [(start // HOUR * HOUR, end // HOUR * HOUR)]
    step = WIDTHS[width]
    return [(at, at + step) for at in range(start // step * step, min(end, now + 1), step)]


def _ranked(
    org: Org,
    source: Source,
    query: Query,
    group_by: list[str],
    spans: list[tuple[int, int]],
    order_by: str,
    order: str,
) -> list[Json]:
    filters = [
        # An empty entry matches what has no such value.
        (dim, frozenset(value or None for value in query.many(name)))
        for name, dim in _ANALYTICS_FILTERS.items()
        if query.many(name)
    ]
    ranked: list[tuple[int, int, str, Json]] = []
    for start, end in spans:
        grouped: Cells = {}
        labels: dict[Dims, Json] = {}
        for dims, counts in org.cells(source.name, start, end).items() if end > start else ():
            if "token_type" in group_by and not _fans_out(source, dims, group_by):
                continue
            values = {dim: _analytics_value(org, source, dims, dim) for dim in group_by}
            if any(_filter_value(org, source, dims, dim) not in wanted for dim, wanted in filters):
                continue
            label = tuple(str(value) if value is not None else None for value in values.values())
            labels[label] = values
            grouped[label] = tuple(map(operator.add, grouped.get(label, (0,) * len(counts)), counts))
        for label, counts in grouped.items():
            row = _analytics_row(org, source, start, end, labels[label], counts, group_by)
            ranked.append((start, _rank(source, counts, order_by), str(label), row))
    ranked.sort(key=lambda item: item[2])
    # Python's sort is stable: size within a bucket first, then the bucket.
    if order_by == "time":
        ranked.sort(key=lambda item: -item[1])
        ranked.sort(key=lambda item: item[0], reverse=order == "desc")
    else:
        ranked.sort(key=lambda item: item[1], reverse=order == "desc")
    return [item[3] for item in ranked]


def _fans_out(source: Source, dims: Dims, group_by: list[str]) -> bool:
    """By token type alone only tokens are listed; with the cost type too, the other components are as well."""
    return "cost_type" in group_by or dims[source.at("cost_type")] == "tokens"


def _rank(source: Source, counts: tuple[int, ...], order_by: str) -> int:
    if source.is_cost:
        return counts[1] if order_by == "list_amount" else counts[0]
    match order_by:
        case "output_tokens":
            return counts[4]
        case "requests":
            return counts[6]
        case "uncached_input_tokens":
            return counts[0]
        case _:
            return sum(counts[:5])


def _filter_value(org: Org, source: Source, dims: Dims, dim: str) -> str | None:
    if dim == "inference_geo":
        return dims[source.at(dim)] or "not_available"
    value = _analytics_value(org, source, dims, dim)
    return value if value is None or isinstance(value, str) else None


def _analytics_value(org: Org, source: Source, dims: Dims, dim: str) -> Json | str | None:
    match dim:
        case "workspace_id":
            return dims[source.at(dim)] or org.cast.projects[0]  # tagged also for the default workspace
        case "organization_id":
            return org.cast.org_uuid
        case "inference_geo":
            geo = dims[source.at(dim)]
            return None if geo == "not_available" else geo
        case "actor" | "actor_type" | "actor_id":
            return _actor(org, source, dims, dim)
        case _ if dim in source.dims:
            return dims[source.at(dim)]
        case _:
            return None


def _actor(org: Org, source: Source, dims: Dims, dim: str) -> Json | str | None:
    account, service, key = (dims[source.at(name)] for name in ("account_id", "service_account_id", "api_key_id"))
    if dim == "actor_id":
        return account or service or key
    if account is not None:
        email = next((each.email for each in org.cast.keys if each.user == account), None)
        actor: Json = {"type": "user_actor", "user_id": account, "email_address": email, "deleted": False}
    elif service is not None:
        actor = {"type": "service_account_actor", "service_account_id": service}
    elif key is not None:
        actor = {"type": "api_actor", "api_key_id": key}
    else:
        return None
    return actor if dim == "actor" else str(actor["type"])


def _analytics_row(
    org: Org, source: Source, start: int, end: int, values: Json, counts: tuple[int, ...], group_by: list[str]
) -> Json:
    names = (*_ANALYTICS_DIMS, *_FAN_OUT) if source.is_cost else _ANALYTICS_DIMS
    row: Json = {
        "starting_at": _time(start),
        "ending_at": _time(end),
        "group": {name: values.get(name) for name in names},
    }
    if source.is_cost:
        row["cost"] = {
            "amount": _cents(counts[0]),
            "list_amount": _cents(counts[1]),
            "currency": "USD",
            "requests": None if set(group_by) & set(_FAN_OUT) else counts[2],
        }
    else:
        row["usage"] = _token_counts(counts) | {"total_tokens": sum(counts[:5]), "requests": counts[6]}
    if org.wire.missing_optional_fields:
        row["group"] = {name: value for name, value in row["group"].items() if value is not None}
        row["cost" if source.is_cost else "usage"].pop("requests")
    if org.wire.unknown_fields:
        row["billing_hint"] = {"nested": [1, None]}
    return row


def _claude_code(org: Org, query: Query) -> Page:
    """One record per actor and terminal of one UTC day, from the messages that Claude Code sent; an hour behind."""
    query.only(("starting_at", "limit", "page"))
    try:
        day = datetime.strptime(query.one("starting_at") or "", "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise _invalid("starting_at: expected a date such as 2026-11-21") from None
    start = to_epoch(day)
    limit = _limit(query, 20, 1000)
    fingerprint = query.fingerprint("claude_code", org.key)
    cursor = query.one("page")
    position = 0 if cursor is None else read_cursor(cursor, fingerprint)
    source = ANTHROPIC["messages"]
    end = min(start + DAY, (org.clock.now() - HOUR) // HOUR * HOUR)
    cells = org.cells("messages", start, end) if end > start else {}
    product = source.at("product")
    by_model = group(source, cells, ("account_id", "api_key_id", "model"), lambda dims: dims[product] == "claude_code")
    records: dict[Dims, Json] = {}
    for (account, key, model), counts in by_model.items():
        actor: Json = {"type": "api_actor", "api_key_name": key}
        if account is not None:
            email = next((each.email for each in org.cast.keys if each.user == account), account)
            actor = {"type": "user_actor", "email_address": email}
        record = records.setdefault((account, key), _claude_code_record(org, start, actor))
        _add_model(record, model, counts)
    rows = list(records.values())
    has_more = position + limit < len(rows)
    body: Json = {
        "data": rows[position : position + limit],
        "has_more": has_more,
        "next_page": write_cursor(fingerprint, position + limit) if has_more else None,
    }
    return Page(org, body, position, position + limit, lambda place: write_cursor(fingerprint, place))


def _claude_code_record(org: Org, start: int, actor: Json) -> Json:
    tools = ("edit_tool", "multi_edit_tool", "write_tool", "notebook_edit_tool")
    return {
        "date": _time(start),
        "actor": actor,
        "organization_id": org.cast.org_uuid,
        "customer_type": "api",
        "subscription_type": None,
        "terminal_type": "vscode",
        "core_metrics": {
            "num_sessions": 0,
            "lines_of_code": {"added": 0, "removed": 0},
            "commits_by_claude_code": 0,
            "pull_requests_by_claude_code": 0,
        },
        "tool_actions": {tool: {"accepted": 0, "rejected": 0} for tool in tools},
        "model_breakdown": [],
    }


def _add_model(record: Json, model: str | None, counts: tuple[int, ...]) -> None:
    uncached, cache_read, cache_5m, cache_1h, output, _, requests = counts
    price = catalogue.chat_price("anthropic", model)
    pico = (
        uncached * price.input
        + cache_read * price.cache_read
        + cache_5m * price.write_5m
        + cache_1h * price.write_1h
        + output * price.output
    )
    record["core_metrics"]["num_sessions"] += requests
    record["core_metrics"]["lines_of_code"]["added"] += output // 10
    record["tool_actions"]["edit_tool"]["accepted"] += requests
    record["model_breakdown"].append(
        {
            "model": model,
            "tokens": {
                "input": uncached,
                "output": output,
                "cache_read": cache_read,
                "cache_creation": cache_5m + cache_1h,
            },
            "estimated_cost": {"currency": "USD", "amount": Decimal(_cents(pico))},
        }
    )


def _users(org: Org, query: Query) -> Json:
    query.only((*_LISTING, "email"))
    people = {key.user: key.email for key in org.cast.keys if key.user not in org.gone}
    rows: list[Json] = [
        {
            "id": user,
            "type": "user",
            "email": email,
            "name": org.name_of(user, email.partition("@")[0]),
            "role": "developer",
            "added_at": _time(org.history_from),
        }
        for user, email in people.items()
        if query.one("email") in {None, email}
    ]
    return _listing(rows, query)


def _workspaces(org: Org, query: Query) -> Json:
    """The default workspace is not listed: it has neither a name nor, in the legacy reports, an id."""
    query.only((*_LISTING, "include_archived"))
    rows: list[Json] = [
        {
            "id": workspace,
            "type": "workspace",
            "name": org.name_of(workspace, f"workspace {n}"),
            "created_at": _time(org.history_from),
            "archived_at": _time(org.created_at) if workspace in org.gone else None,
            "display_color": "#6C5BB9",
            "compartment_id": token(workspace),
            "data_residency": {
                "allowed_inference_geos": "unrestricted",
                "default_inference_geo": "global",
                "workspace_geo": "us",
            },
            "external_key_id": None,
            "tags": {},
            "user_profile_id": None,
        }
        for n, workspace in enumerate(org.cast.projects)
        if n and (workspace not in org.gone or query.one("include_archived") == "true")
    ]
    return _listing(rows, query)


def _api_keys(org: Org, query: Query) -> Json:
    """All keys, also those that are no longer in use: Anthropic archives a key, and never deletes one."""
    query.only((*_LISTING, "status", "workspace_id", "created_by_user_id"))
    wanted = {name: query.one(name) for name in ("status", "workspace_id")}
    rows: list[Json] = [
        {
            "id": key.id,
            "type": "api_key",
            "name": org.name_of(key.id, key.name),
            "created_at": _time(org.history_from),
            "created_by": {"id": key.user, "type": "user"},
            "expires_at": None,
            "partial_key_hint": f"sk-ant-api03-{(key.id or '')[-3:]}...AA",
            "principal": None,
            "scope": {"type": "workspace", "workspace_id": key.project},
            "status": "archived" if key.id in org.gone else "active",
            "workspace_id": None if key.project == org.cast.projects[0] else key.project,
        }
        for key in org.cast.keys
        if query.one("created_by_user_id") in {None, key.user}
    ]
    return _listing([row for row in rows if all(value in {None, row[name]} for name, value in wanted.items())], query)


def _listing(rows: list[Json], query: Query) -> Json:
    limit, after, before = _limit(query, 20, 1000), query.one("after_id"), query.one("before_id")
    ids = [row["id"] for row in rows]
    for name, anchor in (("after_id", after), ("before_id", before)):
        if anchor is not None and anchor not in ids:
            raise _invalid(f"{name}: no such object")
    if before is not None:
        end = ids.index(before)
        start = max(0, end - limit)
        has_more = start > 0
    else:
        start = 0 if after is None else ids.index(after) + 1
        end = start + limit
        has_more = end < len(rows)
    shown = rows[start:end]
    return {
        "data": shown,
        "has_more": has_more,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


_PREFIXES: dict[IdKind, str] = {"project": "wrkspc_01", "key": "apikey_01", "user": "user_01"}
VENDOR = Vendor(
    "anthropic",
    lambda kind, digits: uuid_of(digits) if kind == "organization" else _PREFIXES[kind] + digits[:24],
    CHAT["anthropic"],
    ANTHROPIC,
    main="messages",
    bill="cost",
    make=_anthropic_traffic.make,
    charge=_anthropic_traffic.charge,
    key_dim="api_key_id",
    unpriced={"model": "claude-next-9-20261101"},
    novel={"service_tier": "priority_plus"},
    credit={"description": "Credit"},
    says_529=True,
)
SERVICE = Service(VENDOR, (PREFIX,), answer, error_body)
