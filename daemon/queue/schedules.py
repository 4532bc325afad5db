"""Schedules: what publishes messages by the clock.

A firing is one transaction: the schedule's row, locked, its messages, and its next instant. So each instant fires once,
whichever replica sees it and wherever it is killed. An instant that was missed fires once when somebody looks again, and
however many were missed, it is one firing; of a paused schedule, none.

What a header field says is read when the schedule is put; only the endpoints of a group are looked up at each firing.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

import anyio
import msgspec
import structlog

from daemon.db.pool import Database, Record, Session, query
from daemon.db.text import storable
from daemon.domain.account import AccountId, Limits
from daemon.domain.errors import QuotaError, TransientError
from daemon.domain.job import JobId
from daemon.queue.cron import upcoming
from daemon.queue.groups import Group, endpoints_of
from daemon.queue.message import MessageId, Publication, Spec
from daemon.queue.messages import Messages, State
from daemon.queue.postgres import PostgresQueue

FIRE_MAX = 100
"""Schedules fired in one transaction."""
MESSAGES_MAX = 2_000
"""Messages after which a transaction takes no further schedule."""
BODIES_BYTES_MAX = 32 << 20
LOOK_S = (0.05, 1.0)
"""How long to sleep between two looks: what is due next is known, but others may put, resume or fire schedules."""

_ACCOUNT_LOCK = query("account_lock")
_EXISTS = query("schedule_exists")
_COUNT = query("schedule_count")
_PUT = query("schedule_put")
_GET = query("schedule_get")
_LIST = query("schedule_list")
_MESSAGES = query("schedule_messages")
_DELETE = query("schedule_delete")
_PAUSE = query("schedule_pause")
_LOCK = query("schedule_lock")
_RESUME = query("schedule_resume")
_DUE_ACCOUNTS = query("schedule_due_accounts")
_DUE = query("schedule_due")
_DUE_ONE = query("schedule_due_one")
_DUE_IDS = query("schedule_due_ids")
_FIRED = query("schedule_fired")
_NEXT = query("schedule_next")

_encode = msgspec.json.Encoder().encode
_decode_spec = msgspec.json.Decoder(Spec).decode

log = structlog.get_logger(__name__)

Progress = Literal["IN_PROGRESS", "SUCCESS", "FAIL"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule as it stands.

    Attributes:
        cron, destination: as sent.
        body: None: the bodies of the list are too large together; `get` has it.
        next_at: None: never again.
        last_states: of the messages of the last firing, as far as they are still known.
        error: why the last firing made no message.
    """

    id: str
    created_at: datetime
    cron: str
    destination: str
    spec: Spec
    body: bytes | None
    queue: str | None
    labels: tuple[str, ...]
    caller_ip: str | None
    is_paused: bool
    next_at: datetime | None
    last_at: datetime | None
    last_states: dict[MessageId, Progress]
    error: str | None


class TooManySchedulesError(QuotaError):
    """The account has as many schedules as it may."""

    def __init__(self, most: int) -> None:
        super().__init__("schedule", f"quota maxSchedules exceeded, current limit: {most}", "delete a schedule first")


@dataclass(slots=True)
class _Firing:
    """A due schedule, and what comes of it."""

    row: Record
    next_at: datetime | None
    publications: list[Publication] = field(default_factory=list)
    ids: list[JobId] = field(default_factory=list)
    error: str | None = None


