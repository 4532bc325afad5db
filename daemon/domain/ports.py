"""The protocols through which a room gets what it needs from another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol, TypeVar

from daemon.domain.collection import Collected
from daemon.domain.connection import Identity, Target
from daemon.domain.record import Grain, Snapshot, Totals
from daemon.domain.window import Window

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """A 200 from a provider: the whole body, decompressed, at most the configured number of bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Caller(Protocol):
    """How a poller asks: one connection's door to its provider, with limits, retries and counting behind it."""

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), headers: Mapping[str, str] | None = None
    ) -> Answer:
        """GET `base_url + path`; `params` are sent in this order, repeated keys included.

        Raises:
            CredentialError: 401.  ForbiddenError: 403.  BadRequestError: any other 4xx, with code and param.
            TransientError: still failing after the retries in the job, or not tried at all.
        """
        ...

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, base_url: str | None = None
    ) -> Answer:
        """POST a question whose parameters are in its body: tried again like `get`, so never for what changes anything.

        Args:
            headers: the content type among them.
            base_url: of another host of the same provider, such as the one that hands out tokens.

        Raises:
            As `get`.
        """
        ...

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        """A request by other means: limited, tried again and counted as one of `get` is.

        Args:
            send: makes the request, once for each try, and raises our errors.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ladder:
    """How far back a source is read again. Buckets younger than `young` each poll, `hourly` each hour, `daily` each day."""

    young: timedelta
    hourly: timedelta
    daily: timedelta


Cadence = Literal["tick", "hourly", "daily", "follow"]
"""When a tick reads a source: each time; once an hour; once a day; or once a day, and when the costs have moved."""

Report = Literal["usage", "cost"]
Collection = Literal["names", "quota", "resource"]


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What is known about one source of a provider, as data.

    Attributes:
        name: unique in the provider, such as "completions"; stored, so never renamed.
        kind: of a report over time, "usage" (tokens, requests, quantities; priced by us) or "cost" (money as the provider
            reports it); of a collection (see `Collector`), what its items are.
        is_level: the quantity is a level (bytes stored), which must not be summed over buckets.
        chain_buckets: the most buckets that one page chain asks for.
        can_probe: `probe` answers for it with one cheap request.
        has_totals: `totals` can read it without grouping.
        upstream: the dimension that names the vendor who is paid for a row, by our name of it ("openai"), where that is
            another one than this provider: a gateway's row, and the vendor's own report, are the same money.
    """

    name: str
    kind: Report | Collection
    cadence: Cadence
    ladder: Ladder
    chain_buckets: int
    is_level: bool = False
    can_probe: bool = False
    has_totals: bool = True
    upstream: str | None = None

    @property
    def is_report(self) -> bool:
        return self.kind in ("usage", "cost")


def collection(name: str, kind: Collection, cadence: Cadence) -> SourceSpec:
    """A source that is read by `Collector.collect`, as a whole each time."""
    return SourceSpec(name, kind, cadence, Ladder(timedelta(0), timedelta(0), timedelta(0)), 1, has_totals=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """One cheap look at a window.

    Exactly one of the two is set: `totals` per bucket start (compared with what the ledger holds; a bucket left out
    holds nothing), or `digest` (compared with the `Snapshot.digest` of the last fetch).
    """

    totals: Mapping[datetime, Totals] | None = None
    digest: bytes | None = None


class Poller(Protocol):
    """One provider: its endpoints, paging and field names. Stateless; every method may run concurrently.

    Every read is of one aligned window and one grain, and either returns the whole of it or raises: a page chain with
    a missing page, a repeated cursor or `has_more` without a cursor raises SchemaDriftError, never returns a part.
    """

    provider: str
    default_base_url: str
    sources: Mapping[str, SourceSpec]

    def check_settings(self, settings: Mapping[str, object]) -> None:
        """Raise UsageError for a setting that this provider does not know, naming it and the choices."""
        ...

    def check_credential(self, credential: str) -> None:
        """Raise CredentialError when the text is plainly a key of another kind, saying which is needed."""
        ...

    def grain(self, source: str, settings: Mapping[str, object]) -> Grain:
        """How this connection cuts the source."""
        ...

    async def identify(self, target: Target, call: Caller) -> Identity:
        """The cheapest request that proves the credential and, where it can, names the organisation."""
        ...

    async def probe(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Probe:
        """One request. Only for sources with `can_probe`."""
        ...

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        """The grouped read of a whole window.

        Raises:
            HistoryFloorError: the provider does not look back so far; it names the earliest start worth asking for.
        """
        ...

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        """The ungrouped read of a whole window, all pages. Only for sources with `has_totals`."""
        ...


class Collector(Protocol):
    """What a poller has besides, some of whose sources are collections."""

    def collect(self, target: Target, source: str, known: bytes | None, call: Caller) -> AsyncIterator[Collected]:
        """Read a collection once, in parts of some hundred or thousand items, which are written as they come: an async
        generator, which is closed where the reading is cut short.

        It ends when the whole was read, and raises when it cannot be: what was written stays, and the next reading
        begins anew.

        Args:
            known: the `Collected.digest` of the last whole reading.
        """
        ...


class Clock(Protocol):
    """The local clock: for durations only. What is due is the database's business."""

    def monotonic(self) -> float:
        """Seconds since some fixed point; never goes back."""
        ...


__all__ = [
    "Answer",
    "Cadence",
    "Caller",
    "Clock",
    "Collection",
    "Collector",
    "Ladder",
    "Poller",
    "Probe",
    "Report",
    "SourceSpec",
    "collection",
]
