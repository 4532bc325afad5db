"""The oracle: at every grouping a report adds up to the truth, and the same seed gives the same bytes."""

from __future__ import annotations

import itertools
from collections import Counter
from decimal import Decimal
from typing import Any

import httpx
import pytest

from daemon.simulator.catalogue import OPENAI
from daemon.simulator.openai import VENDOR as OPENAI_VENDOR
from daemon.simulator.server import Simulator
from daemon.simulator.wire import Request
from daemon.simulator.world import Clock, World
from tests.unit.simulator.conftest import NOW, OPENAI_HEADERS, Sim, at, instant

pytestmark = pytest.mark.anyio

START = at("2026-11-20T00:00:00Z")
LISTED = [name for name in OPENAI if name != "unreported"]
QUANTITIES = ("images", "characters", "seconds", "usage_bytes", "num_sessions", "num_requests")
Sums = Counter[tuple[Any, ...]]


def groupings(dims: tuple[str, ...]) -> list[tuple[str, ...]]:
    """None, each, every pair, all."""
    return [(), *((dim,) for dim in dims), *itertools.combinations(dims, 2), dims]


def key_of(dims: tuple[str, ...], bucket: int | str, row: dict[str, Any]) -> tuple[Any, ...]:
    named = [row[dim] for dim in dims]
    return (bucket, *(str(value).lower() if isinstance(value, bool) else value for value in named))


@pytest.mark.parametrize("source", LISTED)
async def test_openai_adds_up_at_every_grouping(sim: Sim, source: str) -> None:
    profile = {"requests_per_hour": 6, "sources": [*(set(LISTED) - {"costs"}), "unreported"]}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})
    what = OPENAI[source]
    width, where = ("1d", "costs") if what.is_cost else ("1h", f"usage/{source}")
    for dims in groupings(what.dims[: what.public]):
        truth = await sim.truth("openai", source=source, group_by=list(dims) or [""])
        expected = {key_of(dims, at(row["bucket_start"]), row["dims"]): row for row in truth[source]}
        groups = "".join(f"&group_by[]={dim}" for dim in dims)
        report = await sim.chain(
            f"/v1/organization/{where}?start_time={START}&bucket_width={width}&limit=31{groups}",
        )
        seen = 0
        for bucket in report:
            for row in bucket["results"]:
                true = expected[key_of(dims, bucket["start_time"], row)]
                seen += 1
                assert row.get("input_tokens") == true["input_tokens"]
                assert row.get("output_tokens") == true["output_tokens"]
                assert row.get("input_cached_tokens") == true["cache_read_tokens"]
                assert row.get("num_model_requests") == true["requests"]
                counted = next((row[name] for name in QUANTITIES if name in row), row.get("quantity"))
                if not what.is_cost or "line_item" in dims:
                    assert true["quantity"] == (None if counted is None else str(counted))
                if what.is_cost:
                    assert Decimal(row["amount"]["value"]) == Decimal(true["amount"])
        assert seen == len(expected) > 0


