"""What a newer read of a bucket changes in the ledger: pure, one bucket at a time.

A complete read is authoritative for its buckets. A key missing from it has vanished, and becomes a revision of zero;
but a glitch must not zero a real row, so a vanished key needs a second witness first (see `judge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from daemon.domain.record import Pending, ReadyBucket, ReadyRow, Stored
from daemon.records.identity import bucket_digest

CONFIRM_AFTER = timedelta(minutes=10)
"""Two reads that both miss a key count as two only when they are this far apart, by the database's clock."""

Witness = Literal["none", "totals", "full"]
"""Beside the grouped read itself: nothing; an ungrouped total that it equals; or the same in a full re-read."""


class Change(NamedTuple):
    """What to write for a bucket.

    Attributes:
        new: rows without a predecessor, or whose predecessor had vanished.
        restated: rows whose content differs from the stored one.
        vanished: keys to book down to zero.
        withheld: keys that are missing from the read but stay for now.
        digest: of what is stored afterwards, withheld rows included.
        pending_since: when the oldest of the withheld keys may have been missed first; None when there are none.
    """

    new: tuple[ReadyRow, ...]
    restated: tuple[ReadyRow, ...]
    vanished: tuple[bytes, ...]
    withheld: tuple[bytes, ...]
    digest: bytes
    pending_since: datetime | None


def judge(
    read: ReadyBucket, stored: Sequence[Stored], *, witness: Witness, pending: Pending | None, now: datetime
) -> Change:
    """Compare a complete read of a bucket with what is stored there.

    A vanished key is booked down at once when an ungrouped total, read in the same attempt, equals the sum of the rows
    that are left (late attribution moves money from one key to another, and the sum stays). A bucket that drops to
    empty looks the same in both reads when the provider has a bad moment, so there only a full re-read is believed at
    once. Everything else waits until a second read, at least `CONFIRM_AFTER` later, misses the same key.

    Args:
        now: the database's time.
    """
    before = {row.key: row for row in stored}
    new: list[ReadyRow] = []
    restated: list[ReadyRow] = []
    for row in read.rows:
        old = before.pop(row.key, None)
        if old is None or old.is_tombstone:
            new.append(row)
        elif old.content != row.content:
            restated.append(row)
    missing = [row for row in before.values() if not row.is_tombstone]
    if witness == "full" or (witness == "totals" and read.rows):
        vanished, withheld = missing, []
    else:
        is_old = pending is not None and now - pending.since >= CONFIRM_AFTER
        vanished = [row for row in missing if pending is not None and is_old and row.key in pending.keys]
        withheld = [row for row in missing if row not in vanished]
    since = None
    if withheld:
        is_known = pending is not None and all(row.key in pending.keys for row in withheld)
        since = pending.since if pending is not None and is_known else now
    held = [(row.key, row.content) for row in read.rows] + [(row.key, row.content) for row in withheld]
    return Change(
        tuple(new),
        tuple(restated),
        tuple(row.key for row in vanished),
        tuple(row.key for row in withheld),
        bucket_digest(held),
        since,
    )
