"""How LiteLLM counts: a log of one request, and the spend of a day, each with the vendor by our name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal

import msgspec

from daemon.domain.errors import SchemaDriftError
from daemon.domain.record import EXACT, Rating, Row
from daemon.pollers._vendors import vendor
from daemon.pollers.chain import Fields, encode_detail, money, need_count, take_count, take_dims

CURRENCY = "USD"
UPSTREAM = "upstream"

LOG_DIMS = frozenset({"api_key_id", "model", "team_id", "user_id", UPSTREAM})
LOG_OPTIONAL = frozenset({"agent_id", "call_type", "end_user", "model_group", "organization_id", "status"})
ACTIVITY_DIMS = frozenset({"api_key_id", UPSTREAM})

_WIRE = {"api_key_id": "api_key", "user_id": "user"}
"""Dimensions that stand in a log under another name than in the other providers' reports, which is ours."""

VENDORS = {
    "amazon-nova": "bedrock",
    "anthropic-text": "anthropic",
    "azure-ai": "azure",
    "azure-text": "azure",
    "bedrock-converse": "bedrock",
    "bedrock-mantle": "bedrock",
    "text-completion-openai": "openai",
    "unknown": "",
    "vertex-ai": "vertex",
    "vertex-ai-beta": "vertex",
}
"""Of `custom_llm_provider`."""

PRICE_LISTS = {
    "bedrock": "aws",
    "gemini": "google",
    "vertex": "google",
    "xai": "x-ai",
    "together-ai": "together",
    "fireworks-ai": "fireworks",
}
"""The price list's names of vendors, where they differ from ours."""

_OF_ONE_REQUEST = (
    "request_id", "startTime", "endTime", "completionStartTime", "model_id", "api_base", "cache_key", "request_tags",
    "requester_ip_address", "session_id", "request_duration_ms", "litellm_call_id", "messages", "response",
    "proxy_server_request", "mcp_namespaced_tool_name", "total_tokens",
)  # fmt: skip
"""What is true of one request and of no hour, or is nobody's business in a ledger."""

UNATTRIBUTED = "unattributed"
_RAW = "raw:"
"""How the daily report writes a key that is missing, and one that is really called so."""

NOISE = Decimal("1e-9")
"""Dollars by which sums may miss each other that the proxy made of the same floats in another order."""

_metadata_decoder = msgspec.json.Decoder(dict[str, object], float_hook=Decimal)


def upstream_of(name: object) -> str | None:
    return vendor(name, VENDORS) if type(name) is str else None


# ── Logs ────────────────────────────────────────────────────────────────────────────────────────


def started_at(log: Fields) -> datetime:
    """When the request began; a time without a zone is UTC, as the proxy stores it."""
    try:
        text = log.get("startTime")
        instant = datetime.fromisoformat(text if type(text) is str else "")
        return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise SchemaDriftError("a log does not say when it started", encode_detail({"fields": sorted(log)})) from error


def content_of(log: Fields) -> int:
    """What a log says, for telling whether the same one was sent twice."""
    names = ("startTime", "api_key", "model", "prompt_tokens", "completion_tokens", "spend")
    return hash(tuple([repr(log.get(name)) for name in names]))


def log_row(log: Fields, group_by: Sequence[str]) -> Row:
    """One request. An answer from the proxy's own cache has no price: nobody is paid for it."""
    cached, written = _cache_tokens(log.pop("metadata", None))
    for name in _OF_ONE_REQUEST:  # first, so that no error shows them
        log.pop(name, None)
    prompt, output = need_count(log, "prompt_tokens"), need_count(log, "completion_tokens")
    upstream = upstream_of(log.pop("custom_llm_provider", None))
    model = log.get("model")
    is_cached = str(log.pop("cache_hit", None)).lower() == "true"
    if log.get("status") == "failure":
        log["failed_requests"] = 1
    for ours, wire in _WIRE.items():
        log[ours] = log.pop(wire, None)
    log[UPSTREAM] = upstream
    dims = take_dims(log, group_by)
    for name in LOG_DIMS | LOG_OPTIONAL:
        log.pop(name, None)
    counts: tuple[tuple[str, int], ...] = (
        ("input", max(prompt - (cached or 0) - (written or 0), 0)),
        ("cache_read", cached or 0),
        ("cache_write", written or 0),
        ("output", output),
    )
    counts = tuple([pair for pair in counts if pair[1]])
    return Row(
        dims,
        input_tokens=prompt,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        output_tokens=output,
        requests=1,
        detail=encode_detail(log),
        rating=None if is_cached else _rating(upstream, model, counts),
    )


