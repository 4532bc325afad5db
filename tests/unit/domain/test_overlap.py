"""Which of several connections counts, bucket by bucket: never twice, and nothing is missing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.connection import ConnectionId, StreamId, TenantId
from daemon.domain.overlap import BEHIND, Gateway, Shadow, View, shadows
from daemon.domain.window import Width

T0 = datetime(2026, 11, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
GATEWAY = Gateway("litellm", "spend", "upstream", frozenset({("openai", "completions"), ("anthropic", "messages")}))


def view(
    number: int,
    start: float,
    end: float,
    *,
    provider: str = "openai",
    source: str = "completions",
    account: str = "org 1",
    tenant: int = 1,
    width: Width = Width.HOUR,
    is_ended: bool = False,
    adds: bool = False,
) -> View:
    return View(
        StreamId(number), TenantId(tenant), ConnectionId(number), provider, source, account, T0 + start * HOUR,
        T0 + end * HOUR, width, is_ended, adds,
    )  # fmt: skip


def left_out(found: list[Shadow], number: int) -> list[tuple[float, float, int]]:
    """(first hour, hour after the last, who counts) of a stream."""
    return [((s.start - T0) / HOUR, (s.end - T0) / HOUR, s.by) for s in found if s.stream_id == number]


def test_of_two_that_are_read_the_oldest_counts_where_it_covers() -> None:
    found = shadows([view(1, 5, 20), view(2, 0, 21)], [], across=False)
    assert left_out(found, 1) == [(0, 5, 2), (20, 21, 2)]
    assert left_out(found, 2) == [(5, 20, 1)]


def test_one_that_has_ended_counts_only_where_no_other_covers() -> None:
    """Its last buckets lack what came later."""
    found = shadows([view(1, 0, 10, is_ended=True), view(2, 8, 30)], [], across=False)
    assert left_out(found, 1) == [(8, 30, 2)]
    assert left_out(found, 2) == [(0, 8, 1)]


def test_one_that_is_far_behind_has_ended_whatever_its_state_says() -> None:
    far = BEHIND / HOUR + 11
    found = shadows([view(1, 0, 10), view(2, 8, far)], [], across=False)
    assert left_out(found, 1) == [(8, far, 2)]
    assert left_out(shadows([view(1, 0, 10), view(2, 8, far - 1)], [], across=False), 2) == [(0, 10, 1)]


def test_of_several_that_have_ended_the_one_read_furthest_counts() -> None:
    found = shadows([view(1, 0, 10, is_ended=True), view(2, 2, 12, is_ended=True), view(3, 11, 20)], [], across=False)
    assert left_out(found, 1) == [(2, 11, 2), (11, 20, 3)]
    assert left_out(found, 2) == [(0, 2, 1), (11, 20, 3)]
    assert left_out(found, 3) == [(0, 2, 1), (2, 11, 2)]


def test_other_organisations_sources_and_tenants_are_let_alone() -> None:
    views = [
        view(1, 0, 9), view(2, 0, 9, account="org 2"), view(3, 0, 9, source="embeddings"), view(4, 0, 9, tenant=2),
        view(5, 0, 9, provider="anthropic"), view(6, 0, 9, adds=True),
    ]  # fmt: skip
    assert shadows(views, [], across=False) == []
    assert left_out(shadows(views, [], across=True), 4) == [(0, 9, 1)]
    assert len(shadows(views, [], across=True)) == 1


def test_a_coarse_bucket_is_never_divided() -> None:
    """An hourly connection that begins within a day of a daily one: the day is one of them's alone."""
    hourly, daily = view(1, 10, 60), view(2, 0, 72, width=Width.DAY)
    found = shadows([hourly, daily], [], across=False)
    assert left_out(found, 1) == [(0, 24, 2)]
    assert left_out(found, 2) == [(24, 72, 1)]


def test_gateway_rows_are_left_out_where_the_vendor_is_covered() -> None:
    gateway = view(1, 0, 100, provider="litellm", source="spend", account="proxy")
    vendor, costs = view(2, 30, 100), view(2, 10, 100, source="costs")
    (shadow,) = shadows([gateway, vendor, costs], [GATEWAY], across=False)
    assert shadow == Shadow(
        StreamId(1), T0 + 30 * HOUR, T0 + 100 * HOUR, ConnectionId(2), "gateway", "upstream", "openai"
    )


def test_gateway_is_let_alone_beside_vendors_of_other_tenants_and_those_that_say_add() -> None:
    gateway = view(1, 0, 100, provider="litellm", source="spend", account="proxy")
    assert shadows([gateway, view(2, 0, 100, tenant=2)], [GATEWAY], across=True) == []
    assert shadows([gateway, view(2, 0, 100, adds=True)], [GATEWAY], across=True) == []
    assert shadows([gateway._replace(adds=True), view(2, 0, 100)], [GATEWAY], across=True) == []


