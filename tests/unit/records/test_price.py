"""Prices by rates, held against the price list's own calculation of single requests."""

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from genai_prices import Usage, calc_price
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.domain.record import Rating
from daemon.records.price import UNPRICED, Pricer

AT = datetime(2026, 11, 20, 10, tzinfo=UTC)
PRICER = Pricer()


def rating(model, counts, provider="openai", context=(), is_long=None):
    return Rating(provider, model, context, tuple(counts.items()), is_long)


def reference(model, usage, provider="openai", context=None):
    calculation = calc_price(
        Usage(**usage), model, provider_id=provider, genai_request_timestamp=AT, price_context=context
    )
    return calculation.total_price


tokens = st.integers(min_value=1, max_value=90_000)


@settings(max_examples=60, deadline=None)
@given(
    uncached=tokens,
    read=tokens,
    output=tokens,
    model=st.sampled_from(["gpt-4o-2024-08-06", "gpt-5-2025-08-07", "gpt-4.1-mini", "o3"]),
    context=st.sampled_from(
        [(), (("service_tier", "flex"),), (("service_tier", "priority"),), (("processing", "batch"),)]
    ),
)
def test_equals_the_list_for_one_request_of_openai(uncached, read, output, model, context):
    ours = PRICER.price(rating(model, {"input": uncached, "cache_read": read, "output": output}, context=context), AT)
    usage = {"input_tokens": uncached + read, "cache_read_tokens": read, "output_tokens": output}
    assert ours.amount == reference(model, usage, context=dict(context))


@settings(max_examples=60, deadline=None)
@given(
    uncached=tokens,
    read=tokens,
    short=tokens,
    hour=tokens,
    output=tokens,
    searches=st.integers(min_value=0, max_value=50),
    model=st.sampled_from(["claude-opus-4-1-20250805", "claude-3-5-haiku-20241022"]),
    context=st.sampled_from([(), (("processing", "batch"),)]),
)
def test_equals_the_list_for_one_request_of_anthropic(uncached, read, short, hour, output, searches, model, context):
    counts = {
        "input": uncached,
        "cache_read": read,
        "cache_write": short,
        "cache_write_1h": hour,
        "output": output,
        "web_search": searches,
    }
    ours = PRICER.price(rating(model, counts, "anthropic", context), AT)
    usage = {
        "input_tokens": uncached + read + short + hour,
        "cache_read_tokens": read,
        "cache_write_tokens": short + hour,
        "cache_write_5m_tokens": short,
        "cache_write_1h_tokens": hour,
        "output_tokens": output,
        "web_searches": searches,
    }
    assert ours.amount == reference(model, usage, "anthropic", dict(context))


def test_audio_and_image_classes_equal_the_list():
    counts = {
        "input": 1_000,
        "cache_read": 200,
        "input_audio": 300,
        "input_image": 70,
        "cache_audio_read": 40,
        "output": 500,
        "output_audio": 60,
    }
    usage = {
        "input_tokens": 1_610,
        "cache_read_tokens": 240,
        "input_audio_tokens": 340,
        "input_image_tokens": 70,
        "cache_audio_read_tokens": 40,
        "cache_image_read_tokens": 0,
        "output_tokens": 560,
        "output_audio_tokens": 60,
    }
    assert PRICER.price(rating("gpt-realtime", counts), AT).amount == reference("gpt-realtime", usage)


@pytest.mark.parametrize(
    ("provider", "model"), [("openai", "gpt-5.5"), ("anthropic", "claude-sonnet-4-5-20250929"), ("openai", "gpt-6-sol")]
)
def test_a_bucket_of_short_requests_does_not_trip_the_long_context_tier(provider, model):
    """A thousand requests of 1 k + 100 sum to what the list prices as one request of a million."""
    one = reference(model, {"input_tokens": 1_000, "output_tokens": 100}, provider)
    summed = reference(model, {"input_tokens": 1_000_000, "output_tokens": 100_000}, provider)
    ours = PRICER.price(rating(model, {"input": 1_000_000, "output": 100_000}, provider), AT)
    assert ours.amount == 1_000 * one
    assert summed > Decimal("1.5") * ours.amount
    assert ours.is_estimate


def test_context_window_names_the_tier():
    counts = {"input": 300_000, "output": 1_000}
    model = "claude-sonnet-4-5-20250929"
    short = PRICER.price(rating(model, counts, "anthropic", is_long=False), AT)
    long = PRICER.price(rating(model, counts, "anthropic", is_long=True), AT)
    assert long.amount == reference(model, {"input_tokens": 300_000, "output_tokens": 1_000}, "anthropic")
    assert short.amount == 300 * reference(model, {"input_tokens": 1_000}, "anthropic") + reference(
        model, {"output_tokens": 1_000}, "anthropic"
    )
    assert not short.is_estimate
    assert not long.is_estimate


def test_a_context_window_that_does_not_decide_the_tier_leaves_an_estimate():
    assert PRICER.price(rating("gpt-5.5", {"input": 1}, is_long=True), AT).is_estimate
    assert PRICER.price(rating("claude-haiku-5-5", {"input": 1}, "anthropic", is_long=False), AT).is_estimate


def test_unknown_model_is_unpriced_never_zero():
    for unknown in (rating("gpt-99-imaginary", {"input": 5}), rating("gpt-5", {"input": 5}, provider="nobody")):
        priced = PRICER.price(unknown, AT)
        assert priced == (None, False, UNPRICED)


@pytest.mark.parametrize("model", ["tts-1", "whisper-1"])
def test_model_billed_in_another_unit_is_unpriced(model):
    assert PRICER.price(rating(model, {"input": 1_000}), AT).amount is None


def test_model_billed_by_characters_or_seconds_is_priced_by_them():
    assert PRICER.price(rating("tts-1", {"input_characters": 2_000}), AT).amount == Decimal("0.03")
    assert PRICER.price(rating("whisper-1", {"input_audio_seconds": 3_600}), AT).amount == Decimal("0.36")


def test_moderation_is_known_to_be_free():
    priced = PRICER.price(rating("omni-moderation-2024-09-26", {"input": 1_000}), AT)
    assert priced.amount == 0
    assert priced.rate_version.startswith("genai-prices ")


def test_unknown_tier_is_the_standard_price_and_says_so():
    standard = PRICER.price(rating("gpt-5", {"input": 1_000}), AT)
    scale = PRICER.price(rating("gpt-5", {"input": 1_000}, context=(("service_tier", "scale"),)), AT)
    assert scale.amount == standard.amount
    assert scale.is_estimate
    assert not standard.is_estimate


def test_tier_before_its_price_was_known_is_an_estimate():
    flex = rating("gpt-5", {"input": 1_000}, context=(("service_tier", "flex"),))
    assert not PRICER.price(flex, AT).is_estimate
    assert PRICER.price(flex, datetime(2026, 10, 1, tzinfo=UTC)).is_estimate


def test_price_is_that_of_its_day():
    o3 = rating("o3", {"input": 10_000})
    assert PRICER.price(o3, datetime(2025, 5, 1, tzinfo=UTC)).amount > PRICER.price(o3, AT).amount


def test_huge_counts_stay_exact():
    counts = {"input": 2**63 - 1, "output": 2**63 - 1}
    exact = (Decimal("1.25") + Decimal(10)) * (2**63 - 1)
    assert PRICER.price(rating("gpt-5", counts), AT).amount * 1_000_000 == exact
