"""What each provider counts: sources with their dimensions and counts, models, and prices.

Money is an integer of picodollars (1e-12 USD), so that every sum is exact. Prices are list prices per million tokens
as of November 2026, the same that price lists carry, so that a local estimate can meet the simulated bill.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Provider = Literal["openai", "anthropic"]
PROVIDERS: tuple[Provider, ...] = ("openai", "anthropic")
PICO = 10**12


@dataclass(frozen=True, slots=True)
class Source:
    """One report's raw material.

    Attributes:
        dims: the dimensions of every event, in this order; the first `public` of them are those that truth shows.
        counts: the names of an event's integers, in this order.
        is_level: counts are a level (bytes stored): within a bucket the last hour's value stands.
        is_cost: counts start with an amount in picodollars; the only bucket is a day.
    """

    name: str
    dims: tuple[str, ...]
    counts: tuple[str, ...]
    public: int
    is_level: bool = False
    is_cost: bool = False

    def at(self, dim: str) -> int:
        return self.dims.index(dim)


def _usage(name: str, dims: tuple[str, ...], counts: tuple[str, ...], *, is_level: bool = False) -> Source:
    return Source(name, dims, counts, len(dims), is_level=is_level)


_BASE = ("project_id", "user_id", "api_key_id", "model")
_TOKENS = (
    "text", "audio", "image", "cached_text", "cached_audio", "cached_image", "cache_write_30m", "cache_write_12h",
    "output_text", "output_audio", "output_image", "requests",
)  # fmt: skip
_COMPLETIONS = (*_BASE, "batch", "service_tier", "api_source")

OPENAI: dict[str, Source] = {
    source.name: source
    for source in (
        _usage("completions", _COMPLETIONS, _TOKENS),
        _usage("decisions", _COMPLETIONS, _TOKENS),
        _usage("embeddings", _BASE, ("input_tokens", "requests")),
        _usage("moderations", _BASE, ("input_tokens", "requests")),
        _usage("images", (*_BASE, "size", "source"), ("images", "requests")),
        _usage("audio_speeches", _BASE, ("characters", "requests")),
        _usage("audio_transcriptions", _BASE, ("seconds", "requests")),
        _usage("vector_stores", ("project_id",), ("usage_bytes",), is_level=True),
        _usage("code_interpreter_sessions", ("project_id",), ("num_sessions",)),
        _usage("file_search_calls", ("project_id", "user_id", "api_key_id", "vector_store_id"), ("num_requests",)),
        _usage("web_search_calls", (*_BASE, "context_level", "api_source"), ("num_requests", "requests")),
        Source(
            "costs",
            ("project_id", "user_id", "api_key_id", "api_source", "line_item", "unit"),
            ("amount", "quantity"),
            5,
            is_cost=True,
        ),
        # Billed, yet no usage report shows it: image generation has been seen so, and credits are.
        Source("unreported", ("project_id", "user_id", "api_key_id", "api_source", "line_item", "unit"),
               ("amount", "quantity"), 0, is_cost=True),
    )
}  # fmt: skip

_MESSAGES = (
    "api_key_id", "workspace_id", "model", "service_tier", "context_window", "inference_geo", "speed", "account_id",
    "service_account_id",
)  # fmt: skip
_ANTHROPIC_COST = (
    "workspace_id", "description", "cost_type", "model", "service_tier", "token_type", "context_window",
    "inference_geo", "api_key_id", "speed", "account_id", "service_account_id", "product",
)  # fmt: skip
ANTHROPIC: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "messages",
            (*_MESSAGES, "product"),
            ("uncached", "cache_read", "cache_5m", "cache_1h", "output", "web_searches", "requests"),
            len(_MESSAGES),
        ),
        Source("cost", _ANTHROPIC_COST, ("amount", "list_amount", "requests"), 2, is_cost=True),
        Source("unreported", _ANTHROPIC_COST, ("amount", "list_amount", "requests"), 0, is_cost=True),
    )
}
SOURCES: dict[Provider, dict[str, Source]] = {"openai": OPENAI, "anthropic": ANTHROPIC}
COST_SOURCE: dict[Provider, str] = {"openai": "costs", "anthropic": "cost"}
MAIN_SOURCE: dict[Provider, str] = {"openai": "completions", "anthropic": "messages"}


@dataclass(frozen=True, slots=True)
class Price:
    """Picodollars per token. `write_5m` is also what OpenAI takes for a cache write of any length."""

    input: int
    cache_read: int
    output: int
    write_5m: int = 0
    write_1h: int = 0


def _price(*per_million: str) -> Price:
    return Price(*(int(Decimal(each) * 10**6) for each in per_million))


CHAT: dict[Provider, dict[str, Price]] = {
    "openai": {
        "gpt-5-2025-08-07": _price("1.25", "0.125", "10"),
        "gpt-5-mini-2025-08-07": _price("0.25", "0.025", "2"),
        "gpt-4o-2024-08-06": _price("2.5", "1.25", "10"),
        "gpt-4o-mini-2024-07-18": _price("0.15", "0.075", "0.6"),
        "gpt-4.1-2025-04-14": _price("2", "0.5", "8"),
        "o3-2025-04-16": _price("2", "0.5", "8"),
        "gpt-6-sol": _price("2", "0.2", "10", "2.5"),
    },
    "anthropic": {
        "claude-sonnet-4-5-20250929": _price("3", "0.3", "15", "3.75", "6"),
        "claude-haiku-4-5-20251001": _price("1", "0.1", "5", "1.25", "2"),
        "claude-opus-4-1-20250805": _price("15", "1.5", "75", "18.75", "30"),
        "claude-opus-4-5-20251101": _price("5", "0.5", "25", "6.25", "10"),
    },
}
UNKNOWN_MODEL_PRICE = _price("7", "0.7", "21", "8.75", "14")
"""What the provider charges for a model that no price list knows."""

EMBEDDING: dict[str, int] = {"text-embedding-3-small": 20_000, "text-embedding-3-large": 130_000}
IMAGE_PICO = 40_000_000_000  # gpt-image-1, 1024x1024, medium: about 4 cents
SPEECH_CHARACTER_PICO = 15_000_000  # tts-1
TRANSCRIPTION_SECOND_PICO = 100_000_000  # whisper-1
GIBIBYTE_HOUR_PICO = 4_000_000_000
CODE_SESSION_PICO = 30_000_000_000
FILE_SEARCH_PICO = 2_500_000_000
WEB_SEARCH_PICO = 10_000_000_000
GIBIBYTE = 2**30


def chat_price(provider: Provider, model: str | None) -> Price:
    return CHAT[provider].get(model or "", UNKNOWN_MODEL_PRICE)


def dollars(pico: int) -> Decimal:
    """Exact, without trailing zeros and never in exponent form."""
    return Decimal(format((Decimal(pico) / PICO).normalize(), "f"))


def measures(provider: Provider, source: Source, counts: tuple[int, ...]) -> dict[str, int | str | None]:
    """The counts of one row in common terms: input includes what was read from and written to the cache."""
    named = dict(zip(source.counts, counts, strict=True))
    row: dict[str, int | str | None] = dict.fromkeys(
        ("input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests", "quantity", "amount")
    )
    if source.is_cost:
        row["amount"] = str(dollars(named["amount"]))
        if provider == "openai":
            row["quantity"] = str(named["quantity"])
    elif source.counts is _TOKENS:
        row["cache_read_tokens"] = named["cached_text"] + named["cached_audio"] + named["cached_image"]
        row["cache_write_tokens"] = named["cache_write_30m"] + named["cache_write_12h"]
        row["input_tokens"] = sum(counts[:8])
        row["output_tokens"] = sum(counts[8:11])
        row["requests"] = named["requests"]
    elif provider == "anthropic":
        row["cache_read_tokens"] = named["cache_read"]
        row["cache_write_tokens"] = named["cache_5m"] + named["cache_1h"]
        row["input_tokens"] = sum(counts[:4])
        row["output_tokens"] = named["output"]
        row["quantity"] = str(named["web_searches"])
    else:
        row["requests"] = named.get("requests")
        if source.counts[0] == "input_tokens":
            row["input_tokens"] = counts[0]
        else:
            row["quantity"] = str(counts[0])
    return row
