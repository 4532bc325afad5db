"""OpenRouter's management API as documented: activity, credits, keys, workspaces, and what the calling key is.

Source: the official SDK 1.3.84, which is generated from OpenRouter's own OpenAPI document, and its reference pages.
What they leave open is answered so: activity comes newest day first; a `date` that is no completed day of the last
thirty, today included, is a 400; a page of keys or workspaces holds a hundred unless `limit` says less; a deleted key
is gone from the list, and a 404 by its hash. The credits move with what is billed (`cost_late_s`).
`POST /analytics/query` is not simulated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from daemon.domain.window import from_epoch, rfc3339, to_epoch
from daemon.simulator import catalogue
from daemon.simulator.catalogue import CHAT, DAY, OPENROUTER, Source, dollars
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
    halves,
    matcher,
    money,
)
from daemon.simulator.world import Cells, Dims, Org, World, group

PREFIX = "/api/v1/"
ACTIVITY_DAYS = 30
PAGE_ROWS = 100
_GAUGES = tuple(name + span for name in ("usage", "byok_usage") for span in ("", "_daily", "_weekly", "_monthly"))
BYOK_FEE_PERCENT = 5
"""What OpenRouter itself takes of a request that the customer's own key at the vendor pays for."""

_ACTIVITY, _COSTS = OPENROUTER["activity"], OPENROUTER["costs"]
_ENDPOINTS = {
    "openai/gpt-4.1-2025-04-14": ("openai/gpt-4.1", "OpenAI", "openai"),
    "openai/gpt-5-mini-2025-08-07": ("openai/gpt-5-mini", "Azure", "azure"),
    "anthropic/claude-4.5-sonnet-20250929": ("anthropic/claude-sonnet-4.5", "Anthropic", "anthropic"),
    "google/gemini-2.5-flash": ("google/gemini-2.5-flash", "Google AI Studio", "gemini"),
    "deepseek/deepseek-chat-v3.1": ("deepseek/deepseek-chat-v3.1", "DeepInfra", "deepinfra"),
}
"""By permaslug: the slug, who serves it, and the vendor that is paid for it, as it calls itself."""

_SHOWN = ("model", "model_permaslug", "endpoint_id", "provider_name")
_FILTERS = ("api_key_hash", "user_id", "workspace_id")