async def test_anthropic_adds_up_at_every_grouping_in_both_generations(sim: Sim) -> None:
    profile = {"requests_per_hour": 6, "discount_percent": 10}
    await sim.control("POST", "orgs", {"provider": "anthropic", "key": "sk-ant-admin01-test", "profile": profile})
    base = "/v1/organizations/"
    end = "&ending_at=2026-11-23T00:00:00Z"
    for dims in groupings(("api_key_id", "model", "service_tier", "account_id", "workspace_id")):
        groups = "".join(f"&group_by[]={dim}" for dim in dims)
        truth = await sim.truth("anthropic", source="messages", group_by=list(dims) or [""])
        expected = {key_of(dims, row["bucket_start"], row["dims"]): row for row in truth["messages"]}
        report = await sim.chain(
            f"{base}usage_report/messages?starting_at=2026-11-20T00:00:00Z&bucket_width=1h&limit=168{groups}"
        )
        rows = [(bucket["starting_at"], row) for bucket in report for row in bucket["results"]]
        assert len(rows) == len(expected)
        for start, row in rows:
            true = expected[key_of(dims, start, row)]
            writes = sum(row["cache_creation"].values())
            assert row["cache_read_input_tokens"] == true["cache_read_tokens"]
            assert writes == true["cache_write_tokens"]
            assert row["uncached_input_tokens"] + row["cache_read_input_tokens"] + writes == true["input_tokens"]
            assert row["output_tokens"] == true["output_tokens"]
            assert str(row["server_tool_use"]["web_search_requests"]) == true["quantity"]
        if "account_id" in dims:
            continue
        flat = await sim.chain(
            f"{base}analytics/usage?starting_at=2026-11-20T00:00:00Z{end}&time_bucket_width=1h&limit=1000{groups}"
        )
        assert sum(row["usage"]["total_tokens"] for row in flat) == sum(
            row["input_tokens"] + row["output_tokens"] for row in truth["messages"]
        )
    for groups in ("", "&group_by[]=workspace_id", "&group_by[]=description&group_by[]=workspace_id"):
        dims = tuple(part.partition("=")[2] for part in groups.split("&") if part)
        truth = await sim.truth("anthropic", source="cost", group_by=list(dims) or [""])
        expected = {key_of(dims, row["bucket_start"], row["dims"]): Decimal(row["amount"]) for row in truth["cost"]}
        report = await sim.chain(f"{base}cost_report?starting_at=2026-11-20T00:00:00Z{groups}")
        got = {
            key_of(dims, bucket["starting_at"], row): Decimal(row["amount"]) / 100
            for bucket in report
            for row in bucket["results"]
        }
        assert got == expected
        flat = await sim.chain(
            f"{base}analytics/cost?starting_at=2026-11-20T00:00:00Z{end}&time_bucket_width=1d&group_by[]=model&limit=9"
        )
        assert sum(Decimal(row["cost"]["amount"]) for row in flat) / 100 == sum(expected.values())
        assert all(Decimal(row["cost"]["amount"]) < Decimal(row["cost"]["list_amount"]) for row in flat)


async def test_the_bill_is_usage_at_list_price_and_what_usage_does_not_show(sim: Sim) -> None:
    profile = {"models": ["gpt-4o-mini-2024-07-18"], "sources": ["completions"]}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})
    truth = await sim.truth("openai", source=["completions", "costs"])
    expected = Decimal(0)
    for row in truth["completions"]:
        uncached = row["input_tokens"] - row["cache_read_tokens"]
        price = uncached * Decimal("0.15") + row["cache_read_tokens"] * Decimal("0.075")
        price += row["output_tokens"] * Decimal("0.6")
        expected += price / 10**6 / (2 if row["dims"]["batch"] == "true" else 1)
    assert sum(Decimal(row["amount"]) for row in truth["costs"]) == expected
    credit = await sim.scenario("openai", "negative_credit", amount=7)
    assert [row["amount"] for row in credit["after"]] == ["-7"]
    after = await sim.truth("openai", source="costs")
    assert sum(Decimal(row["amount"]) for row in after["costs"]) == expected - 7


async def test_totals_add_up_without_the_rows(sim: Sim) -> None:
    await sim.json(f"/v1/organization/costs?start_time={START}")
    await sim.json("/v1/organizations/usage_report/messages?starting_at=2026-11-20T00:00:00Z")
    totals = (await sim.client.get("/_sim/truth?totals=1")).json()["orgs"]
    assert {org["provider"] for org in totals} == {"openai", "anthropic"}
    for org in totals:
        for name, rows in (await sim.truth(org["provider"])).items():
            sums = org["sources"][name]
            assert (sums["input_tokens"] or 0) == sum(row["input_tokens"] or 0 for row in rows)
            assert Decimal(sums["amount"] or 0) == sum(Decimal(row["amount"] or 0) for row in rows)
    half = await sim.client.get("/_sim/truth?totals=1&provider=openai&until=2026-11-21T12:00:00Z")
    other = await sim.client.get("/_sim/truth?totals=1&provider=openai&since=2026-11-21T12:00:00Z")
    parts = [answer.json()["orgs"][0]["sources"]["completions"]["requests"] for answer in (half, other)]
    assert sum(parts) == totals[0]["sources"]["completions"]["requests"]
    assert all(parts)


