"""LiteLLM's proxy: the log of every request as usage by the hour, and its daily spend as cost.

Source: the proxy's code as of `litellm` 1.110.2 (`spend_management_endpoints`, `common_daily_activity`,
`key_management_endpoints`, `internal_user_endpoints`, `team_endpoints`), read 2026-11-22. A proxy is its owner's: there
is no address that all share. What it calls spend is its own estimate of what the vendors will bill.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from daemon.domain.collection import Collected
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import (
    BadRequestError,
    ForbiddenError,
    HistoryFloorError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.ports import Answer, Caller, Ladder, Probe, SourceSpec, collection
from daemon.domain.record import BucketRead, Grain, Row, Snapshot, Totals, totals_of
from daemon.domain.window import Width, Window
from daemon.pollers._litellm_rows import (
    ACTIVITY_DIMS,
    LOG_DIMS,
    LOG_OPTIONAL,
    UPSTREAM,
    Day,
    content_of,
    log_row,
    started_at,
)
from daemon.pollers._names import NOT_FOUND, Listing, Unread, decode_list, follow, names_of
from daemon.pollers.chain import (
    Fields,
    Page,
    check_group_by,
    check_key_kind,
    check_known,
    decode,
    encode_detail,
    read_pages,
    reading,
)
from daemon.records.normalize import merge

LOGS_LADDER = Ladder(young=timedelta(hours=2), hourly=timedelta(hours=6), daily=timedelta(days=2))
"""A log is written within a minute or so of its request's end and hardly changes. What is late is what ran long."""

COST_LADDER = Ladder(young=timedelta(days=1), hourly=timedelta(days=3), daily=timedelta(days=35))
LOG_HOURS = 24
PAGE_SIZES = (1000, 100)
"""The most rows a page may have; older releases refuse more than a hundred (422)."""

PAGES_MAX = 1000
SLICE_S_MIN = 2
UNPROCESSABLE = 422
KEPT_SURELY = timedelta(days=3)
"""Logs older than this may have been deleted by the proxy's retention: an hour without any is then no empty hour."""

KEY_NEEDED = "the proxy's master key, or a key of a user with the role proxy_admin or proxy_admin_viewer"
NAMES_SIZE = "100"
_DIMS = {"logs": LOG_DIMS, "activity": ACTIVITY_DIMS}
_FIRST_LOG = datetime(2020, 1, 1, tzinfo=UTC)
_INSTANT = "%Y-%m-%d %H:%M:%S"


class _Logs(msgspec.Struct):
    data: list[Fields]
    total_pages: int
    total: int | None = None
    page: int | None = None
    total_is_capped: bool = False
    """The proxy counts to ten thousand and no further, pages included."""


class _ActivityEnd(msgspec.Struct):
    total_pages: int
    page: int | None = None


class _Activity(msgspec.Struct):
    results: list[Day]
    metadata: _ActivityEnd


class _NameList(msgspec.Struct):
    """Keys, users or teams; the page's number goes by two names."""

    keys: list[Fields | str] | None = None
    users: list[Fields] | None = None
    teams: list[Fields] | None = None
    total_pages: int | None = None
    page: int | None = None
    current_page: int | None = None


_logs_decoder = msgspec.json.Decoder(_Logs, float_hook=Decimal)
_activity_decoder = msgspec.json.Decoder(_Activity, float_hook=Decimal)
_list_decoder = msgspec.json.Decoder(_NameList)
_teams_decoder = msgspec.json.Decoder(list[Fields])


