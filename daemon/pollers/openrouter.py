"""OpenRouter: the activity of the last thirty completed UTC days, as usage and as cost.

Source: the `openrouter` SDK 1.3.84 and the API reference of openrouter.ai, read 2026-11-22. One answer, without pages,
holds the whole report. A row is a day, an endpoint and a model; the key that made the request is not told.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from daemon.domain.collection import Collected
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import BadRequestError, CredentialError, ForbiddenError, HistoryFloorError, SchemaDriftError
from daemon.domain.ports import Caller, Ladder, Probe, SourceSpec, collection
from daemon.domain.record import BucketRead, Dims, Grain, Rating, Row, Snapshot, Totals, totals_of
from daemon.domain.window import Width, Window
from daemon.pollers._names import Listing, Unread, decode_list, follow, names_of
from daemon.pollers._vendors import vendor
from daemon.pollers.chain import (
    Fields,
    check_grid,
    check_group_by,
    check_key_kind,
    check_known,
    decode,
    encode_detail,
    money,
    need_count,
    reading,
    take_count,
    take_dims,
)

LADDER = Ladder(young=timedelta(days=1), hourly=timedelta(days=3), daily=timedelta(days=7))
HISTORY_DAYS = 30
"""Completed days that the activity goes back; what is older is refused."""

KEY_NEEDED = "an OpenRouter management key, made under Settings -> Management Keys"
CURRENCY = "USD"
WORKSPACE = "workspace_id"
_BASE = frozenset({"endpoint_id", "model", "model_permaslug", "provider_name"})
"""What tells two rows of a day apart: one endpoint serves a model under several names, such as its free variant."""

_BILL = frozenset({"billing", "upstream"})
"""Of costs, always: they tell whose money a row is."""

_DIMS = {"activity": _BASE, "costs": _BASE | _BILL}
_COUNTS = ("requests", "prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens")
_MONEY = ("usage", "byok_usage_inference")

VENDORS = {"amazon-bedrock": "bedrock", "google": "vertex", "google-ai-studio": "gemini", "azure": "azure"}
"""Of `provider_name`, which calls Google's Vertex AI plainly "Google"."""


class _Activity(msgspec.Struct):
    data: list[Fields]


class _Credits(msgspec.Struct):
    total_usage: Any = None


class _CreditsAnswer(msgspec.Struct):
    data: _Credits


class _Key(msgspec.Struct):
    is_management_key: bool | None = None
    is_provisioning_key: bool | None = None
    """The older name of the same."""
    organization_id: str | None = None
    creator_user_id: str | None = None


class _KeyAnswer(msgspec.Struct):
    data: _Key


class _List(msgspec.Struct):
    data: list[Fields]


_activity_decoder = msgspec.json.Decoder(_Activity, float_hook=Decimal)
_credits_decoder = msgspec.json.Decoder(_CreditsAnswer, float_hook=Decimal)
_key_decoder = msgspec.json.Decoder(_KeyAnswer)
_list_decoder = msgspec.json.Decoder(_List, float_hook=Decimal)


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


def _day(row: Fields) -> datetime:
    """The UTC day of a row: a date, which has been seen with a time of midnight behind it."""
    text = row.pop("date", None)
    try:
        start = datetime.fromisoformat(text if type(text) is str else "")
    except ValueError as error:
        raise SchemaDriftError("a row does not say its day", encode_detail(row)) from error
    start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
    check_grid(start, start + Width.DAY.delta, Width.DAY)
    return start


def _usage(row: Fields, dims: Dims, model: str | None) -> Iterable[Row]:
    """`cached_tokens` may exceed `prompt_tokens`, where a cached answer was served again: both are kept as sent."""
    prompt = need_count(row, "prompt_tokens")
    output = need_count(row, "completion_tokens")
    cached = take_count(row, "cached_tokens")
    classes = (("input", max(prompt - (cached or 0), 0)), ("cache_read", cached or 0), ("output", output))
    counts = tuple([pair for pair in classes if pair[1]])
    requests = need_count(row, "requests")
    for name in _MONEY:
        row.pop(name, None)  # the other source's
    yield Row(
        dims,
        input_tokens=prompt,
        cache_read_tokens=cached,
        output_tokens=output,
        requests=requests,
        detail=encode_detail(row),
        rating=Rating("openrouter", model, (), counts) if model and counts else None,
    )


