"""Batches that QStash was asked to trigger: published, released, reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

from daemon.db.pool import Executor, query
from daemon.db.text import storable
from daemon.domain.job import JobId

_HAND_OVER = query("hand_over_batches")
_UNPUBLISHED = query("unpublished_batches")
_MARK_PUBLISHED = query("mark_published")
_RELEASE = query("release_batches")
_REPORT = query("report_delivery")
_REPORT_MESSAGE = query("report_message")

ReleasedBy = Literal["delivery", "failure", "refusal"]


async def hand_over(tx: Executor, jobs: Sequence[JobId], slot: datetime) -> None:
    """Note, in the transaction of their tick, that these batches wait for QStash. Their places are 1, 2, 3, ..."""
    await tx.execute(_HAND_OVER, list(jobs), slot)


async def unpublished(db: Executor, jobs: Sequence[JobId]) -> list[tuple[JobId, int]]:
    """Those that QStash has not accepted and nothing has released, with their places."""
    return [(JobId(row["job_id"]), row["place"]) for row in await db.fetch(_UNPUBLISHED, list(jobs))]


async def mark_published(db: Executor, messages: Mapping[JobId, str]) -> None:
    """Note the ids under which QStash has accepted them."""
    await db.execute(_MARK_PUBLISHED, list(messages), [storable(message) for message in messages.values()])


async def release(db: Executor, jobs: Sequence[JobId], by: ReleasedBy) -> set[JobId]:
    """Make waiting batches ready. Only the first release of a batch counts; one that runs or is gone is left alone.

    Returns:
        Those that became ready by this call.
    """
    return {JobId(row["id"]) for row in await db.fetch(_RELEASE, list(jobs), by)}


async def report(db: Executor, job: JobId | None, message_id: str | None, status: int | None) -> JobId | None:
    """Record what a callback says of a delivery: of the batch that it names, or else of its message.

    Returns:
        The batch; None when it is about none of ours.
    """
    found: int | None = None
    if job is not None:
        found = await db.fetchval(_REPORT, job, status)
    elif message_id:
        found = await db.fetchval(_REPORT_MESSAGE, storable(message_id), status)
    return None if found is None else JobId(found)