class LiteLLMPoller:
    """A LiteLLM proxy with a database.

    Args:
        now: the wall clock, for telling which logs may have been deleted.
    """

    provider = "litellm"
    default_base_url = ""
    sources: Mapping[str, SourceSpec] = {
        "logs": SourceSpec("logs", "usage", "tick", LOGS_LADDER, LOG_HOURS, can_probe=True, upstream=UPSTREAM),
        # A day a chain: rows are paged newest first, so that each new row of today moves all others.
        "activity": SourceSpec("activity", "cost", "hourly", COST_LADDER, 1, upstream=UPSTREAM),
        "names": collection("names", "names", "daily"),
    }

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    def check_settings(self, settings: Mapping[str, object]) -> None:
        check_known(settings, ("group_by",))
        if "group_by" in settings:
            check_group_by(settings["group_by"], {"logs": LOG_DIMS | LOG_OPTIONAL, "activity": ACTIVITY_DIMS})

    def check_credential(self, credential: str) -> None:
        # The master key is whatever its owner chose, "sk-admin-1" included.
        check_key_kind(credential, "sk-admin-", KEY_NEEDED)

    def grain(self, source: str, settings: Mapping[str, Any]) -> Grain:
        """The vendor is always among the dimensions: it tells whose money a row is."""
        if source not in _DIMS:
            return Grain("v1", Width.DAY, ())
        group_by = settings.get("group_by", {}).get(source, _DIMS[source])
        return Grain("v1", Width.HOUR if source == "logs" else Width.DAY, tuple(sorted({*group_by, UPSTREAM})))

    async def identify(self, target: Target, call: Caller) -> Identity:
        """Only a key that sees all users sees all logs: any other is shown its own, and is not told so."""
        try:
            await call.get("/user/list", (("page", "1"), ("page_size", "1")), _headers(target))
        except ForbiddenError as error:
            raise ForbiddenError(f"the key sees its own requests alone; needed is {KEY_NEEDED} ({error})") from error
        except BadRequestError:
            hour = Width.HOUR.floor(self._now())
            await self._newest(target, Window(hour - Width.HOUR.delta, hour), call)
        return Identity(target.base_url)

    async def probe(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - one source has a probe
        grain: Grain,  # noqa: ARG002 - it sees the logs themselves
        window: Window,
        call: Caller,
    ) -> Probe:
        newest = await self._newest(target, window, call)
        return Probe(digest=_digest(newest.total, str(newest.data[0].get("request_id")) if newest.data else None))

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        if source == "logs":
            return await self._fetch_logs(target, grain, window, call)
        return await self._fetch_activity(target, grain, window, call)

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        snapshot = await self.fetch(target, source, Grain(grain.api, grain.width, ()), window, call)
        return {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets if bucket.rows}

    async def collect(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - there is one
        known: bytes | None,  # noqa: ARG002 - no list has a version
        call: Caller,
    ) -> AsyncIterator[Collected]:
        """Keys by their hash, the deleted ones too where the release keeps them; then users, then teams."""
        unread = Unread()
        full = (("return_full_object", "true"), ("size", NAMES_SIZE))
        with unread.of("api_key"):
            async for items in _listed(target, "/key/list", full, "keys", call):
                yield Collected(names_of("api_key", items, "token", "key_alias", "key_name"))
            try:
                async for items in _listed(target, "/key/list", (*full, ("status", "deleted")), "keys", call):
                    yield Collected(names_of("api_key", items, "token", "key_alias", "key_name"))
            except BadRequestError:
                pass  # an older release, which keeps none
        sized = (("page_size", NAMES_SIZE),)
        with unread.of("user"):
            async for items in _listed(target, "/user/list", sized, "users", call):
                yield Collected(names_of("user", items, "user_id", "user_alias", "user_email"))
        with unread.of("team"):
            async for items in _teams(target, sized, call):
                yield Collected(names_of("team", items, "team_id", "team_alias"))
        for part in unread.ending():
            yield part

    # ── Logs ────────────────────────────────────────────────────────────────────────────────────

    async def _fetch_logs(self, target: Target, grain: Grain, window: Window, call: Caller) -> Snapshot:
        """The window's logs, summed as their pages come, so that no more than a page of them is held."""
        chain = _LogChain(target, grain, call)
        slices = [window]
        while slices:
            part = slices.pop()
            if not await chain.read(part):
                slices += _halves(part)
        starts = sorted(chain.buckets)
        if window.start < self._now() - KEPT_SURELY and (not starts or starts[0] > window.start):
            await self._check_history(target, window, starts[0] if starts else window.end, call)
        buckets = tuple([BucketRead(start, chain.buckets[start]) for start in starts])
        newest = None if chain.newest is None else chain.newest[1]
        return Snapshot(grain, window, buckets, chain.pages, _digest(chain.total, newest))

    async def _check_history(self, target: Target, window: Window, first: datetime, call: Caller) -> None:
        """Raise HistoryFloorError when there is no log before `first`: nobody can tell a deleted hour from an idle one."""
        before = await self._newest(target, Window(_FIRST_LOG, window.start), call)
        if not before.data:
            raise HistoryFloorError(first, f"the proxy keeps no log from before {first:%Y-%m-%d %H:%M}")

    async def _newest(self, target: Target, window: Window, call: Caller) -> _Logs:
        """The newest log of a window, and how many there are."""
        answer = await call.get("/spend/logs/v2", _logs_query(window, 1, "desc"), _headers(target))
        return _decode_logs(answer)

    # ── Days ────────────────────────────────────────────────────────────────────────────────────

    async def _fetch_activity(self, target: Target, grain: Grain, window: Window, call: Caller) -> Snapshot:
        last = window.end - Width.DAY.delta
        query = [
            ("start_date", f"{window.start:%Y-%m-%d}"),
            ("end_date", f"{last:%Y-%m-%d}"),  # inclusive
            ("page_size", str(PAGE_SIZES[0])),
        ]
        days: dict[datetime, list[Row]] = {}

        async def ask(cursor: str | None) -> Page:
            answer = await call.get("/user/daily/activity", _at(query, cursor), _headers(target))
            page = decode(_activity_decoder, answer, "activity")
            with reading(answer, "activity"):
                has_more = _has_more(cursor, page.metadata.page, page.metadata.total_pages)
                buckets = [(day.start(), tuple(day.rows(grain.group_by))) for day in page.results]
            return Page(buckets, has_more, _next(cursor))

        pages = await read_pages(ask, end=datetime.max.replace(tzinfo=UTC), pages_max=PAGES_MAX)
        for start, rows in (bucket for page in pages for bucket in page.buckets):
            if start in window:
                days.setdefault(start, []).extend(rows)
        return Snapshot(
            grain, window, tuple([BucketRead(start, tuple(days[start])) for start in sorted(days)]), len(pages)
        )


