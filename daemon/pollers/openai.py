"""OpenAI's organization usage and costs.

Source: the API reference of the Usage and Costs endpoints (OpenAPI document of 2026-08-21), and what is known of their
behaviour as of 2026-11-22: buckets oldest first, empty ones included; `limit` counts buckets; a cursor is bound to its
query; an unaligned start clips the first bucket.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import msgspec

from daemon.domain.collection import Collected
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import BadRequestError, ForbiddenError, HistoryFloorError, SchemaDriftError
from daemon.domain.ports import Cadence, Caller, Ladder, Probe, SourceSpec, collection
from daemon.domain.record import Dims, Grain, Rating, Row, Snapshot, Totals, totals_of
from daemon.domain.window import Width, Window, from_epoch, to_epoch
from daemon.pollers._names import Listing, Unread, decode_list, follow, names_of
from daemon.pollers.chain import (
    Fields,
    Page,
    check_grid,
    check_group_by,
    check_key_kind,
    check_known,
    currency_code,
    decode,
    encode_detail,
    in_order,
    money,
    need_count,
    part,
    read_pages,
    reading,
    take_count,
    take_dims,
)

USAGE_LADDER = Ladder(young=timedelta(hours=3), hourly=timedelta(hours=48), daily=timedelta(days=7))
COSTS_LADDER = Ladder(young=timedelta(days=1), hourly=timedelta(days=3), daily=timedelta(days=35))
USAGE_BUCKETS = 168
COSTS_BUCKETS = 31
"""The reference allows 180; a live probe saw it clamped to 31."""

COSTS_KEY_FLOOR = datetime(2025, 12, 6, tzinfo=UTC)
"""Costs grouped by api_key_id are refused with 400 before this day; without it history goes back years."""

LOOKBACK_DAYS = (730, 365, 180, 90, 30, 7)
"""Where to look for the floor of an endpoint that says `reporting_lookback_exceeded` and not how far it goes."""

CLOCK_SKEW = timedelta(minutes=5)
"""An end is sent only when it lies this far back: a future one has been refused, and our clock may be ahead."""

_BASE = frozenset({"project_id", "user_id", "api_key_id", "model"})


@dataclass(frozen=True, slots=True)
class _Report:
    """One endpoint: its default cut, what else it may be grouped by, and how a row reads."""

    group_by: frozenset[str]
    optional: frozenset[str]
    read: Callable[[Fields, Dims], Row]


class _Bucket(msgspec.Struct):
    start_time: int
    end_time: int
    results: list[Fields] | None = None
    result: list[Fields] | None = None
    """Some published schemas and clients write it so; the wire has been seen with `results`."""

    def read(
        self, read: Callable[[Fields, Dims], Row], width: Width, group_by: tuple[str, ...]
    ) -> tuple[datetime, tuple[Row, ...]]:
        start = from_epoch(self.start_time)
        check_grid(start, from_epoch(self.end_time), width)
        rows = self.results if self.results is not None else self.result
        if rows is None:
            raise SchemaDriftError("a bucket has neither results nor result")
        for row in rows:
            row.pop("object", None)  # names the endpoint, which the source does already
        return start, tuple([read(row, take_dims(row, group_by)) for row in rows])


class _Page(msgspec.Struct):
    data: list[_Bucket]
    has_more: bool
    next_page: str | None = None


class _Projects(msgspec.Struct):
    data: list[dict[str, Any]] = []


class _List(msgspec.Struct):
    """Projects, users or keys; the cursor is the last one's id."""

    data: list[Fields]
    has_more: bool
    last_id: str | None = None


_page_decoder = msgspec.json.Decoder(_Page, float_hook=Decimal)
_projects_decoder = msgspec.json.Decoder(_Projects)
_list_decoder = msgspec.json.Decoder(_List, float_hook=Decimal)


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


_TIERS: Mapping[str | None, tuple[tuple[str, str], ...]] = {None: (), "default": (), "auto": (), "standard": ()}
_BATCH = (("processing", "batch"),)


