"""What is special to OpenAI; the rest is in the conformance suite."""

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
    UsageError,
)
from daemon.domain.ports import Ladder
from daemon.domain.window import Width, Window, to_epoch
from daemon.pollers.openai import COSTS_KEY_FLOOR, OpenAIPoller
from tests.conformance.poller_cases import NOW, OPENAI, OURS, Script, openai_page

pytestmark = pytest.mark.anyio
BY_SOURCE = {case.source: case for case in OURS if case.poller is OPENAI}
COMPLETIONS = BY_SOURCE["completions"]
HOUR = timedelta(hours=1)


async def ask(case, window, *answers):
    script = Script(*(answers or [openai_page([], False, None)]))
    await case.poller.fetch(case.target, case.source, case.grain, window, script)
    return script


async def read_row(**fields):
    row = {**COMPLETIONS.row(1), **fields}
    page = openai_page([COMPLETIONS.bucket(COMPLETIONS.starts(1)[0], [row])], False, None)
    snapshot = await OPENAI.fetch(
        COMPLETIONS.target, "completions", COMPLETIONS.grain, COMPLETIONS.window(1), Script(page)
    )
    return snapshot.buckets[0].rows[0]


async def test_question_about_the_present_has_no_end():
    """A cursor is bound to its query, and an end in the future has been refused."""
    floor = Width.HOUR.floor(NOW)
    for end, is_sent in ((floor + HOUR, False), (floor + 5 * HOUR, False), (floor, True), (floor - HOUR, True)):
        script = await ask(COMPLETIONS, Window(floor - 3 * HOUR, end))
        query = dict(script.query(0))
        assert query.get("end_time") == (str(to_epoch(end)) if is_sent else None)
        assert query["start_time"] == str(to_epoch(floor - 3 * HOUR))
        assert query["bucket_width"] == "1h"


async def test_grouping_repeats_the_plain_key_and_limit_counts_buckets():
    script = await ask(COMPLETIONS, COMPLETIONS.window(24))
    query = script.query(0)
    groups = [value for name, value in query if name == "group_by"]
    assert groups == ["api_key_id", "batch", "model", "project_id", "service_tier", "user_id"]
    assert ("limit", "24") in query
    far = Window(NOW.replace(minute=0) - 400 * HOUR, NOW.replace(minute=0))
    assert ("limit", "168") in (await ask(COMPLETIONS, far)).query(0)
    costs = BY_SOURCE["costs"]
    days = Window(Width.DAY.floor(NOW) - timedelta(days=90), Width.DAY.floor(NOW))
    assert ("limit", "31") in (await ask(costs, days)).query(0)


async def test_pages_beyond_the_window_are_not_read():
    """Without an end the chain runs to the present; the first bucket past the window is where it stops."""
    first, second, third = COMPLETIONS.starts(3)
    page = openai_page([COMPLETIONS.bucket(first, [COMPLETIONS.row(1)]), COMPLETIONS.bucket(second, [])], True, "c1")
    unread = openai_page([COMPLETIONS.bucket(third, [])], True, "c2")
    script = await ask(COMPLETIONS, Window(first, second), page, unread)
    assert len(script.requests) == 1


async def test_costs_by_key_have_a_floor_and_without_it_have_none():
    costs = BY_SOURCE["costs"]
    before = Window(COSTS_KEY_FLOOR - timedelta(days=1), COSTS_KEY_FLOOR)
    with pytest.raises(HistoryFloorError) as caught:
        await ask(costs, before)
    assert caught.value.earliest == COSTS_KEY_FLOOR
    await ask(costs, Window(COSTS_KEY_FLOOR, COSTS_KEY_FLOOR + timedelta(days=1)))
    grain = OPENAI.grain("costs", {"group_by": {"costs": ["project_id", "line_item"]}})
    script = Script(openai_page([], False, None))
    await OPENAI.fetch(costs.target, "costs", grain, before, script)
    await OPENAI.totals(costs.target, "costs", costs.grain, before, script)
    assert len(script.requests) == 2


