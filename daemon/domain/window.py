"""Half-open UTC windows and the bucket grid they sit on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Width(Enum):
    """The length of a bucket. The value is the spelling that OpenAI and Anthropic share."""

    MINUTE = "1m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def seconds(self) -> int:
        return _SECONDS[self]

    @property
    def delta(self) -> timedelta:
        return timedelta(seconds=_SECONDS[self])

    def floor(self, instant: datetime) -> datetime:
        """The start of the bucket that holds `instant` (UTC-aware)."""
        return floor_to(instant, self.seconds)

    def ceil(self, instant: datetime) -> datetime:
        """`instant` itself if it is on the grid, else the start of the next bucket."""
        floored = self.floor(instant)
        return floored if floored == instant else floored + self.delta


_SECONDS = {Width.MINUTE: 60, Width.HOUR: 3600, Width.DAY: 86400}


def floor_to(instant: datetime, step_s: int) -> datetime:
    """`instant` rounded down to a multiple of `step_s` seconds since the Unix epoch."""
    elapsed = instant - EPOCH
    return instant - (elapsed % timedelta(seconds=step_s))


def from_epoch(seconds: int) -> datetime:
    """A UTC instant from Unix seconds."""
    return EPOCH + timedelta(seconds=seconds)


def to_epoch(instant: datetime) -> int:
    """Whole Unix seconds of `instant`."""
    return int((instant - EPOCH) // timedelta(seconds=1))


def rfc3339(instant: datetime) -> str:
    """`2026-11-22T10:00:00Z`, microseconds only if there are any."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_rfc3339(text: str) -> datetime:
    """An aware instant in UTC. Raises ValueError for a text without a zone, or no time at all."""
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; write it as 2026-11-22T10:00:00Z")
    return instant.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Window:
    """The instants `start <= t < end`, both UTC."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"window ends {self.end} before it starts {self.start}")

    def __contains__(self, instant: datetime) -> bool:
        return self.start <= instant < self.end

    def buckets(self, width: Width) -> Iterator[datetime]:
        """The starts of the buckets inside, oldest first; the window must be aligned."""
        start = self.start
        while start < self.end:
            yield start
            start += width.delta

    def count(self, width: Width) -> int:
        """How many buckets of `width` the window holds."""
        return int((self.end - self.start) / width.delta)

    def intersect(self, other: Window) -> Window | None:
        """What both cover, or None."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Window(start, end) if start < end else None
