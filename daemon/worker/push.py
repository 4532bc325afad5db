"""Step 4 of 8, worker: deliver a message to its URL, signed, and write how that ended.

What an attempt needs is loaded, and what became of it is written, for many at once: whoever comes while one statement is
under way joins the next. An attempt whose end could not be written happens again: delivery is at least once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import cache
from time import perf_counter, time

import anyio
import structlog

from daemon.db.accounts import AccountStore
from daemon.domain.duration import asked_wait_s, backoff_s
from daemon.domain.errors import (
    ConfigError,
    CredentialError,
    LeaseLostError,
    PermanentError,
    TransientError,
    UpstreamUnavailableError,
)
from daemon.domain.expression import parse_delay
from daemon.domain.headers import joined
from daemon.domain.job import Completed, Discarded, Job, Outcome, Retryable, Snoozed
from daemon.http_push import PushClient, PushRequest, PushResponse
from daemon.queue.budget import ByteBudget
from daemon.queue.gather import Gatherer
from daemon.queue.message import Attempted
from daemon.queue.messages import TIMEOUT_MARGIN_S, Ended, Load, Messages
from daemon.telemetry import metrics
from daemon.worker.signature import sign

USER_AGENT = "Upstash-QStash"
GIVE_UP = "upstash-nonretryable-error"
SETTLE_RETRY_S = (0.2, 5.0)
UNSIGNED_SNOOZE_S = 30.0
AWAY_SNOOZE_S = 5.0
CROWDED_SNOOZE_S = 5.0
ROOM_S = 20.0
"""How long a large body waits for room; of the margin that its job has."""
CALLBACK_COPIES = 3
"""How much of a body a callback's JSON, and the statement that stores it, hold on top of it."""
BYTES_MAX = 128 << 20

log = structlog.get_logger()

_pushes = cache(metrics.PUSHES.labels)


class Pusher:
    """Runs `push` jobs.

    Args:
        bytes_max: of large bodies on their way, in memory at once.
        clock: Unix seconds, for signatures and for dates that a response names.
    """

    def __init__(
        self,
        messages: Messages,
        accounts: AccountStore,
        client: PushClient,
        bytes_max: int = BYTES_MAX,
        clock: Callable[[], float] = time,
    ) -> None:
        self._messages = messages
        self._accounts = accounts
        self._client = client
        self._budget = ByteBudget(bytes_max)
        self._clock = clock
        self._load: Callable[[Job], Awaitable[Load | None]] = Gatherer(messages.load)
        self._settle: Callable[[Ended], Awaitable[bool]] = Gatherer(messages.settle)

    async def run(self, job: Job) -> Outcome:
        """One attempt.

        Raises:
            LeaseLostError: the job is somebody else's, or was cancelled.
        """
        try:
            load = await self._load(job)
            if load is None:
                raise LeaseLostError(f"job {job.id}: token {job.token} is stale")
            if load.body is not None:
                return await self._deliver(job, load, load.body)
            copies = 1 + CALLBACK_COPIES * sum(
                c is not None for c in (load.message.spec.callback, load.message.spec.failure_callback)
            )
            async with AsyncExitStack() as stack:
                with anyio.move_on_after(ROOM_S) as waiting:
                    await stack.enter_async_context(self._budget.hold(load.body_bytes * copies))
                if waiting.cancelled_caught:
                    # Others may hold it for hours. To go on waiting would use up the attempt without one.
                    return Snoozed(CROWDED_SNOOZE_S, "other large bodies are under way")
                return await self._deliver(job, load, await self._messages.body(load))
        except TransientError as error:
            # Only ever before anything is sent, so it is no attempt: there may be no other.
            return Snoozed(AWAY_SNOOZE_S, str(error))

    async def _deliver(self, job: Job, load: Load, body: bytes) -> Outcome:
        began = perf_counter()
        try:
            keys = self._accounts.opened(load.message.account, load.key_id, load.sealed_keys)
        except (ConfigError, CredentialError) as error:
            # A matter of this process, not of the message: another one may have the key, or this one will.
            log.error("push.unsigned", message_id=str(load.message.id), reason=str(error))  # noqa: TRY400 - it is told
            return Snoozed(UNSIGNED_SNOOZE_S, str(error))
        outcome, attempted = await self._attempt(job, load, body, keys.current)
        took_s = perf_counter() - began
        if not await self._write(Ended(job, load, body, outcome, attempted, int(took_s * 1000))):
            raise LeaseLostError(f"job {job.id}: token {job.token} is stale")
        _tell(job, load, outcome, attempted, took_s)
        return Completed(is_settled=True, is_told=True)

    async def _attempt(self, job: Job, load: Load, body: bytes, key: str) -> tuple[Outcome, Attempted]:
        message = load.message
        signature = sign(key, url=message.url, body=body, now=int(self._clock()))
        request = PushRequest(
            message.spec.method,
            message.url,
            headers_of(job, load, signature),
            body,
            job.timeout_s - TIMEOUT_MARGIN_S,
        )
        try:
            response = await self._client.send(request)
        except UpstreamUnavailableError as error:
            return Retryable(str(error), self._wait_s(job, load)), Attempted(error=str(error))
        except PermanentError as error:
            # Nothing was sent, and nothing would be: an address that may not be reached, a URL that is none.
            return Discarded(str(error)), Attempted(error=str(error))
        return self._judge(job, load, response)

    def _judge(self, job: Job, load: Load, response: PushResponse) -> tuple[Outcome, Attempted]:
        attempted = Attempted(response.status, joined(response.headers), response.body)
        if 200 <= response.status < 300:
            return Completed(), attempted
        attempted.error = f"the endpoint answered {response.status}"
        headers = {name.lower(): value for name, value in response.headers}
        if headers.get(GIVE_UP, "").strip().lower() == "true":
            attempted.error += " and asked not to try again"
            return Discarded(attempted.error), attempted
        wait_s = asked_wait_s(headers, datetime.fromtimestamp(self._clock(), UTC))
        return Retryable(attempted.error, self._wait_s(job, load) if wait_s is None else wait_s), attempted

    def _wait_s(self, job: Job, load: Load) -> float:
        """Seconds until the next attempt, where the endpoint does not ask for others."""
        if (text := load.message.spec.retry_delay) is not None:
            return parse_delay(text).milliseconds(job.attempt - 1) / 1000
        return backoff_s(job.attempt)

    async def _write(self, ended: Ended) -> bool:
        """Write the end of an attempt, as often as it takes: not to write it would mean to deliver once more."""
        delay_s = SETTLE_RETRY_S[0]
        while True:
            try:
                return await self._settle(ended)
            except TransientError as error:
                log.debug("push.settling_postponed", reason=str(error))
                await anyio.sleep(delay_s)
                delay_s = min(SETTLE_RETRY_S[1], delay_s * 2)


