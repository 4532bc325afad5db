"""The dead letters among the messages: those that failed for good, until somebody retries or drops them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from daemon.db.pool import Database, Record, Session, query
from daemon.domain.account import AccountId, Limits
from daemon.domain.errors import UsageError
from daemon.domain.job import JobId
from daemon.queue.budget import portions
from daemon.queue.listing import NEWEST, PAGE_BYTES_MAX, Filter, Place, cursor_of, matching, places_of, walk
from daemon.queue.message import (
    Headers,
    Message,
    Publication,
    Published,
    dead_name,
    message_of,
    parse_dead_name,
)
from daemon.queue.messages import Messages
from daemon.queue.postgres import PostgresQueue

_PAGE = matching("letter_page", "letter_stretch")
_THESE = matching("letter_page", "letter_these")
_LOCK = query("letter_lock")
_SIZES = query("letter_sizes")
_MESSAGES = query("letter_messages")
_DROP = query("dead_drop")

_KIND = "dlq"

_decode_headers = msgspec.json.Decoder(dict[str, list[str]]).decode


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which letters: those of these messages, with any of these statuses; 0: there was no response."""

    messages: Filter = field(default_factory=Filter)
    statuses: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that failed for good, and what its last attempt met.

    Attributes:
        id: its name outside, see `dead_name`.
        status: of the response; 0 where none came.
    """

    id: str
    at: datetime
    message: Message
    body: bytes
    status: int
    response_header: Headers
    response_body: bytes
    error: str | None


class NoSuchLetterError(UsageError):
    """Dead letters that are not there, or not the account's: nothing was done."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__("dlqId", f"{', '.join(names[:10])} not found")


