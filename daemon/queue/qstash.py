"""Batches handed over to Upstash QStash: published by a durable job, with a fallback for whatever QStash refuses.

A batch is first a row of our queue, waiting in `due` until its hand-over deadline, and QStash only learns its id. So a
message that is lost, doubled or late costs nothing: a delivery releases the row once, a refusal brings it forward, and
at the deadline it runs anyway. Publishing happens outside of any transaction and may happen twice: QStash drops the
second copy by its deduplication id, and a copy that gets through finds a row that was released already.

The SDK takes a second to import, so it is imported when it is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from json import JSONDecodeError
from time import time
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import anyio
import msgspec
import structlog

from daemon.db import handovers, pauses
from daemon.db.pool import Database
from daemon.domain.connection import Secret
from daemon.domain.errors import PermanentError, UpstreamUnavailableError
from daemon.domain.job import Completed, Job, JobId, NewJob, Outcome
from daemon.queue.wake import Waker
from daemon.telemetry import metrics

if TYPE_CHECKING:
    from qstash import AsyncQStash

PUBLISH = "publish"
PUBLISH_MAX = 100
"""Messages in one call of QStash's batch endpoint, and in one `publish` job."""
CALL_S = 15.0
PAUSE_S_MAX = 86_400.0
PAUSE_HOST = "qstash"
WORKER_PATH = "/api/poll/worker"
CALLBACK_PATH = "/api/qstash/callback"
FAILURE_PATH = "/api/qstash/failure"

Told = TypeVar("Told")

log = structlog.get_logger()

Reason = Literal["daily_limit", "burst_limit", "refused", "unreachable", "malformed", "paused", "not_configured"]


@dataclass(frozen=True, slots=True)
class QStashSettings:
    """How to reach QStash, and how it reaches us.

    Attributes:
        url: None for the SDK's default, the EU region.
        public_url: where deliveries arrive, without a trailing slash.
        retries: of a delivery, by QStash.
    """

    token: Secret
    public_url: str
    url: str | None = None
    retries: int = 3


class PublishOrder(msgspec.Struct, frozen=True):
    """The body of a `publish` job: batches of one tick. `request_id` and `trace` say what asked for it."""

    slot: datetime
    batches: list[int]
    request_id: str | None = None
    trace: str | None = None


class _Refusal(NamedTuple):
    reason: Reason
    detail: str


def publish_jobs(
    slot: datetime, batches: Sequence[JobId], timeout_s: float, request_id: str | None, trace: str | None
) -> list[NewJob]:
    """The jobs that hand these batches over. They run first: what waits behind them waits for a deadline."""
    return [
        NewJob(
            PUBLISH,
            msgspec.json.encode(PublishOrder(slot, list(batches[at : at + PUBLISH_MAX]), request_id, trace)),
            prio=10,
            timeout_s=max(timeout_s, 2 * CALL_S),
        )
        for at in range(0, len(batches), PUBLISH_MAX)
    ]


def deduplication_id(slot: datetime, place: int) -> str:
    """The same for every attempt to publish a batch. QStash refuses a colon."""
    return f"poll-{slot.astimezone(UTC):%Y%m%dT%H%M%SZ}-{place}"


@asynccontextmanager
async def open_client(settings: QStashSettings) -> AsyncIterator[AsyncQStash]:
    """A client without retries of its own: what fails here has a better place to go."""
    from qstash import AsyncQStash  # noqa: PLC0415 - see above

    client = AsyncQStash(settings.token.reveal(), retry=False, base_url=settings.url)
    try:
        yield client
    finally:
        await client.http._client.aclose()  # noqa: SLF001 - the SDK offers no way to close its connections