def headers_of(job: Job, load: Load, signature: str) -> list[tuple[str, str]]:
    """What a delivery carries: what is forwarded, and what says whose message it is, which counts for more. What belongs to
    the connection is the client's to leave out.
    """
    message = load.message
    ours = [
        ("Upstash-Message-Id", str(message.id)),
        ("Upstash-Retried", str(job.attempt - 1)),
        ("Upstash-Signature", signature),
    ]
    for name, value in (
        ("Upstash-Schedule-Id", message.schedule),
        ("Upstash-Topic-Name", message.topic),
        ("Upstash-Caller-Ip", message.caller_ip),
        ("Upstash-Label", ",".join(message.labels)),
    ):
        if value:
            ours.append((name, value))
    taken = {name.lower() for name, _ in ours}
    forwarded = [*_forwarded(message.spec.header.items(), taken)]
    if not any(name.lower() == "user-agent" for name, _ in forwarded):
        ours.insert(0, ("User-Agent", USER_AGENT))
    return [*forwarded, *ours]


def _forwarded(headers: Iterable[tuple[str, Sequence[str]]], taken: Collection[str]) -> Iterable[tuple[str, str]]:
    for name, values in headers:
        if name.lower() not in taken:
            for value in values:
                yield name, value


def _tell(job: Job, load: Load, outcome: Outcome, attempted: Attempted, took_s: float) -> None:
    match outcome:
        case Completed():
            ended, level = "delivered", log.debug
        case Retryable() if job.attempt < job.max_attempts:
            ended, level = "retried", log.info
        case _:
            ended, level = "failed", log.warning
    _pushes(ended).inc()
    metrics.PUSH_SECONDS.observe(took_s)
    if isinstance(outcome, Completed) and not log.is_enabled_for(logging.DEBUG):
        return  # putting it into words costs as much as signing it
    fields: dict[str, object] = {"message_id": str(load.message.id), "status": attempted.status, "ended": ended}
    if attempted.error is not None:
        fields["reason"] = attempted.error
    level("push.attempted", **fields, duration_s=round(took_s, 3))
