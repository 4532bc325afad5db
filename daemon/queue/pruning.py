"""Housekeeping of messages: what is over and old enough goes, with its body and its log."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from daemon.db.pool import Database, query
from daemon.queue.maintenance import drop_partitions

BATCH = 1_000
UNUSED_S = 86_400.0
"""How long a flow-control key stays after its last message."""

_LOCK = query("prune_lock")
_OLD_LETTERS = query("prune_old_letters")
_DROP = query("dead_drop")
_MESSAGES = query("prune_messages")
_PAYLOADS = query("prune_payloads")
_PARTITIONS = query("prune_event_partitions")
_STRAYS = query("prune_event_strays")
_GATES_LOCK = query("prune_gates_lock")
_GATES_DELETE = query("prune_gates_delete")


@dataclass(frozen=True, slots=True)
class PrunedMessages:
    """What was removed; `partitions` are weeks of the log."""

    letters: int
    messages: int
    payloads: int
    partitions: int
    gates: int


async def prune_messages(db: Database, *, kept: timedelta, dead_kept: timedelta) -> PrunedMessages:
    """Remove what is over: harmless when done twice, or by several at once.

    Args:
        kept: how long a message stays after its last line in the log, and how long that log is kept; whole weeks go.
        dead_kept: how long a dead letter waits for somebody.
    """
    letters = await _letters(db, dead_kept)
    messages, payloads = await _messages(db, kept)
    await _strays(db, kept)
    return PrunedMessages(letters, messages, payloads, await drop_partitions(db, _PARTITIONS, kept), await _gates(db))


async def _letters(db: Database, kept: timedelta) -> int:
    dropped = 0
    while old := [row["id"] for row in await db.fetch(_OLD_LETTERS, kept.total_seconds())]:
        dropped += len(await db.fetch(_DROP, sorted(old)))
    return dropped


async def _messages(db: Database, kept: timedelta) -> tuple[int, int]:
    """Walk all messages by their ids, which are about as old as they are, those that still wait included."""
    messages = payloads = after = 0
    while True:
        async with db.transaction() as tx:
            if not await tx.fetchval(_LOCK):
                return messages, payloads  # another replica does it
            row = await tx.fetchrow(_MESSAGES, after, kept.total_seconds())
            assert row is not None
            if row["payloads"]:
                payloads += _count(await tx.execute(_PAYLOADS, row["payloads"]))
        messages += row["deleted"]
        if row["walked"] < BATCH or row["is_young"]:
            return messages, payloads
        after = row["last_id"]


async def _strays(db: Database, kept: timedelta) -> None:
    while _count(await db.execute(_STRAYS, BATCH, kept.total_seconds())) == BATCH:
        pass


async def _gates(db: Database) -> int:
    deleted = after = 0
    while True:
        async with db.transaction() as tx:
            ids = [row["id"] for row in await tx.fetch(_GATES_LOCK, after, UNUSED_S)]
            deleted += _count(await tx.execute(_GATES_DELETE, ids)) if ids else 0
        if len(ids) < BATCH:
            return deleted
        after = ids[-1]


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
