"""Step 1 of 8, trigger: signed deliveries of QStash. Verify first; then a tick, a release, or a note of what happened.

Nothing of a delivery is read before its signature over the raw body is proven (law 9). Then it either makes the tick of
a slot, or releases one batch that waits for it; both happen once, however often and however late QStash delivers.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import anyio
import msgspec
import structlog

from daemon import orchestrate
from daemon.db import handovers, quota
from daemon.db.pool import Database, Session
from daemon.db.text import storable
from daemon.domain.connection import ConnectionId, Secret
from daemon.domain.errors import PermanentError, SignatureError, UsageError
from daemon.domain.job import JobId
from daemon.domain.window import rfc3339
from daemon.queue.cron import cron_of, upcoming
from daemon.queue.gather import Gatherer
from daemon.queue.postgres import PostgresQueue
from daemon.queue.qstash import FAILURE_PATH, QStashSettings, ask, open_client

if TYPE_CHECKING:
    from qstash import Receiver

ORCHESTRATE_PATH = "/api/poll/orchestrate"
QUOTA_PATH = "/api/quota/sync"
QUOTA_PATH_ALIAS = "/api/cron/update-usage"
"""What users call theirs who have had a cron of their own."""
SCHEDULE_ID = "tallyd-poll"
SKEW_S = 10.0
"""A delivery that was signed up to this long in our future waits until it is valid: the SDK knows no tolerance."""
REGION_HEADER = "upstash-region"
SIGNATURE_HEADER = "upstash-signature"
MESSAGE_HEADER = "upstash-message-id"
MESSAGE_ID_CHARS_MAX = 200

log = structlog.get_logger()


class _Pair(NamedTuple):
    """What verifies with both keys, and what tells of each alone why not."""

    both: Receiver
    each: tuple[Receiver, Receiver]


class Door:
    """Lets in what QStash has signed for our public URL.

    Args:
        keys: (current, next) by region; "" for deliveries of any. Without keys nobody is let in.
        public_url: without a trailing slash; never taken from what a request says.
    """

    def __init__(
        self,
        keys: Mapping[str, tuple[Secret, Secret]],
        public_url: str | None,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self._url = public_url
        self._sleep = sleep
        self._receivers: dict[str, _Pair] = {}
        if keys and public_url:
            from qstash import Receiver  # noqa: PLC0415 - slow to import

            for region, (first, second) in keys.items():
                current, following = first.reveal(), second.reveal()
                self._receivers[region.replace("_", "-").upper()] = _Pair(
                    Receiver(current, following), (Receiver(current, current), Receiver(following, following))
                )

    @property
    def is_open(self) -> bool:
        """Whether there are keys to verify with."""
        return bool(self._receivers)

    async def verify(self, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Prove that QStash signed this body for `public_url + path`.

        Raises:
            SignatureError: it did not, or not for us, or not now.
        """
        signature = headers.get(SIGNATURE_HEADER)
        if not signature:
            raise SignatureError("there is no Upstash-Signature header")
        region = headers.get(REGION_HEADER, "").upper()
        receiver = self._receivers.get(region) or self._receivers.get("")
        if receiver is None:
            raise SignatureError(f"there are no signing keys for the region {region!r}"[:200])
        url = f"{self._url}{path}"
        try:
            _verify(receiver, signature, body, url)
        except SignatureError:
            ahead_s = _signed_at(signature) - time()
            if not 0 < ahead_s <= SKEW_S:
                raise
            await self._sleep(ahead_s)
            _verify(receiver, signature, body, url)


def _verify(pair: _Pair, signature: str, body: bytes, url: str) -> None:
    try:
        pair.both.verify(signature=signature, body=body.decode(), url=url)
    except Exception as error:
        # The SDK raises SignatureError for most, and whatever a hostile token or body provokes for the rest.
        raise SignatureError(_reason(pair, signature, body, url, error)) from error


def _reason(pair: _Pair, signature: str, body: bytes, url: str, error: Exception) -> str:
    """Why a delivery is refused. The SDK tells what is wrong under the next key: mostly that it is the other one's."""
    reason = str(error)
    for receiver in pair.each:
        try:
            receiver.verify(signature=signature, body=body.decode(), url=url)
        except Exception as own:  # noqa: BLE001 - as above
            if "Signature verification failed" not in str(own):
                reason = str(own)
                break
    return f"the signature is refused: {reason}"[:300]