async def test_a_level_is_not_summed_over_hours(sim: Sim) -> None:
    profile = {"sources": ["vector_stores"], "requests_per_hour": 3}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})
    query = f"/v1/organization/usage/vector_stores?start_time={START}&group_by=project_id&limit=24&bucket_width="
    hours = (await sim.json(query + "1h"))["data"]
    day = (await sim.json(query.replace("limit=24", "limit=1") + "1d"))["data"][0]
    last = {row["project_id"]: row["usage_bytes"] for bucket in hours for row in bucket["results"]}
    assert {row["project_id"]: row["usage_bytes"] for row in day["results"]} == last


def test_the_same_seed_gives_the_same_bytes_whatever_was_asked_before() -> None:
    def ask(simulator: Simulator, paths: list[str]) -> dict[str, bytes]:
        headers = dict(OPENAI_HEADERS)
        return {path: simulator.respond(Request("GET", *path.split("?"), headers)).encoded() for path in paths}

    paths = [
        f"/v1/organization/{where}?start_time={START}&{more}"
        for where in ("costs", "usage/completions", "usage/images")
        for more in ("limit=3", "group_by=project_id", "group_by=project_id&group_by=api_key_id")
    ]

    def world(seed: int) -> Simulator:
        return Simulator(World(seed, Clock(instant(NOW), frozen=True)))

    assert ask(world(1), paths) == ask(world(1), paths[::-1])
    assert ask(world(1), paths) != ask(world(2), paths)
    forgetful = world(1)
    first = ask(forgetful, paths)
    for org in forgetful.world.orgs.values():
        org.forget(aggregates=True)
    assert ask(forgetful, paths) == first


def test_keys_are_organisations_of_their_own() -> None:
    world = World(1, Clock(instant(NOW), frozen=True))
    orgs = [world.org(OPENAI_VENDOR, f"sk-admin-{n}") for n in range(3)]
    assert len({org.cast.org_id for org in orgs}) == 3
    assert len({str(org.cells("completions", START, START + 86400)) for org in orgs}) == 3


async def test_history_is_revealed_as_time_passes(sim: Sim) -> None:
    """Late events show up when they become visible, and a report made before does not stick."""
    profile = {"late_s": 7200, "cost_late_s": 3600, "requests_per_hour": 20, "sources": ["completions"]}
    await sim.control("POST", "orgs", {"provider": "openai", "key": "sk-admin-test", "profile": profile})
    query = f"/v1/organization/usage/completions?start_time={at('2026-11-22T11:00:00Z')}&bucket_width=1h&limit=1"
    cost = f"/v1/organization/costs?start_time={at('2026-11-22T00:00:00Z')}&limit=1"

    async def seen() -> tuple[int, Decimal]:
        await sim.control("POST", "advance", {"seconds": 1800})
        rows = (await sim.json(query))["data"]
        money = (await sim.json(cost))["data"][0]["results"][0]["amount"]["value"]
        return sum(row["num_model_requests"] for bucket in rows for row in bucket["results"]), Decimal(money)

    steps = [await seen() for _ in range(10)]
    requests = [step[0] for step in steps]
    assert requests == sorted(requests)
    assert (requests[0], requests[-1]) == (0, 20)
    assert len(set(requests)) > 4
    assert steps[-1][1] > steps[0][1]


async def test_a_profile_without_a_key_is_for_all_to_come(sim: Sim) -> None:
    await sim.get(f"/v1/organization/costs?start_time={START}")  # this one has been made already
    quiet = {"provider": "openai", "profile": {"requests_per_hour": 0}}
    await sim.control("POST", "orgs", quiet)
    await sim.control("POST", "orgs", {**quiet, "key": "sk-admin-own", "profile": {"history_days": 1, "live": False}})
    for key in ("sk-admin-new", "sk-admin-own"):
        await sim.get(f"/v1/organization/costs?start_time={START}", authorization=f"Bearer {key}")
    listed = (await sim.client.get("/_sim/truth?totals=1")).json()["orgs"]
    requests = {org["key"]: org["sources"]["completions"]["requests"] for org in listed}
    assert requests["sk-admin-new"] == 0
    assert 0 < requests["sk-admin-own"] < requests["sk-admin-test"]
    await sim.control("POST", "advance", {"seconds": 7200})
    again = (await sim.client.get("/_sim/truth?totals=1")).json()["orgs"]
    later = {org["key"]: org["sources"]["completions"]["requests"] for org in again}
    assert later["sk-admin-own"] == requests["sk-admin-own"]  # not live
    assert later["sk-admin-test"] > requests["sk-admin-test"]


