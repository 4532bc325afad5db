"""LiteLLM's proxy as documented and as its source has it: spend logs, daily activity, keys, people, teams, liveness.

Source: BerriAI/litellm 1.110 (`spend_management_endpoints`, `common_daily_activity`, `key_management_endpoints`) and
docs.litellm.ai. Logs are kept by `startTime`; both ends of a range belong to it; pages are counted from the newest
log unless asked otherwise, so they shift while logs arrive; no more than 10,000 are counted. The totals beside daily
activity are those of its page alone. A log is written a minute after its request. What the documents leave open is
answered so: logs of one instant come in the order of their `request_id`; daily rows of one date by person, key, model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

from daemon.domain.window import from_epoch, rfc3339, to_epoch
from daemon.simulator import catalogue
from daemon.simulator.catalogue import CHAT, DAY, HOUR, LITELLM, dollars
from daemon.simulator.traffic import ApiKey, Cast, Event, IdKind, Made, Profile, Vendor, token, uuid_of
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
    money,
)
from daemon.simulator.world import Cells, Dims, Org, World, group

PREFIXES = ("/spend/", "/user/", "/key/", "/team/", "/v2/team/", "/health/")
COUNT_CAP = 10_000
WRITTEN_AFTER_S = 60
FAILED_SHARE = 0.04
UNATTRIBUTED = "unattributed"

_LOGGED, _SPENT = LITELLM["logs"], LITELLM["activity"]
_DEPLOYMENTS = {
    "gpt-4.1-2025-04-14": ("openai", "gpt-4.1"),
    "gpt-5-mini-2025-08-07": ("azure", "cheap"),
    "claude-sonnet-4-5-20250929": ("anthropic", "smart"),
    "gemini-2.5-flash": ("gemini", "cheap"),
}
_LOG_FILTERS = {
    "api_key": "api_key_id", "user_id": "user_id", "team_id": "team_id", "request_id": "request_id", "model": "model",
    "model_group": "model_group", "end_user": "end_user", "status_filter": "status",
}  # fmt: skip
_SORTS: dict[str, Callable[[_Log], object]] = {
    "startTime": lambda log: log.at_ms,
    "endTime": lambda log: log.end_ms,
    "request_duration_ms": lambda log: log.end_ms - log.at_ms,
    "spend": lambda log: log.counts[0],
    "total_tokens": lambda log: log.counts[1] + log.counts[2],
    "model": lambda log: log.dims[0] or "",
    "ttft_ms": lambda log: log.end_ms - log.at_ms,
}


def make(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> Made:
    """One request through the proxy. What failed is logged as well, with nothing spent."""
    key = people.keys[int(rng.random() * len(people.keys))]
    if "unreported" in profile.sources:
        return (
            "unreported",
            (None,) * len(_SPENT.dims),
            ((1 + int(rng.random() * 100)) * catalogue.CODE_SESSION_PICO, 0),
        )
    model = models[int(rng.random() * len(models))]
    vendor, model_group = _DEPLOYMENTS.get(model, ("openai", model))
    price = catalogue.chat_price("litellm", model)
    fresh = 1 + int(rng.random() * 4000)
    read = int(fresh * 2 * rng.random()) if rng.random() < 0.5 else 0
    write = int(fresh * rng.random()) if read and price.write_5m else 0
    completion = 1 + int(rng.random() * 1200)
    pico = fresh * price.input + read * price.cache_read + write * price.write_5m + completion * price.output
    # `prompt_tokens` is all input, whatever the vendor calls it.
    counts: tuple[int, ...] = (pico, fresh + read + write, completion, read, write, 1)
    status, upstream = "success", vendor or None
    if rng.random() < FAILED_SHARE:
        counts, status, upstream = (0, 0, 0, 0, 0, 1), "failure", None
    end_user = f"customer-{int(rng.random() * 3)}" if rng.random() < 0.3 else ""
    request_id = f"chatcmpl-{rng.getrandbits(96):024x}"
    # The master key has neither a person nor a team.
    who = (key.id, key.user, key.project) if rng.random() > 0.05 else (people.org_id, "default_user_id", None)
    return "logs", (model, upstream, *who, model_group, end_user, status, request_id), counts


def charge(source: str, event: Event, _: Profile) -> Iterator[Event]:
    """What the proxy adds to its day for one log."""
    if source == "unreported":
        yield event
        return
    dims = tuple(event.dims[_LOGGED.at(dim)] for dim in _SPENT.dims)
    yield Event(event.at, event.visible_at, dims, (event.counts[0], event.counts[-1]))


def answer(world: World, request: Request, headers: Headers) -> Reply:
    """One request. Liveness needs no key."""
    headers += [("x-litellm-call-id", uuid_of(token(request.path, request.query, world.clock.now(), length=64)))]
    parts = request.path.strip("/").split("/")
    if request.method != "GET":
        raise _detail(405, "Method Not Allowed")
    match parts:
        case ["health", "liveliness" | "liveness"]:
            return Reply(headers=headers, body=encode("I'm alive!"))
        case ["health", "readiness"]:
            return Reply(headers=headers, body=encode({"status": "healthy", "db": "connected"}))
    org = _authenticate(world, request, parts)
    query = Query(request.query)
    match parts:
        case ["spend", "logs", "v2" | "ui" as route]:
            return Reply(headers=headers, page=_logs(org, query, is_v2=route == "v2"))
        case ["user", "daily", "activity"]:
            body: object = _daily_activity(org, query)
        case ["key", "list"]:
            body = _keys(org, query)
        case ["user", "list"]:
            body = _users(org, query)
        case ["team", "list"]:
            query.only(("user_id", "organization_id"))
            body = _teams(org)
        case ["v2", "team", "list"]:
            body = _team_pages(org, query)
        case _:
            raise _detail(404, "Not Found")
    return Reply(headers=headers, body=encode(body))


def error_body(refused: RefusedError, _: Reply) -> bytes:
    """The proxy's own errors, or those of the framework under it, which have no `error` at their top."""
    if refused.kind == "detail":
        return encode({"detail": {"error": refused.message}})
    if refused.kind == "validation":
        problem = {"type": "value_error", "loc": ["query", refused.param], "msg": refused.message}
        return encode({"detail": [problem]})
    error = {"message": refused.message, "type": refused.kind, "param": refused.param, "code": str(refused.status)}
    return encode({"error": error})