def _rating(upstream: str | None, model: object, counts: tuple[tuple[str, int], ...]) -> Rating | None:
    if type(model) is not str or not model or not counts:
        return None
    lead, _, rest = model.partition("/")
    if rest and upstream_of(lead) == upstream:
        model = rest  # the proxy's way of choosing a vendor, unknown to the vendor's price list
    return Rating(PRICE_LISTS.get(upstream or "", upstream or ""), model, (), counts)


def _cache_tokens(metadata: object) -> tuple[int | None, int | None]:
    """Tokens read from and written to the vendor's cache; both are inside `prompt_tokens`."""
    if type(metadata) is str:
        try:
            metadata = _metadata_decoder.decode(metadata)
        except msgspec.MsgspecError:
            return None, None
    told = metadata.get("additional_usage_values") if type(metadata) is dict else None
    if type(told) is not dict:
        return None, None
    return take_count(told, "cache_read_input_tokens"), take_count(told, "cache_creation_input_tokens")


# ── Days ────────────────────────────────────────────────────────────────────────────────────────


class Metrics(msgspec.Struct):
    """A figure with its metrics, and those of each key in it."""

    metrics: Fields
    api_key_breakdown: dict[str, Metrics] = {}


class Breakdown(msgspec.Struct):
    providers: dict[str, Metrics] = {}


class Day(msgspec.Struct):
    date: str
    metrics: Fields
    breakdown: Breakdown | None = None

    def start(self) -> datetime:
        try:
            return datetime.strptime(self.date, "%Y-%m-%d").replace(tzinfo=UTC)
        except ValueError as error:
            raise SchemaDriftError("a day has no date", self.date.encode()) from error

    def rows(self, group_by: Sequence[str]) -> Iterator[Row]:
        """The day by vendor and key. What it has beyond those (flat costs, older releases) is a row of its own.

        The sum of the rows is the day's spend, but for the noise of floats.
        """
        whole = _spend(self.metrics)
        if not group_by:
            yield _cost(group_by, None, None, whole, self.metrics)
            return
        told = Decimal(0)
        for name, provider in (self.breakdown or Breakdown()).providers.items():
            upstream = upstream_of(name)
            of_provider, of_keys = _spend(provider.metrics), Decimal(0)
            for key, figure in provider.api_key_breakdown.items():
                amount = _spend(figure.metrics)
                of_keys = EXACT.add(of_keys, amount)
                yield _cost(group_by, upstream, _key_of(key), amount, figure.metrics)
            yield from _rest(group_by, upstream, of_provider, of_keys)
            told = EXACT.add(told, of_provider)
        yield from _rest(group_by, None, whole, told)


def _rest(group_by: Sequence[str], upstream: str | None, whole: Decimal, told: Decimal) -> Iterator[Row]:
    rest = EXACT.subtract(whole, told)
    if abs(rest) > NOISE * max(abs(whole), Decimal(1)):
        yield _cost(group_by, upstream, None, rest, {})


def _spend(metrics: Fields) -> Decimal:
    """What a figure costs by the proxy's own price map. A flat fee for reserved capacity is counted beside it."""
    spend = money(metrics.pop("spend", None))
    flat = metrics.pop("flat_cost", None)
    return spend if flat is None or not money(flat) else EXACT.add(spend, money(flat))


def _cost(group_by: Sequence[str], upstream: str | None, key: str | None, amount: Decimal, rest: Fields) -> Row:
    dims = take_dims({"api_key_id": key, UPSTREAM: upstream}, group_by)
    named = tuple(sorted((*dims, ("currency", CURRENCY))))
    return Row(named, amount=amount, currency=CURRENCY, detail=encode_detail(rest))


def _key_of(text: str) -> str | None:
    return None if text == UNATTRIBUTED else text.removeprefix(_RAW)
