"""Organisations and their events. Every report is an aggregation of the events that are visible now.

Nothing is stored that follows from the seed: an hour's events are made when a report first needs them, and aggregates
carry the span of time for which they hold.
"""

from __future__ import annotations

import operator
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from daemon.domain.window import from_epoch, rfc3339, to_epoch
from daemon.simulator import catalogue, traffic
from daemon.simulator.catalogue import DAY, HOUR, WIDTHS, Provider, Source
from daemon.simulator.traffic import Event, Profile, Vendor

Dims = tuple[str | None, ...]
Cells = dict[Dims, tuple[int, ...]]
FOREVER = 1 << 62
_EVENTS_MAX = 200_000
_ROWS_MAX = 1_000_000
_NOTHING: Cells = {}


class Clock:
    """The simulators' only clock, in whole Unix seconds: frozen, or running from where it was set."""

    def __init__(self, start: datetime | None, *, frozen: bool) -> None:
        self.frozen = frozen
        self._set(to_epoch(start) if start else int(time.time()))

    def _set(self, now: int) -> None:
        self._base, self._mark = now, time.monotonic()

    def now(self) -> int:
        return self._base if self.frozen else self._base + int(time.monotonic() - self._mark)

    def advance(self, seconds: int) -> None:
        self._base += seconds

    def freeze(self, at: datetime | None, *, frozen: bool) -> None:
        self._set(self.now() if at is None else to_epoch(at))
        self.frozen = frozen


@dataclass(slots=True)
class Edit:
    """A change of history: what `apply(hour, events)` makes of an hour. An edit of usage also moves what it costs."""

    id: str
    action: str
    source: str
    hours: frozenset[int]
    apply: Callable[[int, list[Event]], list[Event]]


@dataclass(slots=True)
class Wire:
    """How an organisation's answers are written; the truth behind them stays."""

    duplicate_rows: bool = False
    missing_optional_fields: bool = False
    unknown_fields: bool = False
    money_format: str = "number"
    clamp_limit: bool = False
    refuse_future_end: bool = False


@dataclass(slots=True)
class _Aggregate:
    cells: Cells
    since: int
    until: int