async def test_the_clock_moves_only_when_told(sim: Sim) -> None:
    assert (await sim.control("GET", "health"))["now"] == NOW
    assert (await sim.control("POST", "advance", {"seconds": 90}))["now"] == "2026-11-22T10:21:30Z"
    frozen = await sim.control("POST", "freeze", {"now": "2026-12-01T00:00:00Z"})
    assert frozen["now"] == "2026-12-01T00:00:00Z"
    answer = await sim.get(f"/v1/organization/costs?start_time={START}")
    assert answer.headers["date"] == "Tue, 01 Dec 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "nowhere", None, 404),
        ("POST", "orgs", {"provider": "openai", "profile": {"colour": "red"}}, 400),
        ("POST", "orgs", {"provider": "mars", "profile": {}}, 400),
        ("POST", "scenario", {"provider": "openai", "key": "sk-admin-test", "action": "explode"}, 400),
        ("POST", "scenario", {"provider": "openai", "key": "sk-admin-test", "action": "restore"}, 400),
        ("POST", "faults/next", {"kind": "418"}, 400),
        ("POST", "faults", {"rate": 1, "kinds": ["418"]}, 400),
        ("GET", "truth?provider=openai&key=sk-admin-test&source=nonsense", None, 400),
    ],
)
async def test_mistakes_in_control_calls_are_loud(sim: Sim, method: str, path: str, body: Any, status: int) -> None:
    answer: httpx.Response = await sim.client.request(method, f"/_sim/{path}", json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_filters_select_what_grouping_shows(sim: Sim) -> None:
    day = f"/v1/organization/usage/completions?start_time={START}&limit=1"
    for dim, name in (("model", "models"), ("project_id", "project_ids"), ("batch", "batch")):
        rows = (await sim.json(f"{day}&group_by={dim}"))["data"][0]["results"]
        for row in rows:
            value = str(row[dim]).lower() if dim == "batch" else row[dim]
            alone = (await sim.json(f"{day}&{name}={value}"))["data"][0]["results"]
            assert [each["output_tokens"] for each in alone] == [row["output_tokens"]]
        assert len(rows) > 1
    base = "/v1/organizations/"
    legacy = f"{base}usage_report/messages?starting_at=2026-11-20T00:00:00Z&limit=1"
    row = (await sim.json(f"{legacy}&group_by[]=model"))["data"][0]["results"][0]
    alone = (await sim.json(f"{legacy}&models[]={row['model']}"))["data"][0]["results"]
    assert [each["output_tokens"] for each in alone] == [row["output_tokens"]]
    flat = f"{base}analytics/usage?starting_at=2026-11-20T00:00:00Z&ending_at=2026-11-21T00:00:00Z&limit=100"
    for dim, name in (("api_key_id", "api_key_ids"), ("actor_type", "actor_types"), ("product", "products")):
        rows = (await sim.json(f"{flat}&group_by[]={dim}"))["data"]
        for row in rows:
            if row["group"][dim] is None and dim != "api_key_id":
                continue
            # An empty entry matches usage that no key authenticated.
            alone = (await sim.json(f"{flat}&{name}[]={row['group'][dim] or ''}"))["data"]
            assert [each["usage"] for each in alone] == [row["usage"]]
        assert len(rows) > 1
    assert (await sim.json(f"{flat}&rbac_group_ids[]=none"))["data"] == []


def test_memory_is_bounded_and_what_was_forgotten_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.simulator.world._EVENTS_MAX", 2_000)
    monkeypatch.setattr("daemon.simulator.world._ROWS_MAX", 3_000)
    world = World(1, Clock(instant(NOW), frozen=True))
    first = {
        n: dict(world.org(OPENAI_VENDOR, f"sk-admin-{n}").cells("costs", START, START + 86400)) for n in range(600)
    }
    assert sum(org.cached_events > 0 for org in world.orgs.values()) < 150
    assert all(
        dict(world.org(OPENAI_VENDOR, f"sk-admin-{n}").cells("costs", START, START + 86400)) == first[n] for n in first
    )
