"""Which windows a poll reads."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.connection import Epoch, Stream, StreamId
from daemon.domain.ports import Ladder, SourceSpec
from daemon.domain.record import Grain, GrainId
from daemon.domain.window import EPOCH, Width, Window
from daemon.worker.ladder import DAY, HOUR, Mode, is_due, plan

NOW = datetime(2026, 11, 22, 10, 20, tzinfo=UTC)
OPEN_HOUR = NOW.replace(minute=0)
SPEC = SourceSpec("completions", "usage", "tick", Ladder(3 * HOUR, 48 * HOUR, 7 * DAY), 168, can_probe=True)
HOURLY = Grain("reports", Width.HOUR, ("model",))
DAILY = Grain("reports", Width.DAY, ("model",))
FRESH = Stream(
    id=StreamId(1), source="completions", epochs=(Epoch(EPOCH, GrainId("h"), HOURLY),), covered_from=None,
    covered_to=None, last_seq=0, last_window=None, last_pages=1, probe_digest=None, floor=None, read_at=None,
    hourly_at=None, daily_at=None, changed_at=None, parked_reason=None,
)  # fmt: skip
SINCE = NOW - 30 * DAY
READ = replace(
    FRESH,
    covered_from=SINCE.replace(minute=0),
    covered_to=OPEN_HOUR,
    read_at=NOW - timedelta(minutes=5),
    hourly_at=NOW - timedelta(minutes=20),
    daily_at=NOW - 3 * HOUR,
)


def windows(chunks: object) -> list[Window]:
    return [chunk.window for chunk in chunks]


def test_young_buckets_are_probed_at_each_poll() -> None:
    got = plan(SPEC, READ, Mode.TICK, NOW, SINCE)
    assert got.probe is not None
    assert windows(got.live) == [Window(OPEN_HOUR - 3 * HOUR, OPEN_HOUR + HOUR)]
    assert got.history == ()
    assert not got.is_hourly


def test_ladder_reads_ignore_probes() -> None:
    """A total can stay equal while attribution moves underneath it."""
    hourly = plan(SPEC, replace(READ, hourly_at=NOW - HOUR), Mode.TICK, NOW, SINCE)
    assert hourly.probe is None
    assert hourly.is_hourly
    assert windows(hourly.live) == [Window(OPEN_HOUR - 48 * HOUR, OPEN_HOUR + HOUR)]
    daily = plan(SPEC, replace(READ, daily_at=NOW - DAY), Mode.TICK, NOW, SINCE)
    assert daily.is_daily
    assert daily.live[-1].window.start == OPEN_HOUR - 7 * DAY


def test_downtime_is_caught_up_by_a_longer_window() -> None:
    got = plan(SPEC, replace(READ, covered_to=OPEN_HOUR - 20 * HOUR), Mode.TICK, NOW, SINCE)
    assert got.live[-1].window.start == OPEN_HOUR - 20 * HOUR


def test_first_poll_reads_the_trailing_window_then_history_newest_first() -> None:
    got = plan(SPEC, FRESH, Mode.TICK, NOW, SINCE)
    assert got.probe is None
    assert windows(got.live)[0].end == OPEN_HOUR + HOUR
    starts = [w.start for w in windows(got.history)]
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == SINCE.replace(minute=0)


def test_history_below_the_providers_floor_is_not_asked_for() -> None:
    floor = NOW - 10 * DAY
    got = plan(SPEC, replace(FRESH, floor=floor), Mode.TICK, NOW, SINCE)
    assert min(w.start for w in windows(got.live + got.history)) == Width.HOUR.floor(floor)


def test_bucket_with_a_pending_row_is_read_whatever_its_age() -> None:
    old = OPEN_HOUR - 9 * DAY
    got = plan(SPEC, replace(READ, pending=(old,)), Mode.TICK, NOW, SINCE)
    assert got.probe is None
    assert Window(old, old + HOUR) in windows(got.history)


def test_connection_that_begins_now_reads_the_open_bucket() -> None:
    got = plan(SPEC, FRESH, Mode.POLL, NOW, NOW + timedelta(minutes=3))
    assert windows(got.live) == [Window(OPEN_HOUR, OPEN_HOUR + HOUR)]
    assert got.history == ()


def test_window_is_cut_where_the_grain_changes() -> None:
    """Each bucket is asked for in the grain that owns it."""
    cut = OPEN_HOUR - HOUR
    stream = replace(READ, epochs=(*READ.epochs, Epoch(cut, GrainId("new"), replace(HOURLY, group_by=("project_id",)))))
    got = plan(SPEC, stream, Mode.TICK, NOW, SINCE)
    assert got.probe is None
    assert [(c.epoch.grain_id, c.window) for c in got.live] == [
        ("new", Window(cut, OPEN_HOUR + HOUR)),
        ("h", Window(OPEN_HOUR - 3 * HOUR, cut)),
    ]


def test_backfill_reads_just_what_was_asked() -> None:
    asked = Window(NOW - 3 * DAY, NOW - 2 * DAY)
    got = plan(SPEC, READ, Mode.RANGE, NOW, SINCE, asked)
    assert got.live == ()
    assert windows(got.history) == [Window(OPEN_HOUR - 3 * DAY, OPEN_HOUR - 2 * DAY + HOUR)]


ages = st.none() | st.integers(0, 60 * 24 * 60).map(lambda m: NOW - timedelta(minutes=m))


@given(
    mode=st.sampled_from([Mode.TICK, Mode.POLL, Mode.FULL]),
    since=st.integers(-600, 60 * 24 * 400).map(lambda m: NOW - timedelta(minutes=m)),
    covered=ages, covered_to=ages, hourly_at=ages, daily_at=ages, floor=ages,
    cut=st.none() | st.integers(-30, 400).map(lambda h: OPEN_HOUR - h * HOUR),
    chain=st.integers(1, 200),
)  # fmt: skip
def test_every_plan_is_aligned_disjoint_and_whole(
    mode: Mode,
    since: datetime,
    covered: datetime | None,
    covered_to: datetime | None,
    hourly_at: datetime | None,
    daily_at: datetime | None,
    floor: datetime | None,
    cut: datetime | None,
    chain: int,
) -> None:
    """Whatever the cursors say: nothing unaligned, nothing of the future, nothing twice, no hole, no long chain."""
    stream = replace(
        FRESH,
        covered_from=covered and Width.HOUR.floor(covered),
        covered_to=covered_to and Width.HOUR.floor(covered_to),
        hourly_at=hourly_at,
        daily_at=daily_at,
        floor=floor,
    )
    if cut is not None:
        stream = replace(stream, epochs=(*stream.epochs, Epoch(cut, GrainId("new"), HOURLY)))
    got = plan(replace(SPEC, chain_buckets=chain), stream, mode, NOW, since)
    spans = windows(got.live + got.history)
    for window in spans:
        assert Width.HOUR.floor(window.start) == window.start
        assert window.start < window.end <= OPEN_HOUR + HOUR
        assert window.count(Width.HOUR) <= chain
    buckets = [start for window in spans for start in window.buckets(Width.HOUR)]
    assert len(buckets) == len(set(buckets))
    live = sorted(start for w in windows(got.live) for start in w.buckets(Width.HOUR))
    assert live[-1] == OPEN_HOUR
    assert live == [live[0] + n * HOUR for n in range(len(live))]
    first = Width.HOUR.floor(min(NOW, max(since, floor or since)))
    assert min(buckets) >= first
    if mode is Mode.FULL:
        assert sorted(buckets) == [first + n * HOUR for n in range(len(buckets))]


def test_width_that_grows_keeps_the_old_grain_aligned() -> None:
    midnight = NOW.replace(hour=0, minute=0)
    stream = replace(READ, epochs=(Epoch(EPOCH, GrainId("d"), DAILY), Epoch(midnight, GrainId("h"), HOURLY)))
    got = plan(SPEC, stream, Mode.FULL, NOW, NOW - 2 * DAY)
    for chunk in got.live + got.history:
        width = chunk.epoch.grain.width
        assert width.floor(chunk.window.start) == chunk.window.start
        assert width.floor(chunk.window.end) == chunk.window.end


def test_source_in_the_retry_queue_is_left_to_it_by_ticks_alone() -> None:
    retried = replace(READ, is_open_elsewhere=True)
    assert not is_due(SPEC, retried, Mode.TICK, NOW, None)
    assert is_due(SPEC, retried, Mode.FULL, NOW, None)


def test_follower_is_read_when_the_costs_moved_or_a_day_has_passed() -> None:
    spec = replace(SPEC, name="images", cadence="follow", can_probe=False)
    assert not is_due(spec, READ, Mode.TICK, NOW, None)
    assert not is_due(spec, READ, Mode.TICK, NOW, NOW - timedelta(minutes=6))
    assert is_due(spec, READ, Mode.TICK, NOW, NOW - timedelta(minutes=5))
    assert is_due(spec, replace(READ, daily_at=NOW - DAY), Mode.TICK, NOW, None)


def test_parked_source_is_tried_once_a_day_and_whenever_a_person_asks() -> None:
    parked = replace(READ, parked_reason="403")
    assert not is_due(SPEC, parked, Mode.TICK, NOW, None)
    assert is_due(SPEC, replace(parked, read_at=NOW - DAY), Mode.TICK, NOW, None)
    assert is_due(SPEC, parked, Mode.POLL, NOW, None)