def _signed_at(signature: str) -> float:
    """When a token claims to have been signed: 0 for one that cannot be read. Proves nothing."""
    try:
        part = signature.split(".")[1]
        claims = msgspec.json.decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)), type=dict[str, Any])
        return float(claims["iat"])
    except Exception:  # noqa: BLE001 - a stranger chose what stands there, and depth and size of it
        return 0.0


def message_id(headers: Mapping[str, str]) -> str:
    """What all deliveries of one message have in common; of a delivery without an id, its signature."""
    given = headers.get(MESSAGE_HEADER, "")
    if 0 < len(given) <= MESSAGE_ID_CHARS_MAX:
        return storable(given)
    # It is not signed, so that anything may stand there: what is too long for an id is known by its digest.
    return hashlib.sha256((given or headers.get(SIGNATURE_HEADER, "")).encode()).hexdigest()


class _TickOrder(msgspec.Struct, forbid_unknown_fields=True):
    slot: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class _QuotaOrder(msgspec.Struct, forbid_unknown_fields=True):
    tenant: str | None = None
    name: str | None = None


class _ReleaseOrder(msgspec.Struct, forbid_unknown_fields=True):
    batch: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


Order = TypeVar("Order", bound=msgspec.Struct)


class Deliveries:
    """What verified deliveries do.

    Args:
        hands_over: a tick that QStash asks for leaves its batches to QStash as well.
    """

    def __init__(
        self, db: Database, queue: PostgresQueue, settings: orchestrate.TickSettings, *, hands_over: bool
    ) -> None:
        self._db = db
        self._queue = queue
        self._settings = settings
        self._hands_over = hands_over
        self._release = Gatherer(self._release_all)

    async def orchestrate(self, body: bytes, message: str, request_id: str) -> dict[str, object]:
        """Make the tick that `{}` or `{"slot": TIME}` asks for, once for each message.

        Raises:
            UsageError: the body is not of that form, or the slot is in the future or off the grid.
        """
        order = _decoded(body or b"{}", _TickOrder)
        occasion = orchestrate.Occasion(
            via="qstash",
            message_id=message,
            request_id=request_id,
            hands_over=self._hands_over,
            early_s=min(SKEW_S, self._settings.tick_s / 10),
        )
        try:
            slot = order.slot and order.slot.astimezone(UTC)
        except OverflowError as error:
            raise UsageError("slot", "lies outside of the calendar", "give the start of a slot") from error
        made = await orchestrate.tick(self._db, self._queue, self._settings, slot, occasion=occasion)
        return {
            "slot": rfc3339(made.slot),
            "created": made.created,
            "batches": made.batches,
            "connections": made.connections,
        }

    async def sync_quotas(self, body: bytes, message: str, request_id: str) -> dict[str, object]:
        """Sync the quota sources that `{}`, `{"tenant": T}` or `{"tenant": T, "name": N}` names, once for each message.

        Raises:
            UsageError: the body is not of that form, or names a source that is not there.
        """
        order = _decoded(body or b"{}", _QuotaOrder)
        if order.name is not None and order.tenant is None:
            raise UsageError("name", "says nothing without its tenant", 'give {"tenant": ..., "name": ...}')

        async def find(tx: Session) -> list[ConnectionId]:
            return await quota.connections(tx, order.tenant, order.name)

        occasion = orchestrate.Occasion(via="qstash", message_id=message, request_id=request_id)
        made = await orchestrate.sync(self._db, self._queue, self._settings, find, occasion)
        if made.created and not made.connections and order.tenant is not None:
            raise UsageError(
                "name" if order.name is not None else "tenant", "has no quota source", "see `tallyd quota list`"
            )
        return {"created": made.created, "connections": made.connections, "batches": made.batches}

    async def release(self, body: bytes, _message: str, _request_id: str) -> dict[str, object]:
        """Let the batch that `{"batch": id}` names run now. One that runs, is done or never waited is left alone.

        Raises:
            UsageError: the body is not of that form.
        """
        batch = JobId(_decoded(body, _ReleaseOrder).batch)
        return {"batch": batch, "released": await self._release(batch)}

    async def _release_all(self, batches: Sequence[JobId]) -> list[bool]:
        """Release what is asked for at the same time in one statement; of several calls for one batch, one did it."""
        released = await handovers.release(self._db, batches, "delivery")
        if released:
            self._queue.waker.wake()
        told: list[bool] = []
        for batch in batches:
            told.append(batch in released)
            released.discard(batch)
        return told

    async def callback(self, body: bytes, _message: str, _request_id: str) -> dict[str, object]:
        """Record an attempt of QStash to deliver. It says that the delivery was accepted, not that a batch is done.

        Raises:
            UsageError: the body is no JSON object.
        """
        batch, status = await self._report(body)
        return {"recorded": batch is not None, "status": status}

    async def failure(self, body: bytes, _message: str, _request_id: str) -> dict[str, object]:
        """QStash gave up on a message: a batch that still waits runs now.

        Raises:
            UsageError: the body is no JSON object.
        """
        batch, status = await self._report(body)
        released = batch is not None and batch in await handovers.release(self._db, [batch], "failure")
        if released:
            self._queue.waker.wake()
        log.warning("handover.failed", batch=batch, status=status, released=released)
        return {"recorded": batch is not None, "status": status, "released": released}

    async def _report(self, body: bytes) -> tuple[JobId | None, int | None]:
        """A callback's own fields may be numbers or texts, and absent; its `sourceBody` is what we had published."""
        told = _decoded(body, dict[str, Any])
        try:
            source = base64.b64decode(str(told.get("sourceBody") or ""), validate=True)
            batch: JobId | None = JobId(msgspec.json.decode(source, type=_ReleaseOrder).batch)
        except (ValueError, msgspec.MsgspecError):
            batch = None
        try:
            status = min(999, max(0, int(told.get("status") or 0))) or None
        except (TypeError, ValueError):
            status = None
        message = told.get("sourceMessageId")
        found = await handovers.report(self._db, batch, message if isinstance(message, str) else None, status)
        return found, status


