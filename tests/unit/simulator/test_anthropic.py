"""Anthropic's wire format: snapping, limits, versions, both generations of reports."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from anthropic.types.beta.beta_organization import BetaOrganization
from anthropic.types.beta.organization.analytics.beta_analytics_cost_item import BetaAnalyticsCostItem
from anthropic.types.beta.organization.analytics.beta_analytics_usage_item import BetaAnalyticsUsageItem
from anthropic.types.beta.organization.beta_api_key import BetaAPIKey
from anthropic.types.beta.organization.beta_organization_user import BetaOrganizationUser
from anthropic.types.beta.organization.beta_workspace import BetaWorkspace

from tests.unit.simulator.conftest import ANTHROPIC_HEADERS, Sim

pytestmark = pytest.mark.anyio

BASE = "/anthropic/v1/organizations/"
USAGE = BASE + "usage_report/messages?starting_at=2026-11-20T00:00:00Z"
COST = BASE + "cost_report?starting_at=2026-11-20T00:00:00Z"
ANALYTICS = BASE + "analytics/{}?starting_at=2026-11-20T00:00:00Z&ending_at=2026-11-23T00:00:00Z&time_bucket_width=1d"
GROUPS = "&group_by[]=actor&group_by[]=model&group_by[]=workspace_id&group_by[]=service_tier&group_by[]=inference_geo"


async def test_analytics_rows_validate_strictly_against_the_official_sdk(sim: Sim) -> None:
    for name, model, extra in (
        ("usage", BetaAnalyticsUsageItem, ""),
        ("cost", BetaAnalyticsCostItem, "&group_by[]=token_type&group_by[]=cost_type"),
    ):
        body = await sim.json(ANALYTICS.format(name) + GROUPS + extra + "&limit=1000")
        assert len(body["data"]) > 10
        assert body["data_refreshed_at"] == "2026-11-22T10:20:00Z"
        for row in body["data"]:
            model.model_validate(row)
    BetaOrganization.model_validate(await sim.json(BASE + "me"))
    BetaOrganizationUser.model_validate((await sim.json(BASE + "users?limit=1"))["data"][0])


async def test_legacy_rows_have_exactly_the_documented_fields(sim: Sim) -> None:
    row = (await sim.json(USAGE + "&group_by[]=model"))["data"][0]["results"][0]
    assert set(row) == {
        "uncached_input_tokens", "cache_read_input_tokens", "cache_creation", "output_tokens", "server_tool_use",
        "api_key_id", "workspace_id", "model", "service_tier", "context_window", "inference_geo", "account_id",
        "service_account_id",
    }  # fmt: skip
    assert set(row["cache_creation"]) == {"ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"}
    cost = (await sim.json(COST + "&group_by[]=description"))["data"][0]["results"]
    assert set(cost[0]) == {
        "currency", "amount", "workspace_id", "description", "cost_type", "model", "service_tier", "token_type",
        "context_window", "inference_geo",
    }  # fmt: skip
    assert all(isinstance(line["amount"], str) and Decimal(line["amount"]) > 0 for line in cost)


async def test_an_unaligned_start_snaps_down(sim: Sim) -> None:
    aligned = await sim.json(BASE + "usage_report/messages?starting_at=2026-11-20T09:00:00Z&bucket_width=1h")
    odd = await sim.json(BASE + "usage_report/messages?starting_at=2026-11-20T10:59:59%2B01:00&bucket_width=1h")
    assert odd["data"] == aligned["data"]
    assert odd["data"][0]["starting_at"] == "2026-11-20T09:00:00Z"


@pytest.mark.parametrize(
    "query",
    [
        USAGE + "&bucket_width=1h&limit=169",
        USAGE + "&limit=32",
        USAGE + "&group_by[]=description",
        USAGE + "&colour=red",
        COST + "&limit=32",
        COST + "&bucket_width=1h",
        COST + "&group_by[]=api_key_id",
        BASE + "cost_report?starting_at=2026-11-22T00:00:00Z",
        BASE + "usage_report/messages?starting_at=2026-11-22T00:00:00",
        BASE + "usage_report/messages",
        BASE + "usage_report/claude_code?starting_at=2026-11-22T00:00:00Z",
        BASE + "analytics/usage?starting_at=2025-12-31T00:00:00Z",
        BASE + "analytics/usage?starting_at=2026-11-22T00:00:00Z&time_bucket_width=1h",
        BASE + "analytics/usage?starting_at=2026-10-01T00:00:00Z&ending_at=2026-11-02T00:00:00Z",
        BASE + "analytics/usage?starting_at=2026-11-20T00:00:00Z&ending_at=2026-11-21T00:01:00Z&time_bucket_width=1m",
        ANALYTICS.format("usage") + GROUPS + "&group_by[]=speed",
        ANALYTICS.format("usage") + "&group_by[]=token_type",
        ANALYTICS.format("usage") + "&order_by=amount",
        ANALYTICS.format("usage") + "&limit=1001",
    ],
)
async def test_what_the_rules_forbid_is_a_400(sim: Sim, query: str) -> None:
    answer = await sim.get(query)
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert body["request_id"] == answer.headers["request-id"]


async def test_headers_are_required(sim: Sim) -> None:
    for path, missing in (
        (USAGE, "anthropic-version"),
        (ANALYTICS.format("usage"), "anthropic-beta"),
        (USAGE + "&group_by[]=speed", "anthropic-beta"),
    ):
        headers = {name: value for name, value in ANTHROPIC_HEADERS.items() if name != missing}
        answer = await sim.client.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), path


@pytest.mark.parametrize(
    ("headers", "status", "kind"),
    [
        ({}, 401, "authentication_error"),
        ({"x-api-key": "sk-ant-api03-x"}, 401, "authentication_error"),
        ({"x-api-key": "sk-ant-admin01-noscope"}, 403, "permission_error"),
        ({"authorization": "Bearer sk-ant-admin01-test"}, 200, None),
    ],
)
async def test_only_admin_keys_get_in(sim: Sim, headers: dict[str, str], status: int, kind: str | None) -> None:
    answer = await sim.client.get(USAGE, headers={"anthropic-version": "2023-06-01", **headers})
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("type") == kind


async def test_a_cursor_belongs_to_its_query(sim: Sim) -> None:
    for first, other in ((USAGE + "&limit=1", USAGE + "&limit=2"), (COST + "&limit=1", USAGE + "&limit=1")):
        cursor = (await sim.json(first))["next_page"]
        assert (await sim.get(f"{first}&page={cursor}")).status_code == 200
        assert (await sim.get(f"{other}&page={cursor}")).status_code == 400


async def test_too_many_rows_are_refused_until_the_limit_is_halved(sim: Sim) -> None:
    profile = {"requests_per_hour": 8, "row_cap": 60}
    await sim.control("POST", "orgs", {"provider": "anthropic", "key": "sk-ant-admin01-test", "profile": profile})
    query = USAGE + "&bucket_width=1h&group_by[]=model&group_by[]=api_key_id&limit={}"
    assert (await sim.get(query.format(24))).status_code == 400
    assert (await sim.get(query.format(6))).status_code == 200


async def test_the_default_workspace_is_null_in_one_generation_and_tagged_in_the_other(sim: Sim) -> None:
    legacy = await sim.chain(USAGE + "&group_by[]=workspace_id")
    flat = await sim.chain(ANALYTICS.format("usage") + "&group_by[]=workspace_id")
    assert None in {row["workspace_id"] for bucket in legacy for row in bucket["results"]}
    assert None not in {row["group"]["workspace_id"] for row in flat}
    assert len({row["group"]["workspace_id"] for row in flat}) == 2


async def test_analytics_rank_rows_and_count_them(sim: Sim) -> None:
    query = ANALYTICS.format("usage") + "&group_by[]=model&group_by[]=api_key_id&limit=7"
    ranked = await sim.chain(query)
    sizes = [row["usage"]["total_tokens"] for row in ranked]
    assert sizes == sorted(sizes, reverse=True)
    assert len((await sim.json(query))["data"]) == 7
    timed = await sim.chain(query + "&order_by=time&order=asc")
    keys = [(row["starting_at"], -row["usage"]["total_tokens"]) for row in timed]
    assert keys == sorted(keys)
    assert sorted(map(str, timed)) == sorted(map(str, ranked))
    fanned = await sim.json(ANALYTICS.format("cost") + "&group_by[]=model&group_by[]=token_type&limit=2")
    assert len(fanned["data"]) > 2
    assert len({(row["starting_at"], row["group"]["model"]) for row in fanned["data"]}) == 2


async def test_without_a_width_each_group_is_one_row_over_whole_hours(sim: Sim) -> None:
    query = BASE + "analytics/usage?starting_at=2026-11-20T08:31:00Z&ending_at=2026-11-20T11:59:00Z"
    rows = (await sim.json(query))["data"]
    assert [(row["starting_at"], row["ending_at"]) for row in rows] == [
        ("2026-11-20T08:00:00Z", "2026-11-20T11:00:00Z")
    ]


async def test_claude_code_reports_one_day_an_hour_behind(sim: Sim) -> None:
    profile = {"requests_per_hour": 30}
    await sim.control("POST", "orgs", {"provider": "anthropic", "key": "sk-ant-admin01-test", "profile": profile})
    records = await sim.chain(BASE + "usage_report/claude_code?starting_at=2026-11-22&limit=1")
    assert len(records) > 1
    assert {record["date"] for record in records} == {"2026-11-22T00:00:00Z"}
    cells = await sim.json(BASE + "analytics/usage?starting_at=2026-11-22T00:00:00Z&ending_at=2026-11-22T09:00:00Z"
                           "&products[]=claude_code")  # fmt: skip
    output = sum(model["tokens"]["output"] for record in records for model in record["model_breakdown"])
    assert output == cells["data"][0]["usage"]["output_tokens"]


async def listed(sim: Sim, path: str) -> list[dict[str, Any]]:
    """All pages of a list, one item a page."""
    found: list[dict[str, Any]] = []
    body = await sim.json(f"{BASE}{path}limit=1")
    while True:
        found += body["data"]
        if not body["has_more"]:
            return found
        body = await sim.json(f"{BASE}{path}limit=1&after_id={body['last_id']}")


async def test_lists_of_names_validate_and_page_both_ways(sim: Sim) -> None:
    profile = {"projects": 3, "keys": 5}
    await sim.control("POST", "orgs", {"provider": "anthropic", "key": "sk-ant-admin01-test", "profile": profile})
    workspaces, keys, users = [await listed(sim, path + "?") for path in ("workspaces", "api_keys", "users")]
    assert (len(workspaces), len(keys), len(users)) == (2, 5, 3)  # the default workspace is not listed
    for workspace in workspaces:
        BetaWorkspace.model_validate(workspace)
    for key in keys:
        BetaAPIKey.model_validate(key)
    assert {key["workspace_id"] for key in keys} == {None, *(workspace["id"] for workspace in workspaces)}
    body = await sim.json(f"{BASE}api_keys?limit=2&before_id={keys[4]['id']}")
    assert ([row["id"] for row in body["data"]], body["has_more"]) == ([keys[2]["id"], keys[3]["id"]], True)
    assert (await sim.get(f"{BASE}workspaces?after_id=nothing")).status_code == 400


async def test_what_is_archived_is_listed_where_it_is_asked_for(sim: Sim) -> None:
    (workspace,), (key, *_) = await listed(sim, "workspaces?"), await listed(sim, "api_keys?")
    for subject in (workspace, key):
        await sim.scenario("anthropic", "delete", id=subject["id"])
    await sim.scenario("anthropic", "rename", id=key["id"], value="robot")
    assert not await listed(sim, "workspaces?")
    (archived,) = await listed(sim, "workspaces?include_archived=true&")
    assert archived["archived_at"] is not None
    (gone,) = await listed(sim, "api_keys?status=archived&")
    assert (gone["id"], gone["name"]) == (key["id"], "robot")
