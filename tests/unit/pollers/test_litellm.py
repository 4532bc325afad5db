"""What is special to LiteLLM; the rest is in the conformance suite."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.domain.connection import Identity
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    ForbiddenError,
    HistoryFloorError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.record import totals_of
from daemon.domain.window import Width, Window
from daemon.pollers.litellm import KEPT_SURELY, PAGE_SIZES, LiteLLMPoller
from daemon.testing.poller_cases import NOW, Script
from tests.conformance.gateway_cases import CASES, LITELLM, log_row

pytestmark = pytest.mark.anyio
BY_SOURCE = {case.source: case for case in CASES if case.poller is LITELLM}
LOGS, ACTIVITY = BY_SOURCE["logs"], BY_SOURCE["activity"]
END = Width.HOUR.floor(NOW)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
INSTANT = "%Y-%m-%d %H:%M:%S"


def log(request_id, began, **fields):
    row = log_row(1)
    row["api_key"] = row.pop("api_key_id")
    row["user"] = row.pop("user_id")
    return {"request_id": request_id, "startTime": began.isoformat(), **row, **fields}


class Proxy:
    """A proxy's logs, paged, counted and refused as the proxy does.

    Attributes:
        cap: it counts so far and no further. sizes: the largest page. between: called after each answer.
    """

    def __init__(self, logs, cap=10_000, largest=1000, between=None):
        self.logs = list(logs)
        self.cap = cap
        self.largest = largest
        self.between = between
        self.asked = []

    def __call__(self, request):
        asked = dict(request.url.params)
        self.asked.append(asked)
        size, page = int(asked["page_size"]), int(asked.get("page", 1))
        if size > self.largest:
            return httpx.Response(422, json={"detail": [{"loc": ["query", "page_size"], "msg": "too large"}]})
        first, last = (
            datetime.strptime(asked[name], INSTANT).replace(tzinfo=UTC) for name in ("start_date", "end_date")
        )
        found = [item for item in self.logs if first <= datetime.fromisoformat(item["startTime"]) <= last]
        found.sort(key=lambda item: item["startTime"], reverse=asked["sort_order"] == "desc")
        total = min(len(found), self.cap)
        answer = {
            "data": found[(page - 1) * size : page * size],
            "total": total,
            "page": page,
            "page_size": size,
            "total_pages": -(-total // size),
            "total_is_capped": len(found) > self.cap,
        }
        body = json.dumps(answer).encode()
        if self.between:
            self.between(self)
        return httpx.Response(200, content=body)


async def fetch_logs(proxy, window, poller=LITELLM):
    return await poller.fetch(LOGS.target, "logs", LOGS.grain, window, Script(proxy))


def requests_of(snapshot):
    return {bucket.start: totals_of(bucket.rows).requests for bucket in snapshot.buckets}


# ── Logs ────────────────────────────────────────────────────────────────────────────────────────


async def test_both_ends_are_asked_for_and_the_last_instant_is_the_next_window_s():
    """The proxy's end is inclusive and of whole seconds, while a log begins at a fraction of one."""
    logs = [log(f"r{n}", END - HOUR + n * timedelta(milliseconds=1)) for n in (0, 1, 3_599_999, 3_600_000, 3_600_001)]
    proxy = Proxy(logs)
    assert requests_of(await fetch_logs(proxy, Window(END - HOUR, END))) == {END - HOUR: 3}
    assert (proxy.asked[0]["start_date"], proxy.asked[0]["end_date"]) == ("2026-11-22 09:00:00", "2026-11-22 10:00:00")
    assert (proxy.asked[0]["sort_by"], proxy.asked[0]["sort_order"]) == ("startTime", "asc")
    assert requests_of(await fetch_logs(proxy, Window(END, END + HOUR))) == {END: 2}


async def test_log_that_moved_to_the_next_page_counts_once():
    logs = [log(f"r{n:03}", END - HOUR + n * timedelta(seconds=1)) for n in range(250)]

    def late(proxy):  # began earlier, was written later: it pushes the others on
        n = len(proxy.asked)
        proxy.logs.append(log(f"late{n}", END - HOUR + timedelta(milliseconds=n)))

    proxy = Proxy(logs, largest=100, between=late)
    snapshot = await fetch_logs(proxy, Window(END - HOUR, END))
    # None of the 250 is lost or counted twice; what came behind the reader's back is found by the next reading.
    assert requests_of(snapshot) == {END - HOUR: 250}
    proxy.between = None
    assert requests_of(await fetch_logs(proxy, Window(END - HOUR, END))) == {END - HOUR: len(proxy.logs)}


