"""What is special to OpenRouter; the rest is in the conformance suite."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest

from daemon.domain.connection import Identity
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    HistoryFloorError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.record import totals_of
from daemon.domain.window import Width, Window
from daemon.pollers.openrouter import HISTORY_DAYS, OpenRouterPoller
from daemon.records.normalize import merge
from daemon.records.price import Pricer
from daemon.testing.poller_cases import NOW, Script
from tests.conformance.gateway_cases import CASES, OPENROUTER, activity_page

pytestmark = pytest.mark.anyio
BY_SOURCE = {case.source: case for case in CASES if case.poller is OPENROUTER}
ACTIVITY, COSTS = BY_SOURCE["activity"], BY_SOURCE["costs"]
TODAY = Width.DAY.floor(NOW)
DAY = timedelta(days=1)


async def fetch(case, window, *answers, group_by=None):
    script = Script(*(answers or [{"data": []}]))
    settings = {} if group_by is None else {"group_by": {case.source: group_by}}
    case.poller.check_settings(settings)
    grain = case.poller.grain(case.source, settings)
    return await case.poller.fetch(case.target, case.source, grain, window, script), script


async def rows_of(case, *rows):
    start = case.starts(1)[0]
    snapshot, _ = await fetch(case, case.window(1), activity_page([case.bucket(start, list(rows))], False, None))
    return snapshot.buckets[0].rows


# ── Windows ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", [ACTIVITY, COSTS], ids=lambda case: case.source)
async def test_a_day_that_is_not_over_is_not_covered(case):
    """It is never reported, so that nothing is known of it: an empty bucket would be a claim."""
    page = activity_page([case.bucket(TODAY - DAY, [case.row(1)])], False, None)
    snapshot, _ = await fetch(case, Window(TODAY - DAY, TODAY + DAY), page)
    assert snapshot.window == Window(TODAY - DAY, TODAY)
    snapshot, script = await fetch(case, Window(TODAY, TODAY + DAY))
    assert snapshot.window == Window(TODAY, TODAY)
    assert (snapshot.buckets, script.requests) == ((), [])


async def test_one_day_is_asked_for_by_its_date_and_several_without():
    _, script = await fetch(ACTIVITY, Window(TODAY - DAY, TODAY + DAY))
    assert script.query(0) == [("date", "2026-11-21")]
    _, script = await fetch(ACTIVITY, Window(TODAY - 3 * DAY, TODAY))
    assert script.query(0) == []


async def test_history_has_a_floor_of_thirty_completed_days():
    floor = TODAY - HISTORY_DAYS * DAY
    with pytest.raises(HistoryFloorError) as refused:
        await fetch(ACTIVITY, Window(floor - DAY, floor + DAY))
    assert refused.value.earliest == floor
    snapshot, _ = await fetch(ACTIVITY, Window(floor, TODAY))
    assert snapshot.window == Window(floor, TODAY)


@pytest.mark.parametrize("text", ["2026-11-21", "2026-11-21 00:00:00", "2026-11-21T00:00:00Z"])
async def test_a_date_with_midnight_behind_it_is_a_date(text):
    snapshot, _ = await fetch(ACTIVITY, ACTIVITY.window(1), {"data": [{"date": text, **ACTIVITY.row(1)}]})
    assert [bucket.start for bucket in snapshot.buckets] == [TODAY - DAY]


@pytest.mark.parametrize("text", ["2026-11-21 07:00:00", "yesterday", "", None, 20261121, "2026-13-01"])
async def test_what_is_no_day_is_drift(text):
    with pytest.raises(SchemaDriftError):
        await fetch(ACTIVITY, ACTIVITY.window(1), {"data": [{"date": text, **ACTIVITY.row(1)}]})


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


async def test_own_key_s_spend_is_a_row_of_its_own_that_names_the_vendor():
    """It is on the vendor's bill: added to the credits, or to the vendor's own report, it would count twice."""
    credits_row, own = await rows_of(COSTS, {**COSTS.row(1), "usage": 0.05, "byok_usage_inference": 1.5})
    assert dict(credits_row.dims)["billing"] == "credits"
    assert dict(credits_row.dims)["upstream"] is None
    assert credits_row.amount == Decimal("0.05")
    assert dict(own.dims)["billing"] == "byok"
    assert dict(own.dims)["upstream"] == "openai"
    assert (own.amount, own.currency) == (Decimal("1.5"), "USD")
    assert OPENROUTER.sources["costs"].upstream == "upstream"


@pytest.mark.parametrize(
    ("called", "ours"),
    [
        ("OpenAI", "openai"),
        ("Anthropic", "anthropic"),
        ("Azure", "azure"),
        ("Amazon Bedrock", "bedrock"),
        ("Google", "vertex"),
        ("Google AI Studio", "gemini"),
        ("Z.AI", "z-ai"),
        ("Some New Vendor", "some-new-vendor"),
        ("月之暗面", "月之暗面"),
        (None, None),
        ("", None),
    ],
)
async def test_vendors_bear_our_names(called, ours):
    _, own = await rows_of(COSTS, {**COSTS.row(1), "provider_name": called, "byok_usage_inference": 1})
    assert dict(own.dims)["upstream"] == ours


async def test_two_bills_of_one_row_never_merge():
    rows = merge(await rows_of(COSTS, *[{**COSTS.row(1), "usage": 1, "byok_usage_inference": 2}] * 2))
    assert sorted(row.amount for row in rows) == [2, 4]


async def test_negative_and_absent_own_key_amounts():
    for value, amounts in ((None, [1.25]), (0, [1.25]), (-0.5, [1.25, -0.5])):
        rows = await rows_of(COSTS, {**COSTS.row(1), "byok_usage_inference": value})
        assert [float(row.amount) for row in rows] == amounts
    with pytest.raises(SchemaDriftError):
        await rows_of(COSTS, {**COSTS.row(1), "byok_usage_inference": "free"})


async def test_more_cached_than_prompt_tokens_are_kept_as_sent():
    (row,) = await rows_of(ACTIVITY, {**ACTIVITY.row(1), "prompt_tokens": 10, "cached_tokens": 400})
    assert (row.input_tokens, row.cache_read_tokens) == (10, 400)
    assert dict(row.rating.counts) == {"cache_read": 400, "output": 7}


async def test_usage_is_priced_by_the_gateway_s_list():
    (row,) = await rows_of(ACTIVITY, ACTIVITY.row(1))
    assert (row.rating.provider, row.rating.model) == ("openrouter", "openai/gpt-4.1-2025-04-14")
    priced = Pricer().price(row.rating, NOW)
    # 60 input at 2, 40 cached at 0.5 and 7 output at 8 dollars a million.
    assert priced.amount == Decimal("0.000196")


async def test_neither_source_shows_what_is_the_other_s():
    (usage,) = await rows_of(ACTIVITY, {**ACTIVITY.row(1), "byok_usage_inference": 1})
    (cost,) = await rows_of(COSTS, COSTS.row(1))
    assert usage.amount is None
    assert usage.detail == b'{"reasoning_tokens":2}'
    assert (cost.requests, cost.input_tokens, cost.detail) == (None, None, b"{}")


async def test_workspaces_are_asked_for_and_cut_by():
    page = {"data": [{"date": "2026-11-21", "workspace_id": f"w{n}", **ACTIVITY.row(1)} for n in (1, 2)]}
    snapshot, script = await fetch(ACTIVITY, ACTIVITY.window(1), page, group_by=["model", "workspace_id"])
    assert ("group_by", "workspace") in script.query(0)
    assert [row.dims for row in snapshot.buckets[0].rows] == [
        (("model", "openai/gpt-4.1"), ("workspace_id", f"w{n}")) for n in (1, 2)
    ]


async def test_fewer_dimensions_add_up_to_the_same():
    rows = [ACTIVITY.row(n) for n in range(5)]
    page = activity_page([ACTIVITY.bucket(TODAY - DAY, rows)], False, None)
    full, _ = await fetch(ACTIVITY, ACTIVITY.window(1), page)
    less, _ = await fetch(ACTIVITY, ACTIVITY.window(1), page, group_by=["model"])
    (row,) = merge(less.buckets[0].rows)
    assert totals_of((row,)) == totals_of(full.buckets[0].rows)
    assert row.detail == b'{"reasoning_tokens":10}'


# ── Keys and probes ─────────────────────────────────────────────────────────────────────────────


async def identify(*answers):
    script = Script(*answers)
    return await OPENROUTER.identify(ACTIVITY.target, script), script


@pytest.mark.parametrize("flag", ["is_management_key", "is_provisioning_key"])
async def test_management_key_names_its_organisation_or_its_owner(flag):
    identity, script = await identify({"data": {flag: True, "organization_id": "org_1", "creator_user_id": "u_1"}})
    assert identity == Identity("org_1")
    assert [request.url.path for request in script.requests] == ["/key"]
    identity, _ = await identify({"data": {flag: True, "organization_id": None, "creator_user_id": "u_1"}})
    assert identity == Identity("u_1")


async def test_inference_key_is_refused_with_what_is_needed():
    with pytest.raises(CredentialError, match="management key, made under"):
        await identify(
            {"data": {"is_management_key": False, "is_provisioning_key": False, "label": "sk-or-v1-0e6...1c9"}}
        )


async def test_gateway_without_the_key_s_endpoint_is_proved_by_its_credits():
    used = {"data": {"total_credits": 1, "total_usage": 0.5}}
    identity, script = await identify(httpx.Response(404, json={"error": {"code": 404, "message": "no"}}), used)
    assert identity == Identity(None)
    assert [request.url.path for request in script.requests] == ["/key", "/credits"]
    with pytest.raises(BadRequestError):
        await identify(httpx.Response(404))
    with pytest.raises(UpstreamUnavailableError):
        await identify(httpx.Response(502))


async def digest(used, now=NOW):
    poller = OpenRouterPoller(now=lambda: now)
    script = Script(b'{"data":{"total_credits":100,"total_usage":%b}}' % used)
    return (await poller.probe(ACTIVITY.target, "activity", ACTIVITY.grain, ACTIVITY.window(1), script)).digest


async def test_probe_tells_what_was_used_and_which_day_is_complete():
    first = await digest(b"1.5")
    assert first == await digest(b"1.50") == await digest(b'"1.5"') == await digest(b"1.5", NOW + timedelta(hours=13))
    assert first != await digest(b"1.5000000000000001")
    assert first != await digest(b"1.5", datetime(2026, 11, 23, tzinfo=UTC))


@pytest.mark.parametrize("used", [b"null", b"true", b'"much"', b"{}", b"NaN"])
async def test_credits_without_an_amount_are_drift(used):
    with pytest.raises(SchemaDriftError):
        await digest(used)


@pytest.mark.parametrize("key", ["sk-admin-1", "sk-proj-1", "sk-ant-admin01-1"])
def test_keys_of_others_are_refused(key):
    with pytest.raises(CredentialError, match="OpenRouter management key"):
        OPENROUTER.check_credential(key)
    OPENROUTER.check_credential("sk-or-v1-0123")
