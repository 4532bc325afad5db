"""What providers do to history, as a client sees it on the wire."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

import pytest

from daemon.simulator.registry import SERVICES
from tests.unit.simulator.conftest import Sim, at

pytestmark = pytest.mark.anyio

HOUR = "2026-11-22T09:00:00Z"
REPORTS = {
    "openai": f"/v1/organization/usage/completions?start_time={at(HOUR)}&bucket_width=1h&limit=1"
    "&group_by=model&group_by=api_key_id&group_by=user_id&group_by=project_id&group_by=batch&group_by=service_tier",
    "anthropic": f"/v1/organizations/usage_report/messages?starting_at={HOUR}&bucket_width=1h&limit=1"
    "&group_by[]=model&group_by[]=api_key_id&group_by[]=workspace_id&group_by[]=service_tier&group_by[]=account_id",
}
COSTS = {
    "openai": f"/v1/organization/costs?start_time={at('2026-11-22T00:00:00Z')}&limit=1&group_by=line_item",
    "anthropic": "/v1/organizations/cost_report?starting_at=2026-11-21T00:00:00Z&group_by[]=description",
}
both = pytest.mark.parametrize("provider", ["openai", "anthropic"])


async def rows(sim: Sim, provider: str) -> list[dict[str, Any]]:
    return (await sim.json(REPORTS[provider]))["data"][0]["results"]


async def bill(sim: Sim, provider: str) -> Decimal:
    data = await sim.chain(COSTS[provider])
    amounts = [row["amount"] for bucket in data for row in bucket["results"]]
    return sum((Decimal(each["value"] if isinstance(each, dict) else each) for each in amounts), Decimal(0))


def output(found: list[dict[str, Any]]) -> int:
    return sum(row["output_tokens"] for row in found)


def anonymous(found: list[dict[str, Any]], dim: str) -> Counter[str]:
    return Counter(str({**row, dim: "*"}) for row in found)


@both
async def test_the_open_bucket_grows(sim: Sim, provider: str) -> None:
    key = "sk-admin-test" if provider == "openai" else "sk-ant-admin01-test"
    before = await sim.truth(provider)
    grown = await sim.control("POST", "grow", {"provider": provider, "key": key, "requests": 12})
    after = await sim.truth(provider)
    assert grown["added"]
    for name, found in before.items():
        added = grown["added"].get(name, {})
        for measure in ("input_tokens", "cache_read_tokens", "output_tokens", "requests", "amount"):
            old, new = (sum(Decimal(row[measure] or 0) for row in each) for each in (found, after[name]))
            assert new - old == Decimal(added.get(measure) or 0)


async def test_growth_is_no_edit_and_survives_a_restore(sim: Sim) -> None:
    org = {"provider": "openai", "key": "sk-admin-test"}
    await sim.scenario("openai", "vanish_row", bucket=HOUR)
    before = await sim.truth("openai", source="costs", group_by="")
    added = [(await sim.control("POST", "grow", {**org, "requests": 3}))["added"] for _ in range(20)]
    restored = await sim.scenario("openai", "restore")
    assert restored["bucket_start"] == HOUR
    await sim.scenario("openai", "vanish_row", bucket=HOUR)
    after = await sim.truth("openai", source="costs", group_by="")
    old, new = (sum(Decimal(row["amount"]) for row in each["costs"]) for each in (before, after))
    assert new - old == sum(Decimal(each["costs"]["amount"]) for each in added)


@both
async def test_a_late_arrival_adds_to_a_closed_bucket(sim: Sim, provider: str) -> None:
    before, paid = await rows(sim, provider), await bill(sim, provider)
    told = await sim.scenario(provider, "late_arrival", tokens=123_456)
    after = await rows(sim, provider)
    assert told["bucket_start"] == HOUR
    assert output(after) > output(before)
    assert await bill(sim, provider) > paid


@both
async def test_corrections_go_both_ways_and_restore_brings_back_the_first_state(sim: Sim, provider: str) -> None:
    first, paid = await rows(sim, provider), await bill(sim, provider)
    down = await sim.scenario(provider, "correction_down", bucket=HOUR)
    lower = await rows(sim, provider)
    assert output(lower) < output(first)
    assert await bill(sim, provider) < paid
    assert down["before"]
    assert down["after"]
    await sim.scenario(provider, "restore")
    assert await rows(sim, provider) == first
    await sim.scenario(provider, "correction_up", bucket=HOUR)
    assert output(await rows(sim, provider)) > output(first)


@both
async def test_rows_and_buckets_vanish_and_come_back(sim: Sim, provider: str) -> None:
    first = await rows(sim, provider)
    told = await sim.scenario(provider, "vanish_row", bucket=HOUR)
    fewer = await rows(sim, provider)
    assert len(fewer) == len(first) - 1
    assert any(row["source"] in {"completions", "messages"} for row in told["before"])
    await sim.scenario(provider, "vanish_bucket", bucket=HOUR)
    report = await sim.json(REPORTS[provider])
    assert report["data"][0]["results"] == []  # the bucket is listed, empty
    await sim.scenario(provider, "restore")
    await sim.scenario(provider, "restore")
    assert await rows(sim, provider) == first


async def test_a_bucket_without_rows_is_absent_in_analytics(sim: Sim) -> None:
    query = f"/v1/organizations/analytics/usage?starting_at={HOUR}&ending_at=2026-11-22T10:00:00Z&time_bucket_width=1h"
    assert len((await sim.json(query))["data"]) == 1
    await sim.scenario("anthropic", "vanish_bucket", bucket=HOUR)
    assert (await sim.json(query))["data"] == []


@both
async def test_null_becomes_a_value_and_the_total_stays(sim: Sim, provider: str) -> None:
    await sim.scenario(provider, "late_arrival", set={"api_key_id": None})
    before, paid = await rows(sim, provider), await bill(sim, provider)
    await sim.scenario(provider, "attribute", bucket=HOUR, dim="api_key_id", value="key_found")
    after = await rows(sim, provider)
    assert [row["api_key_id"] for row in after].count("key_found") == 1
    assert anonymous(after, "api_key_id") == anonymous(before, "api_key_id")
    assert await bill(sim, provider) == paid


@both
async def test_a_model_is_relabelled_throughout_history(sim: Sim, provider: str) -> None:
    name = "completions" if provider == "openai" else "messages"
    before = (await sim.truth(provider, source=name))[name]
    old = next(row["dims"]["model"] for row in before if row["bucket_start"] == HOUR)
    await sim.scenario(provider, "relabel_model", where={"model": old}, value="renamed-model")
    after = (await sim.truth(provider, source=name))[name]
    assert old not in {row["dims"]["model"] for row in after}
    count = sum(row["dims"]["model"] == old for row in before)
    assert sum(row["dims"]["model"] == "renamed-model" for row in after) == count > 1
    assert sum(row["output_tokens"] for row in after) == sum(row["output_tokens"] for row in before)


@both
async def test_two_rows_of_a_bucket_have_equal_amounts(sim: Sim, provider: str) -> None:
    told = await sim.scenario(provider, "equal_amounts")
    pair = [row for row in told["after"] if row["source"] in {"completions", "messages"}]
    keys = {row["dims"]["api_key_id"] for row in pair}
    values = [{name: value for name, value in row.items() if name != "dims"} for row in pair]
    assert len(keys) == 2
    assert values[0] == values[1]


@both
async def test_rows_come_twice_and_still_add_up(sim: Sim, provider: str) -> None:
    first, paid = await rows(sim, provider), await bill(sim, provider)
    await sim.scenario(provider, "duplicate_rows")
    twice = await rows(sim, provider)
    assert len(twice) == 2 * len(first)
    assert output(twice) == output(first)
    assert await bill(sim, provider) == paid
    await sim.scenario(provider, "duplicate_rows", enabled=False)
    assert await rows(sim, provider) == first


@both
async def test_optional_fields_go_missing_and_unknown_ones_appear(sim: Sim, provider: str) -> None:
    full = (await rows(sim, provider))[0]
    await sim.scenario(provider, "missing_optional_fields")
    lean = (await rows(sim, provider))[0]
    assert set(lean) < set(full)
    assert all(lean[name] == full[name] for name in lean)
    await sim.scenario(provider, "unknown_fields")
    assert set((await rows(sim, provider))[0]) - set(full)


@both
@pytest.mark.parametrize(
    ("action", "dim", "written"),
    [("new_enum_value", "service_tier", "novel"), ("unpriced_model", "model", "unpriced")],
)
async def test_values_nobody_knows_appear_and_cost_money(
    sim: Sim, provider: str, action: str, dim: str, written: str
) -> None:
    paid = await bill(sim, provider)
    await sim.scenario(provider, action)
    assert getattr(SERVICES[provider].vendor, written)[dim] in {row[dim] for row in await rows(sim, provider)}
    assert await bill(sim, provider) > paid


@both
async def test_hostile_text_arrives_as_json_escapes_it(sim: Sim, provider: str) -> None:
    await sim.scenario(provider, "hostile_text")
    answer = await sim.get(REPORTS[provider])
    assert b"\\u0000" in answer.content
    await sim.scenario(provider, "hostile_text", value="x" * 200_000)
    assert max(len(row["model"]) for row in await rows(sim, provider)) == 200_000


@pytest.mark.parametrize(
    ("style", "text"), [("number", b'"value":0.'), ("string", b'"value":"0.'), ("exponent", b"e-")]
)
async def test_money_keeps_its_value_in_every_spelling(sim: Sim, style: str, text: bytes) -> None:
    paid = await bill(sim, "openai")
    await sim.scenario("openai", "money_format", format=style)
    answer = await sim.get(COSTS["openai"])
    assert text in answer.content
    assert await bill(sim, "openai") == paid
    if style == "string":
        assert max(len(row["amount"]["value"]) for row in answer.json()["data"][0]["results"]) >= 40


async def test_money_is_zero_and_negative_too(sim: Sim) -> None:
    await sim.scenario("openai", "negative_credit", bucket="2026-11-22T00:00:00Z")
    await sim.scenario("openai", "late_arrival", source="moderations")
    lines = (await sim.json(COSTS["openai"]))["data"][0]["results"]
    amounts = {row["line_item"]: Decimal(row["amount"]["value"]) for row in lines}
    assert amounts["credit grant"] == -5
    assert amounts["omni-moderation-latest, input"] == 0
    paid = await bill(sim, "anthropic")
    await sim.scenario("anthropic", "negative_credit")
    assert await bill(sim, "anthropic") == paid - 500  # cents


async def test_the_bill_alone_can_be_corrected(sim: Sim) -> None:
    usage, paid = await rows(sim, "openai"), await bill(sim, "openai")
    await sim.scenario("openai", "correction_down", source="costs", bucket="2026-11-22T00:00:00Z")
    assert await bill(sim, "openai") < paid
    assert await rows(sim, "openai") == usage
    await sim.scenario("openai", "vanish_bucket", source="costs", bucket="2026-11-22T00:00:00Z")
    assert await bill(sim, "openai") == 0
    await sim.scenario("openai", "restore")
    await sim.scenario("openai", "restore")
    assert await bill(sim, "openai") == paid