async def test_what_is_appended_while_pages_are_read_is_read_too():
    logs = [log(f"r{n:03}", END - HOUR + n * timedelta(seconds=1)) for n in range(199)]

    def grow(proxy):
        n = len(proxy.logs)
        if n < 350:
            proxy.logs += [log(f"r{n + k:03}", END - HOUR + (n + k) * timedelta(seconds=1)) for k in range(60)]

    proxy = Proxy(logs, largest=100, between=grow)
    assert requests_of(await fetch_logs(proxy, Window(END - HOUR, END))) == {END - HOUR: len(proxy.logs)}


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "spend", "model", "api_key", "startTime"])
async def test_log_sent_twice_with_other_figures_is_an_alarm(field):
    other = {"startTime": (END - HOUR / 3).isoformat()}.get(
        field, 7 if field.endswith(("tokens", "spend")) else "other"
    )
    first = log("same", END - HOUR / 2)
    first["completion_tokens"] = 8
    pages = [
        {"data": [first], "page": 1, "total_pages": 2},
        {"data": [{**first, field: other}], "page": 2, "total_pages": 2},
    ]
    with pytest.raises(SchemaDriftError, match="twice"):
        await LITELLM.fetch(LOGS.target, "logs", LOGS.grain, Window(END - HOUR, END), Script(*pages))


async def test_log_that_was_lost_between_pages_fails_the_chain():
    """Logs of one instant have no order of their own, so that one page may show what another one showed before."""
    logs = [log(f"r{n}", END - HOUR) for n in range(150)]
    pages = [
        {"data": logs[:100], "page": 1, "total_pages": 2, "total": 150},
        {"data": logs[50:100], "page": 2, "total_pages": 2, "total": 150},
    ]
    with pytest.raises(UpstreamUnavailableError, match="moved"):
        await LITELLM.fetch(LOGS.target, "logs", LOGS.grain, Window(END - HOUR, END), Script(*pages))


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": None},
        {"request_id": ""},
        {"request_id": 7},
        {"startTime": None},
        {"startTime": "noon"},
        {"startTime": 20261122},
        {"startTime": "2026-11-22T08:59:59+00:00"},
    ],
    ids=str,
)
async def test_log_without_an_id_or_a_time_of_the_window_is_drift(fields):
    page = {"data": [log("r", END - HOUR / 2) | fields], "total_pages": 1}
    with pytest.raises(SchemaDriftError) as caught:
        await LITELLM.fetch(LOGS.target, "logs", LOGS.grain, Window(END - HOUR, END), Script(page))
    assert caught.value.body


@pytest.mark.parametrize(
    ("fields", "page"),
    [
        ({"startTime": "2026-11-22T08:59:59+00:00"}, {}),
        ({"startTime": "0001-01-01T00:00:00+23:00"}, {}),
        ({"prompt_tokens": None}, {}),
        ({"model": ["m"]}, {}),
        ({}, {"page": 2}),
        ({}, {"total_pages": "many"}),
        ({}, {"total_is_capped": True}),
    ],
    ids=str,
)
async def test_error_about_logs_shows_no_prompt_and_nobody_s_address(fields, page):
    """A proxy may keep both with a log, and what an error keeps ends in a log of ours and in a dead letter."""
    secret = {"messages": "PRIVATE", "user": "PRIVATE@x.test", "end_user": "PRIVATE", "metadata": {"email": "PRIVATE"}}
    logs = {"data": [log("r", END - HOUR / 2) | secret | fields], "page": 1, "total_pages": 1} | page
    with pytest.raises(SchemaDriftError) as caught:
        await LITELLM.fetch(LOGS.target, "logs", LOGS.grain, Window(END - HOUR, END), Script(*[logs] * 20))
    error: BaseException | None = caught.value
    while error is not None:
        assert "PRIVATE" not in f"{error} {getattr(error, 'body', b'')}"
        error = None if error.__suppress_context__ else error.__context__