async def test_lookback_refusal_steps_forward_and_ends():
    refusal = {"error": {"message": "no", "type": "x", "param": "start_time", "code": "reporting_lookback_exceeded"}}

    async def floor_of(age):
        start = Width.HOUR.floor(NOW - age)
        answer = httpx.Response(400, json=refusal)
        with pytest.raises(BadRequestError) as caught:
            await ask(COMPLETIONS, Window(start, start + HOUR), answer)
        return getattr(caught.value, "earliest", None)

    assert await floor_of(timedelta(days=2000)) == Width.HOUR.ceil(NOW - timedelta(days=730))
    assert await floor_of(timedelta(days=730)) == Width.HOUR.ceil(NOW - timedelta(days=730))
    assert await floor_of(timedelta(days=100)) == Width.HOUR.ceil(NOW - timedelta(days=90))
    assert await floor_of(timedelta(days=3)) is None


async def test_other_refusal_is_left_as_it_is():
    error = {"error": {"message": "no", "type": "invalid_request_error", "param": "group_by", "code": None}}
    with pytest.raises(BadRequestError) as caught:
        await ask(COMPLETIONS, COMPLETIONS.window(1), httpx.Response(400, json=error))
    assert not isinstance(caught.value, HistoryFloorError)
    assert caught.value.param == "group_by"


async def test_bucket_may_call_its_rows_result():
    page = openai_page([COMPLETIONS.bucket(COMPLETIONS.starts(1)[0], [COMPLETIONS.row(1)])], False, None)
    bucket = page["data"][0]
    bucket["result"] = bucket.pop("results")
    snapshot = await OPENAI.fetch(
        COMPLETIONS.target, "completions", COMPLETIONS.grain, COMPLETIONS.window(1), Script(page)
    )
    assert len(snapshot.buckets[0].rows) == 1
    del bucket["result"]
    with pytest.raises(SchemaDriftError, match="neither results nor result"):
        await ask(COMPLETIONS, COMPLETIONS.window(1), page)


@pytest.mark.parametrize("start", [2**62, -(2**62), 10**30])
async def test_time_beyond_reason_is_drift(start):
    page = {"data": [{"start_time": start, "end_time": start + 3600, "results": []}], "has_more": False}
    with pytest.raises(SchemaDriftError):
        await ask(COMPLETIONS, COMPLETIONS.window(1), page)


async def test_rating_counts_do_not_overlap():
    row = await read_row(
        model="gpt-realtime",
        input_tokens=1000,
        input_cached_tokens=300,
        input_cache_write_tokens=50,
        input_audio_tokens=200,
        input_image_tokens=20,
        input_cached_audio_tokens=100,
        input_cached_image_tokens=10,
        output_tokens=90,
        output_audio_tokens=40,
    )
    counts = dict(row.rating.counts)
    assert counts == {
        "input": 430,
        "input_audio": 200,
        "input_image": 20,
        "cache_read": 190,
        "cache_audio_read": 100,
        "cache_image_read": 10,
        "cache_write": 50,
        "output": 50,
        "output_audio": 40,
    }
    assert sum(counts.values()) == row.input_tokens + row.output_tokens


@pytest.mark.parametrize("value", ["1", -1, 1.5, True, [], 2**63])
async def test_part_that_is_no_count_is_drift(value):
    with pytest.raises(SchemaDriftError, match="output_audio_tokens"):
        await read_row(output_audio_tokens=value)


async def test_part_larger_than_its_whole_never_counts_below_zero():
    row = await read_row(model="gpt-realtime", output_tokens=5, output_audio_tokens=8)
    assert dict(row.rating.counts)["output_audio"] == 8
    assert "output" not in dict(row.rating.counts)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, ()),
        ({"service_tier": "default"}, ()),
        ({"service_tier": "flex"}, (("service_tier", "flex"),)),
        ({"service_tier": "priority"}, (("service_tier", "priority"),)),
        ({"service_tier": "turbo"}, (("service_tier", "turbo"),)),
        ({"batch": True}, (("processing", "batch"),)),
        ({"batch": True, "service_tier": "default"}, (("processing", "batch"),)),
        ({"batch": False}, ()),
    ],
)
async def test_context_of_the_price(fields, context):
    assert (await read_row(model="gpt-5", **fields)).rating.context == context


