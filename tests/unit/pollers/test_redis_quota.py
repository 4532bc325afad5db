"""Settings of quota connections, and numbers as servers hold them."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.connection import Secret, Target
from daemon.domain.errors import CredentialError, PermanentError, UsageError
from daemon.domain.ports import Collector, Poller
from daemon.pollers.redis_quota import RedisQuotaPoller, exact, read_settings, written

GOOD = {"pattern": "quota:{user}"}


def test_settings_have_defaults_but_for_the_pattern() -> None:
    told = read_settings(GOOD)
    assert (told.count, told.every_s, told.falls, told.write_back) == (1_000, 3_600, "reset", False)
    assert (told.type, told.field, told.measure, told.dimension, told.events_url, told.ca_bundle) == (None,) * 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pattern", None),
        ("pattern", 5),
        ("pattern", "quota:*"),
        ("count", 0),
        ("count", 10_001),
        ("count", True),
        ("count", "100"),
        ("every_s", 59),
        ("every_s", 60.5),
        ("every_s", 604_801),
        ("field", ""),
        ("field", "a\x00"),
        ("type", "list"),
        ("falls", "down"),
        ("falls", ["reset"]),
        ("measure", "cents"),
        ("window", "year"),
        ("dimension", "User"),
        ("dimension", "x; drop table"),
        ("write_back", "yes"),
        ("write_back", 1),
        ("events_url", "ftp://host"),
        ("events_url", "https://user:word@host"),
        ("events_url", "https://[::1"),
        ("ca_bundle", 1),
        ("patern", "quota:{user}"),
    ],
)
def test_setting_that_cannot_be_is_refused_by_name(name, value) -> None:
    with pytest.raises(UsageError) as refused:
        RedisQuotaPoller().check_settings({**GOOD, name: value})
    assert refused.value.field == f"settings.{name}"
    assert refused.value.fix


@pytest.mark.parametrize("unit", [0, -1, "", "x", True, None, float("nan"), float("inf"), [1]])
def test_unit_that_is_no_number_above_zero_is_refused(unit) -> None:
    with pytest.raises(UsageError, match=r"settings\.unit"):
        read_settings({**GOOD, "unit": unit})


def test_unit_is_exact_however_it_is_written() -> None:
    assert [read_settings({**GOOD, "unit": unit}).unit for unit in (0.01, "0.01", 1)] == [Decimal("0.01")] * 2 + [1]


def test_comparison_with_the_ledger_needs_all_of_its_settings() -> None:
    with pytest.raises(UsageError, match=r"settings\.dimension"):
        read_settings({**GOOD, "measure": "requests"})
    with pytest.raises(UsageError, match=r"settings\.measure"):
        read_settings({**GOOD, "write_back": True})
    told = read_settings({**GOOD, "measure": "requests", "dimension": "user_id", "write_back": True})
    assert (told.measure, told.dimension, told.window, told.write_back) == ("requests", "user_id", "month", True)


def test_field_belongs_to_hashes() -> None:
    with pytest.raises(UsageError, match="name the field"):
        read_settings({**GOOD, "type": "hash"})
    with pytest.raises(UsageError, match="for hashes"):
        read_settings({**GOOD, "type": "string", "field": "used"})


@given(st.integers(-(10**40), 10**40), st.integers(0, 20))
def test_number_is_written_as_it_is_read(digits, places) -> None:
    """More digits than decimal's context would keep in any sum."""
    sign, figures, _ = Decimal(digits).as_tuple()
    value = Decimal((sign, figures, -places))
    if value and abs(value.adjusted()) > 30:
        return
    text = written(value)
    assert exact(text.encode()) == value
    assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", text), "INCR takes no exponent, and no fraction that says nothing"


@given(st.binary(max_size=70))
def test_any_bytes_are_a_finite_number_or_none(text) -> None:
    value = exact(text)
    assert value is None or value.is_finite()


def test_zero_is_zero_however_it_is_written() -> None:
    assert [str(exact(text)) for text in (b"0", b"-0", b"0.000", b"0e99")] == ["0"] * 4


def test_credential_that_cannot_be_typed_is_refused_before_anything_is_sent() -> None:
    RedisQuotaPoller().check_credential("")
    RedisQuotaPoller().check_credential("user:pass word")
    with pytest.raises(CredentialError):
        RedisQuotaPoller().check_credential("user:word\n")


async def _report(poller: Poller) -> None:
    await poller.totals(
        Target("redis_quota", "redis://h:6379/0", Secret("")), "quota", poller.grain("quota", {}), None, None
    )


@pytest.mark.anyio
async def test_counters_are_a_collection_and_no_report() -> None:
    poller: Poller = RedisQuotaPoller()
    collector: Collector = RedisQuotaPoller()
    assert collector is not None
    assert not poller.sources["quota"].is_report
    with pytest.raises(PermanentError, match="no report"):
        await _report(poller)
