"""OpenRouter's wire format: completed days, two bills in a row, gauges that are reset, and who may ask."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from tests.unit.simulator.conftest import Sim

pytestmark = pytest.mark.anyio

BASE = "/openrouter/api/v1/"
KEY = "sk-or-v1-test"
FIELDS = {
    "date", "model", "model_permaslug", "endpoint_id", "provider_name", "usage", "byok_usage_inference", "requests",
    "prompt_tokens", "completion_tokens", "reasoning_tokens", "cached_tokens",
}  # fmt: skip


@pytest.fixture
async def router(sim: Sim) -> Sim:
    sim.client.headers["authorization"] = f"Bearer {KEY}"
    await setup(sim)
    return sim


async def setup(sim: Sim, **profile: Any) -> None:
    shape = {"history_days": 40, "requests_per_hour": 4, **profile}
    await sim.control("POST", "orgs", {"provider": "openrouter", "key": KEY, "profile": shape})


async def ask(sim: Sim, path: str) -> Any:
    answer = await sim.client.get(BASE + path)
    assert answer.status_code == 200, answer.text
    return answer.json(parse_float=Decimal)


async def rows(sim: Sim, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await ask(sim, f"activity?{query}"))["data"]
    return found


async def scenario(sim: Sim, action: str, **more: Any) -> Any:
    return await sim.control("POST", "scenario", {"provider": "openrouter", "key": KEY, "action": action, **more})


async def truth(sim: Sim, source: str, **params: str) -> list[dict[str, Any]]:
    answer = await sim.client.get(
        "/_sim/truth", params={"provider": "openrouter", "key": KEY, "source": source, **params}
    )
    found: list[dict[str, Any]] = answer.json()["sources"][source]
    return found


async def test_rows_have_exactly_the_documented_fields(router: Sim) -> None:
    assert all(set(row) == FIELDS for row in await rows(router))
    assert all(set(row) == FIELDS | {"workspace_id"} for row in await rows(router, "group_by=workspace"))


async def test_the_last_thirty_completed_days_are_told_and_no_other(router: Sim) -> None:
    days = [row["date"] for row in await rows(router)]
    assert (days[0], days[-1], len(set(days))) == ("2026-11-21", "2026-10-23", 30)
    one = await rows(router, "date=2026-10-23")
    assert {row["date"] for row in one} == {"2026-10-23"}
    for outside in ("2026-11-22", "2026-10-22", "2026-11-23", "yesterday"):
        answer = await router.client.get(f"{BASE}activity?date={outside}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)


async def test_a_day_appears_with_midnight_and_goes_after_thirty(router: Sim) -> None:
    before = await rows(router)
    await router.control("POST", "advance", {"seconds": 14 * 3600})
    after = await rows(router)
    assert {row["date"] for row in after} - {row["date"] for row in before} == {"2026-11-22"}
    assert {row["date"] for row in before} - {row["date"] for row in after} == {"2026-10-23"}


async def test_own_keys_are_billed_by_the_vendor_beside_the_credits(router: Sim) -> None:
    found = await rows(router)
    assert any(row["byok_usage_inference"] for row in found)
    assert sum(row["usage"] for row in found) > 0
    bills = {
        billing: sum(Decimal(row["amount"]) for row in await truth(router, "costs", group_by="billing")
                     if row["dims"]["billing"] == billing and "2026-10-23" <= row["bucket_start"] < "2026-11-22")
        for billing in ("credits", "byok")
    }  # fmt: skip
    assert bills["credits"] == sum(row["usage"] for row in found)
    assert bills["byok"] == sum(row["byok_usage_inference"] for row in found)


async def test_workspaces_split_the_rows_and_filters_pick_from_them(router: Sim) -> None:
    whole, split = await rows(router), await rows(router, "group_by=workspace")
    assert len({row["workspace_id"] for row in split}) == 2
    for name in ("usage", "requests", "cached_tokens"):
        assert sum(row[name] for row in whole) == sum(row[name] for row in split)
    workspace = split[0]["workspace_id"]
    picked = await rows(router, f"workspace_id={workspace}")
    wanted = sum(row["requests"] for row in split if row["workspace_id"] == workspace)
    assert sum(row["requests"] for row in picked) == wanted
    assert (await router.client.get(f"{BASE}activity?workspace_id=else")).status_code == 404
    assert (await router.client.get(f"{BASE}activity?colour=red")).status_code == 400


async def test_a_replayed_answer_counts_more_cached_tokens_than_its_prompt_had(sim: Sim) -> None:
    sim.client.headers["authorization"] = f"Bearer {KEY}"
    await setup(sim, requests_per_hour=1, models=["deepseek/deepseek-chat-v3.1"], keys=12, projects=12, history_days=40)
    split = await rows(sim, "group_by=workspace")
    assert any(row["cached_tokens"] > row["prompt_tokens"] for row in split)
    assert all(row["usage"] >= 0 for row in split)


async def test_credits_grow_with_today_and_never_beyond_what_was_bought(router: Sim) -> None:
    first = (await ask(router, "credits"))["data"]
    added = await router.control("POST", "grow", {"provider": "openrouter", "key": KEY, "requests": 50})
    second = (await ask(router, "credits"))["data"]
    paid = second["total_usage"] - first["total_usage"]
    assert 0 < paid <= Decimal(added["added"]["costs"]["amount"])  # which has the vendor's bill in it as well
    assert second["total_credits"] > second["total_usage"]


async def test_gauges_of_the_keys_add_up_to_the_credits_and_are_reset(router: Sim) -> None:
    spaces = [space["id"] for space in (await ask(router, "workspaces"))["data"]]
    keys = [key for space in spaces for key in (await ask(router, f"keys?workspace_id={space}"))["data"]]
    assert len(keys) == 4
    used = (await ask(router, "credits"))["data"]["total_usage"]
    assert sum(key["usage"] for key in keys) == used
    for key in keys:
        assert key["usage"] >= key["usage_monthly"] >= key["usage_weekly"] >= key["usage_daily"]
    await router.control("POST", "advance", {"seconds": 14 * 3600})  # a Monday begins
    later = (await ask(router, f"keys/{keys[0]['hash']}"))["data"]
    assert later["usage_daily"] == later["usage_weekly"] < keys[0]["usage_weekly"]


async def test_keys_are_those_of_the_default_workspace_in_pages_and_without_the_deleted(sim: Sim) -> None:
    sim.client.headers["authorization"] = f"Bearer {KEY}"
    await setup(sim, keys=205, projects=1, history_days=1, requests_per_hour=100)
    pages = [(await ask(sim, f"keys?offset={offset}"))["data"] for offset in (0, 100, 200, 300)]
    assert [len(page) for page in pages] == [100, 100, 5, 0]
    first = pages[0][0]["hash"]
    await scenario(sim, "rename", id=first, value="robot")
    assert (await ask(sim, f"keys/{first}"))["data"]["name"] == "robot"
    await scenario(sim, "delete", id=first)
    assert first not in {key["hash"] for key in (await ask(sim, "keys"))["data"]}
    assert (await sim.client.get(f"{BASE}keys/{first}")).status_code == 404
    assert await rows(sim, f"api_key_hash={first}"), "what it used stays"


async def test_keys_of_another_workspace_are_told_when_it_is_named(router: Sim) -> None:
    spaces = [space["id"] for space in (await ask(router, "workspaces"))["data"]]
    default = {key["hash"] for key in (await ask(router, "keys"))["data"]}
    other = {key["hash"] for key in (await ask(router, f"keys?workspace_id={spaces[1]}"))["data"]}
    assert default
    assert other
    assert not default & other


@pytest.mark.parametrize(("key", "status"), [("", 401), ("sk-abc", 401), ("sk-or-v1-noscope", 403)])
async def test_only_management_keys_see_reports(sim: Sim, key: str, status: int) -> None:
    for path in ("activity", "credits", "keys", "workspaces"):
        answer = await sim.client.get(BASE + path, headers={"authorization": f"Bearer {key}".strip()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    if status == 403:
        answer = await sim.client.get(BASE + "key", headers={"authorization": f"Bearer {key}".strip()})
        assert answer.json()["data"]["is_management_key"] is False


async def test_the_key_says_what_it_is_and_whose(router: Sim) -> None:
    told = (await ask(router, "key"))["data"]
    assert told["is_management_key"] is True
    answer = await router.client.get("/_sim/truth", params={"provider": "openrouter", "key": KEY})
    assert answer.json()["org_id"] == told["organization_id"]


@pytest.mark.parametrize("status", ["401", "403", "408", "429", "500", "503", "529"])
async def test_errors_have_its_shape(router: Sim, status: str) -> None:
    await router.fault(status, provider="openrouter")
    answer = await router.client.get(BASE + "activity")
    assert answer.status_code == int(status)
    assert set(answer.json()["error"]) == {"code", "message"}
    assert answer.json()["error"]["code"] == int(status)


async def test_money_and_fields_bend_on_request(router: Sim) -> None:
    plain = await rows(router, "date=2026-11-21")
    await scenario(router, "money_format", format="string")
    texts = await rows(router, "date=2026-11-21")
    assert [Decimal(row["usage"]) for row in texts] == [row["usage"] for row in plain]
    await scenario(router, "money_format", format="exponent")
    assert b"E-" in (await router.client.get(BASE + "activity")).content.upper()
    await scenario(router, "money_format")
    await scenario(router, "duplicate_rows")
    twice = await rows(router, "date=2026-11-21")
    assert len(twice) == 2 * len(plain)
    assert sum(row["usage"] for row in twice) == sum(row["usage"] for row in plain)
    await scenario(router, "missing_optional_fields")
    assert all("cached_tokens" not in row for row in await rows(router))


async def test_late_requests_restate_a_completed_day(sim: Sim) -> None:
    sim.client.headers["authorization"] = f"Bearer {KEY}"
    await setup(sim, late_s=2 * 86400, requests_per_hour=10, history_days=3)
    await sim.control("POST", "advance", {"seconds": 86400})
    young = await rows(sim, "date=2026-11-22")
    await sim.control("POST", "advance", {"seconds": 2 * 86400})
    settled = await rows(sim, "date=2026-11-22")
    assert sum(row["requests"] for row in young) < sum(row["requests"] for row in settled)
