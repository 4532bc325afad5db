"""Where an attempt gets its poll_seq: from Postgres, just before its first request (law 4)."""

from __future__ import annotations

import anyio

from daemon.db import ledger
from daemon.db.pool import Database


class SeqSource:
    """Gathers those who ask at the same time into one statement: each number is still drawn after it was asked for."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._lock = anyio.Lock()
        self._waiting: list[_Ticket] = []

    async def next(self) -> int:
        """A number greater than any that was drawn before this call."""
        ticket = _Ticket()
        self._waiting.append(ticket)
        async with self._lock:
            if not ticket.seq:
                # Whoever comes first draws for all who queue behind it; those who come later wait for the next draw.
                served = list(self._waiting)
                for other, seq in zip(served, await ledger.next_seqs(self._db, len(served)), strict=True):
                    other.seq = seq
                del self._waiting[: len(served)]
        return ticket.seq


class _Ticket:
    __slots__ = ("seq",)

    def __init__(self) -> None:
        self.seq = 0
