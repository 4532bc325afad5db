"""What happens right now, as `tallyd top` shows it: replicas, running jobs, the queue, what was settled, what failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec

from daemon.db.pool import Database, Record, query

_REPLICAS = query("activity_replicas")
_RUNNING = query("activity_running")
_QUEUE = query("activity_queue")
_SETTLED = f"{query('activity_log')}\n{query('activity_settled')}"
_FAILURES = f"{query('activity_log')}\n{query('activity_failures')}"

MINUTES = 15
"""How far back the settled attempts reach."""
FAILURES_FOR = timedelta(days=1)
LOG_BLOCKS = 1_000
"""Of the attempts log, from its end: 8 MB, some 80,000 attempts."""
KIND_ROWS = 10_000
"""Of each state of the queue, when its kinds are counted."""
REPLICAS_MAX, RUNNING_MAX, FAILURES_MAX = 100, 100, 20
OUTCOMES = {1: "done", 2: "retry", 3: "snooze", 4: "dead", 5: "cancelled", 8: "released", 9: "worker lost"}
_TABLES = (("available",), ("scheduled", "retryable"), ("pending",), ("running",), ("discarded",))
"""Which states share a table of the queue."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A worker that beats, or did until lately.

    Attributes:
        beat_s: since its last heartbeat.
        settled: what it settled within the last minute, by outcome.
    """

    worker: int
    info: str
    beat_s: float
    up_s: float
    running: int
    settled: dict[str, int]


@dataclass(frozen=True, slots=True)
class RunningJob:
    """A job that a worker has. `tenant` is None for the system's own, which mix tenants; the rest is of polls only."""

    id: int
    kind: str
    tenant: str | None
    attempt: int
    worker: int
    running_s: float
    slot_at: datetime | None
    connections: int | None
    source: str | None


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many jobs of a kind are in a state. `is_cut`: at least so many, for the state has more than are looked at."""

    kind: str
    state: str
    jobs: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Minute:
    """What was settled in one of the last minutes, by outcome; the minute `ago` 0 ends now."""

    ago: int
    settled: dict[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    at: datetime
    job: int
    kind: str | None
    attempt: int
    outcome: str
    worker: int | None
    took_ms: int | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Activity:
    """What happens right now.

    Attributes:
        running_total: `running` holds those that run longest.
        minutes: the last `MINUTES`, newest first; only those that the log was read for.
        settled_for_s: how far back the log was read for `minutes`.
        failures: attempts that ended in a retry, as a dead letter or with their worker, newest first.
    """

    now: datetime
    replicas: tuple[Replica, ...]
    running: tuple[RunningJob, ...]
    running_total: int
    kinds: tuple[KindCount, ...]
    minutes: tuple[Minute, ...]
    settled_for_s: float
    failures: tuple[Failure, ...]


class PollBody(msgspec.Struct):
    """As much of a poll's body as can be shown."""

    connections: list[int] = []
    slot: datetime | None = None
    request_id: str | None = None
    source: str | None = None


async def read_activity(db: Database) -> Activity:
    """Short reads, one after the other, whose cost does not grow with the tables."""
    now = await db.now()
    read_for = timedelta(minutes=MINUTES)
    settled = await db.fetch(_SETTLED, read_for, LOG_BLOCKS)
    if settled and settled[0]["reached_at"] is not None:
        read_for = min(now - settled[0]["reached_at"], read_for)
    kinds = await db.fetch(_QUEUE, KIND_ROWS)
    cut = {
        state
        for states in _TABLES
        if sum(row["jobs"] for row in kinds if row["state"] in states) >= KIND_ROWS
        for state in states
    }
    replicas = await db.fetch(_REPLICAS, REPLICAS_MAX)
    running = await db.fetch(_RUNNING, RUNNING_MAX)
    failures = await db.fetch(_FAILURES, FAILURES_FOR, LOG_BLOCKS, FAILURES_MAX)
    return Activity(
        now=now,
        replicas=tuple(
            Replica(
                **row,
                settled=_by_outcome(s for s in settled if (s["worker"], s["minutes_ago"]) == (row["worker"], 0)),
            )
            for row in replicas
        ),
        running=tuple(_running(row) for row in running),
        running_total=sum(row["jobs"] for row in kinds if row["state"] == "running"),
        kinds=tuple(KindCount(**row, is_cut=row["state"] in cut) for row in kinds),
        minutes=tuple(
            Minute(ago, _by_outcome(s for s in settled if s["minutes_ago"] == ago))
            for ago in range(MINUTES)
            if ago * 60 < read_for.total_seconds()
        ),
        settled_for_s=read_for.total_seconds(),
        failures=tuple(Failure(**with_outcome(row)) for row in failures),
    )


def with_outcome(row: Record) -> dict[str, Any]:
    """The row with its outcome by name."""
    return {**row, "outcome": OUTCOMES.get(row["outcome"], str(row["outcome"]))}


def poll_body(body: bytes | None) -> PollBody:
    """What a body says; nothing where another version has written it otherwise."""
    try:
        return PollBody() if body is None else msgspec.json.decode(body, type=PollBody)
    except msgspec.MsgspecError:
        return PollBody()


def _by_outcome(rows: Iterable[Record]) -> dict[str, int]:
    """Attempts by outcome, those alone that there are, in the order of `OUTCOMES`."""
    counts: dict[int, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + row["jobs"]
    return {name: counts[code] for code, name in OUTCOMES.items() if code in counts}


def _running(row: Record) -> RunningJob:
    fields = dict(row)
    body = poll_body(fields.pop("body"))
    return RunningJob(**fields, slot_at=body.slot, connections=len(body.connections) or None, source=body.source)
