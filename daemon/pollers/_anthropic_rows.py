"""What the two generations of Anthropic's reports share: how a row counts, what it costs, and how it is asked for."""

from __future__ import annotations

from decimal import Decimal

from daemon.domain.connection import Target
from daemon.domain.errors import SchemaDriftError
from daemon.domain.record import EXACT, Dims, Rating, Row
from daemon.pollers.chain import Fields, currency_code, encode_detail, money, need_count, take_count

VERSION = "2023-06-01"
"""`anthropic-version` of the Admin API's documentation, read 2026-09-25. A version never changes under its callers."""

LONG_WINDOWS = {"0-200k": False, "200k-1M": True}


def headers(target: Target, beta: str | None = None) -> dict[str, str]:
    sent = {"x-api-key": target.credential.reveal(), "anthropic-version": VERSION}
    if beta is not None:
        sent["anthropic-beta"] = beta
    return sent


def _context(cut: dict[str, str | None]) -> tuple[tuple[str, str], ...]:
    """The choices that change a rate, those included that the price list does not know: they make it an estimate."""
    context = []
    if (tier := cut.get("service_tier")) == "batch":
        context.append(("processing", "batch"))
    elif tier not in (None, "standard"):
        context.append(("service_tier", str(tier)))
    if (speed := cut.get("speed")) not in (None, "standard"):
        context.append(("speed", str(speed)))
    if (geo := cut.get("inference_geo")) not in (None, "global", "not_available"):
        context.append(("inference_geo", str(geo)))
    return tuple(sorted(context))


def _take_object(row: Fields, name: str) -> Fields:
    value = row.pop(name, None)
    if value is None:
        return {}
    if type(value) is not dict:
        raise SchemaDriftError(f"{name} is not an object", encode_detail(row))
    return value


def usage_row(row: Fields, dims: Dims, requests: int | None) -> Row:
    """The token classes are disjoint here, unlike OpenAI's: all input is their sum."""
    uncached = need_count(row, "uncached_input_tokens")
    output = need_count(row, "output_tokens")
    cached = take_count(row, "cache_read_input_tokens")
    tools = _take_object(row, "server_tool_use")
    searches = take_count(tools, "web_search_requests")
    if tools:
        row["server_tool_use"] = tools
    # A lifetime that we do not know yet is a cache write too, at the rate of the shortest.
    creation = _take_object(row, "cache_creation")
    hour = take_count(creation, "ephemeral_1h_input_tokens")
    short = take_count(creation, "ephemeral_5m_input_tokens")
    for name in tuple(creation):
        row[f"cache_creation.{name}"] = count = take_count(creation, name)
        short = (short or 0) + (count or 0)
    written = None if hour is None and short is None else (hour or 0) + (short or 0)
    total = uncached + (cached or 0) + (written or 0)
    if row.get("total_tokens") == total + output:
        del row["total_tokens"]
    cut = dict(dims)
    model = cut.get("model")
    counts: tuple[tuple[str, int], ...] = (
        ("input", uncached),
        ("cache_read", cached or 0),
        ("cache_write", short or 0),
        ("cache_write_1h", hour or 0),
        ("output", output),
        ("web_search", searches or 0),
    )
    counts = tuple([pair for pair in counts if pair[1]])
    is_long = LONG_WINDOWS.get(cut.get("context_window") or "")
    return Row(
        dims,
        input_tokens=total,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        output_tokens=output,
        requests=requests,
        quantity=None if searches is None else Decimal(searches),
        unit=None if searches is None else "searches",
        detail=encode_detail(row),
        rating=Rating("anthropic", model, _context(cut), counts, is_long) if model and counts else None,
    )


def cost_row(row: Fields, dims: Dims) -> Row:
    """Amounts arrive in cents, with fractions of a cent, and leave in whole units of the currency."""
    currency = currency_code(row.pop("currency", None))
    amount = from_cents(row.pop("amount", None))
    if row.get("list_amount") is not None:
        row["list_amount"] = from_cents(row["list_amount"])
    return Row(
        tuple(sorted((*dims, ("currency", currency)))), amount=amount, currency=currency, detail=encode_detail(row)
    )


def from_cents(value: object) -> Decimal:
    return EXACT.scaleb(money(value), -2)
