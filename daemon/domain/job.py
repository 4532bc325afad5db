"""Jobs, what runs them, and how a run can end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NewType

JobId = NewType("JobId", int)
WorkerId = NewType("WorkerId", int)

SYSTEM_KEY = 0
"""The fairness key of work that mixes tenants; other jobs carry their tenant's id."""


PUSH_KEY = 1 << 62
"""Fairness keys from here on belong to messages with a URL, those below to the work that runs inside."""
KEY_END = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Lane:
    """A class of work with slots of its own, so that neither kind waits for the other's: a range of fairness keys.

    Attributes:
        name: in logs and metrics.
        first_key, end_key: the keys from the first up to the end, which is left out.
        concurrency: jobs of the lane that one process runs at once.
        per_key: those of one key among them at most; what is beyond is not claimed. None: no such limit.
    """

    name: str
    first_key: int
    end_key: int
    concurrency: int
    per_key: int | None = None


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to enqueue.

    Attributes:
        kind: which handler runs it.
        body: at most 1 MiB; never a secret.
        key: fairness key: claims go round the keys.
        prio: smaller runs first within its key.
        delay: due this long after the database's now.
        dedup_id: a second job with this id inside `dedup_window` is not stored; the first one's id is returned.
        only_unclaimed: with `dedup_id`: a job that has been claimed no longer holds its id.
        max_attempts: failures before it is dead.
        timeout_s: how long one attempt may run.
    """

    kind: str
    body: bytes = b""
    key: int = SYSTEM_KEY
    prio: int = 100
    delay: timedelta = timedelta(0)
    dedup_id: str | None = None
    dedup_window: timedelta = timedelta(minutes=10)
    only_unclaimed: bool = False
    max_attempts: int = 5
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """A claimed job: ours for as long as its lease matches `(id, token)`.

    `losses` counts the workers that were lost while they had it.
    """

    id: JobId
    token: int
    kind: str
    body: bytes
    key: int
    attempt: int
    max_attempts: int
    timeout_s: float
    created_at: datetime
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """Done. `is_settled` when the handler settled the job in its own transaction (law 5), `is_told` when it has logged
    how it went.
    """

    is_settled: bool = False
    note: str | None = None
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Retryable:
    """Failed for now: again after `delay_s` (None: the queue's own backoff), or dead when attempts are spent."""

    reason: str
    delay_s: float | None = None


@dataclass(frozen=True, slots=True)
class Snoozed:
    """Not its time: again after `delay_s`, no attempt spent."""

    delay_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Discarded:
    """Trying again changes nothing: to the dead letters, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Stopped on purpose; kept as an outcome only."""

    reason: str


Outcome = Completed | Retryable | Snoozed | Discarded | Cancelled


@dataclass(frozen=True, slots=True)
class Settlement:
    """An outcome on its way to the queue."""

    job: Job
    outcome: Outcome
    took_ms: int


@dataclass(slots=True)
class Summary:
    """What a batch did. `unchanged` to `dead` count sources, `rows` revisions written, `items` what collections held."""

    connections: int = 0
    unchanged: int = 0
    stored: int = 0
    restated: int = 0
    retried: int = 0
    dead: int = 0
    requests: int = 0
    requests_saved: int = 0
    rows: int = 0
    duration_s: float = 0.0
    items: int = 0
