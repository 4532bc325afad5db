"""`run_job`: the only worker code, whatever brought the job. It alone decides what a failure means."""

from __future__ import annotations

import structlog

from daemon.domain.errors import DaemonError, LeaseLostError, StorageUnavailableError, TransientError
from daemon.domain.job import Cancelled, Completed, Discarded, Job, Outcome, Retryable, Snoozed
from daemon.worker.poll import POLL, POLL_ONE, PollDeps, run_poll

STORAGE_RETRY_S = 15.0
CRASHES_MAX = 5
"""A defect of ours is not tried for as long as an outage of the database is."""

log = structlog.get_logger()


async def run_job(job: Job, deps: PollDeps) -> Outcome:
    """Run a job and say how it ended. Never raises but for cancellation.

    A `Completed(is_settled=True)` has been settled by its handler, or belongs to another replica by now: the loop
    writes nothing for it.
    """
    began = deps.monotonic()
    outcome: Outcome = Cancelled("interrupted")
    with structlog.contextvars.bound_contextvars(job_id=job.id, kind=job.kind, attempt=job.attempt):
        try:
            outcome = await _dispatch(job, deps)
        except LeaseLostError:
            outcome = Completed(is_settled=True, note="lease lost")
        except StorageUnavailableError as error:
            # An outage is nobody's failure: soon again, and often enough to outlast it.
            outcome = Retryable(str(error), STORAGE_RETRY_S)
        except TransientError as error:
            outcome = Retryable(str(error), error.retry_after_s)
        except DaemonError as error:
            outcome = Discarded(str(error))
        except Exception as error:
            log.exception("job.crashed")
            reason = f"{type(error).__name__}: {error}"
            outcome = Retryable(reason) if job.attempt < CRASHES_MAX else Discarded(reason)
        finally:
            _log_finished(outcome, deps.monotonic() - began)
    return outcome


async def _dispatch(job: Job, deps: PollDeps) -> Outcome:
    match job.kind:
        case str() as kind if kind in (POLL, POLL_ONE):
            return await run_poll(job, deps)
        case _:
            # In a rolling upgrade an older replica may claim a newer one's work: another one will take it.
            return Retryable(f"no handler for kind {job.kind!r} in this version")


def _log_finished(outcome: Outcome, duration_s: float) -> None:
    fields: dict[str, object] = {"outcome": type(outcome).__name__.lower(), "duration_s": round(duration_s, 3)}
    match outcome:
        case Completed(note=str() as note):
            fields["note"] = note
        case Retryable(reason=reason) | Discarded(reason=reason) | Cancelled(reason=reason) | Snoozed(reason=reason):
            fields["reason"] = reason
    level = log.error if isinstance(outcome, Discarded) else log.warning if isinstance(outcome, Retryable) else log.info
    level("job.finished", **fields)
