"""Every poller against the provider simulator over a real socket: what is read is the simulator's ground truth."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from daemon.domain.connection import Secret, Target
from daemon.domain.errors import (
    CredentialError,
    ForbiddenError,
    HistoryFloorError,
    RateLimitedError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.record import Totals, totals_of
from daemon.domain.window import Width, Window, parse_rfc3339, rfc3339
from daemon.http_client import HttpClient, HttpSettings
from daemon.pollers.anthropic import AnthropicPoller
from daemon.pollers.litellm import LiteLLMPoller
from daemon.pollers.openai import OpenAIPoller
from daemon.pollers.openrouter import OpenRouterPoller
from daemon.records.normalize import merge
from daemon.simulator.server import Simulator, serve
from daemon.simulator.world import Clock, World
from tests.http_kit import local_client

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 22, 10, 20, tzinfo=UTC)
KEYS = {
    "openai": "sk-admin-conformance",
    "anthropic": "sk-ant-admin01-conformance",
    "openrouter": "sk-or-v1-conformance",
    "litellm": "sk-conformance",
}
BASES = {"openai": "/v1", "anthropic": "", "openrouter": "/api/v1", "litellm": "/litellm"}
POLLERS = {
    "openai": OpenAIPoller(now=lambda: NOW),
    "anthropic": AnthropicPoller(now=lambda: NOW),
    "openrouter": OpenRouterPoller(now=lambda: NOW),
    "litellm": LiteLLMPoller(now=lambda: NOW),
}
SOURCES = [
    (provider, name, {})
    for provider, poller in POLLERS.items()
    for name, spec in poller.sources.items()
    if spec.is_report
]
ANALYTICS = [("anthropic", source, {"api": "analytics"}) for source in ("messages", "cost")]
MAIN = [
    ("openai", "completions", {}),
    ("anthropic", "messages", {}),
    ("openrouter", "activity", {}),
    ("litellm", "logs", {}),
]


@dataclass
class Bench:
    """A simulator that listens, and a door to it."""

    url: str
    client: HttpClient
    simulator: Simulator
    settings: dict = field(default_factory=dict)

    async def control(self, method: str, path: str, **asked):
        async with local_client(base_url=self.url) as http:
            answer = await http.request(method, f"/_sim/{path}", **asked)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def target(self, provider: str, settings) -> Target:
        return Target(provider, self.url + BASES[provider], Secret(KEYS[provider]), settings)

    def caller(self, provider: str):
        return Caller(self.client, self.target(provider, {}).base_url)

    async def fetch(self, provider, source, settings, window=None):
        poller = POLLERS[provider]
        grain = poller.grain(source, settings)
        window = window or span(grain.width)
        return await poller.fetch(self.target(provider, settings), source, grain, window, self.caller(provider))

    async def totals(self, provider, source, settings, window=None):
        poller = POLLERS[provider]
        grain = poller.grain(source, settings)
        window = window or span(grain.width)
        return await poller.totals(self.target(provider, settings), source, grain, window, self.caller(provider))

    async def truth(self, provider, source, group_by, window):
        """Rows by bucket and dimensions, as (input, read, write, output, requests, amount, quantity)."""
        params = [("provider", provider), ("key", KEYS[provider]), ("source", source)]
        params += [("since", rfc3339(window.start)), ("until", rfc3339(window.end))]
        params += [("group_by", name) for name in group_by] or [("group_by", "")]
        rows = (await self.control("GET", "truth", params=params))["sources"][source]
        told = {
            (parse_rfc3339(row["bucket_start"]), tuple(sorted(row["dims"].items()))): (
                row["input_tokens"],
                row["cache_read_tokens"],
                row["cache_write_tokens"],
                row["output_tokens"],
                row["requests"],
                None if row["amount"] is None else Decimal(row["amount"]),
                # Of costs, what was billed comes in another unit with each line item, and is kept in the detail.
                None if row["quantity"] is None or row["amount"] else Decimal(row["quantity"]),
            )
            for row in rows
        }
        return {key: numbers for key, numbers in told.items() if any(numbers)}


@dataclass
class Caller:
    client: HttpClient
    base_url: str

    async def get(self, path, params=(), headers=None):
        return await self.client.get(self.base_url, path, params, headers)


def span(width: Width) -> Window:
    end = width.ceil(NOW)
    return Window(end - (3 * timedelta(days=1) if width is Width.DAY else timedelta(hours=30)), end)


def held(snapshot):
    """Rows by bucket and dimensions. A row of zeros says nothing, whether it is there or not."""
    rows = {
        (bucket.start, tuple(pair for pair in row.dims if pair[0] != "currency")): (
            row.input_tokens,
            *_cached(snapshot, row),
            row.output_tokens,
            row.requests,
            row.amount,
            row.quantity,
        )
        for bucket in snapshot.buckets
        for row in merge(bucket.rows)
    }
    return {key: numbers for key, numbers in rows.items() if any(numbers)}


def _cached(snapshot, row):
    """LiteLLM does not speak of a cache that was not used, where truth says 0."""
    counts = (row.cache_read_tokens, row.cache_write_tokens)
    if "team_id" in snapshot.grain.group_by:
        return tuple(count or 0 for count in counts)
    return counts


@asynccontextmanager
async def listening(profile):
    simulator = Simulator(World(7, Clock(NOW, frozen=True)))
    server, connections = await serve(simulator, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with HttpClient(HttpSettings(read_timeout_s=5)) as client:
            bench = Bench(url, client, simulator)
            for provider, key in KEYS.items():
                await bench.control("POST", "orgs", json={"provider": provider, "key": key, "profile": profile})
            yield bench
    finally:
        server.close()
        for connection in list(connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # lets the aborted transports say goodbye


@pytest.fixture
async def bench(anyio_backend):
    async with listening({"requests_per_hour": 30}) as there:
        yield there


@pytest.mark.parametrize(("provider", "source", "settings"), SOURCES, ids=str)
async def test_what_is_read_is_the_truth(bench, provider, source, settings):
    snapshot = await bench.fetch(provider, source, settings)
    truth = await bench.truth(provider, source, snapshot.grain.group_by, snapshot.window)
    assert held(snapshot) == truth
    if source != "decisions":  # no organisation has any unless told to
        assert truth


@pytest.mark.parametrize(("provider", "source", "settings"), [*SOURCES, *ANALYTICS], ids=str)
async def test_ungrouped_totals_equal_the_sums_of_the_grouped_read(bench, provider, source, settings):
    snapshot = await bench.fetch(provider, source, settings)
    totals = await bench.totals(provider, source, settings)
    assert totals == {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets if bucket.rows}


@pytest.mark.parametrize(("provider", "source", "settings"), ANALYTICS, ids=str)
async def test_both_generations_of_anthropic_add_up_to_the_same(bench, provider, source, settings):
    """Requests apart, which only the newer one counts."""
    old = await bench.totals(provider, source, {})
    new = await bench.totals(provider, source, settings)
    assert {start: sums._replace(requests=0) for start, sums in new.items()} == old
    assert (await bench.fetch(provider, source, settings)).digest is not None


SHAPES = [
    {"action": "money_format", "format": "string"},
    {"action": "money_format", "format": "exponent"},
    {"action": "unknown_fields"},
    {"action": "clamp_limit"},
    {"action": "duplicate_rows"},
    {"action": "negative_credit"},
    {"action": "hostile_text"},
    {"action": "new_enum_value"},
    {"action": "late_arrival"},
    {"action": "correction_up"},
    {"action": "correction_down"},
    {"action": "vanish_row"},
    {"action": "vanish_bucket"},
    {"action": "unpriced_model"},
    {"action": "attribute"},
    {"action": "relabel_model"},
    {"action": "equal_amounts"},
]


GRANULAR = [
    ("openai", "completions"),
    ("openai", "costs"),
    ("anthropic", "messages"),
    ("anthropic", "cost"),
    ("openrouter", "activity"),
    ("openrouter", "costs"),
    ("litellm", "logs"),
    ("litellm", "activity"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("provider", "source"), GRANULAR)
async def test_truth_survives_what_providers_do(bench, provider, source, shape):
    if (provider, shape["action"]) == ("openrouter", "attribute"):
        pytest.skip("OpenRouter names every endpoint: there is nothing to attribute")
    asked = {"provider": provider, "key": KEYS[provider], **shape}
    if shape["action"] == "attribute":
        asked |= {"dim": "team_id"} if provider == "litellm" else {}
    async with local_client(base_url=bench.url) as http:
        answer = await http.post("/_sim/scenario", json=asked)
    assert answer.status_code == 200, answer.text
    snapshot = await bench.fetch(provider, source, {})
    assert held(snapshot) == await bench.truth(provider, source, snapshot.grain.group_by, snapshot.window)


async def test_workspaces_of_openrouter_split_its_rows(bench):
    settings = {"group_by": {"activity": ["model_permaslug", "workspace_id"], "costs": ["workspace_id"]}}
    for source in ("activity", "costs"):
        snapshot = await bench.fetch("openrouter", source, settings)
        truth = await bench.truth("openrouter", source, snapshot.grain.group_by, snapshot.window)
        assert held(snapshot) == truth
        assert len({dict(dims)["workspace_id"] for _, dims in truth}) == 2


async def test_thirty_completed_days_of_openrouter_are_read_and_no_more():
    async with listening({"history_days": 40}) as bench:
        today = Width.DAY.floor(NOW)
        whole = Window(today - timedelta(days=30), today + timedelta(days=1))
        snapshot = await bench.fetch("openrouter", "costs", {}, whole)
        assert snapshot.window.end == today
        assert len(snapshot.buckets) == 30
        assert held(snapshot) == await bench.truth("openrouter", "costs", snapshot.grain.group_by, snapshot.window)
        with pytest.raises(HistoryFloorError):
            await bench.fetch("openrouter", "costs", {}, Window(whole.start - timedelta(days=1), whole.end))


@pytest.mark.parametrize("rows_max", [1000, 100])
async def test_logs_of_litellm_fill_many_pages_of_either_release(rows_max):
    async with listening({"requests_per_hour": 60, "page_rows_max": rows_max}) as bench:
        snapshot = await bench.fetch("litellm", "logs", {})
        assert held(snapshot) == await bench.truth("litellm", "logs", snapshot.grain.group_by, snapshot.window)
        assert snapshot.pages == -(-len(list(logged(bench))) // rows_max)
        assert snapshot.pages > 1


async def test_more_logs_than_litellm_counts_are_read_in_slices():
    async with listening({"requests_per_hour": 400, "history_days": 1}) as bench:
        snapshot = await bench.fetch("litellm", "logs", {})
        assert len(list(logged(bench))) > 10_000
        assert held(snapshot) == await bench.truth("litellm", "logs", snapshot.grain.group_by, snapshot.window)


async def test_logs_that_come_while_they_are_read_move_nothing_out():
    """Oldest first, what is written meanwhile comes last."""
    growing = {"kind": "grow_between_pages", "provider": "litellm", "requests": 3, "count": 4, "path_contains": "logs"}
    async with listening({"requests_per_hour": 30, "page_rows_max": 100}) as bench:
        await bench.control("POST", "faults/next", json=growing)
        snapshot = await bench.fetch("litellm", "logs", {})
        assert snapshot.pages > 5
        assert bench.simulator.faults.served["grow_between_pages"] == 4
        assert held(snapshot) == await bench.truth("litellm", "logs", snapshot.grain.group_by, snapshot.window)


def logged(bench):
    """The logs of the window that the tests read."""
    org = bench.simulator.world.orgs["litellm", KEYS["litellm"]]
    window = span(Width.HOUR)
    for hour in range(int(window.start.timestamp()), int(window.end.timestamp()), 3600):
        yield from (event for event in org.events("logs", hour) if event.visible_at <= org.clock.now())


@pytest.mark.parametrize("provider", POLLERS)
async def test_names_are_those_that_the_organisation_gave(bench, provider):
    """Renamed ones go by the new name; what was deleted is simply gone, where the provider does not list it still."""
    poller = POLLERS[provider]
    org = bench.simulator.world.orgs[provider, KEYS[provider]]
    key, other = org.cast.keys[0], org.cast.keys[1]
    asked = {"provider": provider, "key": KEYS[provider]}
    await bench.control("POST", "scenario", json={**asked, "action": "rename", "id": key.id, "value": "billing robot"})
    await bench.control("POST", "scenario", json={**asked, "action": "delete", "id": other.id})
    names = {}
    async for part in poller.collect(bench.target(provider, {}), "names", None, bench.caller(provider)):
        assert not part.unread
        names |= {(name.kind, name.id): name.name for name in part.items}
    keys = {known.id: known.name for known in org.cast.keys} | {key.id: "billing robot"}
    if provider in ("openai", "openrouter"):
        del keys[other.id]
    assert {id_: name for (kind, id_), name in names.items() if kind == "api_key"} == keys
    places = {id_ for kind, id_ in names if kind in ("project", "workspace", "team")}
    assert places == set(org.cast.projects[1 if provider == "anthropic" else 0 :])
    if provider != "openrouter":
        assert {id_ for kind, id_ in names if kind == "user"} == {known.user for known in org.cast.keys}


async def test_report_beyond_the_row_cap_is_read_in_smaller_pages():
    async with listening({"requests_per_hour": 60, "row_cap": 40}) as bench:
        snapshot = await bench.fetch("anthropic", "messages", {})
        assert held(snapshot) == await bench.truth("anthropic", "messages", snapshot.grain.group_by, snapshot.window)
        assert snapshot.pages > 1
        assert bench.simulator.statuses["400"] > 0


async def test_history_floor_is_named_until_the_window_is_within_reach():
    async with listening({"history_days": 60, "lookback_days": 40}) as bench:
        start = NOW.replace(minute=0) - timedelta(days=800)
        for days in (730, 365, 180, 90, 30):
            with pytest.raises(HistoryFloorError) as refused:
                await bench.fetch("openai", "completions", {}, Window(start, start + timedelta(hours=2)))
            start = refused.value.earliest
            assert start == Width.HOUR.ceil(NOW - timedelta(days=days))
        snapshot = await bench.fetch("openai", "completions", {}, Window(start, start + timedelta(hours=2)))
        assert len(snapshot.buckets) == 2


FAULTS = {
    "401": CredentialError,
    "403": ForbiddenError,
    "408": UpstreamUnavailableError,
    "429": RateLimitedError,
    "500": UpstreamUnavailableError,
    "502": UpstreamUnavailableError,
    "503": UpstreamUnavailableError,
    "529": UpstreamUnavailableError,
    "not_json": SchemaDriftError,
    "truncated_body": UpstreamUnavailableError,
    "reset_after_headers": UpstreamUnavailableError,
    "has_more_without_cursor": SchemaDriftError,
    "repeat_cursor": SchemaDriftError,
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize(
    ("provider", "source", "settings"),
    [*MAIN[:2], *ANALYTICS[:1], ("anthropic", "cost", {}), *MAIN[2:], ("litellm", "activity", {})],
    ids=str,
)
async def test_broken_answer_is_an_error_that_says_what_to_do(bench, provider, source, settings, kind):
    if kind in ("has_more_without_cursor", "repeat_cursor") and provider in ("openrouter", "litellm"):
        pytest.skip("no cursors there")
    await bench.control("POST", "faults/next", json={"kind": kind, "count": 50, "retry_after_s": 3})
    with pytest.raises(FAULTS[kind]) as caught:
        await bench.fetch(provider, source, settings)
    if kind == "429":
        assert caught.value.retry_after_s == 3
    assert KEYS[provider] not in str(caught.value)


@pytest.mark.parametrize("retry_after", ["seconds", "date", "ms"])
async def test_retry_after_in_each_form(bench, retry_after):
    await bench.control("POST", "faults/next", json={"kind": "429", "retry_after": retry_after, "retry_after_s": 9})
    with pytest.raises(RateLimitedError) as caught:
        await bench.fetch("openai", "completions", {})
    assert caught.value.retry_after_s == pytest.approx(9, abs=1)


@pytest.mark.parametrize("kind", ["empty_past_end", "result_field"])
async def test_odd_but_whole_answers_are_the_truth(bench, kind):
    await bench.control("POST", "faults/next", json={"kind": kind, "count": 50, "provider": "openai"})
    for source in ("completions", "costs"):
        snapshot = await bench.fetch("openai", source, {})
        assert held(snapshot) == await bench.truth("openai", source, snapshot.grain.group_by, snapshot.window)


async def test_identify_names_the_organisation(bench):
    for provider, poller in POLLERS.items():
        identity = await poller.identify(bench.target(provider, {}), bench.caller(provider))
        truth = await bench.control("GET", "truth", params={"provider": provider, "key": KEYS[provider]})
        # A proxy has no id: it is known by its address.
        assert identity.org_id == (bench.url + BASES[provider] if provider == "litellm" else truth["org_id"])


@pytest.mark.parametrize(("provider", "source", "settings"), [SOURCES[0], ("anthropic", "messages", {})], ids=str)
async def test_probe_is_one_request_and_equals_the_fetch(bench, provider, source, settings):
    poller = POLLERS[provider]
    grain = poller.grain(source, settings)
    end = grain.width.ceil(NOW)
    window = Window(end - timedelta(hours=4), end)
    snapshot = await bench.fetch(provider, source, settings, window)
    before = Counter(bench.simulator.requests)
    probe = await poller.probe(bench.target(provider, settings), source, grain, window, bench.caller(provider))
    assert sum((bench.simulator.requests - before).values()) == 1
    assert probe.totals == {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets if bucket.rows}
    assert Totals() not in probe.totals.values()


async def test_analytics_probe_changes_with_the_stamp(bench):
    poller = POLLERS["anthropic"]
    settings = {"api": "analytics"}
    grain = poller.grain("messages", settings)
    window = span(grain.width)

    async def digest():
        target, caller = bench.target("anthropic", settings), bench.caller("anthropic")
        return (await poller.probe(target, "messages", grain, window, caller)).digest

    first = await digest()
    assert first == await digest()
    assert first == (await bench.fetch("anthropic", "messages", settings)).digest
    await bench.control("POST", "advance", json={"seconds": 3600})
    assert await digest() != first


async def test_reads_of_one_moment_are_equal(bench):
    """Nothing in a snapshot may depend on when or how often it was read, or every poll would be a restatement."""
    for provider, source, settings in [*SOURCES, *ANALYTICS]:
        first = await bench.fetch(provider, source, settings)
        second = await bench.fetch(provider, source, settings)
        assert json.dumps(first.buckets, default=str) == json.dumps(second.buckets, default=str)
        assert first == second
