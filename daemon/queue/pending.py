"""Messages under way: what is known of one, and cancelling them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from daemon.db.pool import Database, Session, query
from daemon.domain.account import AccountId
from daemon.domain.errors import StorageUnavailableError
from daemon.domain.job import JobId
from daemon.queue.listing import STRETCH_MAX, Filter, matching
from daemon.queue.message import Message, MessageId, message_of
from daemon.queue.postgres import PostgresQueue

FINISHED_S = 600.0
"""For so long a message can be looked at after its end."""
CANCEL_MAX = 500
"""Messages cancelled in one transaction."""
ROUNDS_MAX = 20
NOTE = "cancelled on request"

_GET = query("pending_get")
_LOCK = query("pending_lock")
_LOCK_LEASES = query("pending_lock_leases")
_ALIVE = query("pending_alive")
_LOG = query("pending_log")
_END = query("pending_end")
_MATCHING = matching("pending_matching", "pending_stretch")
_MATCHING_OF = matching("pending_matching", "pending_these")
_OF_QUEUE = query("pending_of_queue")
_SLOT_GATES = query("slot_gates")


@dataclass(frozen=True, slots=True)
class Stored:
    """A message with its body; `is_alive` until it is delivered, dead or cancelled."""

    message: Message
    body: bytes
    is_alive: bool


class Pending:
    def __init__(self, db: Database, queue: PostgresQueue) -> None:
        self._db = db
        self._queue = queue

    async def get(self, account: AccountId, id_: MessageId) -> Stored | None:
        """None: there is no such message, it is not the account's, or it ended more than `FINISHED_S` ago."""
        row = await self._db.fetchrow(_GET, *id_, account, FINISHED_S)
        return None if row is None else Stored(message_of(row), row["body"] or b"", row["is_alive"])

    async def cancel(self, account: AccountId, ids: Iterable[MessageId]) -> int:
        """Cancel messages that are alive, one that is being delivered too. Returns how many there were."""
        ordered = sorted(set(ids))
        cancelled = 0
        for start in range(0, len(ordered), CANCEL_MAX):
            cancelled += await self._cancel(account, ordered[start : start + CANCEL_MAX])
        return cancelled

    async def cancel_matching(self, account: AccountId, wanted: Filter, count: int | None = None) -> int:
        """Cancel up to `count` messages that match, the oldest first; None: all of those that there are by now.

        Returns how many. Each batch of `CANCEL_MAX` is a transaction of its own.
        """
        sql = _MATCHING if wanted.ids is None else _MATCHING_OF
        after, end = 0, await self._db.fetchval(_END)
        cancelled = 0
        while count is None or cancelled < count:
            most = CANCEL_MAX if count is None else min(CANCEL_MAX, count - cancelled)
            rows = await self._db.fetch(sql, *wanted.arguments(account), after, end, STRETCH_MAX, most)
            found = [MessageId(JobId(row["id"]), row["salt"]) for row in rows if row["id"] is not None]
            cancelled += await self._cancel(account, found)
            if len(found) == most:
                after = found[-1].job
            elif rows[0]["walked"] < STRETCH_MAX:
                break
            else:
                after = rows[0]["end_id"]
        return cancelled

    async def delete_queue(self, account: AccountId, name: str) -> int:
        """Delete a FIFO queue, if there is one, and cancel its messages. Returns how many.

        Callbacks of its messages go on.
        """
        async with self._db.transaction() as tx:
            jobs = await self._queue.gates.delete_queue(tx, account, name)
            rows = await tx.fetch(_OF_QUEUE, jobs, account, name)
            ids = [MessageId(JobId(row["id"]), row["salt"]) for row in rows]
            cancelled, gates = await self._cancel_in(tx, account, ids)
        await self._queue.open_up(gates)
        return cancelled

    async def _cancel(self, account: AccountId, ids: list[MessageId]) -> int:
        if not ids:
            return 0
        async with self._db.transaction() as tx:
            cancelled, gates = await self._cancel_in(tx, account, ids)
        await self._queue.open_up(gates)
        return cancelled

    async def _cancel_in(self, tx: Session, account: AccountId, ids: list[MessageId]) -> tuple[int, set[int]]:
        """How many were cancelled, and the gates to admit at."""
        rows = await tx.fetch(_LOCK, account, [id_.job for id_ in ids], [id_.salt for id_ in ids])
        left = [JobId(row["id"]) for row in rows]
        cancelled: set[JobId] = set()
        gates: set[int] = set()
        # Between two tables a job may escape one statement, which sees both as they were. The next one finds it.
        for _ in range(ROUNDS_MAX):
            await tx.fetch(_LOCK_LEASES, left)
            gates.update(row["id"] for row in await tx.fetch(_SLOT_GATES, left))
            cancelled |= await self._queue.cancel(left, NOTE, tx)
            left = [JobId(row["id"]) for row in await tx.fetch(_ALIVE, left)]
            if not left:
                break
        else:
            raise StorageUnavailableError("database: messages keep moving away from their cancellation")
        if cancelled:
            await tx.execute(_LOG, sorted(cancelled))
        return len(cancelled), gates