class Letters:
    def __init__(self, db: Database, queue: PostgresQueue, messages: Messages) -> None:
        self._db = db
        self._queue = queue
        self._messages = messages

    async def page(
        self, account: AccountId, wanted: LetterFilter, cursor: str | None = None, count: int = 100
    ) -> tuple[list[Letter], str | None]:
        """Up to `count` letters, newest first, and the cursor of those that follow; None: none do.

        A page may have fewer letters and a cursor all the same: where bodies are large, or matches rare.

        Raises:
            UsageError: the cursor is none of ours.
        """
        rows, end = await self._walk(self._db, account, wanted, cursor, count)
        return [_letter(row) for row in rows], end

    async def these(self, account: AccountId, names: Iterable[str]) -> list[Letter]:
        """Those of these letters that there are, newest first; as many as fit on a page."""
        jobs = _jobs(names)
        rows, _ = await self._walk(self._db, account, LetterFilter(), None, len(jobs), only=jobs)
        return [letter for letter in map(_letter, rows) if letter.id == jobs[letter.message.id.job]]

    async def get(self, account: AccountId, name: str) -> Letter | None:
        return next(iter(await self.these(account, [name])), None)

    # Dropping

    async def drop(self, account: AccountId, names: Iterable[str]) -> int:
        """Delete letters; the messages and their log stay. Returns how many there were."""
        async with self._db.transaction() as tx:
            return await self._drop(tx, await self._lock(tx, account, _jobs(names)))

    async def drop_matching(
        self, account: AccountId, wanted: LetterFilter, cursor: str | None = None, count: int = 100
    ) -> tuple[int, str | None]:
        """Delete up to `count` letters, the newest first. Returns how many, and where to go on; None: that was all.

        Raises:
            UsageError: the cursor is none of ours.
        """
        async with self._db.transaction() as tx:
            rows, end = await self._walk(tx, account, wanted, cursor, count, with_bodies=False)
            return await self._drop(tx, await self._lock(tx, account, _named(rows))), end

    # Retrying

    async def retry(
        self, account: AccountId, names: Sequence[str], limits: Limits, changes: Mapping[str, object] | None = None
    ) -> list[Published]:
        """Publish the messages of letters anew, and delete the letters; the new messages in the order given.

        A new one has the old one's URL, headers, body, labels, queue, flow control and callbacks, and its whole number
        of retries; it is due at once. A name given twice counts once.

        Args:
            changes: fields of its `Spec` that are to be different; with `delay_s` it waits.

        Raises:
            NoSuchLetterError: one of them is not there; nothing was done.
            UsageError: a limit of the account.
        """
        jobs = _jobs(names)
        async with self._db.transaction() as tx:
            found = await self._lock(tx, account, jobs)
            there = {jobs[job] for job in found}
            if missing := [name for name in dict.fromkeys(names) if name not in there]:
                raise NoSuchLetterError(missing)
            published, gates = await self._publish(tx, [*jobs], limits, changes or {})
            await self._drop(tx, found)
        await self._begin(gates)
        return published

    async def retry_matching(
        self,
        account: AccountId,
        wanted: LetterFilter,
        limits: Limits,
        cursor: str | None = None,
        count: int = 100,
        changes: Mapping[str, object] | None = None,
    ) -> tuple[list[Published], str | None]:
        """The same for up to `count` letters that match, the newest first; and where to go on, None: that was all.

        Raises:
            UsageError: the cursor is none of ours, or a limit of the account.
        """
        async with self._db.transaction() as tx:
            rows, end = await self._walk(tx, account, wanted, cursor, count, with_bodies=False)
            found = await self._lock(tx, account, _named(rows))
            ordered = [JobId(row["id"]) for row in rows if row["id"] in found]
            published, gates = await self._publish(tx, ordered, limits, changes or {})
            await self._drop(tx, found)
        await self._begin(gates)
        return published, end

    # The parts

    async def _walk(
        self,
        db: Database | Session,
        account: AccountId,
        wanted: LetterFilter,
        cursor: str | None,
        count: int,
        *,
        only: Mapping[JobId, str] | None = None,
        with_bodies: bool = True,
    ) -> tuple[list[Record], str | None]:
        start = NEWEST if cursor is None else places_of(_KIND, cursor)[0]
        sql = _PAGE if only is None else _THESE
        left = PAGE_BYTES_MAX

        async def stretch_of(place: Place, length: int, matches: int) -> list[Record]:
            nonlocal left
            rows = await db.fetch(
                sql, *wanted.messages.arguments(account), *place, length, matches, [*wanted.statuses] or None, left,
                left == PAGE_BYTES_MAX, with_bodies, *([] if only is None else [[*only]]),
            )  # fmt: skip
            left -= sum(len(row["response_body"] or b"") + len(row["body"] or b"") for row in rows)
            return rows

        # Letters of all accounts lie in one list, so that a stretch may hold none of this one's.
        rows, end = await walk(stretch_of, start, count, is_open=False)
        return rows, None if end is None else cursor_of(_KIND, end)

    async def _lock(self, tx: Session, account: AccountId, jobs: Mapping[JobId, str]) -> set[JobId]:
        rows = await tx.fetch(_LOCK, sorted(jobs), account)
        return {JobId(row["id"]) for row in rows if dead_name(row["at"], row["id"]) == jobs[row["id"]]}

    async def _drop(self, tx: Session, jobs: set[JobId]) -> int:
        return len(await tx.fetch(_DROP, sorted(jobs))) if jobs else 0

    async def _publish(
        self, tx: Session, jobs: Sequence[JobId], limits: Limits, changes: Mapping[str, object]
    ) -> tuple[list[Published], set[int]]:
        made: list[Published] = []
        gates: set[int] = set()
        sizes = {row["id"]: row["bytes"] for row in await tx.fetch(_SIZES, jobs)}
        for part in portions(jobs, sizes.__getitem__, PAGE_BYTES_MAX):
            rows = {row["id"]: row for row in await tx.fetch(_MESSAGES, part)}
            call = [_again(rows[job], changes) for job in part]
            published, opened = await self._messages.publish_in(tx, [(limits, call)])
            made += published[0]
            gates |= opened
        return made, gates

    async def _begin(self, gates: set[int]) -> None:
        await self._queue.open_up(gates)
        self._queue.waker.wake()


def _again(row: Record, changes: Mapping[str, object]) -> Publication:
    message = message_of(row)
    return Publication(
        message.account,
        message.url,
        msgspec.structs.replace(message.spec, **changes),
        row["body"] or b"",
        not_before=None if "delay_s" in changes else 0.0,
        queue=message.queue,
        topic=message.topic,
        schedule=message.schedule,
        labels=message.labels,
        caller_ip=message.caller_ip,
        source=message.source,
    )


def _jobs(names: Iterable[str]) -> dict[JobId, str]:
    """The jobs of letters, each with the name by which it was asked for; what is no name is left out."""
    return {job: name for name in names if (job := parse_dead_name(name)) is not None}


def _named(rows: Iterable[Record]) -> dict[JobId, str]:
    return {JobId(row["id"]): dead_name(row["at"], JobId(row["id"])) for row in rows}


def _letter(row: Record) -> Letter:
    return Letter(
        dead_name(row["at"], JobId(row["id"])),
        row["at"],
        message_of(row),
        row["body"] or b"",
        row["status"] or 0,
        _decode_headers(row["response_header"]) if row["response_header"] else {},
        row["response_body"] or b"",
        row["error"] or row["reason"] or None,
    )