def test_vendors_are_told_apart_and_of_one_vendor_the_oldest_is_named() -> None:
    gateway = view(9, 0, 100, provider="litellm", source="spend", account="proxy")
    views = [
        gateway, view(1, 50, 80), view(2, 40, 60, account="org 2"),
        view(3, 0, 90, provider="anthropic", source="messages"),
    ]  # fmt: skip
    found = [s for s in shadows(views, [GATEWAY], across=False) if s.stream_id == 9]
    assert sorted((s.vendor, s.by, (s.start - T0) / HOUR, (s.end - T0) / HOUR) for s in found) == [
        ("anthropic", 3, 0, 90), ("openai", 1, 50, 80), ("openai", 2, 40, 50),
    ]  # fmt: skip


def test_duplicate_of_a_gateway_is_left_out_once() -> None:
    """No two shadows fall on a row, so that what is told of them adds up."""
    views = [view(n, 0, 100, provider="litellm", source="spend", account="proxy") for n in (1, 2)]
    found = shadows([*views[:1], views[1]._replace(start=T0 + 20 * HOUR), view(3, 10, 50)], [GATEWAY], across=False)
    assert left_out(found, 1) == [(10, 50, 3)]
    assert left_out(found, 2) == [(0, 100, 1)]


def test_parts_of_one_stream_are_left_out_once_and_what_lies_between_them_is_not_covered() -> None:
    """A backfill from before the connection's start is a part of its own: nobody has read the time between."""
    old, new = view(1, 0, 5), view(1, 20, 40)
    twins = shadows([old, new, view(2, 3, 8), view(2, 20, 40)], [], across=False)
    assert left_out(twins, 1) == [(5, 8, 2)], "the parts of one connection do not compete"
    assert left_out(twins, 2) == [(0, 5, 1), (20, 40, 1)]
    gateway = view(9, 0, 40, provider="litellm", source="spend", account="proxy")
    assert left_out(shadows([gateway, old, new], [GATEWAY], across=False), 9) == [(0, 5, 1), (20, 40, 1)]
    parts = [gateway._replace(end=T0 + 10 * HOUR), gateway._replace(start=T0 + 20 * HOUR)]
    assert left_out(shadows([*parts, new], [GATEWAY], across=False), 9) == [(20, 40, 1)]


def test_gateway_of_two_tenants_counts_once_beside_the_vendor_of_either() -> None:
    """Over all tenants the older connection of the proxy counts, and the vendor may be the younger one's."""
    older = view(1, 0, 100, provider="litellm", source="spend", account="proxy", tenant=1)
    younger = view(2, 0, 100, provider="litellm", source="spend", account="proxy", tenant=2)
    vendor = view(3, 30, 60, tenant=2)
    found = shadows([older, younger, vendor], [GATEWAY], across=True)
    assert left_out(found, 1) == [(30, 60, 3)]
    assert left_out(found, 2) == [(0, 100, 1)]
    assert left_out(shadows([older, younger, vendor], [GATEWAY], across=False), 1) == []
    assert left_out(shadows([older, younger._replace(adds=True), vendor], [GATEWAY], across=True), 1) == []


_VIEWS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(1, 90), st.booleans(), st.sampled_from([Width.HOUR, Width.DAY])),
    min_size=1,
    max_size=5,
)


@given(_VIEWS)
def test_every_bucket_that_somebody_covers_counts_exactly_once(given_views: list[tuple[int, int, bool, Width]]) -> None:
    """The law of duplicates: over the coarsest bucket, one connection's rows are left, those of one that covers it."""
    step = 24 if any(width is Width.DAY for *_, width in given_views) else 1
    views = []
    for number, (first, length, is_ended, width) in enumerate(given_views, start=1):
        grid = 24 if width is Width.DAY else 1
        start, end = first // grid * grid, -(-(first + length) // grid) * grid
        views.append(view(number, start, end, is_ended=is_ended, width=width))
    found = shadows(views, [], across=False)
    for at in range(0, 240, step):
        instants = [T0 + (at + hour) * HOUR for hour in range(step)]
        holders = {
            v.stream_id for v in views if v.start <= instants[0] and instants[-1] < Width.DAY.ceil(v.end)
        } if step == 24 else {v.stream_id for v in views if v.start <= instants[0] < v.end}  # fmt: skip
        counting = {
            v.stream_id
            for v in views
            if not any(s.stream_id == v.stream_id and s.start <= i < s.end for s in found for i in instants)
        }
        if holders:
            assert len(counting) == 1, at
            assert counting <= holders, at
        else:
            assert counting == {v.stream_id for v in views}, "where nobody covers it, nobody says that it is twice"
