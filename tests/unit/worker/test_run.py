"""What `run_job` makes of a failure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
import structlog

from daemon.domain.errors import (
    CircuitOpenError,
    LeaseLostError,
    PermanentError,
    StorageUnavailableError,
    UpstreamUnavailableError,
)
from daemon.domain.job import Completed, Discarded, Job, JobId, Outcome, Retryable, Snoozed
from daemon.worker.run import CRASHES_MAX, STORAGE_RETRY_S, run_job

pytestmark = pytest.mark.anyio


def job(attempt: int = 1, kind: str = "poll") -> Job:
    return Job(JobId(1), 1, kind, b"", 0, attempt, 50, 60.0, datetime(2026, 11, 22, tzinfo=UTC))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (LeaseLostError("gone"), Completed(is_settled=True, note="lease lost")),
        (StorageUnavailableError("away"), Retryable("away", STORAGE_RETRY_S)),
        (UpstreamUnavailableError("503"), Retryable("503", None)),
        (CircuitOpenError("paused", retry_after_s=9), Retryable("paused", 9)),
        (PermanentError("no"), Discarded("no")),
        (KeyError("bug"), Retryable("KeyError: 'bug'")),
    ],
)
async def test_failure_becomes_the_outcome_that_fits(error: Exception, outcome: Outcome) -> None:
    async def fail(_job: Job) -> Outcome:
        raise error

    assert await run_job(job(), {"poll": fail}) == outcome


async def test_defect_of_ours_is_not_tried_for_as_long_as_an_outage() -> None:
    async def crash(_job: Job) -> Outcome:
        raise KeyError("bug")

    assert isinstance(await run_job(job(CRASHES_MAX), {"poll": crash}), Discarded)


async def test_unknown_kind_is_left_to_a_replica_that_knows_it() -> None:
    """An older replica may claim a newer one's job during a rolling upgrade, again and again: no attempt is spent."""
    assert isinstance(await run_job(job(kind="deliver"), {}), Snoozed)


async def test_a_job_is_logged_under_the_request_that_it_follows_from() -> None:
    seen: list[object] = []

    async def look(_job: Job) -> Outcome:
        seen.append(structlog.contextvars.get_contextvars().get("request_id"))
        return Completed()

    for body in (b'{"connections":[],"request_id":"msg_1"}', b"{}", b"\xff not json", b"[1]"):
        await run_job(replace(job(), body=body), {"poll": look})
    assert seen == ["msg_1", None, None, None]