def _context(dims: Mapping[str, str | None]) -> tuple[tuple[str, str], ...]:
    """The choices that change a rate. A tier that the price list does not know makes the price an estimate there."""
    if dims.get("batch") == "true":
        return _BATCH
    tier = dims.get("service_tier")
    known = _TIERS.get(tier)
    return (("service_tier", str(tier)),) if known is None else known


def _rating(dims: Dims, counts: tuple[tuple[str, int], ...]) -> Rating | None:
    """How to price a row; None unless it is cut by model, or when it counts nothing."""
    cut = dict(dims)
    model = cut.get("model")
    counts = tuple([pair for pair in counts if pair[1]])
    return Rating("openai", model, _context(cut), counts) if model and counts else None


def _completions(row: Fields, dims: Dims) -> Row:
    total = need_count(row, "input_tokens")
    output = need_count(row, "output_tokens")
    requests = need_count(row, "num_model_requests")
    cached = take_count(row, "input_cached_tokens")
    written = take_count(row, "input_cache_write_tokens")
    audio, image = part(row, "input_audio_tokens"), part(row, "input_image_tokens")
    audio_read, image_read = part(row, "input_cached_audio_tokens"), part(row, "input_cached_image_tokens")
    audio_out, image_out = part(row, "output_audio_tokens"), part(row, "output_image_tokens")
    # What is left for text; never below zero, should a modality ever be counted outside its total.
    counts = (
        ("input", max(total - (cached or 0) - (written or 0) - audio - image, 0)),
        ("cache_read", max((cached or 0) - audio_read - image_read, 0)),
        ("cache_write", written or 0),
        ("output", max(output - audio_out - image_out, 0)),
        ("input_audio", audio),
        ("input_image", image),
        ("cache_audio_read", audio_read),
        ("cache_image_read", image_read),
        ("output_audio", audio_out),
        ("output_image", image_out),
    )
    return Row(
        dims,
        input_tokens=total,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        output_tokens=output,
        requests=requests,
        detail=encode_detail(row),
        rating=_rating(dims, counts),
    )


def _input_only(row: Fields, dims: Dims) -> Row:
    tokens = need_count(row, "input_tokens")
    requests = need_count(row, "num_model_requests")
    rating = _rating(dims, (("input", tokens),))
    return Row(dims, input_tokens=tokens, requests=requests, detail=encode_detail(row), rating=rating)


def _counting(
    field: str, unit: str, requests_field: str | None, priced_as: str | None = None
) -> Callable[[Fields, Dims], Row]:
    """A reader of rows that count something other than tokens."""

    def read(row: Fields, dims: Dims) -> Row:
        count = need_count(row, field)
        requests = take_count(row, requests_field) if requests_field else None
        rating = _rating(dims, ((priced_as, count),)) if priced_as else None
        return Row(
            dims, requests=requests, quantity=Decimal(count), unit=unit, detail=encode_detail(row), rating=rating
        )

    return read


def _costs(row: Fields, dims: Dims) -> Row:
    """Dollars, not cents. The billed quantity stays in the detail: it is in another unit with each line item, and an
    ungrouped read, which the totals of a bucket are compared with, has none.
    """
    amount = row.pop("amount", None)
    if type(amount) is not dict:
        raise SchemaDriftError("a cost has no amount", encode_detail(row))
    currency = currency_code(amount.get("currency"))
    return Row(
        tuple(sorted((*dims, ("currency", currency)))),
        amount=money(amount.get("value")),
        currency=currency,
        detail=encode_detail(row),
    )