class Schedules:
    """Safe to share between tasks.

    Args:
        limits_of: what an account may ask for.
    """

    def __init__(
        self,
        db: Database,
        queue: PostgresQueue,
        messages: Messages,
        limits_of: Callable[[AccountId], Awaitable[Limits]],
    ) -> None:
        self._db = db
        self._queue = queue
        self._messages = messages
        self._limits_of = limits_of

    # What people ask for

    async def put(
        self,
        account: AccountId,
        id_: str | None,
        cron: str,
        destination: str,
        spec: Spec,
        limits: Limits,
        *,
        body: bytes = b"",
        queue: str | None = None,
        labels: Sequence[str] = (),
        caller_ip: str | None = None,
    ) -> str:
        """Store a schedule, and return its id. One of the same id is replaced as a whole, and runs even if it was paused.

        Only the time when it was created and what its last firing was stay as they were.

        Args:
            id_: None: a new one that nobody guesses.
            cron: as `check_cron` has returned it.
            destination: a checked URL, or the name of a group.
            spec: `delay_s` holds for each of its messages.

        Raises:
            TooManySchedulesError: it would be one more than the account may have.
        """
        name = id_ or f"scd_{secrets.token_hex(16)}"
        async with self._db.transaction() as tx:
            if id_ is None or not await tx.fetchval(_EXISTS, account, name):
                await tx.fetchval(_ACCOUNT_LOCK, account)
                if await tx.fetchval(_COUNT, account, name) >= limits.schedules:
                    raise TooManySchedulesError(limits.schedules)
            next_at = _first(cron, await tx.fetchval("select clock_timestamp()"))
            await tx.execute(
                _PUT, account, name, cron, destination, _encode(spec).decode(), body, queue,
                None if spec.flow is None else spec.flow[0], list(labels) or None, caller_ip, next_at,
            )  # fmt: skip
        return name

    async def get(self, account: AccountId, id_: str) -> Schedule | None:
        row = await self._db.fetchrow(_GET, account, id_)
        return None if row is None else (await _schedules(self._db, account, [row]))[0]

    async def list(self, account: AccountId) -> list[Schedule]:
        """The oldest first."""
        return await _schedules(self._db, account, await self._db.fetch(_LIST, account, BODIES_BYTES_MAX))

    async def delete(self, account: AccountId, id_: str) -> bool:
        """False when there is none. The messages that it has made go on."""
        return await self._db.fetchval(_DELETE, account, id_) is not None

    async def pause(self, account: AccountId, id_: str) -> bool:
        """False when there is none."""
        return await self._db.fetchval(_PAUSE, account, id_) is not None

    async def resume(self, account: AccountId, id_: str) -> bool:
        """Go on from now; what would have fired meanwhile never will. False when there is none."""
        async with self._db.transaction() as tx:
            row = await tx.fetchrow(_LOCK, account, id_)
            if row is not None and row["is_paused"]:
                await tx.execute(_RESUME, account, id_, _first(row["cron"], row["now"]))
        return row is not None

    # Firing

    async def fire_due(self, limit: int = FIRE_MAX) -> int:
        """Publish what is due, at most `limit` schedules of it. Returns how many fired, those in vain included."""
        accounts = [AccountId(row["id"]) for row in await self._db.fetch(_DUE_ACCOUNTS, limit)]
        if not accounts:
            return 0
        # Before the transaction, which should not wait for a second connection.
        limits = {account: await self._limits_of(account) for account in accounts}
        try:
            return await self._fire(limits, _DUE, limit, accounts, BODIES_BYTES_MAX)
        except TransientError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, it is about one of them
            return await self._fire_singly(limits, limit)

    async def _fire_singly(self, limits: dict[AccountId, Limits], limit: int) -> int:
        """Each by itself, so that the one that cannot be published bears its error alone."""
        fired = 0
        for row in await self._db.fetch(_DUE_IDS, limit, [*limits]):
            try:
                fired += await self._fire(limits, _DUE_ONE, row["account_id"], row["id"])
            except TransientError:
                raise
            except Exception as error:  # noqa: BLE001 - it stops neither the others nor the daemon
                fired += await self._fire(limits, _DUE_ONE, row["account_id"], row["id"], failed=str(error))
        return fired

    async def _fire(self, limits: dict[AccountId, Limits], due: str, *args: object, failed: str | None = None) -> int:
        async with self._db.transaction() as tx:
            firings = await _firings(tx, await tx.fetch(due, *args), failed)
            if not firings:
                return 0
            calls = [(limits[AccountId(f.row["account_id"])], f.publications) for f in firings]
            published, gates = await self._messages.publish_in(tx, calls)
            for firing, made in zip(firings, published, strict=True):
                firing.ids = [one.id.job for one in made]
            await tx.execute(
                _FIRED,
                [f.row["account_id"] for f in firings],
                [f.row["id"] for f in firings],
                [f"{{{','.join(map(str, f.ids))}}}" for f in firings],
                [f.error for f in firings],
                [f.next_at for f in firings],
            )
        for firing in firings:
            _tell(firing)
        await self._queue.open_up(gates)
        self._queue.waker.wake()
        return len(firings)

    # The service

    async def next_due_s(self) -> float | None:
        """Seconds until the next instant of any schedule; negative when it is over, None when there is none."""
        next_s: float | None = await self._db.fetchval(_NEXT)
        return next_s

    async def run(self) -> None:
        """Fire what is due, until cancelled. Outlives an outage of Postgres."""
        is_away = False
        while True:
            wait_s = LOOK_S[1]
            try:
                fired = await self.fire_due()
                next_s = 0.0 if fired else await self.next_due_s()
            except TransientError as error:
                if not is_away:
                    log.warning("schedule.postponed", problem=str(error))
                is_away = True
            else:
                if is_away:
                    log.info("schedule.resumed")
                is_away = False
                if fired:
                    continue
                if next_s is not None:
                    wait_s = min(wait_s, max(LOOK_S[0], next_s))
            await anyio.sleep(wait_s)


