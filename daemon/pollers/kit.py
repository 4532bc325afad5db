"""What makes a simple poller short: one class that says once what most providers' pollers say alike.

A poller of one's own needs no more than `daemon.domain.ports.Poller`. `SimplePoller` is that protocol with the usual
answers in it; each method may be overridden, and none hides a request: the poller still writes every one of them, in
`page`. What it is not for: reports with a probe of their own, more than one generation of an API, several requests for
one row. How to use it: docs/how-to/write-a-poller.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar, NoReturn

from daemon.domain import ports
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import PermanentError, SchemaDriftError, UpstreamUnavailableError
from daemon.domain.ports import Answer, Caller, Ladder, Probe, SourceSpec
from daemon.domain.record import EXACT, Dims, Grain, Row, Snapshot, Totals, totals_of
from daemon.domain.window import Width, Window
from daemon.pollers.chain import (
    Fields,
    Page,
    check_grid,
    check_group_by,
    check_key_kind,
    check_known,
    currency_code,
    encode_detail,
    in_order,
    money,
    read_pages,
    reading,
    take_dims,
)

DAILY = Ladder(young=timedelta(days=1), hourly=timedelta(days=3), daily=timedelta(days=35))
"""Of reports by day: a bill may be corrected until some days after the end of its month."""

HOURLY = Ladder(young=timedelta(hours=3), hourly=timedelta(hours=48), daily=timedelta(days=7))

ROW_PAGES_MAX = 1000
"""Of a report that is paged by rows, whose number nobody knows beforehand."""

NEVER = datetime.max.replace(tzinfo=UTC)

ReadRow = Callable[[Fields, Dims], Row]
"""Makes a row of what was sent and its dimensions. It takes out what it understands; `encode_detail` keeps the rest."""


def daily(name: str, kind: ports.Report, *, buckets: int = 31, upstream: str | None = None) -> SourceSpec:
    """A report by day, read once an hour. `dataclasses.replace` it, or write a `SourceSpec`, for anything else."""
    return SourceSpec(name, kind, "hourly", DAILY, buckets, upstream=upstream)


def hourly(name: str, kind: ports.Report, *, buckets: int = 168, upstream: str | None = None) -> SourceSpec:
    """A report by hour, read at each tick."""
    return SourceSpec(name, kind, "tick", HOURLY, buckets, upstream=upstream)


@dataclass(frozen=True, slots=True)
class Report:
    """One endpoint with buckets of time.

    Attributes:
        spec: what tallyd needs to know about it.
        path: after the base URL.
        group_by: the dimensions that a connection is cut by unless `settings.group_by` says otherwise.
        read: makes a row.
        optional: further dimensions that `settings.group_by` may name.
        wire: how the provider writes a dimension, by our name of it, where that is another.
        api: the generation of the API, a part of stored identities.
        may_send_empty: the provider sends buckets without rows, so that a missing one is a lost page.
        is_row_paged: a page ends after so many rows, in whatever order, so that a bucket may go on on any later page; its
            rows differ in their dimensions or in what else they say.
    """

    spec: SourceSpec
    path: str
    group_by: tuple[str, ...]
    read: ReadRow
    optional: tuple[str, ...] = ()
    wire: Mapping[str, str] = field(default_factory=dict)
    width: Width = Width.DAY
    api: str = "v1"
    may_send_empty: bool = False
    is_row_paged: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """What `page` is asked: the whole of `window`, cut by `grain`, whose `group_by` is empty for the totals."""

    target: Target
    report: Report
    grain: Grain
    window: Window
    call: Caller

    @property
    def limit(self) -> int:
        """How many buckets one page may hold."""
        return min(self.window.count(self.grain.width), self.report.spec.chain_buckets)

    @property
    def group_by(self) -> list[str]:
        """The dimensions to ask for, as the provider writes them."""
        return [self.report.wire.get(name, name) for name in self.grain.group_by]

    def page(
        self,
        answer: Answer,
        buckets: Iterable[tuple[datetime, datetime, list[Fields]]],
        next_page: str | None = None,
        *,
        has_more: bool | None = None,
    ) -> Page:
        """The page of an answer: each bucket is held against the grid, and each row read.

        Args:
            buckets: (start, end, rows), in the order sent; `by_day` makes them of flat rows.
            next_page: the cursor of the next one.
            has_more: where the answer says so itself; else a cursor does.
        """
        taken = []
        with reading(answer, self.report.spec.name):
            for start, end, rows in buckets:
                check_grid(start, end, self.grain.width)
                taken.append((start.astimezone(UTC), tuple([self._read(row) for row in rows])))
        return Page(taken, bool(next_page) if has_more is None else has_more, next_page)

    def _read(self, row: Fields) -> Row:
        for ours, theirs in self.report.wire.items():
            if theirs in row and ours in self.grain.group_by:
                row[ours] = row.pop(theirs)
        return self.report.read(row, take_dims(row, self.grain.group_by))


class SimplePoller(ABC):
    """A `daemon.domain.ports.Poller` whose reports are page chains.

    Attributes:
        reports: all of them; what a source is called is in its `spec`.
        collections: sources for `daemon.domain.ports.Collector.collect`, which a poller with some has to have.
        key_prefix: what a good key begins with; "" where its shape is not known.
        key_needed: which key that is, and where a person gets it; the end of a sentence.
        own_settings: names of settings besides `group_by`; `check_settings` has to be extended to judge their values.
    """

    provider: str
    default_base_url: str
    reports: ClassVar[tuple[Report, ...]]
    collections: ClassVar[tuple[SourceSpec, ...]] = ()
    key_prefix: ClassVar[str] = ""
    key_needed: ClassVar[str]
    own_settings: ClassVar[tuple[str, ...]] = ()
    sources: Mapping[str, SourceSpec]
    _reports: ClassVar[Mapping[str, Report]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        reports = getattr(cls, "reports", ())
        cls.sources = {spec.name: spec for spec in (*(report.spec for report in reports), *cls.collections)}
        cls._reports = {report.spec.name: report for report in reports}

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    @abstractmethod
    async def page(self, question: Question, cursor: str | None) -> Page:
        """Ask for one page and read it; the first has no cursor. All but the cursor is the same for each page."""

    def headers(self, target: Target) -> dict[str, str]:
        """What every request carries. The key travels in a header, never in a URL."""
        return {"authorization": f"Bearer {target.credential.reveal()}"}

    def check_settings(self, settings: Mapping[str, object]) -> None:
        check_known(settings, ("group_by", *self.own_settings))
        if "group_by" in settings:
            choices = {name: frozenset(report.group_by + report.optional) for name, report in self._reports.items()}
            check_group_by(settings["group_by"], choices)

    def check_credential(self, credential: str) -> None:
        check_key_kind(credential, self.key_prefix, self.key_needed)

    def grain(self, source: str, settings: Mapping[str, Any]) -> Grain:
        report = self._reports[source]
        group_by = settings.get("group_by", {}).get(source, report.group_by)
        return Grain(report.api, report.width, tuple(sorted(group_by)))

    async def identify(self, target: Target, call: Caller) -> Identity:
        """The smallest read of the first report proves the key. Override it where a request names the organisation."""
        report = self.reports[0]
        width = report.width
        end = width.floor(self._now())
        grain = Grain(report.api, width, ())
        await self.page(Question(target, report, grain, Window(end - width.delta, end), call), None)
        return Identity(None)

    async def probe(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Probe:
        return Probe(totals=await self.totals(target, source, grain, window, call))

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        report = self._reports[source]
        pages = await self._read(Question(target, report, grain, window, call))
        covered, buckets = in_order(_whole(pages, report), window, grain.width, may_send_empty=report.may_send_empty)
        return Snapshot(grain, covered, buckets, len(pages))

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        snapshot = await self.fetch(target, source, Grain(grain.api, grain.width, ()), window, call)
        return {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets if bucket.rows}

    async def _read(self, question: Question) -> list[Page]:
        if question.report.is_row_paged:
            # In no order, so that a row from beyond the window says nothing about the pages after it.
            return await read_pages(partial(self.page, question), end=NEVER, pages_max=ROW_PAGES_MAX)
        # One bucket a page is the smallest a chain can be cut; the two are an empty page and one past the end.
        pages_max = question.window.count(question.grain.width) + 2
        return await read_pages(partial(self.page, question), end=question.window.end, pages_max=pages_max)


def _whole(pages: Sequence[Page], report: Report) -> Sequence[Page]:
    """The chain with each bucket in one piece.

    Rows are paged by their number, so that a row which is inserted meanwhile moves the others to later pages: one that
    is met again is no other part of a sum, and what moved the other way was missed.
    """
    if not report.is_row_paged:
        return pages
    buckets: dict[datetime, list[Row]] = {}
    met: dict[datetime, set[tuple[Dims, bytes]]] = {}
    for page in pages:
        sent: dict[datetime, list[Row]] = {}
        for start, rows in page.buckets:
            sent.setdefault(start, []).extend(rows)
        for start, more in sent.items():
            marks = {_mark(row) for row in more}
            if not met.setdefault(start, set()).isdisjoint(marks):
                raise UpstreamUnavailableError(f"{report.spec.name}: rows moved from page to page while they were read")
            met[start] |= marks
            buckets.setdefault(start, []).extend(more)
    whole = [(start, tuple(buckets[start])) for start in sorted(buckets)]
    return [Page(whole, has_more=False, next_page=None)]


def _mark(row: Row) -> tuple[Dims, bytes]:
    """What tells a row from others: its dimensions, and in the detail those that were sent without being asked for."""
    return row.dims, row.detail


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


def day(text: object) -> tuple[datetime, datetime]:
    """Start and end of a UTC day as providers write it: "2026-11-22", or with a time of midnight after it."""
    try:
        start = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise SchemaDriftError("a row does not say its day", repr(text).encode()) from error
    start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
    return start, start + Width.DAY.delta


def by_day(rows: Iterable[Fields], field: str) -> Iterator[tuple[datetime, datetime, list[Fields]]]:
    """Flat rows, each of which names its day in `field`, as the buckets of one page, oldest first."""
    days: dict[tuple[datetime, datetime], list[Fields]] = {}
    for row in rows:
        days.setdefault(day(row.pop(field, None)), []).append(row)
    for start, end in sorted(days):
        yield start, end, days[start, end]


def cost_row(dims: Dims, amount: object, currency: object, rest: Fields, *, places: int = 0) -> Row:
    """A row of money. Its currency is a dimension, so that no sum ever mixes two.

    Args:
        amount: a JSON number or text, never through a float.
        rest: what else was sent; it stays in the detail.
        places: 2 where the provider counts in cents.
    """
    code = currency_code(currency)
    exact = EXACT.scaleb(money(amount), -places) if places else money(amount)
    return Row(tuple(sorted((*dims, ("currency", code)))), amount=exact, currency=code, detail=encode_detail(rest))


class CollectionsOnly:
    """The reports' part of the protocol, for a poller all of whose sources are collections. Nobody asks it for any."""

    async def fetch(self, *_: object, **__: object) -> NoReturn:
        raise PermanentError("it holds collections, and no report over time")

    probe = totals = fetch


__all__ = [
    "DAILY",
    "HOURLY",
    "CollectionsOnly",
    "Question",
    "Report",
    "SimplePoller",
    "by_day",
    "cost_row",
    "daily",
    "day",
    "hourly",
]
