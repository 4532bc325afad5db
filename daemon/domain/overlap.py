"""The same money, seen through two connections: which of them counts, judged for each bucket.

Two cases. A gateway's row is also a row of the vendor whom it calls, where that vendor is connected too. And one
organisation may be connected twice. What is left out is told as spans of time, cut where the judgement changes, so that
an old connection and its successor together make the whole history.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Literal, NamedTuple

from daemon.domain.connection import ConnectionId, StreamId, TenantId
from daemon.domain.window import Width

Reason = Literal["gateway", "duplicate"]

BEHIND = timedelta(days=2)
"""A twin that is further behind the other one than this is no longer read, whatever its state says."""


class Gateway(NamedTuple):
    """A source whose rows may be another vendor's money.

    Attributes:
        dimension: names the vendor of a row, by our name of it.
        vendors: the (provider, source) of the other reports in which such money stands, of the same kind.
    """

    provider: str
    source: str
    dimension: str
    vendors: frozenset[tuple[str, str]]


class View(NamedTuple):
    """What has been read of one source of one connection. What was read in several parts is several of these.

    Attributes:
        account: the same for all connections of one organisation.
        start, end: half-open; every bucket that starts in it has been read.
        is_ended: nobody reads it any more, so that its last buckets may lack what came later.
        adds: an operator says that its money is nobody else's.
    """

    stream_id: StreamId
    tenant_id: TenantId
    connection_id: ConnectionId
    provider: str
    source: str
    account: str
    start: datetime
    end: datetime
    width: Width
    is_ended: bool
    adds: bool = False


class Shadow(NamedTuple):
    """Rows of a stream that are not added: those of buckets that start in [start, end).

    Attributes:
        dimension, vendor: only rows whose dimension has this value; None for all of them.
        by: the connection that counts in their place.
    """

    stream_id: StreamId
    start: datetime
    end: datetime
    by: ConnectionId
    reason: Reason
    dimension: str | None = None
    vendor: str | None = None


def shadows(views: Sequence[View], gateways: Iterable[Gateway], *, across: bool) -> list[Shadow]:
    """What must not be added; no two of them fall on the same row.

    Args:
        across: the sum goes over tenants, so that an organisation counts once in all; else once in each tenant.
    """
    doubles = list(_duplicates(views, across=across))
    by_stream: dict[StreamId, list[Shadow]] = defaultdict(list)
    for shadow in doubles:
        by_stream[shadow.stream_id].append(shadow)
    passed_on = (
        part
        for shadow in _passed_on(views, gateways, across=across)
        for part in _without(shadow, by_stream.get(shadow.stream_id, ()))
    )
    return [*doubles, *passed_on]


def _without(shadow: Shadow, others: Iterable[Shadow]) -> list[Shadow]:
    """What of a shadow's time none of the others has."""
    parts = [shadow]
    for other in others:
        parts = [
            part._replace(start=start, end=end)
            for part in parts
            for start, end in (
                (part.start, min(part.end, other.start)),
                (max(part.start, other.end), part.end),
            )
            if start < end
        ]
    return parts


def _duplicates(views: Sequence[View], *, across: bool) -> Iterator[Shadow]:
    groups: dict[tuple[object, ...], list[View]] = defaultdict(list)
    for view in views:
        if not view.adds:
            groups[None if across else view.tenant_id, view.provider, view.account, view.source].append(view)
    for group in groups.values():
        if len(_streams(group)) > 1:
            yield from _twins(group)


def _twins(group: Sequence[View]) -> Iterator[Shadow]:
    # Where the widths differ, a border inside a coarse bucket would divide what cannot be divided.
    coarsest = max((view.width for view in group), key=lambda width: width.seconds)
    held = [view._replace(start=coarsest.ceil(view.start), end=coarsest.ceil(view.end)) for view in group]
    furthest = {view.stream_id: view.end for view in sorted(held, key=lambda view: view.end)}
    newest = max(furthest.values())

    def rank(view: View) -> tuple[bool, float, int]:
        """One that is still read, else the one that was read furthest; of several, the oldest."""
        end = furthest[view.stream_id]
        is_ended = view.is_ended or end < newest - BEHIND
        return is_ended, -end.timestamp() if is_ended else 0.0, view.connection_id

    for start, end, best in _swept(held, rank):
        for view in _streams(group):
            if view.connection_id != best.connection_id:
                yield Shadow(view.stream_id, start, end, best.connection_id, "duplicate")


def _passed_on(views: Sequence[View], gateways: Iterable[Gateway], *, across: bool) -> Iterator[Shadow]:
    by_source = {(gateway.provider, gateway.source): gateway for gateway in gateways}
    by_tenant: dict[TenantId, list[View]] = defaultdict(list)
    tenants: dict[tuple[str, str], set[TenantId]] = defaultdict(set)
    for view in views:
        if not view.adds:
            by_tenant[view.tenant_id].append(view)
            tenants[view.provider, view.account].add(view.tenant_id)
    for view in _streams(view for mine in by_tenant.values() for view in mine):
        gateway = by_source.get((view.provider, view.source))
        if gateway is None:
            continue
        # One gateway of two tenants counts once in all, as the one's; the vendor whom it calls may be the other's.
        homes = sorted(tenants[view.provider, view.account]) if across else [view.tenant_id]
        vendors: dict[str, list[View]] = defaultdict(list)
        for other in (other for home in homes for other in by_tenant[home]):
            if other.provider != view.provider and (other.provider, other.source) in gateway.vendors:
                vendors[other.provider].append(other)
        for vendor, reports in vendors.items():
            for start, end, best in _swept(reports, lambda report: (report.connection_id, report.stream_id)):
                yield Shadow(view.stream_id, start, end, best.connection_id, "gateway", gateway.dimension, vendor)


def _streams(views: Iterable[View]) -> Collection[View]:
    """One view of each stream."""
    return {view.stream_id: view for view in views}.values()


def _swept(
    views: Sequence[View], rank: Callable[[View], tuple[object, ...]]
) -> Iterator[tuple[datetime, datetime, View]]:
    """The time that any of them covers, cut where the best of those that cover it changes."""
    cuts = sorted({instant for view in views for instant in (view.start, view.end)})
    spans: list[tuple[datetime, datetime, View]] = []
    waiting = deque(sorted(views, key=lambda view: view.start))
    covering: list[View] = []
    for start, end in pairwise(cuts):
        while waiting and waiting[0].start <= start:
            covering.append(waiting.popleft())
        covering = [view for view in covering if view.end > start]
        if not covering:
            continue
        best = min(covering, key=rank)
        if spans and spans[-1][1] == start and spans[-1][2].connection_id == best.connection_id:
            spans[-1] = (spans[-1][0], end, best)
        else:
            spans.append((start, end, best))
    yield from spans
