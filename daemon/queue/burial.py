"""Dead letters that are born dead: work that failed inside a batch, where trying it alone would change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from daemon.db.pool import Session, query
from daemon.db.text import storable
from daemon.domain.job import Job, JobId, NewJob

_BURY = query("bury")
_MOURN = query("mourn")
_LETTER_OF = query("letter_of")


async def bury(tx: Session, jobs: Sequence[tuple[NewJob, str]]) -> list[JobId]:
    """Store jobs straight among the dead letters, each with its reason; a replay runs them. Ids in the order given."""
    if not jobs:
        return []
    rows = await tx.fetch(
        _BURY,
        [job.kind for job, _ in jobs],
        [job.key for job, _ in jobs],
        [job.prio for job, _ in jobs],
        [job.max_attempts for job, _ in jobs],
        [job.timeout_s for job, _ in jobs],
        [job.body for job, _ in jobs],
        [storable(reason) for _, reason in jobs],
    )
    return sorted(JobId(row["id"]) for row in rows)


async def mourn(tx: Session, reasons: Mapping[JobId, str]) -> None:
    """The same work failed again: note it on the dead letter that lies there, instead of adding one each tick."""
    if reasons:
        await tx.execute(_MOURN, list(reasons), [storable(reason) for reason in reasons.values()])


async def letter_of(tx: Session, job: Job) -> JobId | None:
    """The dead letter of the same order, if there is one."""
    found = await tx.fetchval(_LETTER_OF, job.kind, job.body)
    return None if found is None else JobId(found)
