"""The sources of the gateways, OpenRouter and LiteLLM, for the suite that every poller passes."""

from collections.abc import Sequence
from decimal import Decimal
from itertools import count
from typing import Any

from daemon.domain.record import Row
from daemon.pollers.litellm import LiteLLMPoller
from daemon.pollers.openrouter import OpenRouterPoller
from daemon.testing.poller_cases import NOW, Bucket, Case, Wire

OPENROUTER = OpenRouterPoller(now=lambda: NOW)
LITELLM = LiteLLMPoller(now=lambda: NOW)


def error(code: str) -> Wire:
    return {"error": {"code": code, "message": "refused"}}


# ── OpenRouter: flat rows that name their day, in one answer ────────────────────────────────────


def activity_page(buckets: Sequence[Bucket], _has_more: bool, _cursor: str | None) -> Wire:
    return {"data": [{"date": f"{start:%Y-%m-%d}", **row} for start, _, rows in buckets for row in rows]}


def activity_row(n: int) -> Wire:
    return {
        "model": "openai/gpt-4.1",
        "model_permaslug": "openai/gpt-4.1-2025-04-14",
        "endpoint_id": f"e{n}",
        "provider_name": "OpenAI",
        "usage": 1.25,
        "byok_usage_inference": 0.0,
        "requests": 3,
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "reasoning_tokens": 2,
        "cached_tokens": 40,
    }


def activity_dims(n: int) -> dict[str, str | None]:
    return {name: activity_row(n)[name] for name in ("endpoint_id", "model", "model_permaslug", "provider_name")}


def activity_means(n: int) -> Row:
    dims = tuple(sorted(activity_dims(n).items()))
    return Row(dims, input_tokens=100, cache_read_tokens=40, output_tokens=7, requests=3)


def costs_means(n: int) -> Row:
    dims = activity_dims(n) | {"billing": "credits", "currency": "USD", "upstream": None}
    return Row(tuple(sorted(dims.items())), amount=Decimal("1.25"), currency="USD")


def _openrouter(source: str, **more: Any) -> Case:
    return Case(
        id=f"openrouter-{source}",
        poller=OPENROUTER,
        source=source,
        row=activity_row,
        page=activity_page,
        error=error,
        envelope=("data",),
        paging="whole",
        is_dated=True,
        is_flat=True,
        **more,
    )


# ── LiteLLM: pages by number ────────────────────────────────────────────────────────────────────

_ids = count()


def numbers(has_more: bool, cursor: str | None) -> tuple[int | None, int]:
    """Which page leads to the cursor ("c1" is what follows the first), and how many there are in all.

    The last page does not say its number: the suite's pages do not know what they were asked for.
    """
    if cursor is None or not has_more:
        return None, 1
    number = int(cursor[1:]) if cursor[1:].isdigit() else 1
    return number, number + 1


def logs_page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
    page, total_pages = numbers(has_more, cursor)
    logs = []
    for start, _, rows in buckets:
        for row in rows:
            log = {("api_key" if name == "api_key_id" else name): value for name, value in row.items()}
            if "user_id" in log:
                log["user"] = log.pop("user_id")
            began = start.replace(minute=20, microsecond=5000).isoformat()
            logs.append({"request_id": f"req-{next(_ids)}", "startTime": began, **log})
    return {"data": logs, "page": page, "total_pages": total_pages}


def log_row(n: int) -> Wire:
    return {
        "api_key_id": f"hash{n}",
        "model": "openai/gpt-4.1",
        "custom_llm_provider": "openai",
        "team_id": None,
        "user_id": None,
        "cache_hit": "False",
        "status": "success",
        "spend": 0.5,
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "total_tokens": 107,
        "metadata": {"additional_usage_values": {"cache_read_input_tokens": 40, "cache_creation_input_tokens": 10}},
    }


def log_means(n: int) -> Row:
    return Row(
        (
            ("api_key_id", f"hash{n}"),
            ("model", "openai/gpt-4.1"),
            ("team_id", None),
            ("upstream", "openai"),
            ("user_id", None),
        ),
        input_tokens=100,
        cache_read_tokens=40,
        cache_write_tokens=10,
        output_tokens=7,
        requests=1,
    )


def days_page(buckets: Sequence[Bucket], has_more: bool, cursor: str | None) -> Wire:
    page, total_pages = numbers(has_more, cursor)
    results = [day for start, _, rows in buckets for day in _days(f"{start:%Y-%m-%d}", rows)]
    return {"results": results, "metadata": {"page": page, "total_pages": total_pages, "has_more": has_more}}


def _days(date: str, rows: list[Wire]) -> list[Wire]:
    """The rows as the day's breakdown. The proxy adds up what has the same key; a second entry does it for the suite."""
    days: list[dict[str, Wire]] = []
    for row in rows:
        figures = {name: value for name, value in row.items() if name not in ("api_key_id", "custom_llm_provider")}
        key = "unattributed" if row.get("api_key_id") is None else row["api_key_id"]
        if not days or any(key in day for day in days):
            days.insert(0, {})
        days[0][key] = {"metrics": figures, "metadata": {"key_alias": None, "team_id": None}}
    entries = []
    for keys in reversed(days):
        spend = _sum([figure["metrics"].get("spend") for figure in keys.values()])
        providers = {"openai": {"metrics": {"spend": spend}, "metadata": {}, "api_key_breakdown": keys}}
        entries.append({"date": date, "metrics": {"spend": spend}, "breakdown": {"models": {}, "providers": providers}})
    return entries


def _sum(amounts: list[Any]) -> Any:
    if len(amounts) == 1:
        return amounts[0]
    return str(sum(Decimal(str(amount)) for amount in amounts))


def day_row(n: int) -> Wire:
    return {"api_key_id": f"hash{n}", "custom_llm_provider": "openai", "spend": 1.25, "prompt_tokens": 100}


def day_means(n: int) -> Row:
    dims = (("api_key_id", f"hash{n}"), ("currency", "USD"), ("upstream", "openai"))
    return Row(dims, amount=Decimal("1.25"), currency="USD")


def _litellm(source: str, **more: Any) -> Case:
    return Case(
        id=f"litellm-{source}",
        poller=LITELLM,
        source=source,
        error=error,
        paging="cursor",
        is_dated=True,
        is_flat=True,
        is_row_paged=True,
        **more,
    )


CASES = (
    _openrouter("activity", means=activity_means, required="prompt_tokens", optional="cached_tokens"),
    _openrouter(
        "costs",
        means=costs_means,
        required="usage",
        set_amount=lambda row, amount: {**row, "usage": amount},
        currency=None,
    ),
    _litellm(
        "logs",
        row=log_row,
        means=log_means,
        page=logs_page,
        envelope=("data", "total_pages"),
        required="completion_tokens",
        optional="metadata",
    ),
    _litellm(
        "activity",
        row=day_row,
        means=day_means,
        page=days_page,
        envelope=("results", "metadata"),
        required="spend",
        set_amount=lambda row, amount: {**row, "spend": amount},
        currency=None,
    ),
)
