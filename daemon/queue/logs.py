"""The log of messages: what happened to them, newest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import msgspec

from daemon.db.pool import Database, Record
from daemon.domain.account import AccountId
from daemon.domain.job import JobId
from daemon.queue.listing import NEWEST, PAGE_BYTES_MAX, Filter, Place, cursor_of, matching, places_of, walk
from daemon.queue.message import Headers, Message, MessageId, message_of
from daemon.queue.messages import State

IN_PROGRESS = (State.ACTIVE, State.ERROR, State.RETRY)
"""What a filter by this name means; no line has it."""
GROUP_LINES_MAX = 10_000
"""Lines of all messages on one page together; those beyond are left out."""

_LINES = matching("log_lines", "log_of_account")
_LINES_OF = matching("log_lines", "log_of_messages")
_GROUPS = matching("log_groups", "log_of_account")
_GROUPS_OF = matching("log_groups", "log_of_messages")

_KIND = "log"
_GROUP_KIND = "logs"

_decode_headers = msgspec.json.Decoder(dict[str, list[str]]).decode


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which lines: those of these messages, in any of these states; no states: in whichever."""

    messages: Filter = field(default_factory=Filter)
    states: tuple[State, ...] = ()


@dataclass(frozen=True, slots=True)
class LogLine:
    """One event of a message.

    Attributes:
        retried: 0 for the first attempt.
        next_at: when it is to be tried next.
        status: of the response, where one came.
        body: of the message, as much of it as was asked for.
    """

    at: datetime
    state: State
    message: Message
    retried: int
    next_at: datetime | None
    status: int | None
    error: str | None
    response_header: Headers
    response_body: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class LogGroup:
    """The lines of one message that match, newest first."""

    id: MessageId
    lines: tuple[LogLine, ...]


class Logs:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def page(
        self,
        account: AccountId,
        wanted: LogFilter,
        cursor: str | None = None,
        count: int = 100,
        *,
        body_bytes: int | None = 0,
    ) -> tuple[list[LogLine], str | None]:
        """Up to `count` lines, newest first, and the cursor of those that follow; None: none do.

        A page may have fewer lines and a cursor all the same: where their bodies are large, or matches rare.

        Args:
            body_bytes: how much of each message's body comes along: its first bytes; None: all of it.

        Raises:
            UsageError: the cursor is none of ours.
        """
        start = NEWEST if cursor is None else places_of(_KIND, cursor)[0]
        rows, end = await self._walk(account, wanted, start, count, body_bytes, PAGE_BYTES_MAX)
        return [_line(row) for row in rows], None if end is None else cursor_of(_KIND, end)

    async def grouped(
        self,
        account: AccountId,
        wanted: LogFilter,
        cursor: str | None = None,
        count: int = 10,
        *,
        body_bytes: int | None = 0,
    ) -> tuple[list[LogGroup], str | None]:
        """Up to `count` messages, each with its lines; the one with the newest line comes first.

        The pages that follow the first show the log as it was then, so that no message is on two of them.

        Raises:
            UsageError: the cursor is none of ours.
        """
        if cursor is None:
            top = start = await self._newest(account, wanted)
        else:
            top, start = places_of(_GROUP_KIND, cursor, 2)
        if top is None or start is None:
            return [], None
        rows, end = await self._walk_groups(account, wanted, start, top, count)
        while True:
            ids = [MessageId(JobId(row["id"]), row["salt"]) for row in rows]
            lines = await self._lines_of(account, wanted, ids, top, body_bytes)
            if lines is not None:
                break
            if len(rows) > 1:
                rows = rows[: len(rows) // 2]
                end = Place(rows[-1]["at"], rows[-1]["place"])
            else:
                body_bytes = 0  # many lines, each with a large body: too much even for one message
        groups = [
            LogGroup(id_, tuple(_line(line) for line in lines if line["message_id"] == id_.job))
            for id_ in ids
        ]  # fmt: skip
        return groups, None if end is None else cursor_of(_GROUP_KIND, top, end)

    async def _walk(
        self, account: AccountId, wanted: LogFilter, start: Place, count: int, body_bytes: int | None, bytes_max: int
    ) -> tuple[list[Record], Place | None]:
        sql = _LINES if wanted.messages.ids is None else _LINES_OF
        left = bytes_max

        async def stretch_of(place: Place, length: int, matches: int) -> list[Record]:
            nonlocal left
            rows = await self._db.fetch(
                sql, *wanted.messages.arguments(account), *place, length, matches, _states(wanted), body_bytes, left,
                left == bytes_max,
            )  # fmt: skip
            left -= sum(len(row["response_body"] or b"") + len(row["body"] or b"") for row in rows)
            return rows

        return await walk(stretch_of, start, count, is_open=wanted.messages.is_open and not wanted.states)

    async def _newest(self, account: AccountId, wanted: LogFilter) -> Place | None:
        """Just above the newest line that may match."""
        everything = replace(wanted, states=(), messages=Filter(to_ms=wanted.messages.to_ms))
        rows, _ = await self._walk(account, everything, NEWEST, 1, 0, PAGE_BYTES_MAX)
        return Place(rows[0]["at"], rows[0]["place"] + 1) if rows else None

    async def _walk_groups(
        self, account: AccountId, wanted: LogFilter, start: Place, top: Place, count: int
    ) -> tuple[list[Record], Place | None]:
        sql = _GROUPS if wanted.messages.ids is None else _GROUPS_OF

        async def stretch_of(place: Place, length: int, matches: int) -> list[Record]:
            return await self._db.fetch(
                sql, *wanted.messages.arguments(account), *place, length, matches, _states(wanted), *top
            )

        return await walk(stretch_of, start, count, is_open=False)

    async def _lines_of(
        self, account: AccountId, wanted: LogFilter, ids: Sequence[MessageId], top: Place, body_bytes: int | None
    ) -> list[Record] | None:
        """The matching lines of these messages; None where their bodies are too large together."""
        only = replace(wanted, messages=replace(wanted.messages, ids=tuple(ids)))
        most = PAGE_BYTES_MAX if body_bytes != 0 or len(ids) > 1 else 1 << 62
        rows, end = await self._walk(account, only, top, GROUP_LINES_MAX, body_bytes, most)
        return None if end is not None and len(rows) < GROUP_LINES_MAX else rows


def _states(wanted: LogFilter) -> list[int] | None:
    return [*wanted.states] or None


def _line(row: Record) -> LogLine:
    return LogLine(
        row["at"],
        State(row["state"]),
        message_of(row),
        row["retried"],
        row["next_at"],
        row["status"],
        row["error"],
        _decode_headers(row["response_header"]) if row["response_header"] else {},
        row["response_body"] or b"",
        row["body"] or b"",
    )