async def test_row_without_a_model_has_no_price():
    assert (await read_row(model=None)).rating is None
    assert (await read_row(model="")).rating is None


async def test_emails_stay_out_of_the_dimensions():
    row = await read_row(user_email="a@example.com", organization_id="org-1")
    assert "a@example.com" not in str(row.dims)
    assert b"a@example.com" in row.detail


@pytest.mark.parametrize("key", ["sk-proj-abc", "sk-svcacct-abc", "sk-ant-admin01-abc", "sk-ant-api03-abc"])
def test_key_of_another_kind_is_named_and_not_shown(key):
    with pytest.raises(CredentialError, match="needed is an OpenAI admin key") as caught:
        OPENAI.check_credential(key)
    assert key not in str(caught.value)


def test_admin_key_passes():
    OPENAI.check_credential("sk-admin-abc")


async def test_identify_reads_the_header_and_forgives_a_gateway():
    def answer(**kwargs):
        return Script(httpx.Response(200, **kwargs))

    target = COMPLETIONS.target
    named = answer(json={"data": []}, headers={"OpenAI-Organization": "org-1"})
    assert await OPENAI.identify(target, named) == Identity("org-1")
    assert named.query(0) == [("limit", "1")]
    assert await OPENAI.identify(target, answer(json={"data": [{"organization_id": "org-2"}]})) == Identity("org-2")
    for refusal in (httpx.Response(404), httpx.Response(403), httpx.Response(200, content=b"[]")):
        gateway = Script(refusal, {"object": "page", "data": [], "has_more": False, "next_page": None})
        assert await OPENAI.identify(target, gateway) == Identity(None)
        assert gateway.requests[1].url.path.endswith("/organization/usage/completions")
    with pytest.raises(ForbiddenError):
        await OPENAI.identify(target, Script(httpx.Response(403)))
    with pytest.raises(BadRequestError):
        await OPENAI.identify(target, Script(httpx.Response(404)))
    with pytest.raises(SchemaDriftError):
        await OPENAI.identify(target, answer(content=b"<html>"))
    with pytest.raises(CredentialError):
        await OPENAI.identify(target, Script(httpx.Response(401)))


def test_sources_are_those_of_the_reference():
    sources = {name: spec for name, spec in OpenAIPoller.sources.items() if spec.is_report}
    assert len(sources) == 12
    assert {name for name, spec in sources.items() if spec.kind == "cost"} == {"costs"}
    assert {name for name, spec in sources.items() if spec.cadence == "tick"} == {"completions"}
    assert {name for name, spec in sources.items() if spec.is_level} == {"vector_stores"}
    assert sources["embeddings"].ladder == Ladder(3 * HOUR, 48 * HOUR, 168 * HOUR)
    assert all(OPENAI.grain(name, {}).width is (Width.DAY if name == "costs" else Width.HOUR) for name in sources)


def test_dimension_of_another_source_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"settings\.group_by\.costs: model: .*use some of .*line_item"):
        OPENAI.check_settings({"group_by": {"costs": ["model"]}})
    OPENAI.check_settings({"group_by": {"completions": ["api_source"], "costs": []}})


async def test_refund_is_a_negative_amount():
    costs = BY_SOURCE["costs"]
    row = costs.set_amount(costs.row(1), "-5.00")
    page = openai_page(
        [costs.bucket(costs.starts(1)[0], [{**row, "quantity": 1.5, "quantity_unit": "tokens"}])], False, None
    )
    snapshot = await OPENAI.fetch(costs.target, "costs", costs.grain, costs.window(1), Script(page))
    (got,) = snapshot.buckets[0].rows
    assert got.amount == Decimal(-5)
    assert got.quantity is None
    assert got.detail == b'{"quantity":1.5,"quantity_unit":"tokens"}'


def test_floor_day_is_the_documented_second():
    assert to_epoch(COSTS_KEY_FLOOR) == 1764979200
    assert datetime(2025, 12, 6, tzinfo=UTC) == COSTS_KEY_FLOOR
