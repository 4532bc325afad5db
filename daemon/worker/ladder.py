"""Which windows of a source to read now: pure.

Every bucket may change until it is settled (law 3). Young buckets are read at each poll, older ones hourly, then daily.
Behind the ladder lies history that was never read, which is fetched newest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from daemon.domain.connection import Epoch, Stream
from daemon.domain.ports import SourceSpec
from daemon.domain.window import Window

HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Mode(Enum):
    """Why a poll happens, which decides how much of each source it reads."""

    TICK = "tick"
    """What is due by cadence and ladder."""
    POLL = "poll"
    """A person asks: every source, at least its young buckets."""
    FULL = "full"
    """Every bucket since the connection's start, and the ungrouped totals as a second witness."""
    RANGE = "range"
    """The buckets of one given window, whatever is known of them: a backfill."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One page chain to read: a window in one grain."""

    window: Window
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """What to read of one source.

    Attributes:
        probe: look here first; when nothing differs, `live` need not be read.
        live: the trailing window, newest chunk first.
        history: older chunks that were never read (or, in a full poll, all of them), newest first.
        is_hourly, is_daily: the rungs that this read serves.
    """

    probe: Chunk | None
    live: tuple[Chunk, ...]
    history: tuple[Chunk, ...]
    is_hourly: bool
    is_daily: bool


def is_due(spec: SourceSpec, stream: Stream, mode: Mode, now: datetime, costs_changed_at: datetime | None) -> bool:
    """Whether a poll reads this source at all.

    What a person asks for is read even while the retry queue has the source: the fences keep the two apart.

    Args:
        now: the database's time.
        costs_changed_at: when the connection's own cost report last moved: money was spent on something.
    """
    if mode is not Mode.TICK:
        return spec.is_report or mode is not Mode.RANGE
    if stream.is_open_elsewhere:
        return False
    if stream.parked_reason is not None or stream.read_at is None:
        return _is_past(stream.read_at, DAY, now)
    if spec.cadence == "tick" or stream.pending:
        return True
    if spec.cadence == "hourly":
        return _is_past(stream.read_at, HOUR, now)
    if spec.cadence == "daily":
        return _is_past(stream.read_at, DAY, now)
    has_news = costs_changed_at is not None and costs_changed_at >= stream.read_at
    return has_news or _is_past(stream.daily_at, DAY, now)


def plan(
    spec: SourceSpec, stream: Stream, mode: Mode, now: datetime, since: datetime, asked: Window | None = None
) -> SourcePlan:
    """Lay out the reads of one source.

    Args:
        now: the database's time; nothing later is asked for.
        since: the connection's start, or the ledger's retention if that is shorter; nothing older is asked for, nor
            anything before the provider's history floor.
        asked: the window of a RANGE poll.
    """
    if mode is Mode.RANGE:
        assert asked is not None
        return SourcePlan(None, (), tuple(_asked(spec, stream, now, asked)), is_hourly=False, is_daily=False)
    width = stream.epochs[-1].grain.width
    is_daily = _is_past(stream.daily_at, DAY, now)
    is_hourly = is_daily or _is_past(stream.hourly_at, HOUR, now)
    start = width.floor(_rung_start(spec, stream, now, is_hourly=is_hourly, is_daily=is_daily))
    if stream.covered_to is not None:
        start = min(start, stream.covered_to)  # what a downtime left unread
    first = width.floor(max(since, stream.floor or since))
    start = width.floor(min(max(first, start), now))
    live = _chunks(Window(start, max(width.ceil(now), start + width.delta)), spec, stream.epochs)
    known_from = start if stream.covered_from is None else stream.covered_from
    oldest = start if mode is Mode.FULL else min(start, known_from)
    history: list[Chunk] = []
    if first < oldest:
        history += _chunks(Window(first, oldest), spec, stream.epochs)
    if mode is not Mode.FULL:
        lonely = [bucket for bucket in stream.pending if oldest <= bucket < start]
        for bucket in sorted(lonely, reverse=True):
            history += _chunks(Window(bucket, bucket + width.delta), spec, stream.epochs)
    probe = None
    is_plain = mode is not Mode.FULL and not is_hourly and not stream.pending and stream.covered_to is not None
    if spec.can_probe and is_plain and len(live) == 1:
        probe = live[0]
    return SourcePlan(probe, tuple(live), tuple(history), is_hourly, is_daily)


def _rung_start(spec: SourceSpec, stream: Stream, now: datetime, *, is_hourly: bool, is_daily: bool) -> datetime:
    """Where the rung's window begins.

    A bucket is read on a rung until it has grown out of its reach. After a pause longer than the rung's period the
    window so begins where the next one would have begun without the pause, or what was young then is never read again.
    """
    if is_daily:
        reach, period, last = spec.ladder.daily, DAY, stream.daily_at
    elif is_hourly:
        reach, period, last = spec.ladder.hourly, HOUR, stream.hourly_at
    else:
        return now - spec.ladder.young
    return now - reach if last is None else min(now, last + period) - reach


def _asked(spec: SourceSpec, stream: Stream, now: datetime, asked: Window) -> list[Chunk]:
    width = stream.epochs[-1].grain.width
    start = width.floor(max(asked.start, stream.floor or asked.start))
    end = min(width.ceil(asked.end), width.ceil(now))
    return _chunks(Window(start, end), spec, stream.epochs) if start < end else []


def _chunks(window: Window, spec: SourceSpec, epochs: Sequence[Epoch]) -> list[Chunk]:
    """Cut a window at epoch boundaries and into page chains, newest first."""
    found: list[Chunk] = []
    for epoch, span in _owners(epochs):
        part = window.intersect(span) if span is not None else window
        if part is None:
            continue
        step = epoch.grain.width.delta * spec.chain_buckets
        oldest, end = epoch.grain.width.floor(part.start), part.end
        while end > oldest:
            start = max(oldest, end - step)
            found.append(Chunk(Window(start, end), epoch))
            end = start
    return sorted(found, key=lambda chunk: chunk.window.start, reverse=True)


def _owners(epochs: Sequence[Epoch]) -> Iterator[tuple[Epoch, Window | None]]:
    """Each epoch with the span that it owns; None when it owns all of time."""
    if len(epochs) == 1:
        yield epochs[0], None
        return
    ends = [epoch.start for epoch in epochs[1:]] + [datetime.max.replace(tzinfo=epochs[0].start.tzinfo)]
    for epoch, end in zip(epochs, ends, strict=True):
        yield epoch, Window(epoch.start, end)


def _is_past(stamp: datetime | None, period: timedelta, now: datetime) -> bool:
    return stamp is None or now - stamp >= period
