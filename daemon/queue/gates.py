"""Gates: what may run at once, and how often. FIFO queues, flow-control keys and an account's parallelism are one thing.

A job with gates waits in `held` in front of the first, takes a slot there, and goes on to the next one and at last to
`ready`. It gives its slots back when its attempt ends; only the lane of a FIFO queue stays taken until it is done.

Letting jobs pass is a transaction of its own, which any replica may begin: whoever opens a gate (by publishing, by
ending an attempt, by resuming) does so at once, and a round of promotion finds what was missed, a second later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

import structlog

from daemon.db.pool import Database, Record, Session, query
from daemon.domain.account import AccountId
from daemon.domain.errors import QuotaError, TransientError
from daemon.domain.job import JobId

GATES_MAX = 500
"""Gates looked at in one statement."""
PASS_MAX = 500
"""Jobs that pass one gate in one statement."""

_FIND = query("gate_find")
_ADD = query("gate_add")
_CONFIGURE = query("gate_configure")
_COUNT = query("gate_count")
_ADMIT_LOCK = query("admit_lock")
_ADMIT_LOCK_THESE = query("admit_lock_these")
_ADMIT = query("admit")
_ADMIT_NEXT = query("admit_next")
_SHOW = query("gate_show")
_LIST = query("gate_list")
_QUEUE_SET = query("queue_set")
_PAUSE = query("gate_pause")
_PIN = query("gate_pin")
_UNPIN = query("gate_unpin")
_RESET = query("gate_reset")
_DELETE = query("gate_delete")
_QUEUE_JOBS = query("queue_jobs")

log = structlog.get_logger(__name__)

Kind = Literal["queue", "flow", "all"]


class Wanted(NamedTuple):
    """A gate that a message needs, with what it asks of it. A queue is only made with these, a flow takes them on."""

    account: AccountId
    kind: Kind
    name: str
    parallelism: int | None
    rate: int | None = None
    period_s: int = 1


class GateKey(NamedTuple):
    account: AccountId
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate and what is going on at it. `rate_count` counts attempts since `rate_start`."""

    id: int
    name: str
    parallelism: int | None
    rate: int | None
    period_s: int
    rate_start: datetime
    rate_count: int
    is_paused: bool
    pins_parallelism: bool
    pins_rate: bool
    created_at: datetime
    updated_at: datetime
    waiting: int
    running: int


class TooManyQueuesError(QuotaError):
    """The account has as many queues as it may."""

    def __init__(self, most: int) -> None:
        super().__init__("queue", f"quota maxQueues exceeded, current limit: {most}", "delete a queue first")