def make(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> Made:
    """One request. Now and then a replayed answer counts more tokens as cached than it had in its prompt."""
    key = people.keys[int(rng.random() * len(people.keys))]
    permaslug = models[int(rng.random() * len(models))]
    slug, served_by, _ = _ENDPOINTS.get(permaslug, (permaslug, "Nebula", "nebula"))
    prompt = 1 + int(rng.random() * 4000)
    cached = int(prompt * rng.random()) if rng.random() < 0.4 else 0
    if rng.random() < 0.03:
        cached = prompt + 1 + int(rng.random() * 2000)
    completion = 1 + int(rng.random() * 1200)
    reasoning = completion // 2 if "gpt-5" in permaslug else 0
    billing = "byok" if rng.random() * 100 < profile.byok_percent else "credits"
    endpoint = uuid_of(token("endpoint", permaslug, length=64))
    dims = (slug, permaslug, endpoint, served_by, key.project, key.id, key.user)
    if "unreported" in profile.sources:
        return "unreported", (*dims, "credits", None), (completion * catalogue.WEB_SEARCH_PICO, 1)
    return "activity", (*dims, billing), (1, prompt, completion, reasoning, cached)


def charge(source: str, event: Event, _profile: Profile) -> Iterator[Event]:
    """What is taken from the credits; and what the vendor takes for a request with the customer's own key."""
    if source == "unreported":
        yield event
        return
    *endpoint, billing = event.dims
    requests, prompt, completion, _, cached = event.counts
    price = catalogue.chat_price("openrouter", event.dims[_ACTIVITY.at("model_permaslug")])
    read = min(prompt, cached) if prompt >= 0 else max(prompt, cached)  # a correction is negative throughout
    pico = (prompt - read) * price.input + read * price.cache_read + completion * price.output

    def line(billed: str, upstream: str | None, amount: int, count: int) -> Event:
        return Event(event.at, event.visible_at, (*endpoint, billed, upstream), (amount, count))

    if billing != "byok":
        yield line("credits", None, pico, requests)
        return
    yield line("credits", None, pico * BYOK_FEE_PERCENT // 100, requests)
    yield line("byok", _upstream(event.dims), pico, 0)


def _upstream(dims: Dims) -> str | None:
    known = {served_by: upstream for _, served_by, upstream in _ENDPOINTS.values()}
    served_by = dims[_ACTIVITY.at("provider_name")]
    return known.get(served_by or "", (served_by or "").lower() or None)


def answer(world: World, request: Request, headers: Headers) -> Reply:
    """One request below `/api/v1/`."""
    headers += [("x-request-id", token(request.path, request.query, world.clock.now(), length=32))]
    key = bearer(request)
    if not key.startswith("sk-or-v1-"):
        raise _refused(401, "Missing Authentication header" if not key else "User not found.")
    org = world.org(VENDOR, key)
    if request.method != "GET":
        raise _refused(405, "Method Not Allowed")
    parts = request.path.removeprefix(PREFIX).strip("/").split("/")
    if parts != ["key"] and not _manages(key):
        raise _refused(403, "Only management keys can perform this operation")
    query = Query(request.query)
    match parts:
        case ["activity"]:
            return Reply(headers=headers, page=Page(org, {"data": _activity(org, query)}))
        case ["credits"]:
            body: object = _credits(org, query)
        case ["key"]:
            body = _current_key(org, query)
        case ["keys"]:
            body = {"data": _keys(org, query)}
        case ["keys", digest]:
            body = _key(org, digest)
        case ["workspaces"]:
            body = _workspaces(org, query)
        case _:
            raise _refused(404, "Not Found")
    return Reply(headers=headers, body=encode(body))


def error_body(refused: RefusedError, _: Reply) -> bytes:
    return encode({"error": {"code": refused.status, "message": refused.message}})


def _refused(status: int, message: str) -> RefusedError:
    return RefusedError(status, "", message)


def _manages(key: str) -> bool:
    return "noscope" not in key


def _days(org: Org, query: Query) -> Sequence[int]:
    """The completed days that are asked for, newest first."""
    today = org.clock.now() // DAY * DAY
    known = range(today - DAY, today - (ACTIVITY_DAYS + 1) * DAY, -DAY)
    date = query.one("date")
    if date is None:
        return known
    try:
        day = to_epoch(datetime.strptime(date, "%Y-%m-%d").replace(tzinfo=UTC))
    except ValueError:
        raise _refused(400, "Invalid date format. Use YYYY-MM-DD.") from None
    if day not in known:
        raise _refused(400, f"Date must be within the last {ACTIVITY_DAYS} (completed) UTC days.")
    return [day]


def _activity(org: Org, query: Query) -> list[Json]:
    query.only(("date", "group_by", *_FILTERS))
    grouping = query.one("group_by")
    if grouping not in {None, "workspace"}:
        raise _refused(400, "group_by: expected workspace")
    workspace = query.one("workspace_id")
    if workspace is not None and workspace not in org.cast.projects:
        raise _refused(404, "Workspace not found")
    shown = (*_SHOWN, "workspace_id") if grouping else _SHOWN
    wanted = {dim: frozenset(query.many(dim)) for dim in _FILTERS if query.many(dim)}
    rows: list[Json] = []
    for day in _days(org, query):
        for dims, metrics in _endpoints(org, day, shown, wanted).items():
            row = {"date": from_epoch(day).strftime("%Y-%m-%d"), **dict(zip(shown, dims, strict=True)), **metrics}
            rows += halves(row) if org.wire.duplicate_rows else [row]
    return [_bent(org, row) for row in rows]


def _endpoints(
    org: Org, day: int, shown: tuple[str, ...], wanted: Mapping[str, frozenset[str | None]]
) -> dict[Dims, Json]:
    """One day by endpoint: what was used, and what it cost by either bill."""

    def grouped(source: Source, **more: str) -> Cells:
        only = {**wanted, **{dim: frozenset([value]) for dim, value in more.items()}}
        keep = matcher([(source.at(dim), values) for dim, values in only.items()])
        return group(source, org.cells(source.name, day, day + DAY), shown, keep)

    used, by_credits, by_vendor = (
        grouped(_ACTIVITY), grouped(_COSTS, billing="credits"), grouped(_COSTS, billing="byok"),
    )  # fmt: skip
    rows: dict[Dims, Json] = {}
    for dims in sorted({*used, *by_credits, *by_vendor}, key=str):
        requests, prompt, completion, reasoning, cached = used.get(dims, (0,) * 5)
        rows[dims] = {
            "usage": dollars(by_credits.get(dims, (0,))[0]),
            "byok_usage_inference": dollars(by_vendor.get(dims, (0,))[0]),
            "requests": requests,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "reasoning_tokens": reasoning,
            "cached_tokens": cached,
        }
    return rows


def _bent(org: Org, row: Json) -> Json:
    if org.wire.money_format != "number":
        row |= {name: money(row[name], org.wire.money_format) for name in ("usage", "byok_usage_inference")}
    if org.wire.missing_optional_fields:  # the oldest answers did not count what was cached
        row = {name: value for name, value in row.items() if value is not None and name != "cached_tokens"}
    if org.wire.unknown_fields:
        row |= {"hologram_tokens": 7, "billing_hint": {"nested": [1, None]}}
    return row


def _credits(org: Org, query: Query) -> Json:
    """What was ever bought, in whole hundreds, and what was used of it so far, today included."""
    query.only(())
    used = sum(gauges["usage"] for gauges in _spent(org).values())
    bought = (used // (100 * catalogue.PICO) + 1) * 100
    return {"data": {"total_credits": bought, "total_usage": dollars(used)}}


def _spent(org: Org) -> dict[str | None, dict[str, int]]:
    """The gauges of each key: what it used ever, today, since Monday, and this month."""
    today = org.clock.now() // DAY * DAY
    date = from_epoch(today)
    since = {
        "": 0, "_daily": today, "_weekly": today - date.weekday() * DAY, "_monthly": today - (date.day - 1) * DAY,
    }  # fmt: skip
    sums: dict[str | None, dict[str, int]] = {key.id: dict.fromkeys(_GAUGES, 0) for key in org.cast.keys}
    for day in org.starts(_COSTS, 0, org.clock.now() + 1):
        cells = group(_COSTS, org.cells("costs", day, day + DAY), ("api_key_hash", "billing"))
        for (key, billing), counts in cells.items():
            gauges = sums.setdefault(key, dict.fromkeys(_GAUGES, 0))
            for suffix, start in since.items():
                if day >= start:
                    gauges[("byok_usage" if billing == "byok" else "usage") + suffix] += counts[0]
    return sums


def _offset(query: Query) -> tuple[int, int]:
    offset, limit = query.whole("offset") or 0, query.whole("limit")
    limit = PAGE_ROWS if limit is None else limit
    if offset < 0 or not 1 <= limit <= PAGE_ROWS:
        raise _refused(400, f"offset: expected 0 or more; limit: expected 1 to {PAGE_ROWS}")
    return offset, limit


def _keys(org: Org, query: Query) -> list[Json]:
    """The keys of one workspace, the default one unless another is named."""
    query.only(("offset", "include_disabled", "include_expired", "workspace_id"))
    offset, limit = _offset(query)
    workspace = query.one("workspace_id") or org.cast.projects[0]
    spent = _spent(org)
    kept = [key for key in org.cast.keys if key.project == workspace and key.id not in org.gone]
    return [_key_row(org, key, spent[key.id]) for key in kept[offset : offset + limit]]


def _key(org: Org, digest: str) -> Json:
    key = next((key for key in org.cast.keys if key.id == digest and digest not in org.gone), None)
    if key is None:
        raise _refused(404, "API key not found")
    return {"data": _key_row(org, key, _spent(org)[key.id])}


def _key_row(org: Org, key: ApiKey, spent: dict[str, int]) -> Json:
    created = rfc3339(from_epoch(org.history_from))
    return {
        "hash": key.id,
        "name": org.name_of(key.id, key.name),
        "label": f"sk-or-v1-{(key.id or '')[:3]}...{(key.id or '')[-3:]}",
        "disabled": False,
        "limit": None,
        "limit_remaining": None,
        "limit_reset": None,
        "include_byok_in_limit": False,
        **{name: dollars(pico) for name, pico in spent.items()},
        "created_at": created,
        "updated_at": created,
        "expires_at": None,
        "last_used_at": None,
        "creator_user_id": key.user,
        "external_user": None,
        "workspace_id": key.project,
    }


def _current_key(org: Org, query: Query) -> Json:
    """Any key may ask what it is itself. The one that asks has used nothing: it does not run inference here."""
    query.only(())
    manages = _manages(org.key)
    return {
        "data": {
            "label": org.key[:12] + "..." + org.key[-3:],
            "limit": None,
            "limit_remaining": None,
            "limit_reset": None,
            "include_byok_in_limit": False,
            **dict.fromkeys(_GAUGES, 0),
            "is_free_tier": False,
            "is_management_key": manages,
            "is_provisioning_key": manages,
            "organization_id": org.cast.org_id,
            "creator_user_id": org.cast.keys[0].user,
            "workspace_id": org.cast.projects[0],
            "expires_at": None,
            "allowed_data_regions": ["global"],
            "budgets": [],
            "effective_budget": None,
            "free_model_daily_requests": {"limit": 1000, "remaining": 1000, "used": 0},
            "rate_limit": {"requests": -1, "interval": "10s", "note": "This field is deprecated."},
        }
    }


def _workspaces(org: Org, query: Query) -> Json:
    query.only(("offset", "limit"))
    offset, limit = _offset(query)
    created = rfc3339(from_epoch(org.history_from))
    rows = [
        {
            "id": workspace,
            "name": org.name_of(workspace, f"workspace {n}" if n else "Default Workspace"),
            "slug": f"workspace-{n}" if n else "default",
            "description": None,
            "created_at": created,
            "created_by": org.cast.keys[0].user,
            "updated_at": None,
            "default_guardrail_id": uuid_of(token("guardrail", workspace, length=64)),
            "default_image_model": None,
            "default_provider_sort": None,
            "default_text_model": None,
            "io_logging_api_key_ids": None,
            "io_logging_sampling_rate": 1,
            "is_data_discount_logging_enabled": False,
            "is_observability_broadcast_enabled": False,
            "is_observability_io_logging_enabled": False,
        }
        for n, workspace in enumerate(org.cast.projects)
        if workspace not in org.gone
    ]
    return {"data": rows[offset : offset + limit], "total_count": len(rows)}


def _identify(kind: IdKind, digits: str) -> str:
    match kind:
        case "project":
            return uuid_of(digits)
        case "key":
            return digits
        case "user":
            return "user_2" + digits[:26]
        case "organization":
            return "org_2" + digits[:26]


VENDOR = Vendor(
    "openrouter",
    _identify,
    CHAT["openrouter"],
    OPENROUTER,
    main="activity",
    bill="costs",
    make=make,
    charge=charge,
    key_dim="endpoint_id",
    unpriced={"model_permaslug": "nebula/next-9-20261101", "model": "nebula/next-9"},
    novel={"provider_name": "Hologram"},
    credit={"model": "credit", "model_permaslug": "credit", "endpoint_id": "credit", "provider_name": "OpenRouter",
            "billing": "credits"},
    says_529=True,
)  # fmt: skip
SERVICE = Service(VENDOR, (PREFIX,), answer, error_body)
