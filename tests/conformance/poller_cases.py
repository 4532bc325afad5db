"""The sources of OpenAI and Anthropic, for the suite that every poller passes."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from daemon.domain.record import Row
from daemon.domain.window import rfc3339, to_epoch
from daemon.pollers.anthropic import AnthropicPoller
from daemon.pollers.openai import OpenAIPoller
from daemon.testing.poller_cases import NOW, Bucket, Case, Script, Wire

# ── OpenAI ──────────────────────────────────────────────────────────────────────────────────────

OPENAI = OpenAIPoller(now=lambda: NOW)


def openai_page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
    data = [
        {"object": "bucket", "start_time": to_epoch(start), "end_time": to_epoch(end), "results": rows}
        for start, end, rows in buckets
    ]
    return {"object": "page", "data": data, "has_more": has_more, "next_page": cursor}


def openai_error(code: str) -> Wire:
    return {"error": {"message": "refused", "type": "invalid_request_error", "param": "group_by", "code": code}}


def _openai(source: str, numbers: Wire, means: dict[str, Any], required: str, optional: str | None = None) -> Case:
    grain = OPENAI.grain(source, {})
    varied = "project_id"

    def dims(n: int) -> dict[str, str | None]:
        return {name: f"p{n}" if name == varied else None for name in grain.group_by}

    return Case(
        id=f"openai-{source}",
        poller=OPENAI,
        source=source,
        row=lambda n: {"object": "x", **numbers, **dims(n)},
        means=lambda n: Row(tuple(sorted(dims(n).items())), **means),
        page=openai_page,
        error=openai_error,
        required=required,
        optional=optional,
        has_empty_buckets=True,
    )


def _counting(source: str, name: str, unit: str, requests: str | None = "num_model_requests") -> Case:
    numbers = {name: 12} | ({requests: 3} if requests else {})
    means = {"quantity": Decimal(12), "unit": unit, "requests": 3 if requests else None}
    return _openai(source, numbers, means, name, requests)


_TOKENS = {
    "input_tokens": 100,
    "input_cached_tokens": 40,
    "input_cache_write_tokens": 10,
    "output_tokens": 7,
    "num_model_requests": 3,
}
_TOKENS_MEAN = {
    "input_tokens": 100,
    "cache_read_tokens": 40,
    "cache_write_tokens": 10,
    "output_tokens": 7,
    "requests": 3,
}


def _openai_costs() -> Case:
    def dims(n: int) -> dict[str, str | None]:
        return {"project_id": None, "line_item": f"gpt-5, input: {n}", "api_key_id": None}

    def row(n: int) -> Wire:
        return {"object": "organization.costs.result", "amount": {"value": 1.25, "currency": "usd"}, **dims(n)}

    return Case(
        id="openai-costs",
        poller=OPENAI,
        source="costs",
        row=row,
        means=lambda n: Row(
            tuple(sorted({**dims(n), "currency": "USD"}.items())), amount=Decimal("1.25"), currency="USD"
        ),
        page=openai_page,
        error=openai_error,
        required="amount",
        set_amount=lambda row, amount: {**row, "amount": {"value": amount, "currency": "usd"}},
        has_empty_buckets=True,
    )


# ── Anthropic ───────────────────────────────────────────────────────────────────────────────────

ANTHROPIC = AnthropicPoller(now=lambda: NOW)
ANALYTICS = {"api": "analytics"}


def reports_page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
    data = [{"starting_at": rfc3339(start), "ending_at": rfc3339(end), "results": rows} for start, end, rows in buckets]
    return {"data": data, "has_more": has_more, "next_page": cursor}


def anthropic_error(code: str) -> Wire:
    return {"type": "error", "error": {"type": code, "message": "refused"}, "request_id": "req_1"}


_CLASSES = {
    "uncached_input_tokens": 50,
    "cache_read_input_tokens": 40,
    "cache_creation": {"ephemeral_5m_input_tokens": 6, "ephemeral_1h_input_tokens": 4},
    "output_tokens": 7,
    "server_tool_use": {"web_search_requests": 2},
}
_CLASSES_MEAN = {
    "input_tokens": 100,
    "cache_read_tokens": 40,
    "cache_write_tokens": 10,
    "output_tokens": 7,
    "quantity": Decimal(2),
    "unit": "searches",
}


def _anthropic(source: str, settings: Mapping[str, Any]) -> Case:
    grain = ANTHROPIC.grain(source, settings)
    is_flat = settings == ANALYTICS
    is_cost = source == "cost"

    def dims(n: int) -> dict[str, str | None]:
        return {name: f"w{n}" if name == "workspace_id" else None for name in grain.group_by}

    def numbers() -> Wire:
        if is_cost:
            return {"amount": "125.0000", "currency": "usd"}
        return _CLASSES | ({"requests": 3, "total_tokens": 107} if is_flat else {})

    def means(n: int) -> Row:
        if is_cost:
            named = tuple(sorted({**dims(n), "currency": "USD"}.items()))
            return Row(named, amount=Decimal("1.25"), currency="USD")
        return Row(tuple(sorted(dims(n).items())), requests=3 if is_flat else None, **_CLASSES_MEAN)

    def analytics_page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
        lines = []
        for start, end, rows in buckets:
            for row in rows:
                group = {name: row[name] for name in grain.group_by if name in row}
                rest = {name: value for name, value in row.items() if name not in group}
                line = {"starting_at": rfc3339(start), "ending_at": rfc3339(end), "group": group}
                lines.append({**line, source if is_cost else "usage": rest})
        stamp = "2026-11-22T10:18:00Z"
        return {"data": lines, "has_more": has_more, "next_page": cursor, "data_refreshed_at": stamp}

    return Case(
        id=f"anthropic-{grain.api}-{source}",
        poller=ANTHROPIC,
        source=source,
        settings=settings,
        row=lambda n: {**numbers(), **dims(n)},
        means=means,
        page=analytics_page if is_flat else reports_page,
        error=anthropic_error,
        required="amount" if is_cost else "output_tokens",
        optional=None if is_cost else "server_tool_use",
        set_amount=(lambda row, amount: {**row, "amount": amount}) if is_cost else None,
        amount_scale=Decimal("0.01"),
        is_row_paged=is_flat,
    )


OURS = (
    _openai("completions", _TOKENS, _TOKENS_MEAN, "output_tokens", "input_cached_tokens"),
    _openai("decisions", _TOKENS, _TOKENS_MEAN, "input_tokens", "input_cache_write_tokens"),
    *(
        _openai(name, {"input_tokens": 9, "num_model_requests": 2}, {"input_tokens": 9, "requests": 2}, "input_tokens")
        for name in ("embeddings", "moderations")
    ),
    _counting("images", "images", "images"),
    _counting("audio_speeches", "characters", "characters"),
    _counting("audio_transcriptions", "seconds", "seconds"),
    _counting("vector_stores", "usage_bytes", "bytes", None),
    _counting("code_interpreter_sessions", "num_sessions", "sessions", None),
    _counting("file_search_calls", "num_requests", "searches", None),
    _counting("web_search_calls", "num_requests", "searches"),
    _openai_costs(),
    _anthropic("messages", {}),
    _anthropic("cost", {}),
    _anthropic("messages", ANALYTICS),
    _anthropic("cost", ANALYTICS),
)

__all__ = [
    "ANALYTICS",
    "ANTHROPIC",
    "NOW",
    "OPENAI",
    "OURS",
    "Script",
    "anthropic_error",
    "openai_page",
    "reports_page",
]
