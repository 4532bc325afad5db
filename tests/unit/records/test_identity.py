"""Identity is where a number belongs, never the number."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.connection import ConnectionId
from daemon.domain.record import HASH_VERSION, Grain, Row
from daemon.domain.window import Width
from daemon.records.identity import Keyer, bucket_digest, content_hash, grain_id

AT = datetime(2026, 11, 22, 10, tzinfo=UTC)
GRAIN = Grain("reports", Width.HOUR, ("model", "project_id"))
KEYER = Keyer(ConnectionId(7), "completions", GRAIN)
DIMS = (("model", "gpt-5"), ("project_id", None))

texts = st.none() | st.text(max_size=12)


def test_key_is_the_same_in_every_process_and_version() -> None:
    """A changed recipe would book every stored row a second time; it needs a new HASH_VERSION and an ADR."""
    assert KEYER.row_key(AT, DIMS).hex() == "01e724c52e8580b1670ece6277519d8b583cad8b"
    assert KEYER.row_key(AT, DIMS)[0] == HASH_VERSION


def test_amounts_that_differ_in_a_late_digit_are_two_contents() -> None:
    """Python rounds to 28 digits where it is let: the restatement of a long amount would never be booked."""
    one, two = Decimal("1." + "0" * 97 + "1"), Decimal("1." + "0" * 97 + "2")
    assert content_hash(Row((), amount=one)) != content_hash(Row((), amount=two))
    assert content_hash(Row((), quantity=one)) != content_hash(Row((), quantity=two))


def test_key_tells_apart_whatever_a_number_belongs_to() -> None:
    others = {
        Keyer(ConnectionId(8), "completions", GRAIN).row_key(AT, DIMS),
        Keyer(ConnectionId(7), "images", GRAIN).row_key(AT, DIMS),
        Keyer(ConnectionId(7), "completions", Grain("analytics", Width.HOUR, GRAIN.group_by)).row_key(AT, DIMS),
        Keyer(ConnectionId(7), "completions", Grain("reports", Width.DAY, GRAIN.group_by)).row_key(AT, DIMS),
        Keyer(ConnectionId(7), "completions", Grain("reports", Width.HOUR, ("model",))).row_key(AT, DIMS),
        KEYER.row_key(AT + timedelta(hours=1), DIMS),
        KEYER.row_key(AT, (("model", "gpt-5"), ("project_id", ""))),
        KEYER.row_key(AT, (("model", None), ("project_id", "gpt-5"))),
        KEYER.row_key(AT, DIMS),
    }
    assert len(others) == 9


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_keys_collide_only_for_equal_dimensions(a: tuple[str | None, ...], b: tuple[str | None, ...]) -> None:
    """Values hold commas, colons, quotes and pipes: no joining by separator may merge two of them."""

    def key(values: tuple[str | None, ...]) -> bytes:
        return KEYER.row_key(AT, (("model", values[0]), ("project_id", values[1])))

    assert (key(a) == key(b)) == (a == b)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=9), st.integers(0, 6))
def test_spelling_of_a_number_is_not_content(number: Decimal, zeros: int) -> None:
    respelled = Decimal(f"{number:f}" + "0" * zeros) if "." in f"{number:f}" else number
    assert content_hash(Row(DIMS, amount=number)) == content_hash(Row(DIMS, amount=respelled))


def test_null_and_zero_are_different_content() -> None:
    assert content_hash(Row(DIMS, input_tokens=None)) != content_hash(Row(DIMS, input_tokens=0))
    assert content_hash(Row(DIMS, amount=Decimal("-0.0"))) == content_hash(Row(DIMS, amount=Decimal(0)))


def test_every_value_of_a_row_is_content() -> None:
    base = Row(DIMS, 1, 2, 3, 4, 5, Decimal(6), "images", Decimal(7), "USD", b"{}")
    changed = [
        base._replace(**{name: value})
        for name, value in (
            ("input_tokens", 9), ("cache_read_tokens", 9), ("cache_write_tokens", 9), ("output_tokens", 9),
            ("requests", 9), ("quantity", Decimal(9)), ("unit", "seconds"), ("amount", Decimal(9)),
            ("currency", "EUR"), ("detail", b'{"x":1}'),
        )
    ]  # fmt: skip
    assert len({content_hash(row) for row in (base, *changed)}) == 11


@given(st.lists(st.tuples(st.binary(min_size=20, max_size=20), st.binary(min_size=16, max_size=16)), unique=True))
def test_digest_does_not_depend_on_the_order(rows: list[tuple[bytes, bytes]]) -> None:
    assert bucket_digest(rows) == bucket_digest(rows[::-1])
    assert (bucket_digest(rows) == b"") == (not rows)


def test_grain_is_named_by_its_cut() -> None:
    assert grain_id(GRAIN) == grain_id(Grain("reports", Width.HOUR, ("project_id", "model")))
    assert grain_id(GRAIN) != grain_id(Grain("reports", Width.HOUR, ("model",)))
