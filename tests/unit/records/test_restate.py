"""What a newer read of a bucket changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.record import Pending, ReadyBucket, ReadyRow, Row, Stored, Totals
from daemon.records.identity import bucket_digest
from daemon.records.restate import CONFIRM_AFTER, Witness, judge

NOW = datetime(2026, 11, 22, 10, 20, tzinfo=UTC)
AT = NOW.replace(minute=0)

contents = st.dictionaries(st.sampled_from([b"a", b"b", b"c", b"d"]), st.sampled_from([b"1", b"2", b"3"]))
witnesses = st.sampled_from(["none", "totals", "full"])


def bucket(content: dict[bytes, bytes]) -> ReadyBucket:
    rows = tuple(ReadyRow(k, v, Row(()), "{}", "{}", None, None, None, None) for k, v in content.items())
    return ReadyBucket(AT, rows, bucket_digest(content.items()), Totals())


def stored(content: dict[bytes, bytes], gone: set[bytes]) -> list[Stored]:
    return [Stored(k, v, is_tombstone=False) for k, v in content.items()] + [
        Stored(k, b"", is_tombstone=True) for k in gone - content.keys()
    ]


def after(before: dict[bytes, bytes], change: object) -> dict[bytes, bytes]:
    """The current rows once the change is booked."""
    state = dict(before)
    for row in (*change.new, *change.restated):
        state[row.key] = row.content
    for key in change.vanished:
        del state[key]
    return state


@given(before=contents, read=contents, gone=st.sets(st.sampled_from([b"a", b"b", b"c", b"d"])), witness=witnesses)
def test_rows_end_as_read_but_for_what_is_withheld(
    before: dict[bytes, bytes], read: dict[bytes, bytes], gone: set[bytes], witness: Witness
) -> None:
    """Whatever was there: the books hold the read and the withheld rows, and the digest says just that."""
    change = judge(bucket(read), stored(before, gone), witness=witness, pending=None, now=NOW)
    state = after(before, change)
    assert state == {**{key: before[key] for key in change.withheld}, **read}
    assert change.digest == bucket_digest(state.items())
    assert set(change.withheld) <= before.keys() - read.keys()
    assert (change.pending_since == NOW) == bool(change.withheld)
    untouched = {key for key in read if before.get(key) == read[key]}
    assert not untouched & {row.key for row in (*change.new, *change.restated)}


@given(before=contents, read=contents)
def test_only_a_full_read_empties_a_bucket_at_once(before: dict[bytes, bytes], read: dict[bytes, bytes]) -> None:
    full = judge(bucket(read), stored(before, set()), witness="full", pending=None, now=NOW)
    assert after(before, full) == read
    totals = judge(bucket({}), stored(before, set()), witness="totals", pending=None, now=NOW)
    assert after(before, totals) == before


@given(
    before=contents, read=contents, waited_s=st.integers(0, 1200), known=st.sets(st.sampled_from([b"a", b"b", b"c"]))
)
def test_second_read_confirms_what_the_first_one_missed_and_nothing_else(
    before: dict[bytes, bytes], read: dict[bytes, bytes], waited_s: int, known: set[bytes]
) -> None:
    pending = Pending(NOW - timedelta(seconds=waited_s), frozenset(known))
    change = judge(bucket(read), stored(before, set()), witness="none", pending=pending, now=NOW)
    missing = before.keys() - read.keys()
    is_old = timedelta(seconds=waited_s) >= CONFIRM_AFTER
    assert set(change.vanished) == (missing & known if is_old else set())
    if change.withheld:  # a key that is missed for the first time starts the wait anew
        assert change.pending_since == (pending.since if set(change.withheld) <= known else NOW)
