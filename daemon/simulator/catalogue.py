"""What each provider counts: sources with their dimensions and counts, models, and prices.

Money is an integer of picodollars (1e-12 USD), so that every sum is exact. Prices are list prices per million tokens
as of November 2026, the same that price lists carry, so that a local estimate can meet the simulated bill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

Provider = Literal["openai", "anthropic", "openrouter", "litellm"]
PICO = 10**12
HOUR = 3600
DAY = 86400
WIDTHS = {"1m": 60, "1h": HOUR, "1d": DAY}
MEASURES = (
    "input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests", "quantity", "amount",
)  # fmt: skip
"""What truth says of every row, in common terms."""

Terms = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Source:
    """One report's raw material.

    Attributes:
        dims: the dimensions of every event, in this order; the first `public` of them are those that truth shows.
        counts: the names of an event's integers, in this order; money is in picodollars.
        terms: which counts each measure of the truth adds up; a measure that is left out is null there.
        is_level: counts are a level (bytes stored): within a bucket the last hour's value stands.
        is_cost: a bill: made of what the other sources' events cost.
        step: seconds of the finest bucket.
        serial: the dimension that no two events share, where each one is listed by itself.
        fixed: counts that a correction leaves alone.
    """

    name: str
    dims: tuple[str, ...]
    counts: tuple[str, ...]
    public: int
    terms: Terms = field(default_factory=dict)
    is_level: bool = False
    is_cost: bool = False
    step: int = HOUR
    serial: str | None = None
    fixed: tuple[str, ...] = ()

    def at(self, dim: str) -> int:
        return self.dims.index(dim)


def _usage(
    name: str, dims: tuple[str, ...], counts: tuple[str, ...], terms: Terms | None = None, *, is_level: bool = False
) -> Source:
    if terms is None:
        terms = {"quantity": counts[:1]} | ({"requests": ("requests",)} if "requests" in counts else {})
    return Source(name, dims, counts, len(dims), terms, is_level=is_level)


def _bill(name: str, dims: tuple[str, ...], counts: tuple[str, ...], public: int, terms: Terms) -> Source:
    return Source(name, dims, counts, public, terms, is_cost=True, step=DAY)


_BASE = ("project_id", "user_id", "api_key_id", "model")
_TOKENS = (
    "text", "audio", "image", "cached_text", "cached_audio", "cached_image", "cache_write_30m", "cache_write_12h",
    "output_text", "output_audio", "output_image", "requests",
)  # fmt: skip
_TOKEN_TERMS: Terms = {
    "input_tokens": _TOKENS[:8], "cache_read_tokens": _TOKENS[3:6], "cache_write_tokens": _TOKENS[6:8],
    "output_tokens": _TOKENS[8:11], "requests": ("requests",),
}  # fmt: skip
_INPUT_TERMS: Terms = {"input_tokens": ("input_tokens",), "requests": ("requests",)}
_COSTS = ("project_id", "user_id", "api_key_id", "api_source", "line_item", "unit")
_COST_TERMS: Terms = {"amount": ("amount",), "quantity": ("quantity",)}
_COMPLETIONS = (*_BASE, "batch", "service_tier", "api_source")

OPENAI: dict[str, Source] = {
    source.name: source
    for source in (
        _usage("completions", _COMPLETIONS, _TOKENS, _TOKEN_TERMS),
        _usage("decisions", _COMPLETIONS, _TOKENS, _TOKEN_TERMS),
        _usage("embeddings", _BASE, ("input_tokens", "requests"), _INPUT_TERMS),
        _usage("moderations", _BASE, ("input_tokens", "requests"), _INPUT_TERMS),
        _usage("images", (*_BASE, "size", "source"), ("images", "requests")),
        _usage("audio_speeches", _BASE, ("characters", "requests")),
        _usage("audio_transcriptions", _BASE, ("seconds", "requests")),
        _usage("vector_stores", ("project_id",), ("usage_bytes",), is_level=True),
        _usage("code_interpreter_sessions", ("project_id",), ("num_sessions",)),
        _usage("file_search_calls", ("project_id", "user_id", "api_key_id", "vector_store_id"), ("num_requests",)),
        _usage("web_search_calls", (*_BASE, "context_level", "api_source"), ("num_requests", "requests")),
        _bill("costs", _COSTS, ("amount", "quantity"), 5, _COST_TERMS),
        # Billed, yet no usage report shows it: image generation has been seen so, and credits are.
        _bill("unreported", _COSTS, ("amount", "quantity"), 0, _COST_TERMS),
    )
}

_MESSAGES = (
    "api_key_id", "workspace_id", "model", "service_tier", "context_window", "inference_geo", "speed", "account_id",
    "service_account_id",
)  # fmt: skip
_ANTHROPIC_COST = (
    "workspace_id", "description", "cost_type", "model", "service_tier", "token_type", "context_window",
    "inference_geo", "api_key_id", "speed", "account_id", "service_account_id", "product",
)  # fmt: skip
_CLAUDE = ("uncached", "cache_read", "cache_5m", "cache_1h", "output", "web_searches", "requests")
_CLAUDE_TERMS: Terms = {
    "input_tokens": _CLAUDE[:4], "cache_read_tokens": ("cache_read",), "cache_write_tokens": _CLAUDE[2:4],
    "output_tokens": ("output",), "quantity": ("web_searches",),
}  # fmt: skip
_AMOUNTS = ("amount", "list_amount", "requests")
ANTHROPIC: dict[str, Source] = {
    source.name: source
    for source in (
        Source("messages", (*_MESSAGES, "product"), _CLAUDE, len(_MESSAGES), _CLAUDE_TERMS),
        _bill("cost", _ANTHROPIC_COST, _AMOUNTS, 2, {"amount": ("amount",)}),
        _bill("unreported", _ANTHROPIC_COST, _AMOUNTS, 0, {"amount": ("amount",)}),
    )
}

# OpenRouter tells of completed days alone. The key and the person behind a request can be asked for, but are not told;
# who is paid, and by whom, follows from the two amounts of a row.
_ENDPOINT = ("model", "model_permaslug", "endpoint_id", "provider_name", "workspace_id", "api_key_hash", "user_id")
_ROUTED_COST = (*_ENDPOINT, "billing", "upstream")
OPENROUTER: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "activity",
            (*_ENDPOINT, "billing"),
            ("requests", "prompt", "completion", "reasoning", "cached"),
            4,
            {
                "input_tokens": ("prompt",),
                "cache_read_tokens": ("cached",),
                "output_tokens": ("completion",),
                "requests": ("requests",),
            },
            step=DAY,
        ),
        _bill("costs", _ROUTED_COST, ("amount", "requests"), 4, {"amount": ("amount",)}),
        _bill("unreported", _ROUTED_COST, ("amount", "requests"), 0, {"amount": ("amount",)}),
    )
}

# LiteLLM keeps a log of every request, which `request_id` tells apart, and adds up the spend of each day.
_LOGGED = ("model", "upstream", "api_key_id", "user_id", "team_id", "model_group", "end_user", "status", "request_id")
_SPENT = ("api_key_id", "upstream", "user_id", "model", "model_group")
LITELLM: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "logs",
            _LOGGED,
            ("spend", "prompt", "completion", "cache_read", "cache_write", "requests"),
            5,
            {
                "input_tokens": ("prompt",),
                "cache_read_tokens": ("cache_read",),
                "cache_write_tokens": ("cache_write",),
                "output_tokens": ("completion",),
                "requests": ("requests",),
            },
            serial="request_id",
            fixed=("requests",),
        ),
        _bill("activity", _SPENT, ("amount", "requests"), 2, {"amount": ("amount",)}),
        # A flat fee for reserved capacity, or money back: no log explains it.
        _bill("unreported", _SPENT, ("amount", "requests"), 0, {"amount": ("amount",)}),
    )
}


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
    "openrouter": {
        "openai/gpt-4.1-2025-04-14": _price("2", "0.5", "8"),
        "openai/gpt-5-mini-2025-08-07": _price("0.25", "0.025", "2"),
        "anthropic/claude-4.5-sonnet-20250929": _price("3", "0.3", "15"),
        "google/gemini-2.5-flash": _price("0.3", "0.03", "2.5"),
        "deepseek/deepseek-chat-v3.1": _price("0.25", "0.05", "1"),
    },
    "litellm": {
        "gpt-4.1-2025-04-14": _price("2", "0.5", "8"),
        "gpt-5-mini-2025-08-07": _price("0.25", "0.025", "2"),
        "claude-sonnet-4-5-20250929": _price("3", "0.3", "15", "3.75", "6"),
        "gemini-2.5-flash": _price("0.3", "0.03", "2.5"),
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


def measures(source: Source, counts: tuple[int, ...]) -> dict[str, int | str | None]:
    """The counts of one row in common terms: input includes what was read from and written to the cache."""
    named = dict(zip(source.counts, counts, strict=True))
    row: dict[str, int | str | None] = dict.fromkeys(MEASURES)
    for measure, parts in source.terms.items():
        total = sum(named[part] for part in parts)
        if measure == "amount":
            row[measure] = str(dollars(total))
        else:
            row[measure] = str(total) if measure == "quantity" else total
    return row
