"""Seeded traffic: the request events of one hour of one organisation, and what each of them costs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from daemon.simulator import catalogue
from daemon.simulator.catalogue import Provider

HOUR = 3600
DAY = 86400


class Event(NamedTuple):
    """Something that happened `at` and shows up in reports from `visible_at` on. `dims` and `counts` are its source's."""

    at: int
    visible_at: int
    dims: tuple[str | None, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """How much an organisation uses.

    Attributes:
        history_days: whole days of traffic before the day on which the simulator started.
        requests_per_hour: events per hour over all sources; 0 leaves the organisation still.
        models: chat models in use; empty means all that the catalogue prices.
        sources: those with traffic; empty means all but `decisions`.
        late_s: an event shows up at most so long after it happened.
        cost_late_s: what it costs shows up so much later still.
        reveal_now: what happened before the organisation was first seen shows at once, however late it would be.
        live: traffic goes on after that; otherwise only control calls add to it.
        projects, keys: how many projects (workspaces) and API keys there are.
        lookback_days: usage reports of OpenAI refuse an older start.
        row_cap: Anthropic's bucketed reports refuse an answer with more rows.
        discount_percent: taken off Anthropic's list price.
    """

    history_days: int = 2
    requests_per_hour: int = 4
    models: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    late_s: int = 0
    cost_late_s: int = 0
    reveal_now: bool = True
    live: bool = True
    projects: int = 2
    keys: int = 4
    lookback_days: int = 730
    row_cap: int = 50_000
    discount_percent: int = 0


class ApiKey(NamedTuple):
    id: str | None
    name: str
    project: str | None
    user: str | None
    email: str


class Cast(NamedTuple):
    """Who uses what in one organisation. The first project is the default one."""

    org_id: str
    org_uuid: str
    projects: tuple[str, ...]
    keys: tuple[ApiKey, ...]


def token(*parts: object, length: int = 24) -> str:
    """An opaque identifier that follows from `parts`."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:length]


def cast(provider: Provider, seed: int, key: str, profile: Profile) -> Cast:
    """The identifiers of an organisation."""

    def name(prefix: str, *parts: object) -> str:
        return prefix + token(seed, key, prefix, *parts)

    is_openai = provider == "openai"
    project_prefix, key_prefix, user_prefix = (
        ("proj_", "key_", "user-") if is_openai else ("wrkspc_01", "apikey_01", "user_01")
    )
    projects = tuple(name(project_prefix, n) for n in range(max(1, profile.projects)))
    keys = tuple(
        ApiKey(
            name(key_prefix, n),
            f"service-{n}",
            projects[n % len(projects)],
            name(user_prefix, n // 2),
            f"user{n // 2}@{token(seed, key, length=8)}.example",
        )
        for n in range(max(1, profile.keys))
    )
    digest = token(seed, key, "org", length=32)
    uuid = f"{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-8{digest[17:20]}-{digest[20:32]}"
    return Cast("org-" + digest[:24] if is_openai else uuid, uuid, projects, keys)


def hour_events(
    provider: Provider, people: Cast, profile: Profile, rng: random.Random, start: int, count: int, span: int = HOUR
) -> Iterator[tuple[str, Event]]:
    """`count` events spread over `start <= at < start + span`, each with its source."""
    make = _openai_event if provider == "openai" else _anthropic_event
    models = profile.models or tuple(catalogue.CHAT[provider])
    for _ in range(count):
        at = start + int(rng.random() * span)
        late = int(rng.random() * (profile.late_s + 1))
        source, dims, counts = make(people, profile, rng, models)
        yield source, Event(at, at + late, dims, counts)


_Made = tuple[str, tuple[str | None, ...], tuple[int, ...]]
_OPENAI_MINOR = (
    "embeddings", "moderations", "images", "audio_speeches", "audio_transcriptions", "vector_stores", "code_interpreter_sessions",
    "file_search_calls", "web_search_calls", "unreported",
)  # fmt: skip


def _openai_event(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> _Made:
    key = people.keys[int(rng.random() * len(people.keys))]
    roll = rng.random()
    allowed = profile.sources
    source = "completions"
    if allowed:
        source = allowed[int(roll * len(allowed))]
    elif roll > 0.7:
        source = _OPENAI_MINOR[int((roll - 0.7) / 0.3 * len(_OPENAI_MINOR)) % len(_OPENAI_MINOR)]
    amount = 1 + int(rng.random() * 4000)
    # Some usage is not attributed: the playground has no key, a service account no user.
    is_attributed = rng.random() > 0.08
    who = (key.project, key.user, key.id) if is_attributed else (key.project, None, None)
    match source:
        case "completions" | "decisions":
            model = models[int(rng.random() * len(models))]
            is_batch = rng.random() < 0.1
            tier = "flex" if model.startswith(("gpt-5", "o3")) and not is_batch and rng.random() < 0.1 else "default"
            # A batch reads no cache: what that costs differs between models.
            cached = int(amount * rng.random()) if rng.random() < 0.5 and not is_batch else 0
            write = int(cached * rng.random()) if catalogue.chat_price("openai", model).write_5m else 0
            image = int(rng.random() * 300) if model.startswith("gpt-4o") and rng.random() < 0.2 else 0
            output = 1 + int(rng.random() * 1200)
            counts = (amount - cached, 0, image, cached, 0, 0, write, write // 4, output, 0, 0, 1)
            return source, (*who, model, "true" if is_batch else "false", tier, "unlabeled"), counts
        case "embeddings":
            return source, (*who, "text-embedding-3-small" if amount % 3 else "text-embedding-3-large"), (amount, 1)
        case "moderations":
            return source, (*who, "omni-moderation-latest"), (amount, 1)
        case "images":
            return source, (*who, "gpt-image-1", "1024x1024", "image.generation"), (1 + amount % 3, 1)
        case "audio_speeches":
            return source, (*who, "tts-1"), (amount, 1)
        case "audio_transcriptions":
            return source, (*who, "whisper-1"), (amount, 1)
        case "vector_stores":
            return source, (key.project,), ((1 + amount % 50) * catalogue.GIBIBYTE,)
        case "code_interpreter_sessions":
            return source, (key.project,), (1,)
        case "file_search_calls":
            return source, (*who, "vs_" + token(key.project)), (1 + amount % 5,)
        case "web_search_calls":
            model = models[int(rng.random() * len(models))]
            return source, (*who, model, ("low", "medium", "high")[amount % 3], "unlabeled"), (1 + amount % 4, 1)
        case "unreported":
            images = 1 + amount % 4
            item = (*who, "unlabeled", "image generation, gpt-image-1", "images")
            return source, item, (images * catalogue.IMAGE_PICO, images)
        case _:
            raise ValueError(f"no such source: {source}")


def _anthropic_event(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> _Made:
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


def openai_charges(source: str, event: Event) -> Iterator[Event]:
    """The lines that one usage event adds to the bill, dated like it."""
    dims, counts = event.dims, event.counts

    def line(item: str, unit: str | None, quantity: int, pico: int) -> Event:
        project = dims[0]
        user, key = (None, None) if len(dims) == 1 else dims[1:3]
        api_source = dims[-1] if source in {"completions", "decisions", "web_search_calls"} else "unlabeled"
        return Event(
            event.at, event.visible_at, (project, user, key, api_source, item, unit), (pico * quantity, quantity)
        )

    match source:
        case "completions" | "decisions":
            model, batch, tier = dims[3], dims[4], dims[5]
            price = catalogue.chat_price("openai", model)
            # Half for batch and flex, double for priority; prices are even numbers of picodollars.
            numerator, divisor = (1, 2) if batch == "true" or tier == "flex" else (2 if tier == "priority" else 1, 1)
            suffix = ", batch" if batch == "true" else "" if tier in {"default", None} else f", {tier}"
            for label, quantity, pico in (
                ("input", sum(counts[:3]), price.input),
                ("cached input", sum(counts[3:6]), price.cache_read),
                ("cache write", sum(counts[6:8]), price.write_5m),
                ("output", sum(counts[8:11]), price.output),
            ):
                if quantity:
                    yield line(f"{model}, {label}{suffix}", "tokens", quantity, pico * numerator // divisor)
        case "embeddings":
            yield line(f"{dims[3]}, input", "tokens", counts[0], catalogue.EMBEDDING.get(dims[3] or "", 20_000))
        case "moderations":
            yield line(f"{dims[3]}, input", "tokens", counts[0], 0)
        case "images":
            yield line(f"{dims[3]}, {dims[4]}", "images", counts[0], catalogue.IMAGE_PICO)
        case "audio_speeches":
            yield line(f"{dims[3]}, characters", "characters", counts[0], catalogue.SPEECH_CHARACTER_PICO)
        case "audio_transcriptions":
            yield line(f"{dims[3]}, audio", "duration_seconds", counts[0], catalogue.TRANSCRIPTION_SECOND_PICO)
        case "vector_stores":
            held = counts[0] // catalogue.GIBIBYTE
            yield line("vector store storage", "gibibyte_hours", held, catalogue.GIBIBYTE_HOUR_PICO)
        case "code_interpreter_sessions":
            yield line("code interpreter sessions", None, counts[0], catalogue.CODE_SESSION_PICO)
        case "file_search_calls":
            yield line("file search tool calls", None, counts[0], catalogue.FILE_SEARCH_PICO)
        case "web_search_calls":
            yield line("web search tool calls", None, counts[0], catalogue.WEB_SEARCH_PICO)
        case "unreported":
            yield event
        case _:
            raise ValueError(f"no such source: {source}")


_TOKEN_TYPES = (
    ("uncached_input_tokens", "Input Tokens"),
    ("cache_read_input_tokens", "Input Tokens, Cache Hit"),
    ("cache_creation.ephemeral_5m_input_tokens", "Input Tokens, Cache Write 5m"),
    ("cache_creation.ephemeral_1h_input_tokens", "Input Tokens, Cache Write 1h"),
    ("output_tokens", "Output Tokens"),
)


def anthropic_charges(source: str, event: Event, profile: Profile) -> Iterator[Event]:
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