_NONE: frozenset[str] = frozenset()
_REPORTS: Mapping[str, _Report] = {
    "completions": _Report(_BASE | {"batch", "service_tier"}, frozenset({"api_source"}), _completions),
    "decisions": _Report(_BASE | {"batch", "service_tier"}, frozenset({"api_source"}), _completions),
    "embeddings": _Report(_BASE, _NONE, _input_only),
    "moderations": _Report(_BASE, _NONE, _input_only),
    "images": _Report(_BASE | {"size", "source"}, _NONE, _counting("images", "images", "num_model_requests")),
    "audio_speeches": _Report(
        _BASE, _NONE, _counting("characters", "characters", "num_model_requests", "input_characters")
    ),
    "audio_transcriptions": _Report(
        _BASE, _NONE, _counting("seconds", "seconds", "num_model_requests", "input_audio_seconds")
    ),
    "vector_stores": _Report(frozenset({"project_id"}), _NONE, _counting("usage_bytes", "bytes", None)),
    "code_interpreter_sessions": _Report(frozenset({"project_id"}), _NONE, _counting("num_sessions", "sessions", None)),
    "file_search_calls": _Report(
        frozenset({"project_id", "user_id", "api_key_id", "vector_store_id"}),
        _NONE,
        _counting("num_requests", "searches", None),
    ),
    "web_search_calls": _Report(
        _BASE | {"context_level"},
        frozenset({"api_source"}),
        _counting("num_requests", "searches", "num_model_requests", "web_search"),
    ),
    "costs": _Report(
        frozenset({"project_id", "line_item", "api_key_id"}), frozenset({"user_id", "api_source"}), _costs
    ),
}


def _spec(name: str) -> SourceSpec:
    if name == "costs":
        return SourceSpec(name, "cost", "hourly", COSTS_LADDER, COSTS_BUCKETS)
    cadence: Cadence = "tick" if name == "completions" else "follow"
    return SourceSpec(
        name,
        "usage",
        cadence,
        USAGE_LADDER,
        USAGE_BUCKETS,
        is_level=name == "vector_stores",
        can_probe=name == "completions",
    )


# ── The poller ──────────────────────────────────────────────────────────────────────────────────


