"""Anthropic's traffic: the messages of an organisation, and what each of them adds to the bill."""

from __future__ import annotations

import random
from collections.abc import Iterator

from daemon.simulator import catalogue
from daemon.simulator.traffic import Cast, Event, Made, Profile


def make(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> Made:
    key = people.keys[int(rng.random() * len(people.keys))]
    amount = 1 + int(rng.random() * 4000)
    # The legacy reports say null for the default workspace.
    workspace = None if key.project == people.projects[0] else key.project
    roll = rng.random()
    if "unreported" in profile.sources or (not profile.sources and roll > 0.95):
        hours = 1 + amount % 3
        pico = hours * 50_000_000_000
        billed: tuple[str | None, ...] = (workspace, "Code Execution Usage", "code_execution", None, None, None, None, None, key.id,
                None, None, None, "messages_api")  # fmt: skip
        return "unreported", billed, (pico * (100 - profile.discount_percent) // 100, pico, 1)
    model = models[int(rng.random() * len(models))]
    tier = "batch" if roll < 0.1 else "priority" if roll < 0.13 else "standard"
    product = "message_batches_api" if tier == "batch" else "claude_code" if roll > 0.8 else "messages_api"
    api_key = None if roll > 0.9 else key.id  # the Console playground has none
    account = key.user if product == "claude_code" or api_key is None else None
    cached = int(amount * 3 * rng.random()) if rng.random() < 0.6 else 0
    write = int(amount * rng.random()) if cached else 0
    counts = (
        amount,
        cached,
        write,
        write // 3 if rng.random() < 0.3 else 0,
        1 + int(rng.random() * 1200),
        1 if rng.random() < 0.08 else 0,
        1,
    )
    dims = (api_key, workspace, model, tier, "0-200k", "not_available", "standard", account, None, product)
    return "messages", dims, counts


_TOKEN_TYPES = (
    ("uncached_input_tokens", "Input Tokens"),
    ("cache_read_input_tokens", "Input Tokens, Cache Hit"),
    ("cache_creation.ephemeral_5m_input_tokens", "Input Tokens, Cache Write 5m"),
    ("cache_creation.ephemeral_1h_input_tokens", "Input Tokens, Cache Write 1h"),
    ("output_tokens", "Output Tokens"),
)


def charge(source: str, event: Event, profile: Profile) -> Iterator[Event]:
    """The lines that one event adds to the bill. Priority Tier is committed spend and is left out, as in the report."""
    if source == "unreported":
        yield event
        return
    api_key, workspace, model, tier, context, geo, speed, account, service, product = event.dims
    if tier == "priority":
        return
    price = catalogue.chat_price("anthropic", model)
    rates = (price.input, price.cache_read, price.write_5m, price.write_1h, price.output)
    note = "".join(f", {each}" for each in (tier, context, geo) if each not in {"standard", "0-200k", "not_available"})
    requests = event.counts[6]
    kept = 100 - profile.discount_percent

    def line(what: tuple[str | None, ...], pico: int) -> Event:
        nonlocal requests
        dims = (workspace, *what, api_key, speed, account, service, product)
        counts = (pico * kept // 100, pico, requests)
        requests = 0  # counted on the event's first line alone
        return Event(event.at, event.visible_at, dims, counts)

    for (kind, label), quantity, rate in zip(_TOKEN_TYPES, event.counts[:5], rates, strict=True):
        if quantity:
            pico = rate * quantity // (2 if tier == "batch" else 1)
            description = f"{display_name(model)} Usage - {label}{note}"
            yield line((description, "tokens", model, tier, kind, context, geo), pico)
    if searches := event.counts[5]:
        what = ("Web Search Usage", "web_search", None, None, None, None, None)
        yield line(what, searches * catalogue.WEB_SEARCH_PICO)


def display_name(model: str | None) -> str:
    """`claude-sonnet-4-5-20250929` as the bill spells it: `Claude Sonnet 4.5`."""
    if model is None:
        return "Unknown"
    family = [part for part in model.split("-") if not (part.isdigit() and len(part) == 8)]
    words = [part.capitalize() for part in family if not part.isdigit()]
    version = ".".join(part for part in family if part.isdigit())
    return " ".join([*words, version]).strip()
