"""The Usage and Cost Analytics API (beta of 2026-10-29): one flat row per bucket and group, Enterprise included.

Source: the `anthropic` SDK 2.12.0, `client.beta.organization.analytics.{usage,cost}.list`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import groupby

import msgspec

from daemon.domain.connection import Target
from daemon.domain.errors import HistoryFloorError, SchemaDriftError, UpstreamUnavailableError
from daemon.domain.ports import Caller
from daemon.domain.record import Dims, Grain, Row, Snapshot
from daemon.domain.window import Window, rfc3339
from daemon.pollers._anthropic_rows import cost_row, headers, usage_row
from daemon.pollers.chain import (
    Fields,
    Instant,
    Page,
    check_grid,
    decode,
    encode_detail,
    in_order,
    read_pages,
    reading,
    take_count,
    take_dims,
)

BETA = "analytics-usage-cost-2026-08-24"
DIMS_MAX = 5
ROWS_MAX = 1000
PAGES_MAX = 1000
FLOOR = datetime(2026, 1, 1, tzinfo=UTC)
REACH = timedelta(days=365)

REFUSED = {"rbac_group_id": "its rows overlap, and their sum counts a member of two groups twice"}
USAGE_DIMS = frozenset(
    {
        "actor",
        "actor_type",
        "agent_id",
        "api_key_id",
        "claude_tag_category",
        "claude_tag_user_id",
        "context_window",
        "deployment_id",
        "environment_id",
        "inference_geo",
        "model",
        "organization_id",
        "product",
        "service_tier",
        "session_id",
        "slack_channel_id",
        "speed",
        "user_profile_id",
        "workspace_id",
    }
)
FREE_DIMS = frozenset({"cost_type", "token_type"})
"""Of the cost report: they do not count towards DIMS_MAX."""

DEFAULTS: Mapping[str, frozenset[str]] = {
    "messages": frozenset({"api_key_id", "model", "workspace_id", "service_tier", "context_window"}),
    "cost": frozenset({"api_key_id", "model", "workspace_id"}) | FREE_DIMS,
}
_PATHS = {
    "messages": "/v1/organizations/analytics/usage",
    "cost": "/v1/organizations/analytics/cost",
}


class _Line(msgspec.Struct):
    starting_at: Instant
    ending_at: Instant
    group: Fields | None = None
    usage: Fields | None = None
    cost: Fields | None = None


class _Page(msgspec.Struct):
    data: list[_Line]
    has_more: bool
    next_page: str | None = None
    data_refreshed_at: Instant | None = None


_decoder = msgspec.json.Decoder(_Page, float_hook=Decimal)


async def read(target: Target, source: str, grain: Grain, window: Window, call: Caller, *, now: datetime) -> Snapshot:
    """The buckets of the window that hold anything, and how fresh they are."""
    floor = max(FLOOR, grain.width.ceil(now - REACH))
    if window.start < floor:
        raise HistoryFloorError(floor, f"the analytics API begins at {rfc3339(floor)}")
    query = _query(grain, window, ROWS_MAX)
    stamps: set[datetime | None] = set()

    async def ask(cursor: str | None) -> Page:
        params = query if cursor is None else [*query, ("page", cursor)]
        answer = await call.get(_PATHS[source], params, headers(target, BETA))
        page = decode(_decoder, answer, source)
        stamps.add(page.data_refreshed_at)
        if len(stamps) > 1:
            # Rows are ranked inside a bucket, so that fresh data moves them from page to page: some would be missed.
            raise UpstreamUnavailableError(f"{source}: the report was refreshed while its pages were read")
        with reading(answer, source):
            return Page(_buckets(page.data, source, grain), page.has_more, page.next_page)

    pages = await read_pages(ask, end=window.end, pages_max=PAGES_MAX)
    digest = _digest(stamps.pop())
    _, buckets = in_order([_joined(pages, source, is_stamped=digest is not None)], window, grain.width)
    return Snapshot(grain, window, buckets, len(pages), digest)


async def probe(target: Target, source: str, grain: Grain, window: Window, call: Caller) -> bytes | None:
    """The report's own freshness stamp, by the smallest read there is; None where it has none."""
    cut = Grain(grain.api, grain.width, ())
    answer = await call.get(_PATHS[source], _query(cut, window, 1), headers(target, BETA))
    return _digest(decode(_decoder, answer, source).data_refreshed_at)


def _digest(refreshed_at: datetime | None) -> bytes | None:
    return None if refreshed_at is None else rfc3339(refreshed_at).encode()


def _query(grain: Grain, window: Window, limit: int) -> list[tuple[str, str]]:
    # By time, because the default order by size moves rows between pages while the data grows.
    return [
        ("starting_at", rfc3339(window.start)),
        ("ending_at", rfc3339(window.end)),
        ("time_bucket_width", grain.width.value),
        *(("group_by[]", name) for name in grain.group_by),
        ("order_by", "time"),
        ("order", "asc"),
        ("limit", str(limit)),
    ]


def _buckets(lines: Sequence[_Line], source: str, grain: Grain) -> list[tuple[datetime, tuple[Row, ...]]]:
    buckets = []
    for start, bucket in groupby(lines, key=lambda line: line.starting_at):
        rows = []
        for line in bucket:
            check_grid(line.starting_at, line.ending_at, grain.width)
            rows.append(_row(line, source, grain.group_by))
        buckets.append((start.astimezone(UTC), tuple(rows)))
    return buckets


def _joined(pages: Sequence[Page], source: str, *, is_stamped: bool) -> Page:
    """The chain as one page: a page ends after so many rows, which may be inside a bucket.

    Args:
        is_stamped: the stamp has proven that all pages are of one report. Without it, a row met again on a later page
            is no other part of a sum: the rows have moved, and what moved the other way was missed.
    """
    buckets: list[tuple[datetime, list[Row]]] = []
    met: set[Dims] = set()
    for start, rows in (bucket for page in pages for bucket in page.buckets):
        names = {row.dims for row in rows}
        if not buckets or buckets[-1][0] != start:
            buckets.append((start, []))
            met = set()
        elif not is_stamped and not met.isdisjoint(names):
            raise UpstreamUnavailableError(f"{source}: rows moved from page to page while they were read")
        buckets[-1][1].extend(rows)
        met |= names
    return Page([(start, tuple(rows)) for start, rows in buckets], has_more=False, next_page=None)


def _row(line: _Line, source: str, group_by: Sequence[str]) -> Row:
    group = line.group or {}
    dims: Dims = take_dims(group, group_by)
    fields = line.cost if source == "cost" else line.usage
    if fields is None:
        raise SchemaDriftError(f"a row of {source} has no numbers", encode_detail(group))
    fields.update({name: value for name, value in group.items() if value is not None})
    if source == "cost":
        # Its count of requests is null once the costs are cut by type, so that no two grains could be compared.
        return cost_row(fields, dims)
    return usage_row(fields, dims, take_count(fields, "requests"))