@dataclass(slots=True)
class Org:
    """One organisation, reached by one credential.

    Attributes:
        renamed: what people call a project, key or person now, where that is not the name they began with.
        gone: identifiers of what was archived or deleted; their past usage stays.
    """

    vendor: Vendor
    key: str
    seed: int
    profile: Profile
    clock: Clock
    history_from: int
    created_at: int
    wire: Wire = field(default_factory=Wire)
    edits: list[Edit] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    serial: int = 0
    cast: traffic.Cast = field(init=False)
    _hours: dict[int, dict[str, list[Event]]] = field(default_factory=dict)
    _aggregates: dict[tuple[str, int, int], _Aggregate] = field(default_factory=dict)
    _edited: dict[int, list[Edit]] = field(default_factory=dict)
    _grown: dict[int, list[tuple[str, Event]]] = field(default_factory=dict)
    cached_events: int = 0
    cached_rows: int = 0

    def __post_init__(self) -> None:
        self.cast = traffic.cast(self.vendor, self.seed, self.key, self.profile)

    @property
    def provider(self) -> Provider:
        return self.vendor.provider

    @property
    def sources(self) -> Mapping[str, Source]:
        return self.vendor.sources

    def name_of(self, identifier: str | None, name: str) -> str:
        """What something is called now that was called `name` at first."""
        return self.renamed.get(identifier or "", name)

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def forget(self, *, aggregates: bool = False) -> None:
        """Drop events, which can be made again; and on demand all that was made of them."""
        self._hours.clear()
        self.cached_events = 0
        if aggregates:
            self._aggregates.clear()
            self.cached_rows = 0

    def edit(self, edit: Edit) -> None:
        self.edits.append(edit)
        for hour in edit.hours:
            self._edited.setdefault(hour, []).append(edit)
        self._changed(edit.hours)

    def undo(self, edit: Edit) -> None:
        self.edits.remove(edit)
        for hour in edit.hours:
            self._edited[hour].remove(edit)
        self._changed(edit.hours)

    def _changed(self, hours: Collection[int]) -> None:
        if not hours:
            return
        for hour in hours:
            self._hours.pop(hour, None)
        low, high = min(hours), max(hours) + HOUR
        for key in [key for key in self._aggregates if key[1] < high and key[2] > low]:
            del self._aggregates[key]

    def _base(self, hour: int) -> Iterator[tuple[str, Event]]:
        profile = self.profile
        if hour < self.history_from or not profile.requests_per_hour or (not profile.live and hour >= self.created_at):
            return
        rng = random.Random(f"{self.seed}/{self.provider}/{self.key}/{hour}")  # noqa: S311  # seeded on purpose
        made = traffic.hour_events(self.vendor, self.cast, profile, rng, hour, profile.requests_per_hour)
        for source, event in sorted(made, key=lambda each: each[1].at):
            if event.at < self.created_at:
                yield source, event._replace(visible_at=event.at) if profile.reveal_now else event
            elif profile.live:
                yield source, event

    def events(self, source: str, hour: int) -> list[Event]:
        """All events of one source in one hour, visible or not, with every edit applied."""
        made = self._hours.get(hour)
        if made is None:
            made = self._hours[hour] = self._make(hour)
            self.cached_events += sum(map(len, made.values()))
        return made.get(source, [])

    def _make(self, hour: int) -> dict[str, list[Event]]:
        bill = self.vendor.bill
        made: dict[str, list[Event]] = {}
        for source, event in (*self._base(hour), *self._grown.get(hour, ())):
            made.setdefault(source, []).append(event)
        edits = self._edited.get(hour, ())
        for edit in edits:
            if edit.source != bill:
                made[edit.source] = edit.apply(hour, made.get(edit.source, []))
        made[bill] = [
            charge for source, events in made.items() for event in events for charge in self.charge(source, event)
        ]
        for edit in edits:
            if edit.source == bill:
                made[bill] = edit.apply(hour, made[bill])
        return made

    def charge(self, source: str, event: Event) -> Iterator[Event]:
        """The lines that one event adds to the bill."""
        if event.at >= self.created_at:
            event = event._replace(visible_at=event.visible_at + self.profile.cost_late_s)
        return self.vendor.charge(source, event, self.profile)

    def cells(self, source: str, start: int, end: int) -> Cells:
        """What is visible of `start <= at < end`, summed per full set of dimensions. Not to be changed by the caller."""
        return self._aggregate(self.sources[source], start, end).cells

    def _aggregate(self, source: Source, start: int, end: int, *, keep: bool = True) -> _Aggregate:
        now = self.clock.now()
        known = self._aggregates.get((source.name, start, end))
        if known is not None and known.since <= now < known.until:
            return known
        if start // HOUR == (end - 1) // HOUR:
            made = self._of_events(source, start, end, now)
        else:
            made = _Aggregate({}, now, FOREVER)
            at = start
            while at < end:
                step = min(end, at - at % HOUR + HOUR)
                if at > now:
                    made.until = min(made.until, at)
                    break
                # Hours are worth keeping beside their sum only while that sum still moves.
                part = self._aggregate(source, at, step, keep=end > now)
                made.until = min(made.until, part.until)
                if source.is_level:
                    made.cells.update(part.cells)
                else:
                    _add(made.cells, part.cells.items())
                at = step
        if keep:
            self._aggregates[source.name, start, end] = made
            self.cached_rows += 1 + len(made.cells)
        return made

    def _of_events(self, source: Source, start: int, end: int, now: int) -> _Aggregate:
        cells: Cells = {}
        until = FOREVER
        for event in self.events(source.name, start - start % HOUR):
            if not start <= event.at < end:
                continue
            if event.visible_at > now:
                until = min(until, event.visible_at)
            elif source.is_level:
                cells[event.dims] = event.counts
            else:
                _add(cells, ((event.dims, event.counts),))
        # A row whose counts all cancel out is one that the provider no longer lists.
        kept = {dims: counts for dims, counts in cells.items() if any(counts)} if cells else _NOTHING
        return _Aggregate(kept, now, until)

    def make(self, count: int, start: int, span: int, *, sources: tuple[str, ...] = ()) -> list[tuple[str, Event]]:
        """`count` more seeded events in `start <= at < start + span`; they are not part of history yet."""
        rng = random.Random(f"{self.seed}/{self.provider}/{self.key}/more/{self.next_serial()}")  # noqa: S311  # seeded
        profile = replace(self.profile, sources=sources) if sources else self.profile
        return list(traffic.hour_events(self.vendor, self.cast, profile, rng, start, count, span))

    def grow(self, count: int, start: int, end: int) -> list[tuple[str, Event]]:
        """`count` more seeded events in `start <= at < end`, visible at once: traffic, which no `restore` undoes."""
        made = [(name, event._replace(visible_at=event.at)) for name, event in self.make(count, start, end - start)]
        hours = set()
        for name, event in made:
            hour = event.at - event.at % HOUR
            self._grown.setdefault(hour, []).append((name, event))
            hours.add(hour)
        self._changed(hours)
        return made

    def addition(self, source: str, events: Sequence[Event], action: str) -> Edit:
        """The edit that adds events which the seed does not have."""
        by_hour: dict[int, list[Event]] = {}
        for event in events:
            by_hour.setdefault(event.at - event.at % HOUR, []).append(event)
        return Edit(
            f"edit-{self.next_serial()}",
            action,
            source,
            frozenset(by_hour),
            lambda hour, known: [*known, *by_hour[hour]],
        )

    def first_hour(self) -> int:
        return min([self.history_from, *self._edited, *self._grown])

    def starts(self, source: Source, since: int, until: int) -> range:
        """The buckets of the finest grain inside `since <= t < until` that may hold something."""
        step = source.step
        first = max(since - since % step, self.first_hour() // step * step)
        return range(first, min(until, self.clock.now() + 1), step)


def _add(cells: Cells, items: Iterable[tuple[Dims, tuple[int, ...]]]) -> None:
    for dims, counts in items:
        known = cells.get(dims)
        cells[dims] = counts if known is None else tuple(map(operator.add, known, counts))


def group(source: Source, cells: Cells, group_by: Sequence[str], keep: Callable[[Dims], bool] | None = None) -> Cells:
    """Cells summed over all dimensions but `group_by`, in its order, sorted by value; null sorts first."""
    places = [source.at(dim) for dim in group_by]
    grouped: Cells = {}
    _add(
        grouped,
        ((tuple([dims[n] for n in places]), counts) for dims, counts in cells.items() if keep is None or keep(dims)),
    )
    return dict(sorted(grouped.items(), key=lambda item: [(value is not None, value or "") for value in item[0]]))


class World:
    """All organisations made so far, the clock, and the profiles of those to come."""

    def __init__(self, seed: int, clock: Clock) -> None:
        self.seed = seed
        self.clock = clock
        self.started_at = clock.now()
        self.profiles: dict[tuple[Provider, str | None], Profile] = {}
        self.orgs: OrderedDict[tuple[Provider, str], Org] = OrderedDict()
        self._looked_up = 0

    def org(self, vendor: Vendor, key: str) -> Org:
        """The organisation behind a credential, made on first use."""
        provider = vendor.provider
        org = self.orgs.get((provider, key))
        if org is None:
            profile = self.profiles.get((provider, key)) or self.profiles.get((provider, None)) or Profile()
            start = self.started_at - self.started_at % DAY - profile.history_days * DAY
            org = Org(vendor, key, self.seed, profile, self.clock, start, self.clock.now())
            self.orgs[provider, key] = org
        self.orgs.move_to_end((provider, key))
        self._looked_up += 1
        if self._looked_up % 512 == 0:
            self._evict()
        return org

    def _evict(self) -> None:
        """Least recently used organisations forget first."""
        events = sum(org.cached_events for org in self.orgs.values())
        rows = sum(org.cached_rows for org in self.orgs.values())
        for org in self.orgs.values():
            if events <= _EVENTS_MAX and rows <= _ROWS_MAX:
                break
            events -= org.cached_events
            is_crowded = rows > _ROWS_MAX
            rows -= org.cached_rows if is_crowded else 0
            org.forget(aggregates=is_crowded)


def truth_rows(
    org: Org, name: str, since: int, until: int, *, width_s: int | None = None, group_by: Sequence[str] | None = None
) -> list[dict[str, object]]:
    """What the provider would report of one source, a row per bucket and dimensions, oldest first."""
    source = org.sources[name]
    dims = source.dims[: source.public] if group_by is None else tuple(group_by)
    step = width_s or source.step
    width = next(name for name, seconds in WIDTHS.items() if seconds == step)
    rows: list[dict[str, object]] = []
    starts = org.starts(source, since, until)
    for start in range(starts.start - starts.start % step, starts.stop, step):
        cells = org.cells(name, start, start + step)
        for values, counts in group(source, cells, dims).items() if cells else ():
            rows.append(
                {
                    "bucket_start": rfc3339(from_epoch(start)),
                    "width": width,
                    "dims": dict(zip(dims, values, strict=True)),
                    **catalogue.measures(source, counts),
                }
            )
    return rows


def truth_totals(org: Org, name: str, since: int, until: int) -> dict[str, object]:
    """The sums of one source. A level has no sum over time: its total is that of the newest bucket."""
    source = org.sources[name]
    sums = (0,) * len(source.counts)
    buckets = 0
    for start in org.starts(source, since, until):
        cells = org.cells(name, start, start + source.step)
        if cells:
            buckets += 1
            if source.is_level:
                sums = (0,) * len(source.counts)
            for counts in cells.values():
                sums = tuple(map(operator.add, sums, counts))
    return {**catalogue.measures(source, sums), "buckets": buckets}


def totals_of(org: Org, events: Iterable[tuple[str, Event]]) -> dict[str, dict[str, object]]:
    """The sums of some events and of what they cost, per source."""
    sums: dict[str, tuple[int, ...]] = {}
    bill = org.vendor.bill

    def count(source: str, counts: tuple[int, ...]) -> None:
        known = sums.get(source)
        sums[source] = counts if known is None else tuple(map(operator.add, known, counts))

    for source, event in events:
        if source != "unreported":
            count(source, event.counts)
        for charge in org.charge(source, event) if source != bill else ():
            count(bill, charge.counts)
    return {name: dict(catalogue.measures(org.sources[name], counts)) for name, counts in sums.items()}