class Gates:
    def __init__(self, db: Database) -> None:
        self._db = db

    # What publishing needs

    async def find(
        self, tx: Session, wanted: Iterable[Wanted], queues_max: Mapping[AccountId, int]
    ) -> dict[GateKey, int]:
        """The ids of these gates, made where they are missing. None of them can be deleted until the caller commits.

        Of several wishes for one gate the last one counts.

        Raises:
            TooManyQueuesError: a queue would be one more than its account may have.
        """
        wishes = {GateKey(wish.account, wish.kind, wish.name): wish for wish in wanted}
        if not wishes:
            return {}
        found = await self._find(tx, wishes)
        # Somebody else's that was there when ours was to be added may be deleted before we find it: then again.
        while missing := [wishes[key] for key in sorted(wishes.keys() - found.keys())]:
            await self._check_queues(tx, missing, queues_max)
            await tx.execute(_ADD, *_columns(missing))
            found = await self._find(tx, wishes)
        changed = [
            (found[key]["id"], wish)
            for key, wish in wishes.items()
            if wish.kind != "queue" and _differs(found[key], wish)
        ]
        if changed:
            changed.sort(key=lambda pair: pair[0])
            # By itself, since an update of several rows locks them in whatever order it meets them.
            await tx.fetch(_ADMIT_LOCK_THESE, [id_ for id_, _ in changed])
            await tx.execute(
                _CONFIGURE,
                [id_ for id_, _ in changed],
                [wish.parallelism for _, wish in changed],
                [wish.rate for _, wish in changed],
                [wish.period_s for _, wish in changed],
            )
        return {key: row["id"] for key, row in found.items()}

    async def _find(self, tx: Session, wishes: Collection[GateKey]) -> dict[GateKey, Record]:
        keys = sorted(wishes)
        rows = await tx.fetch(
            _FIND, [key.account for key in keys], [key.kind for key in keys], [key.name for key in keys]
        )
        return {GateKey(row["account_id"], row["kind"], row["name"]): row for row in rows}

    async def _check_queues(self, tx: Session, missing: Sequence[Wanted], queues_max: Mapping[AccountId, int]) -> None:
        new = [wish.account for wish in missing if wish.kind == "queue"]
        for account in set(new):
            if await tx.fetchval(_COUNT, account, "queue") + new.count(account) > queues_max[account]:
                raise TooManyQueuesError(queues_max[account])

    # Letting pass

    async def admit(self, gates: Iterable[int]) -> int:
        """Let pass at these gates whom they let, and on through the gates behind. Returns how many became ready."""
        admitted = 0
        ids = sorted(gates)
        while ids:
            async with self._db.transaction() as tx:
                await tx.fetch(_ADMIT_LOCK_THESE, ids)
                row = await tx.fetchrow(_ADMIT, ids, PASS_MAX)
            assert row is not None
            admitted += row["ready"]
            ids = sorted(row["next_ids"])
        return admitted

    async def open_up(self, gates: Iterable[int]) -> None:
        """The same, for whom has just committed: that has come true, so nothing may fail here any more. Where letting pass
        does not go now, the next round does it.
        """
        try:
            await self.admit(gates)
        except TransientError as error:
            log.debug("gates.postponed", reason=str(error))

    async def admit_waiting(self) -> tuple[int, float | None]:
        """One round over all gates that hold somebody up: how many became ready, and in how many seconds a rate's window
        opens, if any does.
        """
        admitted, after, behind = 0, 0, set[int]()
        while True:
            async with self._db.transaction() as tx:
                ids = [row["id"] for row in await tx.fetch(_ADMIT_LOCK, after, GATES_MAX)]
                row = await tx.fetchrow(_ADMIT, ids, PASS_MAX) if ids else None
            if row is None:
                break
            admitted += row["ready"]
            behind.update(row["next_ids"])
            after = ids[-1]
        admitted += await self.admit(behind)
        return admitted, await self._db.fetchval(_ADMIT_NEXT)

    # What people ask for

    async def show(self, account: AccountId, kind: Kind, name: str) -> Gate | None:
        row = await self._db.fetchrow(_SHOW, account, kind, name)
        return None if row is None else _gate(row)

    async def find_all(
        self, account: AccountId, kind: Kind, search: str | None = None, most: int = 1_000
    ) -> list[Gate]:
        """By name; with `search`, those whose name holds that text."""
        return [_gate(row) for row in await self._db.fetch(_LIST, account, kind, search, most)]

    async def set_queue(
        self, account: AccountId, name: str, parallelism: int, is_paused: bool | None, queues_max: int
    ) -> None:
        """Create or change a FIFO queue.

        Raises:
            TooManyQueuesError: it would be one more than `queues_max`.
        """
        async with self._db.transaction() as tx:
            if not await self._find(tx, [GateKey(account, "queue", name)]):
                await self._check_queues(tx, [Wanted(account, "queue", name, parallelism)], {account: queues_max})
            gate = await tx.fetchval(_QUEUE_SET, account, name, parallelism, is_paused)
        await self.open_up([gate])

    async def pause(self, account: AccountId, kind: Kind, name: str, *, is_paused: bool) -> bool:
        """Close or open a gate. False when there is none of that name."""
        gate = await self._db.fetchval(_PAUSE, account, kind, name, is_paused)
        if gate is not None and not is_paused:
            await self.open_up([gate])
        return gate is not None

    async def pin(
        self, account: AccountId, name: str, parallelism: int | None, rate: int | None, period_s: int | None
    ) -> None:
        """Fix what is given, for a key that need not exist yet; its window begins anew."""
        gate = await self._made(account, name, _PIN, account, name, parallelism, rate, period_s)
        await self.open_up([gate])

    async def unpin(self, account: AccountId, name: str, *, parallelism: bool, rate: bool) -> bool:
        """Let messages change it again. False when there is no such key."""
        return await self._db.fetchval(_UNPIN, account, name, parallelism, rate) is not None

    async def pause_flow(self, account: AccountId, name: str) -> None:
        """Close a flow-control key that need not exist yet."""
        await self._made(account, name, _PAUSE, account, "flow", name, True)

    async def reset(self, account: AccountId, name: str) -> bool:
        """Begin a new window now. False when there is no such key."""
        gate = await self._db.fetchval(_RESET, account, name)
        if gate is not None:
            await self.open_up([gate])
        return gate is not None

    async def delete_queue(self, tx: Session, account: AccountId, name: str) -> list[JobId]:
        """Delete a queue. Returns the jobs that waited in it or for it, which are now the caller's to cancel."""
        gate = await tx.fetchval(_DELETE, account, "queue", name)
        return [] if gate is None else [JobId(row["id"]) for row in await tx.fetch(_QUEUE_JOBS, gate)]

    async def _made(self, account: AccountId, name: str, sql: str, *args: object) -> int:
        """Do it to a flow-control key, which is made if need be: made and pruned again, it is made once more."""
        while (gate := await self._db.fetchval(sql, *args)) is None:
            await self._db.execute(_ADD, *_columns([Wanted(account, "flow", name, None)]))
        return int(gate)


def _columns(wanted: Sequence[Wanted]) -> tuple[list[object], ...]:
    return tuple(list(column) for column in zip(*wanted, strict=True))


def _differs(row: Record, wish: Wanted) -> bool:
    return (not row["pins_parallelism"] and row["parallelism"] != wish.parallelism) or (
        not row["pins_rate"] and (row["rate"], row["period_s"]) != (wish.rate, wish.period_s)
    )


def _gate(row: Record) -> Gate:
    return Gate(
        row["id"],
        row["name"],
        row["parallelism"],
        row["rate"],
        row["period_s"],
        row["rate_start"],
        0 if row["is_over"] else row["rate_count"],
        row["is_paused"],
        row["pins_parallelism"],
        row["pins_rate"],
        row["created_at"],
        row["updated_at"],
        row["waiting"],
        row["running"],
    )
