"""What people look at by hand: the messages under way, and the messages behind dead letters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from daemon.db.pool import Database, query
from daemon.domain.account import AccountId
from daemon.domain.job import JobId
from daemon.queue.message import MessageId

_UNDER_WAY = query("backlog_under_way")
_OF_JOBS = query("backlog_of_jobs")

WayState = Literal["running", "available", "pending", "retryable", "scheduled"]
"""The job's state, under the name that `job_state` gives it."""


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A message that waits or runs.

    Attributes:
        host: of its URL, whose rest may hold secrets.
        attempt: 0 before the first one, the one that runs while it runs.
        next_at: when it is tried next; None where it runs, or waits for nothing but a free slot or a limit.
    """

    id: MessageId
    account: str
    state: WayState
    host: str
    queue: str | None
    flow_key: str | None
    attempt: int
    next_at: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Addressed:
    """Whose message a job of kind `push` delivers, and where to."""

    id: MessageId
    account_id: AccountId
    account: str
    url: str


class Backlog:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def under_way(
        self, account: AccountId | None = None, state: WayState | None = None, limit: int = 100
    ) -> list[UnderWay]:
        """At most so many messages of each state: what runs first, then what could, then by the time of the next try."""
        return [
            UnderWay(
                MessageId(JobId(row["id"]), row["salt"]), row["account"], row["state"], row["host"], row["queue"],
                row["flow_key"], row["attempt"], row["next_at"], row["created_at"],
            )
            for row in await self._db.fetch(_UNDER_WAY, account, state, limit)
        ]  # fmt: skip

    async def of_jobs(self, jobs: Iterable[JobId]) -> dict[JobId, Addressed]:
        """The messages of these jobs; a job without one is left out."""
        return {
            JobId(row["id"]): Addressed(
                MessageId(JobId(row["id"]), row["salt"]), AccountId(row["account_id"]), row["account"], row["url"]
            )
            for row in await self._db.fetch(_OF_JOBS, sorted(jobs))
        }
