"""OpenAI's traffic: the usage events of an organisation, and what each of them adds to the bill."""

from __future__ import annotations

import random
from collections.abc import Iterator

from daemon.simulator import catalogue
from daemon.simulator.traffic import Cast, Event, Made, Profile, token

_MINOR = (
    "embeddings", "moderations", "images", "audio_speeches", "audio_transcriptions", "vector_stores", "code_interpreter_sessions",
    "file_search_calls", "web_search_calls", "unreported",
)  # fmt: skip


def make(people: Cast, profile: Profile, rng: random.Random, models: tuple[str, ...]) -> Made:
    key = people.keys[int(rng.random() * len(people.keys))]
    roll = rng.random()
    allowed = profile.sources
    source = "completions"
    if allowed:
        source = allowed[int(roll * len(allowed))]
    elif roll > 0.7:
        source = _MINOR[int((roll - 0.7) / 0.3 * len(_MINOR)) % len(_MINOR)]
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


def charge(source: str, event: Event, _: Profile) -> Iterator[Event]:
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