async def test_older_release_is_asked_for_smaller_pages():
    proxy = Proxy([log(f"r{n:03}", END - HOUR + n * timedelta(seconds=1)) for n in range(150)], largest=100)
    assert requests_of(await fetch_logs(proxy, Window(END - HOUR, END))) == {END - HOUR: 150}
    assert [asked["page_size"] for asked in proxy.asked] == [str(PAGE_SIZES[0]), "100", "100"]
    with pytest.raises(BadRequestError):
        await fetch_logs(Proxy([], largest=10), Window(END - HOUR, END))


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.integers(0, 3 * 3600 * 1000 - 1), max_size=60),
    cap=st.integers(7, 20),
    largest=st.sampled_from([100, 1000]),
)
async def test_more_logs_than_the_proxy_counts_are_read_in_slices(seconds, cap, largest):
    """Its count ends at ten thousand, and its pages with it: the window is halved until each part is whole."""
    start = END - 3 * HOUR
    logs = [log(f"r{n}", start + timedelta(milliseconds=at)) for n, at in enumerate(seconds)]
    packed = Counter(at // 1000 for at in seconds)
    packed.update(Counter(at // 1000 for at in seconds if at % 1000 == 0))
    if max(packed.values(), default=0) > cap // 4:
        return  # a second that no slice can hold; see the next test
    truth = Counter(Width.HOUR.floor(datetime.fromisoformat(item["startTime"])) for item in logs)
    snapshot = await fetch_logs(Proxy(logs, cap=cap, largest=largest), Window(start, END))
    assert requests_of(snapshot) == truth


async def test_second_with_more_logs_than_the_proxy_counts_is_drift_not_a_part():
    logs = [log(f"r{n}", END - HOUR / 2 + timedelta(milliseconds=n)) for n in range(30)]
    with pytest.raises(SchemaDriftError, match="one second"):
        await fetch_logs(Proxy(logs, cap=20), Window(END - HOUR, END))


async def test_hours_whose_logs_may_be_deleted_are_a_floor_not_empty_hours():
    """To book them as empty would take back what was spent."""
    start = END - KEPT_SURELY - 10 * HOUR
    window = Window(start, start + 4 * HOUR)
    kept = log("kept", start + 2.5 * HOUR)
    with pytest.raises(HistoryFloorError) as refused:
        await fetch_logs(Proxy([kept]), window)
    assert refused.value.earliest == start + 2 * HOUR
    with pytest.raises(HistoryFloorError) as refused:
        await fetch_logs(Proxy([]), window)
    assert refused.value.earliest == window.end
    # Where something older is left, nothing was deleted here.
    older = log("older", start - 100 * DAY)
    assert requests_of(await fetch_logs(Proxy([kept, older]), window)) == {start + 2 * HOUR: 1}
    # No question is asked about hours that begin with logs, nor about young ones.
    first = log("first", start)
    proxy = Proxy([first])
    await fetch_logs(proxy, window)
    await fetch_logs(proxy, Window(END - 4 * HOUR, END))
    assert len(proxy.asked) == 2


async def row_of(**fields):
    snapshot = await fetch_logs(Proxy([log("r", END - HOUR / 2, **fields)]), Window(END - HOUR, END))
    return snapshot.buckets[0].rows[0]


@pytest.mark.parametrize(
    ("called", "ours", "prices"),
    [
        ("openai", "openai", "openai"),
        ("text-completion-openai", "openai", "openai"),
        ("anthropic", "anthropic", "anthropic"),
        ("azure_ai", "azure", "azure"),
        ("bedrock_converse", "bedrock", "aws"),
        ("vertex_ai", "vertex", "google"),
        ("vertex_ai_beta", "vertex", "google"),
        ("gemini", "gemini", "google"),
        ("openrouter", "openrouter", "openrouter"),
        ("hosted_vllm", "hosted-vllm", "hosted-vllm"),
        ("unknown", None, ""),
        ("", None, ""),
        (None, None, ""),
    ],
)
async def test_vendors_bear_our_names(called, ours, prices):
    row = await row_of(custom_llm_provider=called, model="m")
    assert dict(row.dims)["upstream"] == ours
    assert (row.rating.provider, row.rating.model) == (prices, "m")


async def test_price_is_looked_up_without_the_proxy_s_prefix():
    assert (
        await row_of(custom_llm_provider="vertex_ai", model="vertex_ai/gemini-2.5-pro")
    ).rating.model == "gemini-2.5-pro"
    # A slash that belongs to the model stays.
    assert (await row_of(custom_llm_provider="openrouter", model="openai/gpt-4.1")).rating.model == "openai/gpt-4.1"
    assert dict((await row_of(model="openai/gpt-4.1")).dims)["model"] == "openai/gpt-4.1"


async def test_answer_from_the_proxy_s_cache_has_no_price():
    row = await row_of(cache_hit="True")
    assert row.rating is None
    assert row.input_tokens == 100
    assert dict((await row_of(cache_hit="False")).rating.counts) == {
        "input": 50,
        "cache_read": 40,
        "cache_write": 10,
        "output": 7,
    }


async def test_metadata_reads_as_an_object_or_as_its_text():
    told = {"additional_usage_values": {"cache_read_input_tokens": 4}}
    for metadata in (told, json.dumps(told)):
        row = await row_of(metadata=metadata)
        assert (row.cache_read_tokens, row.cache_write_tokens) == (4, None)
    for metadata in (None, {}, "", "{", "[]", {"additional_usage_values": None}, {"additional_usage_values": []}):
        assert (await row_of(metadata=metadata)).cache_read_tokens is None


async def test_nothing_personal_and_nothing_of_one_request_is_booked():
    private = {
        "requester_ip_address": "198.51.100.7",
        "metadata": {"user_api_key_user_email": "ada@example.com", "requester_ip_address": "198.51.100.7"},
        "messages": [{"content": "secret"}],
        "response": {"choices": []},
        "session_id": "s-1",
        "request_tags": ["User-Agent: curl"],
        "api_base": "https://api.openai.com/v1",
        "end_user": "bob@example.com",
    }
    row = await row_of(**private, status="failure")
    assert json.loads(row.detail) == {"failed_requests": 1, "spend": 0.5}
    assert not any("@" in (value or "") for _, value in row.dims)


async def test_probe_equals_the_fetch_and_sees_a_new_log_and_a_late_one():
    logs = [log(f"r{n}", END - HOUR / 2 + n * timedelta(seconds=1)) for n in range(5)]
    window = Window(END - 2 * HOUR, END)

    async def probe(proxy):
        return (await LITELLM.probe(LOGS.target, "logs", LOGS.grain, window, Script(proxy))).digest

    proxy = Proxy(logs)
    first = await probe(proxy)
    assert proxy.asked == [
        {
            "start_date": "2026-11-22 08:00:00",
            "end_date": "2026-11-22 10:00:00",
            "page_size": "1",
            "sort_by": "startTime",
            "sort_order": "desc",
        }
    ]
    assert first == (await fetch_logs(Proxy(logs), window)).digest == await probe(Proxy(logs))
    assert first != await probe(Proxy([*logs, log("new", END - timedelta(seconds=1))]))
    assert first != await probe(Proxy([*logs, log("late", END - HOUR)]))
    # Beyond its count, the newest log alone tells.
    assert await probe(Proxy(logs, cap=3)) == (await fetch_logs(Proxy(logs, cap=3), window)).digest
    assert await probe(Proxy([])) == (await fetch_logs(Proxy([]), window)).digest


# ── Days ────────────────────────────────────────────────────────────────────────────────────────


def day(spend, providers, date="2026-11-21", **metrics):
    return {
        "date": date,
        "metrics": {"spend": spend, **metrics},
        "breakdown": {
            "providers": {
                name: {
                    "metrics": {"spend": total},
                    "api_key_breakdown": {key: {"metrics": {"spend": of_key}} for key, of_key in keys.items()},
                }
                for name, (total, keys) in providers.items()
            }
        },
    }


async def amounts(*days, group_by=("api_key_id",)):
    page = {"results": list(days), "metadata": {"page": 1, "total_pages": 1}}
    grain = LITELLM.grain("activity", {"group_by": {"activity": list(group_by)}})
    snapshot = await LITELLM.fetch(ACTIVITY.target, "activity", grain, ACTIVITY.window(1), Script(page))
    rows = [dict(row.dims) | {"amount": row.amount} for bucket in snapshot.buckets for row in bucket.rows]
    return {(row.get("upstream"), row.get("api_key_id")): row["amount"] for row in rows}


async def test_spend_is_cut_by_vendor_and_key():
    got = await amounts(day(6, {"openai": (3, {"k1": 1, "k2": 2}), "vertex_ai": (3, {"k1": 3})}))
    assert got == {("openai", "k1"): 1, ("openai", "k2"): 2, ("vertex", "k1"): 3}


async def test_what_no_key_and_no_vendor_owns_is_not_lost():
    """Reserved capacity is charged to the day alone; older releases do not cut vendors by key."""
    got = await amounts(day(5, {"openai": (3, {}), "unknown": (1, {"k1": 1})}, flat_cost=2.5))
    assert got == {("openai", None): 3, (None, "k1"): 1, (None, None): Decimal("3.5")}
    got = await amounts({"date": "2026-11-21", "metrics": {"spend": 5}})
    assert got == {(None, None): 5}


async def test_noise_of_floats_is_no_spend():
    got = await amounts(day(0.30000000000000004, {"openai": (0.3, {"k1": 0.1, "k2": 0.2})}))
    assert got == {("openai", "k1"): Decimal("0.1"), ("openai", "k2"): Decimal("0.2")}


async def test_missing_key_is_null_and_a_key_of_that_name_is_not():
    got = await amounts(day(6, {"openai": (6, {"unattributed": 1, "raw:unattributed": 2, "raw:raw:x": 3})}))
    assert got == {("openai", None): 1, ("openai", "unattributed"): 2, ("openai", "raw:x"): 3}


async def test_without_keys_the_vendors_are_told_apart_still():
    """Or nobody could say which part of the day a connected vendor reports as well."""
    got = await amounts(day(7, {"openai": (4, {"k1": 4}), "anthropic": (2, {"k1": 2})}), group_by=())
    assert got == {("openai", None): 4, ("anthropic", None): 2, (None, None): 1}


async def test_days_are_asked_for_by_their_dates_both_inclusive_and_one_at_a_time():
    script = Script({"results": [], "metadata": {"page": 1, "total_pages": 0}})
    await LITELLM.fetch(ACTIVITY.target, "activity", ACTIVITY.grain, ACTIVITY.window(3), script)
    assert script.query(0) == [("start_date", "2026-11-19"), ("end_date", "2026-11-21"), ("page_size", "1000")]
    assert LITELLM.sources["activity"].chain_buckets == 1


@pytest.mark.parametrize("date", ["", "today", "2026-11-21T00:00:00", "2026-02-30", None, 7])
async def test_what_is_no_day_is_drift(date):
    with pytest.raises(SchemaDriftError):
        await amounts(day(1, {}, date=date))


def test_rows_may_be_another_vendor_s_money():
    assert {name: spec.upstream for name, spec in LITELLM.sources.items() if spec.is_report} == {
        "logs": "upstream",
        "activity": "upstream",
    }


# ── Keys ────────────────────────────────────────────────────────────────────────────────────────


async def identify(*answers):
    script = Script(*answers)
    return await LITELLM.identify(LOGS.target, script), script


async def test_proxy_is_known_by_its_address():
    identity, script = await identify({"users": [], "total": 0, "page": 1, "page_size": 1, "total_pages": 0})
    assert identity == Identity(LOGS.target.base_url)
    assert [(r.url.path, dict(r.url.params)) for r in script.requests] == [
        ("/user/list", {"page": "1", "page_size": "1"})
    ]


async def test_key_that_sees_only_its_own_logs_is_refused():
    """The logs would come without an error, and without everybody else's."""
    refusal = httpx.Response(
        403, json={"detail": {"error": "Only proxy admins and organization admins can list users."}}
    )
    with pytest.raises(ForbiddenError, match="proxy_admin"):
        await identify(refusal)
    with pytest.raises(CredentialError):
        await identify(httpx.Response(401))


async def test_older_release_without_the_list_is_proved_by_its_logs():
    identity, script = await identify(httpx.Response(404), {"data": [], "total_pages": 0})
    assert identity == Identity(LOGS.target.base_url)
    assert [request.url.path for request in script.requests] == ["/user/list", "/spend/logs/v2"]


def test_master_key_is_whatever_its_owner_chose():
    for key in ("sk-1234", "sk-admin-1", "anything"):
        LITELLM.check_credential(key)
    for key in ("sk-ant-api03-1", "sk-proj-1", "sk-or-v1-1"):
        with pytest.raises(CredentialError, match="master key"):
            LITELLM.check_credential(key)


def test_there_is_no_address_that_all_proxies_share():
    assert LiteLLMPoller().default_base_url == ""