def _detail(status: int, message: str) -> RefusedError:
    return RefusedError(status, "detail", message)


def _bad(message: str, param: str | None = None) -> RefusedError:
    return RefusedError(400, "bad_request", message, param=param)


def _authenticate(world: World, request: Request, parts: list[str]) -> Org:
    key = bearer(request)
    if not key.startswith("sk-"):
        raise RefusedError(401, "auth_error", "Authentication Error, LiteLLM Virtual Key expected.", param="None")
    if "noscope" in key:
        # A key that is no admin's: the spend routes call that unauthenticated, the others forbid it.
        if parts[0] == "spend":
            raise RefusedError(401, "auth_error", "Authentication Error, Only proxy admins may see all spend.")
        raise _detail(403, "Only proxy admins may list this.")
    return world.org(VENDOR, key)


# ── Logs ────────────────────────────────────────────────────────────────────────────────────────


class _Log(NamedTuple):
    at_ms: int
    end_ms: int
    dims: Dims
    counts: tuple[int, ...]


def _written(org: Org, start: int, end: int) -> Iterable[_Log]:
    """The logs of `start <= startTime < end` that are there now. What corrects a request's log adds to its counts."""
    now = org.clock.now()
    for hour in range(start // HOUR * HOUR, min(end, now + 1), HOUR):
        known: dict[Dims, Event] = {}
        for event in org.events("logs", hour):
            if event.visible_at > now:
                continue
            first = known.get(event.dims)
            if first is not None:
                sums = tuple(a + b for a, b in zip(first.counts, event.counts, strict=True))
                event = first._replace(counts=sums)  # noqa: PLW2901  # the one log that there is
            known[event.dims] = event
        for event in known.values():
            if start <= event.at < end and any(event.counts):
                digest = int(token(event.dims[-1], length=8), 16)
                # Some requests start on the very second, where two ranges meet.
                at_ms = event.at * 1000 + (digest % 1000 if digest % 4 else 0)
                yield _Log(at_ms, at_ms + 200 + digest % 9000, event.dims, event.counts)


def _instant(query: Query, name: str, *, is_v2: bool) -> int:
    text = (query.one(name) or "").strip()
    formats = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d") if is_v2 else ("%Y-%m-%d %H:%M:%S",)
    for each in formats:
        try:
            return to_epoch(datetime.strptime(text, each).replace(tzinfo=UTC))
        except ValueError:
            continue
    if not text:
        raise _bad("Start date and end date are required")
    raise _bad(f"Invalid date format: {text}. Expected: 'YYYY-MM-DD HH:MM:SS'")


def _number(query: Query, name: str, default: int, most: int | None) -> int:
    number = query.whole(name)
    if number is None:
        return default
    if number < 1 or (most is not None and number > most):
        limit = "greater than or equal to 1" if number < 1 else f"less than or equal to {most}"
        raise RefusedError(422, "validation", f"Input should be {limit}", param=name)
    return number


def _logs(org: Org, query: Query, *, is_v2: bool) -> Page:
    query.only(("start_date", "end_date", "page", "page_size", "sort_by", "sort_order", *_LOG_FILTERS))
    page = _number(query, "page", 1, None)
    size = _number(query, "page_size", 50, org.profile.page_rows_max)
    sort_by, order = query.one("sort_by") or "startTime", (query.one("sort_order") or "desc").lower()
    if sort_by not in _SORTS or order not in {"asc", "desc"}:
        raise _bad(f"Invalid sort_by or sort_order: {sort_by}, {order}", "sort_by")
    start = _instant(query, "start_date", is_v2=is_v2)
    end = _instant(query, "end_date", is_v2=is_v2)
    wanted = [(_LOGGED.at(dim), query.one(name)) for name, dim in _LOG_FILTERS.items() if query.one(name) is not None]
    found = [
        log
        for log in _written(org, start, end + 1)
        if log.at_ms <= end * 1000 and all(log.dims[place] == value for place, value in wanted)
    ]
    found.sort(key=lambda log: log.dims[-1] or "")
    found.sort(key=_SORTS[sort_by], reverse=order == "desc")  # type: ignore[arg-type]  # each sort is of one type
    total = min(len(found), COUNT_CAP)
    shown = [_log_row(org, log) for log in found[(page - 1) * size : page * size]]
    if org.wire.duplicate_rows:
        shown = [copy for row in shown for copy in (row, dict(row))]  # the same log, as when pages shift
    body: Json = {
        "data": [_bent(org, row) for row in shown],
        "total": total,
        "page": page,
        "page_size": size,
        "total_pages": -(-total // size),
        "total_is_capped": len(found) > COUNT_CAP,
    }
    return Page(org, body)


def _time(at_ms: int) -> str:
    return (from_epoch(at_ms // 1000) + timedelta(milliseconds=at_ms % 1000)).isoformat(timespec="milliseconds")


def _log_row(org: Org, log: _Log) -> Json:
    model, vendor, key, user, team, model_group, end_user, status, request_id = log.dims
    amount, prompt, completion, *_ = log.counts
    is_failed = status == "failure"
    return {
        "request_id": request_id,
        "litellm_call_id": uuid_of(token(request_id, length=64)),
        "call_type": "acompletion",
        "api_key": key,
        "spend": dollars(amount),
        "total_tokens": prompt + completion,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "startTime": _time(log.at_ms),
        "endTime": _time(log.end_ms),
        "completionStartTime": _time(log.end_ms),
        "request_duration_ms": log.end_ms - log.at_ms,
        "model": model,
        "model_id": "" if is_failed else token("deployment", model, length=64),
        "model_group": "" if is_failed else model_group,
        "custom_llm_provider": vendor or "",
        "api_base": f"https://{vendor}.example/v1" if vendor else "",
        "user": user,
        "metadata": _metadata(org, log),
        "cache_hit": "False",
        "cache_key": "Cache OFF",
        "request_tags": [],
        "team_id": team,
        "organization_id": None,
        "end_user": end_user,
        "requester_ip_address": "192.0.2.1",
        "session_id": uuid_of(token("session", request_id, length=64)),
        "status": status,
        "mcp_namespaced_tool_name": None,
        "agent_id": None,
    }


def _metadata(org: Org, log: _Log) -> Json:
    """Where the cache shows: beside the common names, the vendors that count so have `prompt_tokens_details`."""
    _, prompt, completion, read, write, _ = log.counts
    _, vendor, key, user, team, *_ = log.dims
    used: Json | None = None
    extra: Json = {}
    if log.dims[_LOGGED.at("status")] != "failure":
        details = {"cached_tokens": read, "audio_tokens": None}
        extra = {"prompt_tokens_details": details, "completion_tokens_details": None}
        if vendor == "anthropic" or read:
            extra["cache_read_input_tokens"] = read
        if vendor == "anthropic" or write:
            extra["cache_creation_input_tokens"] = write
        used = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **extra}
    name = next((known.name for known in org.cast.keys if known.id == key), None)
    return {
        "status": log.dims[_LOGGED.at("status")],
        "user_api_key": key,
        "user_api_key_alias": None if name is None else org.name_of(key, name),
        "user_api_key_user_id": user,
        "user_api_key_team_id": team,
        "additional_usage_values": extra,
        "usage_object": used,
        "error_information": {"error_code": "429", "error_class": "RateLimitError"} if used is None else None,
    }


def _bent(org: Org, row: Json) -> Json:
    if org.wire.money_format != "number":
        row["spend"] = money(row["spend"], org.wire.money_format)
    if org.wire.missing_optional_fields:
        row = {name: value for name, value in row.items() if value is not None and name not in _OPTIONAL}
    if org.wire.unknown_fields:
        row |= {"hologram_tokens": 7, "billing_hint": {"nested": [1, None]}}
    return row


_OPTIONAL = ("litellm_call_id", "request_duration_ms", "session_id", "model_group", "organization_id", "agent_id")


# ── Daily activity ──────────────────────────────────────────────────────────────────────────────


class _Daily(NamedTuple):
    """One row of the table behind it: a date, and who used what."""

    date: int
    user: str
    key: str
    model: str
    model_group: str
    vendor: str


_Sums = dict[str, Decimal | int]
_ROW_DIMS = ("user_id", "api_key_id", "model", "model_group", "upstream")
_METRICS = (
    "spend", "flat_cost", "prompt_tokens", "completion_tokens", "total_tokens", "cache_read_input_tokens",
    "cache_creation_input_tokens", "api_requests", "successful_requests", "failed_requests",
)  # fmt: skip


def _date(query: Query, name: str) -> int:
    text = query.one(name)
    if text is None:
        raise _detail(400, "Please provide start_date and end_date")
    try:
        return to_epoch(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC))
    except ValueError:
        raise _detail(400, f"{name}: expected a date such as 2026-11-21") from None


def _daily_activity(org: Org, query: Query) -> Json:
    """Pages of the table's rows: a date may be split between two pages, and the totals are the page's."""
    query.only(("start_date", "end_date", "model", "api_key", "user_id", "page", "page_size", "timezone"))
    start, end = _date(query, "start_date"), _date(query, "end_date") + DAY
    page, size = _number(query, "page", 1, None), _number(query, "page_size", 50, 1000)
    wanted = {"model": query.one("model"), "key": query.one("api_key"), "user": query.one("user_id")}
    table = {
        row: sums
        for date in range(start, min(end, org.clock.now() + 1), DAY)
        for row, sums in _table(org, date).items()
        if all(value in {None, getattr(row, name)} for name, value in wanted.items())
    }
    rows = sorted(table, key=lambda row: (-row.date, *row[1:]))
    shown = rows[(page - 1) * size : page * size]
    totals = _added(table[row] for row in shown)
    return {
        "results": [
            _day(org, date, {row: table[row] for row in shown if row.date == date})
            for date in dict.fromkeys(row.date for row in shown)
        ],
        "metadata": {
            **{f"total_{name.removeprefix('total_')}": value for name, value in totals.items()},
            "page": page,
            "total_pages": -(-len(rows) // size),
            "has_more": page * size < len(rows),
        },
    }


def _table(org: Org, date: int) -> dict[_Daily, _Sums]:
    """One date: what its logs used, and what the proxy booked for them."""

    def grouped(source: str) -> Cells:
        return group(LITELLM[source], org.cells(source, date, date + DAY), (*_ROW_DIMS, *_STATUS[source]))

    parts: dict[_Daily, list[_Sums]] = {}
    for source in _STATUS:
        for dims, counts in grouped(source).items():
            user, key, model, model_group, vendor = (value or "" for value in dims[:5])
            row = _Daily(date, user, key or UNATTRIBUTED, model, model_group, vendor or "unknown")
            parts.setdefault(row, []).append(_metrics(dims, counts))
    return {row: _added(sums) for row, sums in parts.items()}


_STATUS = {"logs": ("status",), "activity": ()}


def _metrics(dims: Dims, counts: tuple[int, ...]) -> _Sums:
    if len(counts) == len(_SPENT.counts):
        # What no log explains is a flat fee, which belongs to nobody.
        return {"spend" if any(dims) else "flat_cost": dollars(counts[0])}
    _, prompt, completion, read, write, requests = counts
    failed = requests if dims[-1] == "failure" else 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": write,
        "api_requests": requests,
        "successful_requests": requests - failed,
        "failed_requests": failed,
    }


def _added(parts: Iterable[_Sums]) -> _Sums:
    sums: _Sums = dict.fromkeys(_METRICS, 0) | {"spend": Decimal(0), "flat_cost": Decimal(0)}
    for part in parts:
        for name, value in part.items():
            sums[name] += value
    return sums


def _day(org: Org, date: int, rows: dict[_Daily, _Sums]) -> Json:
    """A day in all, and cut in several ways, none of which shows the flat fee."""
    logged = {row: sums for row, sums in rows.items() if row.key != UNATTRIBUTED}

    def cut(part: str) -> dict[str, dict[_Daily, _Sums]]:
        values: dict[str, dict[_Daily, _Sums]] = {}
        for row, sums in logged.items():
            values.setdefault(getattr(row, part), {})[row] = sums
        return values

    def by_key(some: dict[_Daily, _Sums]) -> dict[str, Json]:
        return {
            key: {
                "metrics": _added(sums for row, sums in some.items() if row.key == key),
                "metadata": _key_metadata(org, key),
            }
            for key in dict.fromkeys(row.key for row in some)
        }

    breakdown: Json = {
        name: {
            value: {"metrics": _added(some.values()), "metadata": {}, "api_key_breakdown": by_key(some)}
            for value, some in cut(part).items()
        }
        for name, part in (("models", "model"), ("model_groups", "model_group"), ("providers", "vendor"))
    }
    breakdown |= {"api_keys": by_key(logged), "endpoints": {}, "mcp_servers": {}, "entities": {}}
    return {"date": from_epoch(date).strftime("%Y-%m-%d"), "metrics": _added(rows.values()), "breakdown": breakdown}


def _key_metadata(org: Org, key: str) -> Json:
    known = next((each for each in org.cast.keys if each.id == key), None)
    if known is None:
        return {"key_alias": None, "team_id": None}
    return {"key_alias": org.name_of(key, known.name), "team_id": known.project}


# ── Names ───────────────────────────────────────────────────────────────────────────────────────


def _keys(org: Org, query: Query) -> Json:
    """Hashes, or on demand all that is known of each key. The deleted ones are kept apart."""
    query.only(("page", "size", "status", "return_full_object", "include_team_keys", "include_created_by_keys",
                "user_id", "team_id", "key_hash", "key_alias", "sort_by", "sort_order"))  # fmt: skip
    page, size = _number(query, "page", 1, None), _number(query, "size", 10, 100)
    status = query.one("status")
    if status not in {None, "active", "expired", "revoked", "deleted"}:
        raise _detail(400, "Invalid status value. Supported: 'active', 'expired', 'revoked', 'deleted'.")
    wanted = {"user": query.one("user_id"), "project": query.one("team_id"), "id": query.one("key_hash")}
    known = [
        key
        for key in org.cast.keys
        if (key.id in org.gone) == (status == "deleted")
        and status not in {"expired", "revoked"}
        and all(value in {None, getattr(key, name)} for name, value in wanted.items())
    ]
    is_full = (query.one("return_full_object") or "").lower() == "true"
    shown = known[(page - 1) * size : page * size]
    return {
        "keys": [_key_row(org, key) if is_full else key.id for key in shown],
        "total_count": len(known),
        "current_page": page,
        "total_pages": -(-len(known) // size),
    }


def _key_row(org: Org, key: ApiKey) -> Json:
    return {
        "token": key.id,
        "key_name": f"sk-...{(key.id or '')[-4:]}",
        "key_alias": org.name_of(key.id, key.name),
        "spend": 0.0,
        "expires": None,
        "models": [],
        "user_id": key.user,
        "team_id": key.project,
        "created_at": rfc3339(from_epoch(org.history_from)),
        "blocked": None,
        "metadata": {},
        "org_id": None,
    }


def _users(org: Org, query: Query) -> Json:
    query.only(("page", "page_size", "role", "user_ids", "user_email", "team", "sort_by", "sort_order"))
    page, size = _number(query, "page", 1, None), _number(query, "page_size", 25, 100)
    people = {key.user: key for key in org.cast.keys if key.user not in org.gone}
    rows = [
        {
            "user_id": user,
            "user_alias": org.name_of(user, key.email.partition("@")[0]),
            "user_email": key.email,
            "user_role": "internal_user",
            "teams": [key.project],
            "spend": 0.0,
            "max_budget": None,
            "created_at": rfc3339(from_epoch(org.history_from)),
            "key_count": sum(other.user == user for other in org.cast.keys),
        }
        for user, key in people.items()
    ]
    return {
        "users": rows[(page - 1) * size : page * size],
        "total": len(rows),
        "page": page,
        "page_size": size,
        "total_pages": -(-len(rows) // size),
    }


def _team_pages(org: Org, query: Query) -> Json:
    query.only(("page", "page_size", "user_id", "organization_id", "team_id", "team_alias", "sort_by", "sort_order"))
    page, size = _number(query, "page", 1, None), _number(query, "page_size", 10, 100)
    rows = _teams(org)
    return {
        "teams": rows[(page - 1) * size : page * size],
        "total": len(rows),
        "page": page,
        "page_size": size,
        "total_pages": -(-len(rows) // size),
    }


def _teams(org: Org) -> list[Json]:
    return [
        {
            "team_id": team,
            "team_alias": org.name_of(team, f"team {n}"),
            "organization_id": None,
            "spend": 0.0,
            "max_budget": None,
            "blocked": False,
            "models": [],
            "members_with_roles": [],
            "created_at": rfc3339(from_epoch(org.history_from)),
            "team_memberships": [],
            "keys": [],
        }
        for n, team in enumerate(org.cast.projects)
        if team not in org.gone
    ]


def _identify(kind: IdKind, digits: str) -> str:
    return digits if kind in {"key", "organization"} else uuid_of(digits)


VENDOR = Vendor(
    "litellm",
    _identify,
    CHAT["litellm"],
    LITELLM,
    main="logs",
    bill="activity",
    make=make,
    charge=charge,
    key_dim="api_key_id",
    unpriced={"model": "next-9-20261101"},
    novel={"upstream": "hologram"},
    credit={},
    late_s=WRITTEN_AFTER_S,
)
SERVICE = Service(VENDOR, PREFIXES, answer, error_body)
