"""What the lists of messages, log lines and dead letters share: their filter, their cursors, and how they are walked.

A list is walked by its time, newest first, in stretches of so many rows, and what matches is picked from each. So a page
costs no more than its stretches, however rare a match is and however long the list.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from daemon.db.pool import Record, query
from daemon.domain.account import AccountId
from daemon.domain.errors import UsageError
from daemon.queue.message import MessageId

PAGE_BYTES_MAX = 32 << 20
"""A page ends early where its bodies would be larger; its first row always has its own."""
STRETCH = 1_000
STRETCH_MAX = 16_000
WALK_MAX = 200_000
"""Rows looked at for one page. A page that ends here has fewer rows than asked for, and a cursor."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS_MAX = 253_370_764_800_000  # the year 9999
_ID_MAX = (1 << 63) - 1
_CURSOR = re.compile(
    r"([a-z]+)_(0|[1-9][0-9]{0,18})_(0|[1-9][0-9]{0,18})(?:_(0|[1-9][0-9]{0,18})_(0|[1-9][0-9]{0,18}))?"
)

_MATCHES = query("message_matches")


@dataclass(frozen=True, slots=True)
class Filter:
    """Which messages: of one field any of its values counts, and every field that is given must match.

    Attributes:
        ids: None: any message; an empty tuple: none at all.
        paths: of the URL, without its query.
        from_ms, to_ms: Unix milliseconds, both inclusive: when the line, the letter or the message came to be.
    """

    ids: tuple[MessageId, ...] | None = None
    urls: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    schedules: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    flow_keys: tuple[str, ...] = ()
    caller_ips: tuple[str, ...] = ()
    from_ms: int | None = None
    to_ms: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether every message matches, whatever the time."""
        return self.ids is None and not any(self._texts())

    def arguments(self, account: AccountId) -> tuple[object, ...]:
        """$1 to $14 of a query that `matching` made."""
        return (
            account,
            None if self.ids is None else [id_.job for id_ in self.ids],
            None if self.ids is None else [id_.salt for id_ in self.ids],
            *(list(texts) or None for texts in self._texts()),
            # Half a millisecond to either side: the instants that people are shown are rounded.
            _instant(self.from_ms or 0, -500),
            _instant(_MS_MAX if self.to_ms is None else self.to_ms, 501),
        )

    def _texts(self) -> tuple[tuple[str, ...], ...]:
        paths = tuple(path if path.startswith("/") else f"/{path}" for path in self.paths)
        hosts = tuple(host.lower() for host in self.hosts)
        return (
            self.urls, hosts, paths, self.topics, self.schedules, self.queues, self.labels, self.flow_keys,
            self.caller_ips,
        )  # fmt: skip


class Place(NamedTuple):
    """Between two rows of a list: what is older than this comes next."""

    at: datetime
    id: int


NEWEST = Place(_EPOCH + timedelta(milliseconds=_MS_MAX), _ID_MAX)

Stretch = Callable[[Place, int, int], Awaitable[list[Record]]]
"""From a place on so many rows, and so many matches among them; the first row tells how far it came."""


def matching(name: str, rows: str = "") -> str:
    """A query whose `{matches}` and `{rows}` are filled in: the filter, and where its candidates come from."""
    return query(name).replace("{rows}", query(rows) if rows else "").replace("{matches}", _MATCHES)


async def walk(stretch_of: Stretch, start: Place, count: int, *, is_open: bool) -> tuple[list[Record], Place | None]:
    """Up to `count` matches older than `start`, and where to go on; None: there are no more."""
    found: list[Record] = []
    walked, stretch = 0, count + 1 if is_open else max(STRETCH, count + 1)
    while True:
        room = count - len(found)
        rows = await stretch_of(start, stretch, room + 1)
        end = rows[0]
        matches = [row for row in rows if row["at"] is not None]
        found += matches[:room]
        if found and len(matches[:room]) < (end["matched"] or 0):  # there was one more, or no room for its body
            return found, Place(found[-1]["at"], found[-1]["place"])
        if end["walked"] < stretch:
            return found, None
        start = Place(end["end_at"], end["end_id"])
        walked += stretch
        if walked >= WALK_MAX:
            return found, start
        stretch = min(STRETCH_MAX, stretch * 4)


def cursor_of(kind: str, *places: Place) -> str:
    return "_".join([kind, *(f"{_us(place.at)}_{place.id}" for place in places)])


def places_of(kind: str, cursor: str, count: int = 1) -> list[Place]:
    """The places that `cursor_of` put into a cursor.

    Raises:
        UsageError: it is not a cursor of this kind.
    """
    match = _CURSOR.fullmatch(cursor)
    if match is None or match[1] != kind or (match[4] is not None) != (count == 2):
        raise UsageError("cursor", "is not one that this list has given", "leave it out to begin with the newest")
    numbers = [int(number) for number in match.groups()[1:] if number is not None]
    if any(us > _MS_MAX * 1000 for us in numbers[::2]) or any(id_ > _ID_MAX for id_ in numbers[1::2]):
        raise UsageError("cursor", "is not one that this list has given", "leave it out to begin with the newest")
    return [
        Place(_EPOCH + timedelta(microseconds=us), id_)
        for us, id_ in zip(numbers[::2], numbers[1::2], strict=True)
    ]  # fmt: skip


def _instant(ms: int, more_us: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=min(max(ms, 0), _MS_MAX), microseconds=more_us)


def _us(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)
