"""What is special to Anthropic; the rest is in the conformance suite."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest

from daemon.domain.connection import Identity
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    ForbiddenError,
    HistoryFloorError,
    SchemaDriftError,
    UpstreamUnavailableError,
    UsageError,
)
from daemon.domain.window import Width, Window, rfc3339
from daemon.records.normalize import merge
from daemon.records.price import Pricer
from tests.conformance.poller_cases import ANALYTICS, ANTHROPIC, NOW, OURS, Script, anthropic_error, reports_page

pytestmark = pytest.mark.anyio
BY_ID = {case.id: case for case in OURS if case.poller is ANTHROPIC}
MESSAGES, COST = BY_ID["anthropic-reports-messages"], BY_ID["anthropic-reports-cost"]
FLAT, FLAT_COST = BY_ID["anthropic-analytics-messages"], BY_ID["anthropic-analytics-cost"]
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


async def ask(case, window, *answers, settings=None):
    script = Script(*(answers or [case.page([], False, None)]))
    grain = ANTHROPIC.grain(case.source, case.settings | (settings or {}))
    return script, await ANTHROPIC.fetch(case.target, case.source, grain, window, script)


async def read_row(case, **fields):
    page = case.page([case.bucket(case.starts(1)[0], [{**case.row(1), **fields}])], False, None)
    _, snapshot = await ask(case, case.window(1), page)
    return snapshot.buckets[0].rows[0]


async def test_question_pins_its_version_and_key_header():
    script, _ = await ask(MESSAGES, MESSAGES.window(2))
    headers = script.requests[0].headers
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["x-api-key"] == "key-of-the-test"
    assert "anthropic-beta" not in headers
    script, _ = await ask(FLAT, FLAT.window(2))
    assert script.requests[0].headers["anthropic-beta"] == "analytics-usage-cost-2026-08-24"
    script, _ = await ask(MESSAGES, MESSAGES.window(2), settings={"group_by": {"messages": ["model", "speed"]}})
    assert script.requests[0].headers["anthropic-beta"] == "fast-mode-2026-02-01"
    assert [pair for pair in script.query(0) if pair[0] == "group_by[]"] == [
        ("group_by[]", "model"),
        ("group_by[]", "speed"),
    ]


async def test_end_leaves_room_for_either_reading_of_exclusive():
    """`buckets that end before` may leave out the last one: a bucket more is asked for, and dropped."""
    floor = Width.HOUR.floor(NOW)
    script, _ = await ask(MESSAGES, Window(floor - 5 * HOUR, floor - 3 * HOUR))
    assert dict(script.query(0))["ending_at"] == rfc3339(floor - 2 * HOUR)
    assert dict(script.query(0))["limit"] == "3"
    script, _ = await ask(MESSAGES, Window(floor - 5 * HOUR, floor + HOUR))
    assert "ending_at" not in dict(script.query(0))


async def test_cost_of_today_is_asked_from_yesterday_and_kept_to_the_window():
    today = Width.DAY.floor(NOW)
    page = reports_page([COST.bucket(day, [COST.row(1)]) for day in (today - DAY, today)], False, None)
    script, snapshot = await ask(COST, Window(today, today + DAY), page)
    assert dict(script.query(0))["starting_at"] == rfc3339(today - DAY)
    assert snapshot.window == Window(today, today + DAY)
    assert [bucket.start for bucket in snapshot.buckets] == [today]


async def test_too_many_rows_are_asked_for_again_in_halves():
    limits = []

    def capped(request):
        limits.append(int(request.url.params["limit"]))
        if limits[-1] > 3:
            return httpx.Response(400, json=anthropic_error("invalid_request_error"))
        return httpx.Response(200, json=MESSAGES.page([MESSAGES.bucket(MESSAGES.starts(1)[0], [])], False, None))

    await ask(MESSAGES, MESSAGES.window(23), capped)
    assert limits == [24, 12, 6, 3]
    limits.clear()
    with pytest.raises(BadRequestError) as caught:
        await ask(MESSAGES, MESSAGES.window(23), httpx.Response(400, json=anthropic_error("invalid_request_error")))
    assert caught.value.code == "invalid_request_error"


async def test_cap_met_in_the_middle_starts_the_chain_again():
    first, second = MESSAGES.starts(2)
    one = MESSAGES.page([MESSAGES.bucket(first, [MESSAGES.row(1)])], True, "c1")
    two = MESSAGES.page([MESSAGES.bucket(second, [MESSAGES.row(1)])], False, None)
    refused = httpx.Response(400, json=anthropic_error("invalid_request_error"))
    script, snapshot = await ask(MESSAGES, MESSAGES.window(2), one, refused, one, two)
    assert [dict(script.query(n))["limit"] for n in range(4)] == ["3", "3", "1", "1"]
    assert "page" not in dict(script.query(2))
    assert [len(bucket.rows) for bucket in snapshot.buckets] == [1, 1]
    assert snapshot.pages == 2


async def test_cache_writes_are_priced_by_their_lifetime():
    """There is no flat field for cache writes; who looks for one prices them at zero."""
    row = await read_row(MESSAGES, model="claude-opus-4-1-20250805")
    assert row.cache_write_tokens == 10
    assert dict(row.rating.counts) == {
        "input": 50,
        "cache_read": 40,
        "cache_write": 6,
        "cache_write_1h": 4,
        "output": 7,
        "web_search": 2,
    }
    priced = Pricer().price(row.rating, NOW)
    per_token = (50 * 15 + 40 * Decimal("1.5") + 6 * Decimal("18.75") + 4 * 30 + 7 * 75) / Decimal(1_000_000)
    assert priced.amount == per_token + Decimal("0.02")


async def test_unknown_lifetime_of_a_cache_write_is_input_all_the_same():
    row = await read_row(MESSAGES, cache_creation={"ephemeral_5m_input_tokens": 6, "ephemeral_24h_input_tokens": 5})
    assert row.cache_write_tokens == 11
    assert row.input_tokens == 50 + 40 + 11
    assert row.detail == b'{"cache_creation.ephemeral_24h_input_tokens":5}'


@pytest.mark.parametrize(
    ("fields", "context", "is_long"),
    [
        ({}, (), None),
        ({"service_tier": "standard", "inference_geo": "not_available", "context_window": "0-200k"}, (), False),
        ({"service_tier": "batch", "context_window": "200k-1M"}, (("processing", "batch"),), True),
        ({"service_tier": "priority"}, (("service_tier", "priority"),), None),
        ({"inference_geo": "us"}, (("inference_geo", "us"),), None),
        ({"context_window": "1M-2M"}, (), None),
    ],
)
async def test_context_of_the_price(fields, context, is_long):
    rating = (await read_row(MESSAGES, model="claude-sonnet-4-5-20250929", **fields)).rating
    assert (rating.context, rating.is_long) == (context, is_long)


async def test_description_is_a_key_and_what_it_says_is_detail():
    row = await read_row(COST, description="Claude, input: hit", cost_type="tokens", model="claude-x", token_type=None)
    assert row.dims == (("currency", "USD"), ("description", "Claude, input: hit"), ("workspace_id", "w1"))
    assert row.detail == b'{"cost_type":"tokens","model":"claude-x"}'
    assert row.rating is None


async def test_list_amounts_are_dollars_too_and_add_up():
    page = FLAT_COST.page(
        [FLAT_COST.bucket(FLAT_COST.starts(1)[0], [{**FLAT_COST.row(1), "list_amount": "250.5"}] * 2)], False, None
    )
    _, snapshot = await ask(FLAT_COST, FLAT_COST.window(1), page)
    (row,) = merge(snapshot.buckets[0].rows)
    assert row.amount == Decimal("2.5")
    assert row.detail == b'{"list_amount":5.010}'


async def test_analytics_reads_in_the_order_of_time():
    window = FLAT.window(3)
    script, _ = await ask(FLAT, window)
    query = dict(script.query(0))
    assert (query["order_by"], query["order"], query["limit"]) == ("time", "asc", "1000")
    assert (query["starting_at"], query["ending_at"]) == (rfc3339(window.start), rfc3339(window.end))
    assert query["time_bucket_width"] == "1h"


async def test_fetch_tells_the_digest_that_a_probe_of_its_data_would():
    page = FLAT.page([FLAT.bucket(FLAT.starts(1)[0], [FLAT.row(1)])], False, None)
    probe = await ANTHROPIC.probe(FLAT.target, "messages", FLAT.grain, FLAT.window(1), Script(page))
    _, snapshot = await ask(FLAT, FLAT.window(1), page)
    assert snapshot.digest == probe.digest == b"2026-11-22T10:18:00Z"
    _, snapshot = await ask(FLAT, FLAT.window(1), page | {"data_refreshed_at": None})
    assert snapshot.digest is None


async def test_report_refreshed_between_its_pages_is_read_again_later():
    """Fresh data re-ranks the rows of a bucket: one may have moved to a page that was read already."""
    first, second = FLAT.starts(2)
    one = FLAT.page([FLAT.bucket(first, [FLAT.row(1)])], True, "c1")
    two = FLAT.page([FLAT.bucket(second, [FLAT.row(1)])], False, None) | {"data_refreshed_at": "2026-11-22T10:19:00Z"}
    with pytest.raises(UpstreamUnavailableError, match="refreshed"):
        await ask(FLAT, FLAT.window(2), one, two)


async def test_row_met_again_on_a_later_page_has_moved_unless_a_stamp_says_otherwise():
    """What fell from page to page is counted twice, and what rose in its place was missed: all of it is read again."""
    (start,) = FLAT.starts(1)
    pages = [
        FLAT.page([FLAT.bucket(start, [FLAT.row(1), FLAT.row(2)])], True, "c1"),
        FLAT.page([FLAT.bucket(start, [FLAT.row(3)])], True, "c2"),
        FLAT.page([FLAT.bucket(start, [FLAT.row(1)])], False, None),
    ]
    _, snapshot = await ask(FLAT, FLAT.window(1), *pages)
    assert sorted(row.requests for row in merge(snapshot.buckets[0].rows)) == [3, 3, 6]
    unstamped = [page | {"data_refreshed_at": None} for page in pages]
    with pytest.raises(UpstreamUnavailableError, match="moved"):
        await ask(FLAT, FLAT.window(1), *unstamped)
    apart = FLAT.page([FLAT.bucket(start, [FLAT.row(4)])], False, None) | {"data_refreshed_at": None}
    _, snapshot = await ask(FLAT, FLAT.window(1), *unstamped[:2], apart)
    assert [row.requests for row in snapshot.buckets[0].rows] == [3, 3, 3, 3]


async def test_rows_of_one_page_are_summed_also_without_a_stamp():
    rows = [FLAT.row(1), FLAT.row(1)]
    page = FLAT.page([FLAT.bucket(FLAT.starts(1)[0], rows)], False, None) | {"data_refreshed_at": None}
    _, snapshot = await ask(FLAT, FLAT.window(1), page)
    assert [row.requests for row in merge(snapshot.buckets[0].rows)] == [6]


async def test_analytics_reaches_back_a_year_and_not_before_2026():
    window = Window(datetime(2025, 12, 31, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC))
    with pytest.raises(HistoryFloorError) as caught:
        await ask(FLAT, window)
    assert caught.value.earliest == datetime(2026, 1, 1, tzinfo=UTC)


async def test_probe_without_a_stamp_compares_totals():
    page = FLAT.page([FLAT.bucket(FLAT.starts(1)[0], [FLAT.row(1)])], False, None) | {"data_refreshed_at": None}
    probe = await ANTHROPIC.probe(FLAT.target, "messages", FLAT.grain, FLAT.window(1), Script(page))
    assert probe.digest is None
    assert set(probe.totals) == set(FLAT.starts(1))


async def test_probe_by_stamp_asks_for_one_row():
    script = Script(FLAT.page([], False, None))
    probe = await ANTHROPIC.probe(FLAT.target, "messages", FLAT.grain, FLAT.window(1), script)
    assert probe.digest == b"2026-11-22T10:18:00Z"
    assert dict(script.query(0))["limit"] == "1"


@pytest.mark.parametrize("case", [MESSAGES, FLAT], ids=lambda case: case.id)
async def test_time_without_a_zone_is_drift(case):
    page = case.page([case.bucket(case.starts(1)[0], [case.row(1)])], False, None)
    page["data"][0]["starting_at"] = page["data"][0]["starting_at"].rstrip("Z")
    with pytest.raises(SchemaDriftError):
        await ask(case, case.window(1), page)


def test_generation_is_part_of_the_grain():
    assert ANTHROPIC.grain("messages", {}).api == "reports"
    assert ANTHROPIC.grain("messages", ANALYTICS).api == "analytics"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api": "v3"}, "settings.api.*reports or analytics"),
        ({"api": "analytics", "group_by": {"messages": ["rbac_group_id"]}}, "overlap"),
        ({"group_by": {"cost": ["api_key_id"]}}, "workspace_id"),
        (
            {
                "api": "analytics",
                "group_by": {"messages": ["model", "actor", "speed", "product", "session_id", "workspace_id"]},
            },
            "more than 5",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        ANTHROPIC.check_settings(settings)


def test_cost_types_do_not_count_towards_five():
    five = ["model", "actor", "speed", "product", "workspace_id"]
    ANTHROPIC.check_settings({"api": "analytics", "group_by": {"cost": [*five, "cost_type", "token_type"]}})


@pytest.mark.parametrize("key", ["sk-ant-api03-abc", "sk-admin-abc", "sk-proj-abc", "sk-or-v1-abc"])
def test_key_of_another_kind_is_named_and_not_shown(key):
    with pytest.raises(CredentialError, match="needed is an Anthropic Admin key") as caught:
        ANTHROPIC.check_credential(key)
    assert key not in str(caught.value)


async def test_identify_falls_back_to_a_request_that_proves_the_key():
    me = Script(httpx.Response(200, json={"id": "org_1", "type": "organization", "name": "Acme"}))
    assert await ANTHROPIC.identify(MESSAGES.target, me) == Identity("org_1", "Acme")
    for refusal in (httpx.Response(404), httpx.Response(403), httpx.Response(200, content=b"[]")):
        gateway = Script(refusal, {"data": [], "has_more": False, "next_page": None})
        assert await ANTHROPIC.identify(MESSAGES.target, gateway) == Identity(None)
        assert gateway.requests[1].url.path == "/v1/organizations/usage_report/messages"
    with pytest.raises(ForbiddenError):
        await ANTHROPIC.identify(MESSAGES.target, Script(httpx.Response(403)))
    with pytest.raises(CredentialError):
        await ANTHROPIC.identify(MESSAGES.target, Script(httpx.Response(404), httpx.Response(401)))