@dataclass(slots=True)
class _LogChain:
    """The logs of one question, read slice by slice.

    Attributes:
        buckets: what was read, summed.
        total: how many logs the proxy spoke of first; newest: when the last one began, and its id.
    """

    target: Target
    grain: Grain
    call: Caller
    buckets: dict[datetime, tuple[Row, ...]] = field(default_factory=dict)
    pages: int = 0
    total: int | None = None
    newest: tuple[datetime, str] | None = None
    _page_size: int = PAGE_SIZES[0]
    _has_asked: bool = False

    async def read(self, part: Window) -> bool:
        """Read one slice. False when it has more logs than the proxy counts, so that it must be cut."""
        met: dict[str, int] = {}
        spoken_of: int | None = None

        async def ask(cursor: str | None) -> Page:
            nonlocal spoken_of
            answer = await self._get(part, cursor)
            page = _decode_logs(answer)
            if not self._has_asked:
                self.total, self._has_asked = page.total, True
            if cursor is None and page.total_is_capped:
                if part.end - part.start < timedelta(seconds=SLICE_S_MIN):
                    raise SchemaDriftError("logs: one second has more than the proxy can page through")
                raise _TooManyError
            if cursor is None:
                spoken_of = page.total
            with _reading_logs(page.data):
                has_more = _has_more(cursor, page.page, page.total_pages)
                return Page(self._take(page.data, part, met), has_more, _next(cursor))

        try:
            pages = await read_pages(ask, end=datetime.max.replace(tzinfo=UTC), pages_max=PAGES_MAX)
        except _TooManyError:
            self.pages += 1
            return False
        self.pages += len(pages)
        if spoken_of is not None and len(met) < spoken_of:
            # Logs of one instant have no order of their own: the database may deal them to the pages anew each time.
            raise UpstreamUnavailableError("logs: some moved from page to page while they were read")
        return True

    async def _get(self, part: Window, cursor: str | None) -> Answer:
        headers = _headers(self.target)
        try:
            return await self.call.get(
                "/spend/logs/v2", _at(_logs_query(part, self._page_size, "asc"), cursor), headers
            )
        except BadRequestError as error:
            if error.status != UNPROCESSABLE or self._page_size == PAGE_SIZES[-1] or cursor is not None:
                raise
        self._page_size = PAGE_SIZES[-1]
        return await self._get(part, cursor)

    def _take(
        self, logs: Sequence[Fields], part: Window, met: dict[str, int]
    ) -> list[tuple[datetime, tuple[Row, ...]]]:
        """Add what was not met before to its hours. Returns the hours of the page, which is empty only if they are.

        Pages are cut by number, so that a log which is written meanwhile may push another one to the next page.
        """
        hours: dict[datetime, list[Row]] = {}
        for log in logs:
            request_id, content, start = log.get("request_id"), content_of(log), started_at(log)
            if type(request_id) is not str or not request_id:
                raise SchemaDriftError("a log has no request_id", repr(sorted(log)).encode())
            if start < part.start:
                raise SchemaDriftError(f"a log of {start.isoformat()} lies before the asked start")
            rows = hours.setdefault(Width.HOUR.floor(start), [])
            is_new = request_id not in met
            if met.setdefault(request_id, content) != content:
                raise SchemaDriftError("a log was sent twice, with other figures", repr(request_id).encode())
            if self.newest is None or start >= self.newest[0]:
                self.newest = (start, request_id)
            # The end that is asked for is inclusive: a log of that very instant is the next slice's.
            if is_new and start < part.end:
                rows.append(log_row(log, self.grain.group_by))
        for hour, rows in hours.items():
            if rows:
                self.buckets[hour] = merge((*self.buckets.get(hour, ()), *rows))
        return [(hour, ()) for hour in hours]


