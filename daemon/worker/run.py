"""`run_job`: the only worker code, whatever brought the job. It alone decides what a failure means."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from time import monotonic

import msgspec
import structlog

from daemon.domain.errors import DaemonError, LeaseLostError, StorageUnavailableError, TransientError
from daemon.domain.job import Cancelled, Completed, Discarded, Job, Outcome, Retryable, Snoozed
from daemon.telemetry import metrics
from daemon.telemetry.traces import span

STORAGE_RETRY_S = 15.0
UNKNOWN_SNOOZE_S = 15.0
CRASHES_MAX = 5
"""A defect of ours is not tried for as long as an outage of the database is."""

log = structlog.get_logger()

# A metric looks its labels up anew each time, which costs more than a small job's own log line.
_ended = cache(metrics.JOBS.labels)
_seconds = cache(metrics.JOB_SECONDS.labels)

Handler = Callable[[Job], Awaitable[Outcome]]
"""What a kind of job does. It may raise: see `run_job`."""


class _Cause(msgspec.Struct):
    """What a body may say, besides its own, of where the job comes from."""

    request_id: str | None = None
    trace: str | None = None


async def run_job(job: Job, handlers: Mapping[str, Handler]) -> Outcome:
    """Run a job and say how it ended. Never raises but for cancellation.

    A `Completed(is_settled=True)` has been settled by its handler, or belongs to another replica by now: the loop
    writes nothing for it.

    Args:
        handlers: by kind. A kind that is not among them is left to a replica that knows it.
    """
    began = monotonic()
    outcome: Outcome = Cancelled("interrupted")
    cause = _cause(job)
    bound: dict[str, object] = {"job_id": job.id, "kind": job.kind, "attempt": job.attempt}
    if cause.request_id is not None:
        bound["request_id"] = cause.request_id
    with structlog.contextvars.bound_contextvars(**bound):
        try:
            handler = handlers.get(job.kind)
            if handler is None:
                # In a rolling upgrade an older replica may claim a newer one's work: another one will take it, and no
                # attempt is spent, however often it lands here.
                log.warning("job.unknown")
                outcome = Snoozed(UNKNOWN_SNOOZE_S, f"no handler for kind {job.kind!r} in this version")
            else:
                with span(
                    "job",
                    parent=cause.trace,
                    kind="consumer",
                    tallyd__job__id=job.id,
                    tallyd__job__kind=job.kind,
                    tallyd__job__attempt=job.attempt,
                ):
                    outcome = await handler(job)
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
            duration_s = monotonic() - began
            known = job.kind if job.kind in handlers else "unknown"
            _ended(known, type(outcome).__name__.lower()).inc()
            _seconds(known).observe(duration_s)
            _log_finished(outcome, duration_s)
    return outcome


def _cause(job: Job) -> _Cause:
    try:
        return msgspec.json.decode(job.body, type=_Cause)
    except msgspec.MsgspecError:
        return _Cause()


def _log_finished(outcome: Outcome, duration_s: float) -> None:
    fields: dict[str, object] = {"outcome": type(outcome).__name__.lower(), "duration_s": round(duration_s, 3)}
    match outcome:
        case Completed(note=str() as note):
            fields["note"] = note
        case Retryable(reason=reason) | Discarded(reason=reason) | Cancelled(reason=reason) | Snoozed(reason=reason):
            fields["reason"] = reason
    match outcome:
        case Discarded():
            level = log.error
        case Retryable():
            level = log.warning
        case Completed(is_told=True):
            level = log.debug
        case _:
            level = log.info
    level("job.finished", **fields)
