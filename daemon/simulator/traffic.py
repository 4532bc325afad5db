"""Seeded traffic: who uses what in an organisation, and the request events of one hour of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from daemon.simulator.catalogue import HOUR, Price, Provider, Source


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
        page_rows_max: the most rows that a page of LiteLLM's logs may hold; older releases answer 422 above 100.
        byok_percent: the share of OpenRouter's requests that go through a key of the customer's own at the vendor.
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
    page_rows_max: int = 1000
    byok_percent: int = 20


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


IdKind = Literal["organization", "project", "key", "user"]


@dataclass(frozen=True, slots=True)
class Vendor:
    """How the organisations of one provider live: all that the world has to know of it.

    Attributes:
        identify: an identifier as this provider writes them, from 64 hex digits.
        models: what the catalogue prices, by the name that goes into traffic.
        sources: by name; `unreported` is what is billed, but shown by no report of usage.
        main: the source that a scenario edits unless it names one.
        bill: the source that `charge` fills.
        make: one more event: its source, dimensions and counts.
        charge: the lines that an event of a source adds to the bill.
        key_dim: what tells twins apart in the scenario `equal_amounts`, and what `attribute` fills in.
        unpriced, novel: what `unpriced_model` and `new_enum_value` write into an event; the first of each can be chosen.
        credit: the dimensions of money back.
        says_529: its overload is a 529.
        late_s: the least that its reports are behind.
    """

    provider: Provider
    identify: Callable[[IdKind, str], str]
    models: Mapping[str, Price]
    sources: Mapping[str, Source]
    main: str
    bill: str
    make: Make
    charge: Charge
    key_dim: str
    unpriced: Mapping[str, str]
    novel: Mapping[str, str]
    credit: Mapping[str, str | None]
    says_529: bool = False
    late_s: int = 0


Made = tuple[str, tuple[str | None, ...], tuple[int, ...]]
Make = Callable[[Cast, Profile, random.Random, tuple[str, ...]], Made]
Charge = Callable[[str, Event, Profile], Iterator[Event]]


def uuid_of(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:32]}"


def cast(vendor: Vendor, seed: int, key: str, profile: Profile) -> Cast:
    """The identifiers of an organisation."""

    def name(kind: IdKind, n: int) -> str:
        return vendor.identify(kind, token(seed, vendor.provider, key, kind, n, length=64))

    projects = tuple(name("project", n) for n in range(max(1, profile.projects)))
    keys = tuple(
        ApiKey(
            name("key", n),
            f"service-{n}",
            projects[n % len(projects)],
            name("user", n // 2),
            f"user{n // 2}@{token(seed, key, length=8)}.example",
        )
        for n in range(max(1, profile.keys))
    )
    digits = token(seed, key, "org", length=64)
    return Cast(vendor.identify("organization", digits), uuid_of(digits), projects, keys)


def hour_events(
    vendor: Vendor, people: Cast, profile: Profile, rng: random.Random, start: int, count: int, span: int = HOUR
) -> Iterator[tuple[str, Event]]:
    """`count` events spread over `start <= at < start + span`, each with its source."""
    models = profile.models or tuple(vendor.models)
    for _ in range(count):
        at = start + int(rng.random() * span)
        late = vendor.late_s + int(rng.random() * (profile.late_s + 1))
        source, dims, counts = vendor.make(people, profile, rng, models)
        yield source, Event(at, at + late, dims, counts)