class _TooManyError(Exception):
    pass


def _decode_logs(answer: Answer) -> _Logs:
    """As `decode`, but the error keeps of the body only what comes before the first log."""
    try:
        return decode(_logs_decoder, answer, "logs")
    except SchemaDriftError as error:
        first = answer.body.find(b"{", 1)
        raise SchemaDriftError(str(error), answer.body if first < 0 else answer.body[:first]) from None


@contextmanager
def _reading_logs(logs: Sequence[Fields]) -> Iterator[None]:
    """As `reading`, but the error keeps nothing of a log but its fields' names: it may hold prompts and addresses."""
    fields = encode_detail({"fields": sorted(logs[0])}) if logs else b""
    try:
        yield
    except SchemaDriftError as error:
        raise SchemaDriftError(f"logs: {error}", fields) from None


def _halves(part: Window) -> list[Window]:
    """The later half first, so that the earlier one is read next."""
    seconds = int((part.end - part.start).total_seconds())
    middle = part.start + timedelta(seconds=seconds // 2)
    return [Window(middle, part.end), Window(part.start, middle)]


def _logs_query(window: Window, page_size: int, order: str) -> list[tuple[str, str]]:
    """Both ends are inclusive and of whole seconds, while a log begins at a fraction of one: the end is asked for too."""
    return [
        ("start_date", window.start.strftime(_INSTANT)),
        ("end_date", window.end.strftime(_INSTANT)),
        ("page_size", str(page_size)),
        ("sort_by", "startTime"),
        ("sort_order", order),  # "asc": what is written meanwhile comes last
    ]


def _digest(total: int | None, newest: str | None) -> bytes:
    return hashlib.sha256(f"{total} {newest}".encode()).digest()


# ── Lists ───────────────────────────────────────────────────────────────────────────────────────


def _listed(
    target: Target, path: str, query: Sequence[tuple[str, str]], field_name: str, call: Caller
) -> AsyncIterator[Sequence[Fields]]:
    async def ask(cursor: str | None) -> Listing:
        answer = await call.get(path, _at(query, cursor), _headers(target))
        page = decode_list(_list_decoder, answer, path)
        items = getattr(page, field_name)
        if items is None or page.total_pages is None:
            raise SchemaDriftError(f"{path}: the answer has no {field_name} or no count of pages")
        stated = page.page if page.page is not None else page.current_page
        has_more = _has_more(cursor, stated, page.total_pages)
        return Listing([item for item in items if type(item) is dict], _next(cursor) if has_more else None)

    return follow(ask, path)


async def _teams(target: Target, query: Sequence[tuple[str, str]], call: Caller) -> AsyncIterator[Sequence[Fields]]:
    """By pages where the release has them; else all at once."""
    try:
        async for items in _listed(target, "/v2/team/list", query, "teams", call):
            yield items
    except BadRequestError as error:
        if error.status != NOT_FOUND:
            raise
        teams = decode_list(_teams_decoder, await call.get("/team/list", (), _headers(target)), "/team/list")
        yield teams


def _at(query: Sequence[tuple[str, str]], cursor: str | None) -> list[tuple[str, str]]:
    """The question, for the page of that number; the first is the default."""
    return [*query] if cursor is None else [*query, ("page", cursor)]


def _next(cursor: str | None) -> str:
    return str(int(cursor or 1) + 1)


def _has_more(cursor: str | None, stated: int | None, total_pages: int) -> bool:
    """Whether pages follow. A page that says another number than it was asked for is a page too many."""
    asked = int(cursor or 1)
    if stated is not None and stated != asked:
        raise SchemaDriftError(f"page {asked} was asked for, and page {stated} came: a page was read twice, or none")
    return asked < total_pages


def _headers(target: Target) -> dict[str, str]:
    return {"authorization": f"Bearer {target.credential.reveal()}"}


__all__ = ["COST_LADDER", "KEPT_SURELY", "KEY_NEEDED", "LOGS_LADDER", "LOG_HOURS", "PAGE_SIZES", "LiteLLMPoller"]
