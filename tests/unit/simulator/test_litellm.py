"""LiteLLM's wire format: logs by page, days by row, names, and whose key it takes."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from tests.unit.simulator.conftest import Sim, instant

pytestmark = pytest.mark.anyio

BASE = "/litellm"
KEY = "sk-test"
FIRST, LAST = "2026-11-20 00:00:00", "2026-11-22 23:59:59"


@pytest.fixture
async def proxy(sim: Sim) -> Sim:
    sim.client.headers["authorization"] = f"Bearer {KEY}"
    return sim


async def setup(sim: Sim, **profile: Any) -> None:
    await sim.control("POST", "orgs", {"provider": "litellm", "key": KEY, "profile": profile})


async def ask(sim: Sim, path: str, **params: object) -> Any:
    answer = await sim.client.get(BASE + path, params={name: str(value) for name, value in params.items()})
    assert answer.status_code == 200, answer.text
    return answer.json(parse_float=Decimal)


async def page(sim: Sim, **params: object) -> Any:
    return await ask(sim, "/spend/logs/v2", **{"start_date": FIRST, "end_date": LAST, **params})


async def logs(sim: Sim, **params: object) -> list[dict[str, Any]]:
    """All pages, as they come."""
    found: list[dict[str, Any]] = []
    number, total = 1, 1
    while number <= total:
        told = await page(sim, page=number, **params)
        found += told["data"]
        number, total = number + 1, told["total_pages"]
    return found


async def test_pages_are_counted_and_newest_first_unless_asked_otherwise(proxy: Sim) -> None:
    told = await page(proxy)
    assert (told["page"], told["page_size"], len(told["data"]), told["total_is_capped"]) == (1, 50, 50, False)
    assert told["total_pages"] == -(-told["total"] // 50)
    newest = [log["startTime"] for log in await logs(proxy)]
    oldest = [log["startTime"] for log in await logs(proxy, sort_by="startTime", sort_order="asc", page_size=7)]
    assert newest == sorted(newest, reverse=True)
    assert oldest == sorted(oldest)
    assert sorted(newest) == oldest
    spends = [log["spend"] for log in await logs(proxy, sort_by="spend")]
    assert spends == sorted(spends, reverse=True)


async def test_every_log_is_one_request_with_an_id_of_its_own(proxy: Sim) -> None:
    found = await logs(proxy)
    assert len({log["request_id"] for log in found}) == len(found) > 100
    for log in found:
        read = log["metadata"]["additional_usage_values"].get("cache_read_input_tokens", 0)
        written = log["metadata"]["additional_usage_values"].get("cache_creation_input_tokens", 0)
        assert log["prompt_tokens"] >= read + written
        assert log["total_tokens"] == log["prompt_tokens"] + log["completion_tokens"]
        assert instant(log["endTime"]) >= instant(log["startTime"])
        assert len(log["api_key"]) == 64
    assert {log["custom_llm_provider"] for log in found} == {"openai", "azure", "anthropic", "gemini", ""}
    failed = [log for log in found if log["status"] == "failure"]
    assert failed
    assert all((log["spend"], log["total_tokens"], log["custom_llm_provider"]) == (0, 0, "") for log in failed)


async def test_both_ends_of_a_range_belong_to_it(proxy: Sim) -> None:
    """A log on the very second is told by both of two ranges that meet there."""
    at = next(log["startTime"] for log in await logs(proxy) if ".000" in log["startTime"])
    second = at[:19].replace("T", " ")
    before = await page(proxy, end_date=second, page_size=1000)
    after = await page(proxy, start_date=second, page_size=1000)
    both = {log["request_id"] for log in before["data"]} & {log["request_id"] for log in after["data"]}
    assert len(both) == 1
    assert before["total"] + after["total"] == (await page(proxy))["total"] + 1


async def test_a_log_is_written_a_minute_after_its_request(proxy: Sim) -> None:
    await setup(proxy, history_days=0, requests_per_hour=3600)
    await page(proxy)  # the organisation begins to live
    await proxy.control("POST", "advance", {"seconds": 1800})
    newest = (await page(proxy, page_size=1))["data"][0]
    assert instant("2026-11-22T10:48:00Z") < instant(newest["startTime"]) <= instant("2026-11-22T10:49:01Z")


async def test_pages_shift_while_logs_arrive_but_not_those_of_the_oldest(proxy: Sim) -> None:
    for order, is_shifted in (("desc", True), ("asc", False)):
        first = await page(proxy, sort_order=order, page_size=20)
        await proxy.control("POST", "grow", {"provider": "litellm", "key": KEY, "requests": 3})
        second = await page(proxy, sort_order=order, page_size=20, page=2)
        again = {log["request_id"] for log in first["data"]} & {log["request_id"] for log in second["data"]}
        assert bool(again) is is_shifted


async def test_no_more_than_ten_thousand_logs_are_counted(proxy: Sim) -> None:
    await setup(proxy, requests_per_hour=300, history_days=2)
    told = await page(proxy, page_size=1000)
    assert (told["total"], told["total_pages"], told["total_is_capped"]) == (10_000, 10, True)
    assert len((await page(proxy, page_size=1000, page=11))["data"]) == 1000, "what is not counted is served"


@pytest.mark.parametrize(
    ("profile", "size", "status"), [({}, 1001, 422), ({"page_rows_max": 100}, 101, 422), ({}, 0, 422)]
)
async def test_pages_have_a_largest_size_by_release(
    proxy: Sim, profile: dict[str, int], size: int, status: int
) -> None:
    await setup(proxy, **profile)
    answer = await proxy.client.get(
        f"{BASE}/spend/logs/v2", params={"start_date": FIRST, "end_date": LAST, "page_size": size}
    )
    assert answer.status_code == status
    assert answer.json()["detail"][0]["loc"] == ["query", "page_size"]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"start_date": FIRST},
        {"start_date": "2026-11-20T00:00:00Z", "end_date": LAST},
        {"start_date": FIRST, "end_date": LAST, "sort_by": "colour"},
        {"start_date": FIRST, "end_date": LAST, "sort_order": "up"},
        {"start_date": FIRST, "end_date": LAST, "colour": "red"},
    ],
)
async def test_what_the_rules_forbid_is_a_400(proxy: Sim, params: dict[str, str]) -> None:
    answer = await proxy.client.get(f"{BASE}/spend/logs/v2", params=params)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "400"


async def test_days_add_up_to_their_logs_however_they_are_cut(proxy: Sim) -> None:
    told = await ask(proxy, "/user/daily/activity", start_date="2026-11-20", end_date="2026-11-22", page_size=1000)
    found = await logs(proxy)
    assert [day["date"] for day in told["results"]] == ["2026-11-22", "2026-11-21", "2026-11-20"]
    for day in told["results"]:
        of_day = [log for log in found if log["startTime"][:10] == day["date"]]
        metrics = day["metrics"]
        assert metrics["spend"] == sum(log["spend"] for log in of_day)
        assert metrics["prompt_tokens"] == sum(log["prompt_tokens"] for log in of_day)
        assert metrics["api_requests"] == len(of_day) == metrics["successful_requests"] + metrics["failed_requests"]
        for cut in ("models", "model_groups", "providers", "api_keys"):
            cells = day["breakdown"][cut].values()
            assert sum(cell["metrics"]["spend"] for cell in cells) == metrics["spend"]
        for cell in day["breakdown"]["providers"].values():
            keys = cell["api_key_breakdown"].values()
            assert sum(key["metrics"]["spend"] for key in keys) == cell["metrics"]["spend"]
        assert "unknown" in day["breakdown"]["providers"], "what failed went to nobody"
    assert told["metadata"]["total_spend"] == sum(day["metrics"]["spend"] for day in told["results"])
    assert told["metadata"]["has_more"] is False


async def test_a_page_of_days_is_a_page_of_rows_and_its_totals_are_its_own(proxy: Sim) -> None:
    whole = await ask(proxy, "/user/daily/activity", start_date="2026-11-20", end_date="2026-11-22", page_size=1000)
    spend, number, days = Decimal(0), 1, []
    while True:
        told = await ask(
            proxy, "/user/daily/activity", start_date="2026-11-20", end_date="2026-11-22", page_size=10, page=number
        )
        assert told["metadata"]["total_spend"] == sum(day["metrics"]["spend"] for day in told["results"])
        spend += told["metadata"]["total_spend"]
        days += [day["date"] for day in told["results"]]
        number += 1
        if not told["metadata"]["has_more"]:
            break
    assert number - 1 == told["metadata"]["total_pages"] > 3
    assert len(days) > len(set(days)), "a day is split between two pages"
    assert spend == whole["metadata"]["total_spend"]


async def test_a_flat_fee_is_in_no_log_and_in_no_cut(proxy: Sim) -> None:
    asked = {"provider": "litellm", "key": KEY, "action": "negative_credit"}
    await proxy.control("POST", "scenario", asked)
    told = await ask(proxy, "/user/daily/activity", start_date="2026-11-21", end_date="2026-11-21", page_size=1000)
    (day,) = told["results"]
    assert day["metrics"]["flat_cost"] == -5
    for cut in ("models", "providers", "api_keys"):
        assert not any(cell["metrics"]["flat_cost"] for cell in day["breakdown"][cut].values())


async def test_a_correction_changes_the_log_that_is_there(proxy: Sim) -> None:
    before = {log["request_id"]: log for log in await logs(proxy)}
    await proxy.control("POST", "scenario", {"provider": "litellm", "key": KEY, "action": "correction_up"})
    after = {log["request_id"]: log for log in await logs(proxy)}
    assert set(before) == set(after)
    (changed,) = [name for name in before if before[name] != after[name]]
    assert after[changed]["spend"] > before[changed]["spend"]


async def test_names_are_listed_in_pages_and_what_was_deleted_apart(proxy: Sim) -> None:
    hashes = (await ask(proxy, "/key/list"))["keys"]
    assert len(hashes) == 4
    await proxy.control("POST", "scenario", {"provider": "litellm", "key": KEY, "action": "delete", "id": hashes[0]})
    rename = {"provider": "litellm", "key": KEY, "action": "rename", "id": hashes[1], "value": "robot"}
    await proxy.control("POST", "scenario", rename)
    kept = await ask(proxy, "/key/list", return_full_object="true", size=2)
    assert (kept["total_count"], kept["total_pages"], len(kept["keys"])) == (3, 2, 2)
    assert kept["keys"][0]["key_alias"] == "robot"
    gone = await ask(proxy, "/key/list", status="deleted", return_full_object="true")
    assert [key["token"] for key in gone["keys"]] == [hashes[0]]
    assert {user["user_id"] for user in (await ask(proxy, "/user/list"))["users"]} == {
        log["user"] for log in await logs(proxy)
    } - {"default_user_id"}
    teams = await ask(proxy, "/team/list")
    assert (await ask(proxy, "/v2/team/list", page_size=1, page=2))["teams"] == teams[1:2]
    assert {team["team_id"] for team in teams} >= {log["team_id"] for log in await logs(proxy)} - {None}


@pytest.mark.parametrize(
    ("key", "statuses"), [("", [401, 401, 401]), ("abc", [401, 401, 401]), ("sk-noscope", [401, 403, 403])]
)
async def test_only_the_master_key_sees_all(sim: Sim, key: str, statuses: list[int]) -> None:
    headers = {"authorization": f"Bearer {key}".strip()}
    paths = (f"/spend/logs/v2?start_date={FIRST}&end_date={LAST}", "/key/list", "/user/list")
    assert [(await sim.client.get(BASE + path, headers=headers)).status_code for path in paths] == statuses
    assert (await sim.client.get(BASE + "/health/liveliness", headers=headers)).json() == "I'm alive!"


@pytest.mark.parametrize("status", ["401", "403", "408", "429", "500", "503"])
async def test_errors_have_its_shape(proxy: Sim, status: str) -> None:
    await proxy.fault(status, provider="litellm")
    answer = await proxy.client.get(BASE + "/key/list")
    assert answer.status_code == int(status)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == status


async def test_a_chain_that_ends_early_looks_whole(proxy: Sim) -> None:
    whole = await page(proxy)
    await proxy.fault("truncated_chain", provider="litellm")
    cut = await page(proxy)
    assert (cut["total_pages"], cut["total"]) == (1, len(cut["data"]))
    assert whole["total"] > cut["total"]