class Publisher:
    """Runs `publish` jobs. Without settings it lets the batches run at once: this replica cannot reach QStash."""

    def __init__(self, db: Database, waker: Waker, settings: QStashSettings | None) -> None:
        self._db = db
        self._waker = waker
        self._settings = settings
        if settings is not None:
            import qstash  # noqa: F401, PLC0415 - see above: now, and not in the middle of the work
        self._client: AsyncQStash | None = None
        self._stack = AsyncExitStack()

    async def aclose(self) -> None:
        """Close the connections to QStash."""
        await self._stack.aclose()

    async def run(self, job: Job) -> Outcome:
        """Publish what is not published yet. Whatever QStash does not take runs here at once, and is never lost.

        Raises:
            StorageUnavailableError: Postgres is away; the next run goes on, and publishes nothing anew under another id.
        """
        order = msgspec.json.decode(job.body, type=PublishOrder)
        left = await handovers.unpublished(self._db, [JobId(id_) for id_ in order.batches])
        if not left:
            return Completed(note="nothing left to publish")
        refusal = await self._publish(order.slot, left)
        if refusal is None:
            log.info("publish.accepted", slot=order.slot, batches=len(left))
            return Completed()
        released = await handovers.release(self._db, [id_ for id_, _ in left], "refusal")
        if released:
            self._waker.wake()
        metrics.PUBLISHED.labels(refusal.reason).inc(len(left))
        level = log.info if refusal.reason == "paused" else log.warning
        level(
            "publish.refused",
            slot=order.slot,
            batches=len(left),
            released=len(released),
            reason=refusal.reason,
            detail=refusal.detail,
        )
        return Completed(note=f"refused: {refusal.reason}")

    async def _publish(self, slot: datetime, batches: Sequence[tuple[JobId, int]]) -> _Refusal | None:
        if self._settings is None:
            return _Refusal("not_configured", "this replica has no QSTASH_TOKEN")
        for pause in await pauses.load(self._db):
            if pause.host == PAUSE_HOST:
                return _Refusal("paused", f"{pause.reason}; {pause.seconds:.0f} s left")
        answer = await self._call(self._settings, slot, batches)
        if isinstance(answer, _Refusal):
            return answer
        await handovers.mark_published(
            self._db, {id_: message for (id_, _), message in zip(batches, answer, strict=True)}
        )
        metrics.PUBLISHED.labels("published").inc(len(batches))
        return None

    async def _call(
        self, settings: QStashSettings, slot: datetime, batches: Sequence[tuple[JobId, int]]
    ) -> list[str] | _Refusal:
        """One call for all. The SDK raises errors of its own, of httpx, and of whatever reads a bad answer."""
        from qstash.errors import (  # noqa: PLC0415
            DailyMessageLimitExceededError,
            QStashError,
            RateLimitExceededError,
        )

        if self._client is None:
            self._client = await self._stack.enter_async_context(open_client(settings))
        base = settings.public_url
        try:
            with anyio.fail_after(CALL_S):
                answers = await self._client.message.batch_json(
                    [
                        {
                            "url": base + WORKER_PATH,
                            "body": {"batch": id_},
                            "retries": settings.retries,
                            "callback": base + CALLBACK_PATH,
                            "failure_callback": base + FAILURE_PATH,
                            "deduplication_id": deduplication_id(slot, place),
                        }
                        for id_, place in batches
                    ]
                )
                ids = [str(answer.message_id) for answer in answers if not isinstance(answer, list)]
        except DailyMessageLimitExceededError as error:
            await self._pause_until(error.reset)
            return _Refusal("daily_limit", str(error))
        except RateLimitExceededError as error:
            return _Refusal("burst_limit", str(error))
        except QStashError as error:
            return _Refusal("refused", str(error)[:300])
        except (JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            return _Refusal("malformed", f"{type(error).__name__}: {error}"[:300])
        except Exception as error:  # noqa: BLE001 - httpx's, which must not be named here, and time-outs
            return _Refusal("unreachable", f"{type(error).__name__}: {error}"[:300])
        if len(ids) != len(batches):
            return _Refusal("malformed", f"{len(ids)} answers for {len(batches)} messages")
        return ids

    async def _pause_until(self, reset: str | None) -> None:
        """The day's messages are spent: until the reset (a Unix time) nobody needs to ask again."""
        try:
            seconds = min(PAUSE_S_MAX, float(reset or "") - time())
        except ValueError:
            return
        if seconds > 0:
            await pauses.store(
                self._db, [pauses.Pause(PAUSE_HOST, "", seconds, "the daily limit of QStash is reached")]
            )


async def ask(call: Awaitable[Told]) -> Told:
    """Await a call of the SDK, its errors as ours: for a person who waits, and wants to know why.

    Raises:
        UpstreamUnavailableError: no answer.  PermanentError: QStash refuses, with what it says.
    """
    from qstash.errors import QStashError  # noqa: PLC0415

    try:
        with anyio.fail_after(CALL_S):
            return await call
    except QStashError as error:
        raise PermanentError(f"QStash: {error}") from error
    except Exception as error:
        raise UpstreamUnavailableError(f"QStash cannot be reached: {type(error).__name__}: {error}") from error