def _costs(row: Fields, group_by: Sequence[str], served_by: str | None) -> Iterable[Row]:
    """What was taken from the credits, and what the vendor charged the customer's own key: two bills, two rows."""
    credits_used = money(row.pop("usage", None))
    own_key = row.pop("byok_usage_inference", None)
    own_key_used = Decimal(0) if own_key is None else money(own_key)
    for name in _COUNTS:
        row.pop(name, None)  # the other source's
    named = {name: row.pop(name, None) for name in (*_BASE, WORKSPACE)}

    def bill(billing: str, upstream: str | None, amount: Decimal, detail: bytes) -> Row:
        dims = take_dims({**named, "billing": billing, "upstream": upstream}, group_by)
        return Row(tuple(sorted((*dims, ("currency", CURRENCY)))), amount=amount, currency=CURRENCY, detail=detail)

    yield bill("credits", None, credits_used, encode_detail(row))
    if own_key_used:
        yield bill("byok", vendor(served_by, VENDORS), own_key_used, b"{}")


def _read(source: str, row: Fields, group_by: Sequence[str]) -> Iterable[Row]:
    text = {name: value for name in _BASE if type(value := row.get(name)) is str}
    if source == "costs":
        return _costs(row, group_by, text.get("provider_name"))
    dims = take_dims(row, group_by)
    for name in (*_BASE, WORKSPACE):
        row.pop(name, None)
    return _usage(row, dims, text.get("model_permaslug") or text.get("model"))


# ── The poller ──────────────────────────────────────────────────────────────────────────────────


