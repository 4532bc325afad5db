"""OpenAI's wire format: the official models, the published document, and the rules of section by section."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types.admin import organization as models
from openai.types.admin.organization.organization_user import OrganizationUser
from openai.types.admin.organization.project import Project
from openai.types.admin.organization.projects.project_api_key import ProjectAPIKey

from daemon.simulator.catalogue import OPENAI
from tests.unit.simulator.conftest import Sim, at

pytestmark = pytest.mark.anyio

START = at("2026-11-20T00:00:00Z")
SOURCES = [name for name in OPENAI if name != "unreported"]
CONTRACT = Path(
    os.environ.get("TALLYD_TEST_CONTRACTS")
    or Path(__file__).parents[3].parent / "shared" / "contracts" / "openai-usage.openapi.json"
)


@pytest.fixture(scope="module")
def document() -> Any:
    if not CONTRACT.is_file():
        pytest.skip("the OpenAPI document is not at hand; TALLYD_TEST_CONTRACTS names it")
    return json.loads(CONTRACT.read_text())


def path(source: str, start: int = START, **params: Any) -> str:
    where = "costs" if source == "costs" else f"usage/{source}"
    query = "".join(f"&{name}={value}" for name, value in params.items())
    return f"/openai/v1/organization/{where}?start_time={start}{query}"


def grouped(source: str) -> str:
    dims = OPENAI[source].dims[: OPENAI[source].public]
    return "".join(f"&group_by[]={dim}" for dim in dims)


async def used(sim: Sim) -> None:
    """Some of everything, the rare sources included."""
    profile = {"requests_per_hour": 6, "sources": [*(set(SOURCES) - {"costs"}), "unreported"]}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})


def model_of(source: str) -> Any:
    name = "".join(part.capitalize() for part in source.split("_"))
    return getattr(models, f"Usage{name}Response")


@pytest.mark.parametrize("source", SOURCES)
async def test_answers_validate_strictly_against_the_official_sdk(sim: Sim, source: str) -> None:
    await used(sim)
    for query in (path(source), path(source) + grouped(source)):
        body = (await sim.get(query)).json()
        assert sum(len(bucket["results"]) for bucket in body["data"]) > 0
        page = model_of(source).model_validate(body)
        assert type(page.data[0].results[0]).__name__.endswith("Result")
        assert page.data[0].results[0].object == body["data"][0]["results"][0]["object"]


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "decisions"])
async def test_answers_validate_against_the_published_document(sim: Sim, document: Any, source: str) -> None:
    await used(sim)
    where = "/organization/costs" if source == "costs" else f"/organization/usage/{source}"
    schema = document["paths"][where]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    checker = jsonschema.Draft202012Validator({**schema, "components": document["components"]})
    for query in (path(source), path(source) + grouped(source)):
        body = (await sim.get(query)).json()
        assert body["data"]
        assert not list(checker.iter_errors(body))
    error = (await sim.get(path(source, limit=100_000))).json()
    wrong = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/ErrorResponse", "components": document["components"]}
    )
    assert not list(wrong.iter_errors(error))


async def test_listings_validate_and_page(sim: Sim) -> None:
    body = await sim.json("/v1/organization/projects?limit=1")
    Project.model_validate(body["data"][0])
    assert body["has_more"]
    rest = await sim.json(f"/v1/organization/projects?limit=1&after={body['last_id']}")
    assert not rest["has_more"]
    assert rest["data"][0]["id"] != body["data"][0]["id"]
    OrganizationUser.model_validate((await sim.json("/v1/organization/users"))["data"][0])
    keys = await sim.json(f"/v1/organization/projects/{body['last_id']}/api_keys")
    ProjectAPIKey.model_validate(keys["data"][0])


async def test_archived_projects_and_deleted_keys_leave_the_lists_but_not_the_reports(sim: Sim) -> None:
    base = "/v1/organization/projects"
    project, other = (await sim.json(base))["data"]
    key, *_ = (await sim.json(f"{base}/{project['id']}/api_keys"))["data"]
    for subject in (other, key):
        await sim.scenario("openai", "delete", id=subject["id"])
    await sim.scenario("openai", "rename", id=project["id"], value="robots")
    assert [row["name"] for row in (await sim.json(base))["data"]] == ["robots"]
    kept = (await sim.json(f"{base}?include_archived=true"))["data"]
    assert [row["status"] for row in kept] == ["active", "archived"]
    Project.model_validate(kept[1])
    assert key["id"] not in {row["id"] for row in (await sim.json(f"{base}/{project['id']}/api_keys"))["data"]}
    reported = await sim.chain(path("completions") + "&group_by=api_key_id")
    assert key["id"] in {row["api_key_id"] for bucket in reported for row in bucket["results"]}


async def test_input_is_the_sum_of_its_disjoint_classes(sim: Sim) -> None:
    await sim.control(
        "POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": {"models": ["gpt-6-sol"]}}
    )
    rows = [row for bucket in await sim.chain(path("completions")) for row in bucket["results"]]
    assert all(row["input_cached_tokens"] and row["input_cache_write_tokens"] for row in rows)
    for row in rows:
        classes = ("input_cached_tokens", "input_cache_write_tokens", "input_uncached_tokens")
        assert row["input_tokens"] == sum(row[name] for name in classes)
        assert row["input_cache_write_tokens"] == (
            row["input_cache_write_30m_tokens"] + row["input_cache_write_12h_tokens"]
        )


async def test_brackets_make_no_difference_and_both_bases_serve(sim: Sim) -> None:
    plain = await sim.get(path("completions") + "&group_by=model&group_by=project_id")
    brackets = await sim.get(path("completions") + "&group_by[]=model&group_by[]=project_id")
    short = await sim.get(path("completions").removeprefix("/openai") + "&group_by=model&group_by=project_id")
    assert plain.content == brackets.content == short.content
    assert plain.headers["openai-organization"].startswith("org-")


async def test_an_unaligned_start_clips_the_first_bucket_alone(sim: Sim) -> None:
    clipped = await sim.chain(path("completions", START + 9 * 3600 + 25 * 60 + 30, bucket_width="1h"))
    whole = await sim.chain(path("completions", START + 9 * 3600, bucket_width="1h"))
    assert (clipped[0]["start_time"], clipped[0]["end_time"]) == (START + 9 * 3600 + 25 * 60, START + 10 * 3600)
    assert clipped[1:] == whole[1:]
    minutes = await sim.chain(path("completions", START + 9 * 3600, end_time=START + 10 * 3600, bucket_width="1m"))

    def tokens(buckets: list[Any]) -> int:
        return sum(row["input_tokens"] for bucket in buckets for row in bucket["results"])

    assert tokens(whole[:1]) == tokens(minutes)
    assert tokens(clipped[:1]) == tokens(minutes[25:])


async def test_buckets_are_contiguous_and_empty_ones_are_listed(sim: Sim) -> None:
    buckets = await sim.chain(path("completions", START - 86400, bucket_width="1h"))
    assert [bucket["start_time"] for bucket in buckets] == list(range(START - 86400, at("2026-11-22T11:00:00Z"), 3600))
    assert all(bucket["results"] == [] for bucket in buckets[:24])
    assert any(bucket["results"] for bucket in buckets[24:])


@pytest.mark.parametrize(
    ("source", "params", "param", "code"),
    [
        ("completions", "&bucket_width=1h&limit=169", "limit", "integer_above_max_value"),
        ("completions", "&bucket_width=1m&limit=1441", "limit", "integer_above_max_value"),
        ("completions", "&limit=32", "limit", "integer_above_max_value"),
        ("completions", "&limit=0", "limit", "integer_below_min_value"),
        ("costs", "&limit=181", "limit", "integer_above_max_value"),
        ("costs", "&bucket_width=1h", "bucket_width", "invalid_value"),
        ("completions", "&bucket_width=5m", "bucket_width", "invalid_value"),
        ("vector_stores", "&group_by=model", "group_by", "invalid_value"),
        ("completions", "&group_by=model,project_id", "group_by", "invalid_value"),
        ("completions", "&colour=red", "colour", "unknown_parameter"),
        ("completions", "&end_time=1", "end_time", "invalid_value"),
        ("completions", "&page=page_nonsense", "page", None),
    ],
)
async def test_what_the_rules_forbid_is_a_400(sim: Sim, source: str, params: str, param: str, code: str | None) -> None:
    answer = await sim.get(path(source) + params)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


async def test_start_time_is_required(sim: Sim) -> None:
    answer = await sim.get("/v1/organization/costs")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "start_time")


async def test_costs_clamp_a_large_limit_on_request(sim: Sim) -> None:
    await sim.scenario("openai", "clamp_limit")
    start = at("2026-01-01T00:00:00Z")
    body = await sim.json(path("costs", start, limit=200))
    assert len(body["data"]) == 31
    assert body["has_more"]
    buckets = await sim.chain(path("costs", start, limit=200))
    assert [bucket["start_time"] for bucket in buckets] == list(range(start, at("2026-11-23T00:00:00Z"), 86400))


async def test_a_cursor_belongs_to_its_query(sim: Sim) -> None:
    first = path("completions", bucket_width="1h", limit=2)
    cursor = (await sim.json(first))["next_page"]
    assert (await sim.get(f"{first}&page={cursor}")).status_code == 200
    others = (
        path("completions", bucket_width="1h", limit=3),
        path("completions", START + 60, bucket_width="1h", limit=2),
        path("completions", bucket_width="1h", limit=2, group_by="model"),
        path("embeddings", bucket_width="1h", limit=2),
    )
    for other in others:
        assert (await sim.get(f"{other}&page={cursor}")).status_code == 400
    foreign = await sim.get(f"{first}&page={cursor}", authorization="Bearer sk-admin-other")
    assert foreign.status_code == 400


async def test_history_has_floors(sim: Sim) -> None:
    profile = {"lookback_days": 30}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})
    old = await sim.get(path("images", at("2026-10-22T00:00:00Z")))
    assert (old.status_code, old.json()["error"]["code"]) == (400, "reporting_lookback_exceeded")
    assert (await sim.get(path("images", at("2026-10-23T00:00:00Z")))).status_code == 200
    early = at("2025-12-05T00:00:00Z")
    refused = await sim.get(path("costs", early, group_by="api_key_id"))
    assert refused.status_code == 400
    assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == (
        "start_time",
        "invalid_request_error",
    )
    assert (await sim.get(path("costs", early))).status_code == 200
    assert (await sim.get(path("costs", early + 86400, group_by="api_key_id"))).status_code == 200


@pytest.mark.parametrize(
    ("credential", "status", "code"),
    [
        ("", 401, None),
        ("Bearer", 401, None),
        ("Basic sk-admin-test", 401, None),
        ("Bearer sk-abc", 401, "invalid_api_key"),
        ("Bearer sk-proj-abc", 403, "missing_scope"),
        ("Bearer sk-admin-noscope", 403, "missing_scope"),
    ],
)
async def test_only_admin_keys_get_in(sim: Sim, credential: str, status: int, code: str | None) -> None:
    answer = await sim.get(path("completions"), authorization=credential)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_quantity_comes_only_with_its_line_item(sim: Sim) -> None:
    total = (await sim.json(path("costs")))["data"][0]["results"]
    assert [row["quantity"] for row in total] == [None]
    lines = (await sim.json(path("costs", group_by="line_item")))["data"][0]["results"]
    assert all(row["quantity"] is not None and row["line_item"] for row in lines)
    assert {row["quantity_unit"] for row in lines} >= {"tokens"}


async def test_a_future_end_is_clipped_or_refused(sim: Sim) -> None:
    future = path("completions", end_time=at("2026-12-01T00:00:00Z"))
    assert (await sim.chain(future))[-1]["start_time"] == at("2026-11-22T00:00:00Z")
    await sim.scenario("openai", "refuse_future_end")
    assert (await sim.get(future)).status_code == 400