class OpenAIPoller:
    """OpenAI, and gateways that speak its organization API.

    Args:
        now: the wall clock, for leaving the end out of a question about the present, and for guessing a history floor.
    """

    provider = "openai"
    default_base_url = "https://api.openai.com/v1"
    sources: Mapping[str, SourceSpec] = {
        **{name: _spec(name) for name in _REPORTS},
        "names": collection("names", "names", "daily"),
    }

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    def check_settings(self, settings: Mapping[str, object]) -> None:
        check_known(settings, ("group_by",))
        if "group_by" in settings:
            choices = {name: report.group_by | report.optional for name, report in _REPORTS.items()}
            check_group_by(settings["group_by"], choices)

    def check_credential(self, credential: str) -> None:
        check_key_kind(
            credential, "sk-admin-", "an OpenAI admin key (sk-admin-...), made by an owner of the organisation"
        )

    def grain(self, source: str, settings: Mapping[str, Any]) -> Grain:
        default = _REPORTS[source].group_by if source in _REPORTS else _NONE
        group_by = settings.get("group_by", {}).get(source, default)
        return Grain("v1", Width.DAY if source == "costs" else Width.HOUR, tuple(sorted(group_by)))

    async def identify(self, target: Target, call: Caller) -> Identity:
        try:
            answer = await call.get("/organization/projects", (("limit", "1"),), _headers(target))
            projects = decode(_projects_decoder, answer, "projects").data
        except (BadRequestError, ForbiddenError, SchemaDriftError):
            # A gateway may serve the reports alone, and a key may be for nothing else: what counts is that it reads them.
            hour = Width.HOUR.floor(self._now())
            grain = self.grain("completions", target.settings)
            await self.totals(target, "completions", grain, Window(hour - Width.HOUR.delta, hour), call)
            return Identity(None)
        told = projects[0].get("organization_id") if projects else None
        return Identity(answer.headers.get("openai-organization") or (told if isinstance(told, str) else None))

    async def probe(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Probe:
        """One request, unless a gateway hands out smaller pages than it was asked for."""
        return Probe(totals=await self.totals(target, source, grain, window, call))

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        if source == "costs" and "api_key_id" in grain.group_by and window.start < COSTS_KEY_FLOOR:
            raise HistoryFloorError(
                COSTS_KEY_FLOOR,
                f"costs by api_key_id begin on {COSTS_KEY_FLOOR:%Y-%m-%d}; settings.group_by.costs without it reads more",
            )
        pages = await self._read(target, source, grain, window, call)
        covered, buckets = in_order(pages, window, grain.width, may_send_empty=True)
        return Snapshot(grain, covered, buckets, len(pages))

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        pages = await self._read(target, source, Grain(grain.api, grain.width, ()), window, call)
        _, buckets = in_order(pages, window, grain.width, may_send_empty=True)
        return {bucket.start: totals_of(bucket.rows) for bucket in buckets if bucket.rows}

    async def collect(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - there is one
        known: bytes | None,  # noqa: ARG002 - no list has a version
        call: Caller,
    ) -> AsyncIterator[Collected]:
        """Projects, archived ones too, then people, then each project's keys. Who has no name is called by e-mail."""
        unread = Unread()
        projects: list[str] = []
        with unread.of("project"):
            every = (("include_archived", "true"),)
            async for items in _listed(target, "/organization/projects", every, call):
                projects += [id_ for item in items if type(id_ := item.get("id")) is str]
                yield Collected(names_of("project", items, "id", "name"))
        with unread.of("user"):
            async for items in _listed(target, "/organization/users", (), call):
                yield Collected(names_of("user", items, "id", "name", "email"))
        unread.spread("project", onto="api_key")
        for project in projects:
            with unread.of("api_key"):
                async for items in _listed(
                    target, f"/organization/projects/{quote(project, safe='')}/api_keys", (), call
                ):
                    yield Collected(names_of("api_key", items, "id", "name", "redacted_value"))
        for last in unread.ending():
            yield last

    async def _read(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> list[Page]:
        width = grain.width
        count = window.count(width)
        limit = min(count, self.sources[source].chain_buckets)
        path = "/organization/costs" if source == "costs" else f"/organization/usage/{source}"
        query = [("start_time", str(to_epoch(window.start)))]
        if window.end <= self._now() - CLOCK_SKEW:
            query.append(("end_time", str(to_epoch(window.end))))
        query.append(("bucket_width", width.value))
        query.extend(("group_by", name) for name in grain.group_by)
        query.append(("limit", str(limit)))
        headers = _headers(target)
        read = _REPORTS[source].read

        async def ask(cursor: str | None) -> Page:
            answer = await call.get(path, query if cursor is None else [*query, ("page", cursor)], headers)
            page = decode(_page_decoder, answer, source)
            with reading(answer, source):
                buckets = [bucket.read(read, width, grain.group_by) for bucket in page.data]
            return Page(buckets, page.has_more, page.next_page)

        try:
            # One bucket a page is the smallest a chain can be cut; the two are an empty page and one past the end.
            return await read_pages(ask, end=window.end, pages_max=count + 2)
        except BadRequestError as error:
            if error.code == "reporting_lookback_exceeded":
                raise self._floor(window, width, error) from error
            raise

    def _floor(self, window: Window, width: Width, error: BadRequestError) -> BadRequestError:
        """The next step of the look-back ladder after the refused start; the refusal itself once there is none."""
        now = self._now()
        for days in LOOKBACK_DAYS:
            earliest = width.ceil(now - timedelta(days=days))
            if earliest > window.start:
                return HistoryFloorError(earliest, str(error))
        return error


def _listed(
    target: Target, path: str, query: Sequence[tuple[str, str]], call: Caller
) -> AsyncIterator[Sequence[Fields]]:
    async def ask(cursor: str | None) -> Listing:
        after = () if cursor is None else (("after", cursor),)
        answer = await call.get(path, (*query, ("limit", "100"), *after), _headers(target))
        page = decode_list(_list_decoder, answer, path)
        if page.has_more and page.data and not page.last_id:
            raise SchemaDriftError(f"{path}: the page says that there are more, and gives no cursor")
        return Listing(page.data, page.last_id if page.has_more else None)

    return follow(ask, path)


def _headers(target: Target) -> dict[str, str]:
    return {"authorization": f"Bearer {target.credential.reveal()}"}
