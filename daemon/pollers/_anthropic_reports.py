"""The Admin API's usage and cost reports: buckets with rows, for organisations of the Console.

Source: the Usage and Cost API page of platform.claude.com, read 2026-09-25; what it leaves open, as seen live, is said
where it matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec

from daemon.domain.connection import Target
from daemon.domain.errors import BadRequestError
from daemon.domain.ports import Caller
from daemon.domain.record import BucketRead, Grain, Row
from daemon.domain.window import Window, rfc3339
from daemon.pollers._anthropic_rows import cost_row, headers, usage_row
from daemon.pollers.chain import (
    Fields,
    Instant,
    Page,
    check_grid,
    decode,
    in_order,
    read_pages,
    reading,
    take_dims,
)

USAGE_DIMS = frozenset(
    {
        "api_key_id",
        "workspace_id",
        "model",
        "service_tier",
        "context_window",
        "inference_geo",
        "speed",
        "account_id",
        "service_account_id",
    }
)
COST_DIMS = frozenset({"workspace_id", "description"})
DEFAULTS: Mapping[str, frozenset[str]] = {
    "messages": USAGE_DIMS - {"speed", "account_id", "service_account_id"},
    "cost": COST_DIMS,
}
LIMITS = {"messages": 168, "cost": 31}
SPEED_BETA = "fast-mode-2026-02-01"
_PATHS = {
    "messages": "/v1/organizations/usage_report/messages",
    "cost": "/v1/organizations/cost_report",
}


class _Bucket(msgspec.Struct):
    starting_at: Instant
    ending_at: Instant
    results: list[Fields]

    def read(self, source: str, grain: Grain) -> tuple[datetime, tuple[Row, ...]]:
        check_grid(self.starting_at, self.ending_at, grain.width)
        if source == "cost":
            rows = [cost_row(row, take_dims(row, grain.group_by)) for row in self.results]
        else:
            rows = [usage_row(row, take_dims(row, grain.group_by), None) for row in self.results]
        return self.starting_at.astimezone(UTC), tuple(rows)


class _Page(msgspec.Struct):
    data: list[_Bucket]
    has_more: bool
    next_page: str | None = None


_decoder = msgspec.json.Decoder(_Page, float_hook=Decimal)


async def read(
    target: Target, source: str, grain: Grain, window: Window, call: Caller, *, now: datetime
) -> tuple[tuple[BucketRead, ...], int]:
    """The buckets of the window, those left out that hold nothing, and the number of pages."""
    width = grain.width
    start = window.start
    if source == "cost":
        # A report that began inside the unfinished day has been refused with 400.
        start = min(start, width.floor(now) - timedelta(days=1))
    # The page says of `ending_at` both "exclusive" and "buckets that end before": one bucket more serves either sense.
    end = window.end + width.delta
    query = [("starting_at", rfc3339(start))]
    if end <= now - timedelta(minutes=5):
        query.append(("ending_at", rfc3339(end)))
    query.append(("bucket_width", width.value))
    query.extend(("group_by[]", name) for name in grain.group_by)
    asked = Window(start, end)
    sent = headers(target, SPEED_BETA if "speed" in grain.group_by else None)

    async def ask(cursor: str | None) -> Page:
        params = [*query, ("limit", str(limit))]
        answer = await call.get(_PATHS[source], params if cursor is None else [*params, ("page", cursor)], sent)
        page = decode(_decoder, answer, source)
        with reading(answer, source):
            return Page([bucket.read(source, grain) for bucket in page.data], page.has_more, page.next_page)

    limit = min(asked.count(width), LIMITS[source])
    while True:
        try:
            pages = await read_pages(ask, end=asked.end, pages_max=asked.count(width) + 2)
            break
        except BadRequestError as error:
            # A report of too many rows is refused whole, in no other words than any bad request: ask for fewer buckets.
            if error.status != 400 or limit == 1:
                raise
            limit //= 2
    _, buckets = in_order(pages, asked, width)
    return tuple([bucket for bucket in buckets if bucket.start in window]), len(pages)