def _decoded(body: bytes, form: type[Order] | Any) -> Any:
    try:
        return msgspec.json.decode(body, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError("body", f"is not what this route takes: {error}") from error


# ── The schedule in QStash ──────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SetUp:
    """The schedule as it stands in QStash; `next_at` is when it fires next."""

    schedule_id: str
    destination: str
    cron: str
    next_at: datetime
    created: bool


def chosen_cron(cron: str | None, tick_s: int) -> str:
    """The configured expression, or the one that follows the ticks.

    Raises:
        UsageError: no expression fires every `tick_s` seconds.
    """
    found = cron or cron_of(tick_s)
    if found is None:
        raise UsageError(
            "tick_seconds", f"{tick_s} has no cron expression", "use whole minutes that divide an hour, or qstash_cron"
        )
    return found


async def set_up_schedule(settings: QStashSettings, cron: str, now: datetime, keys: set[tuple[str, str]]) -> SetUp:
    """Create the schedule that asks for our ticks, or bring it up to date.

    Args:
        keys: the configured (current, next) pairs; QStash's own must be one of them, or no delivery would be let in.

    Raises:
        PermanentError: QStash refuses, or signs with keys that are not ours.  UpstreamUnavailableError: no answer.
    """
    destination = settings.public_url + ORCHESTRATE_PATH
    async with open_client(settings) as client:
        theirs = await ask(client.signing_key.get())
        if not any(theirs.current in pair for pair in keys):
            raise PermanentError(
                "QStash signs with keys that are not configured here; set QSTASH_CURRENT_SIGNING_KEY and "
                "QSTASH_NEXT_SIGNING_KEY to those of its console, or of `tallyd keys show --reveal` where it is a tallyd"
            )
        known = {schedule.schedule_id for schedule in await ask(client.schedule.list())}
        await ask(
            client.schedule.create(
                destination=destination,
                cron=cron,
                body="{}",
                content_type="application/json",
                method="POST",
                retries=settings.retries,
                failure_callback=settings.public_url + FAILURE_PATH,
                schedule_id=SCHEDULE_ID,
            )
        )
    return SetUp(SCHEDULE_ID, destination, cron, next(upcoming(cron, now)), SCHEDULE_ID not in known)


async def schedule_of(settings: QStashSettings, now: datetime) -> SetUp | None:
    """Our schedule as QStash has it."""
    async with open_client(settings) as client:
        for schedule in await ask(client.schedule.list()):
            if schedule.schedule_id == SCHEDULE_ID:
                soon = next(upcoming(schedule.cron, now))
                return SetUp(SCHEDULE_ID, schedule.destination, schedule.cron, soon, created=False)
    return None


async def remove_schedule(settings: QStashSettings) -> bool:
    """Delete our schedule. False when there is none."""
    async with open_client(settings) as client:
        if not any(schedule.schedule_id == SCHEDULE_ID for schedule in await ask(client.schedule.list())):
            return False
        await ask(client.schedule.delete(SCHEDULE_ID))
    return True