class OpenRouterPoller:
    """OpenRouter, for a person's or an organisation's account.

    Args:
        now: the wall clock, for which days are complete and which are gone.
    """

    provider = "openrouter"
    default_base_url = "https://openrouter.ai/api/v1"
    sources: Mapping[str, SourceSpec] = {
        "activity": SourceSpec("activity", "usage", "tick", LADDER, HISTORY_DAYS, can_probe=True),
        "costs": SourceSpec("costs", "cost", "hourly", LADDER, HISTORY_DAYS, upstream="upstream"),
        "names": collection("names", "names", "daily"),
    }

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    def check_settings(self, settings: Mapping[str, object]) -> None:
        check_known(settings, ("group_by",))
        if "group_by" in settings:
            check_group_by(settings["group_by"], {source: dims | {WORKSPACE} for source, dims in _DIMS.items()})

    def check_credential(self, credential: str) -> None:
        check_key_kind(credential, "sk-or-", KEY_NEEDED)

    def grain(self, source: str, settings: Mapping[str, Any]) -> Grain:
        group_by = settings.get("group_by", {}).get(source, _DIMS.get(source, ()))
        always = _BILL if source == "costs" else ()
        return Grain("v1", Width.DAY, tuple(sorted({*group_by, *always})))

    async def identify(self, target: Target, call: Caller) -> Identity:
        """An inference key looks like a management key, but says of itself that it is none."""
        try:
            key = decode(_key_decoder, await call.get("/key", (), _headers(target)), "key").data
        except (BadRequestError, ForbiddenError, SchemaDriftError):
            # A gateway may serve the reports alone: what counts is that it reads them.
            await self._used(target, call)
            return Identity(None)
        if not (key.is_management_key or key.is_provisioning_key):
            raise CredentialError(f"this is an OpenRouter key for inference; needed is {KEY_NEEDED}")
        return Identity(key.organization_id or key.creator_user_id)

    async def probe(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - the credits know no sources,
        grain: Grain,  # noqa: ARG002 - no dimensions
        window: Window,  # noqa: ARG002 - and no days
        call: Caller,
    ) -> Probe:
        """What was ever used, with today's date: a day that completes is news even if nothing is spent any more."""
        used = await self._used(target, call)
        today = Width.DAY.floor(self._now())
        return Probe(digest=hashlib.sha256(f"{today:%Y-%m-%d} {used.normalize()}".encode()).digest())

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        today = Width.DAY.floor(self._now())
        floor = today - timedelta(days=HISTORY_DAYS)
        if window.start < floor:
            raise HistoryFloorError(floor, f"the activity goes back {HISTORY_DAYS} completed days")
        # A day is reported once it is over; until then nothing is known of it, not that it is empty.
        covered = Window(window.start, max(window.start, min(window.end, today)))
        if covered.start == covered.end:
            return Snapshot(grain, covered, (), 0)
        query = []
        if covered.count(Width.DAY) == 1:
            query.append(("date", f"{covered.start:%Y-%m-%d}"))
        if WORKSPACE in grain.group_by:
            query.append(("group_by", "workspace"))
        answer = await call.get("/activity", query, _headers(target))
        lines = decode(_activity_decoder, answer, source).data
        days: dict[datetime, list[Row]] = {}
        with reading(answer, source):
            for line in lines:
                start = _day(line)
                rows = _read(source, line, grain.group_by)
                if start in covered:
                    days.setdefault(start, []).extend(rows)
        return Snapshot(grain, covered, tuple([BucketRead(start, tuple(days[start])) for start in sorted(days)]), 1)

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        snapshot = await self.fetch(target, source, Grain(grain.api, grain.width, ()), window, call)
        return {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets}

    async def collect(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - there is one
        known: bytes | None,  # noqa: ARG002 - no list has a version
        call: Caller,
    ) -> AsyncIterator[Collected]:
        """Workspaces, and the keys of each by their hash, which the reports do not carry yet."""
        unread = Unread()
        workspaces: list[str] = []
        with unread.of("workspace"):
            async for items in _listed(target, "/workspaces", (("limit", "100"),), "id", call):
                workspaces += [id_ for item in items if type(id_ := item.get("id")) is str]
                yield Collected(names_of("workspace", items, "id", "name", "slug"))
        # Without a workspace, the keys are those of the default one; it is all that there is to an older account.
        unread.spread("workspace", onto="api_key")
        every = (("include_disabled", "true"), ("include_expired", "true"))
        for workspace in workspaces or (None,):
            of_one = () if workspace is None else (("workspace_id", workspace),)
            with unread.of("api_key"):
                async for items in _listed(target, "/keys", (*every, *of_one), "hash", call):
                    yield Collected(names_of("api_key", items, "hash", "name", "label"))
        for part in unread.ending():
            yield part

    async def _used(self, target: Target, call: Caller) -> Decimal:
        answer = await call.get("/credits", (), _headers(target))
        told = decode(_credits_decoder, answer, "credits").data.total_usage
        with reading(answer, "credits"):
            return money(told)


def _listed(
    target: Target, path: str, query: Sequence[tuple[str, str]], id_field: str, call: Caller
) -> AsyncIterator[Sequence[Fields]]:
    """A list that is paged by an offset, and ends with an empty page: how long a page is, it does not say."""
    first: set[object] = set()

    async def ask(cursor: str | None) -> Listing:
        offset = int(cursor or 0)
        answer = await call.get(path, [*query, ("offset", cursor)] if cursor else query, _headers(target))
        items = decode_list(_list_decoder, answer, path).data
        if items:
            head = items[0].get(id_field)
            if head in first:
                raise SchemaDriftError(f"{path}: the page at offset {offset} was read before")
            first.add(head)
        return Listing(items, str(offset + len(items)) if items else None)

    return follow(ask, path)


def _headers(target: Target) -> dict[str, str]:
    return {"authorization": f"Bearer {target.credential.reveal()}"}


__all__ = ["HISTORY_DAYS", "KEY_NEEDED", "LADDER", "VENDORS", "OpenRouterPoller"]