async def _schedules(db: Database, account: AccountId, rows: Sequence[Record]) -> list[Schedule]:
    wanted = [id_ for row in rows for id_ in row["last_ids"] or ()]
    found = {row["id"]: row for row in await db.fetch(_MESSAGES, wanted, account)} if wanted else {}
    return [
        Schedule(
            row["id"], row["created_at"], row["cron"], row["destination"], _decode_spec(row["spec"]), row["body"],
            row["queue"], tuple(row["labels"] or ()), row["caller_ip"], row["is_paused"], row["next_at"],
            row["last_at"], _states(found[id_] for id_ in row["last_ids"] or () if id_ in found), row["error"],
        )
        for row in rows
    ]  # fmt: skip


async def _firings(tx: Session, rows: Iterable[Record], failed: str | None) -> list[_Firing]:
    firings: list[_Firing] = []
    groups: dict[tuple[AccountId, str], Group | None] = {}
    messages = 0
    for row in rows:
        if messages >= MESSAGES_MAX:
            break  # the others stay due
        firing = _Firing(row, _first(row["cron"], row["now"]), error=failed and storable(failed))
        firings.append(firing)
        if failed is not None:
            continue
        account, destination = AccountId(row["account_id"]), row["destination"]
        if _is_url(destination):
            firing.publications = [_publication(row, destination, _decode_spec(row["spec"]))]
        else:
            if (account, destination) not in groups:
                groups[account, destination] = await endpoints_of(tx, account, destination)
            firing.publications = _to_group(row, groups[account, destination])
            if not firing.publications:
                firing.error = f"there is no URL group {destination!r} with an endpoint"
        messages += len(firing.publications)
    return firings


def _first(cron: str, after: datetime) -> datetime | None:
    return next(upcoming(cron, after), None)


def _is_url(destination: str) -> bool:
    return destination[:8].lower().startswith(("http://", "https://"))


def _publication(row: Record, url: str, spec: Spec) -> Publication:
    return Publication(
        AccountId(row["account_id"]),
        url,
        spec,
        row["body"],
        queue=row["queue"],
        schedule=row["id"],
        labels=tuple(row["labels"] or ()),
        caller_ip=row["caller_ip"],
    )


def _to_group(row: Record, group: Group | None) -> list[Publication]:
    if group is None:
        return []
    spec = _decode_spec(row["spec"])
    made = []
    for endpoint in group.endpoints:
        publication = _publication(row, endpoint.url, msgspec.structs.replace(spec, endpoint=endpoint.name))
        made.append(replace(publication, topic=group.name, body_of=0))
    return made


def _states(messages: Iterable[Record]) -> dict[MessageId, Progress]:
    return {MessageId(JobId(row["id"]), row["salt"]): _progress(row) for row in messages}


def _progress(row: Record) -> Progress:
    if row["is_dead"] or row["ended"] in (State.FAILED, State.CANCELED):
        return "FAIL"
    return "SUCCESS" if row["ended"] == State.DELIVERED else "IN_PROGRESS"


def _tell(firing: _Firing) -> None:
    row = firing.row
    log.debug(
        "schedule.fired",
        account_id=row["account_id"],
        schedule_id=row["id"],
        messages=len(firing.ids),
        late_s=(row["now"] - row["next_at"]).total_seconds(),
    )
    if firing.error is not None and row["error"] is None:
        log.warning(
            "schedule.failed", account_id=row["account_id"], schedule_id=row["id"], reason=firing.error
        )  # fmt: skip
    elif firing.error is None and row["error"] is not None:
        log.info("schedule.recovered", account_id=row["account_id"], schedule_id=row["id"])
