"""The official Python SDK against `/v2`, endpoint by endpoint, with what its own live tests expect of the server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from time import time
from typing import Any

import anyio
import pytest
from qstash import AsyncQStash
from qstash.dlq import DlqMessage
from qstash.errors import QStashError
from qstash.log import Log, LogState
from qstash.schedule import ScheduleState

from tests.books_kit import until
from tests.push_kit import Arrived, Endpoint, Reply, open_endpoint
from tests.v2_kit import Api, open_api

pytestmark = pytest.mark.anyio

CRON = "1 1 1 1 1"


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """Answers with the status that its path names, else 200; `/sleep` does not answer at all."""
    async with open_endpoint() as opened:

        async def judge(one: Arrived) -> Reply:
            name = one.target.partition("?")[0].rpartition("/")[2]
            if name == "sleep":
                await anyio.sleep_forever()
            return Reply(int(name), {}, b"404 Not Found" if name == "404" else b"ok") if name.isdecimal() else Reply()

        opened.judge = judge
        yield opened


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with open_api(database_url) as opened:
        yield opened


@pytest.fixture
async def live(api: Api) -> AsyncIterator[Api]:
    """With a worker."""
    async with api.pushing.working():
        yield api


async def refusal(call: Any) -> str:
    with pytest.raises(QStashError) as refused:
        await call
    return str(refused.value)


async def events(sdk: AsyncQStash, count: int, **wanted: Any) -> list[Log]:
    """Wait until so many log lines match."""
    found: list[Log] = []

    async def are_there() -> bool:
        found[:] = (await sdk.log.list(filter=wanted)).logs
        return len(found) >= count

    await until(are_there, f"{count} log lines of {wanted}", wait_s=15)
    return found


async def delivered(sdk: AsyncQStash, message_id: str) -> Log:
    (line,) = await events(sdk, 1, message_id=message_id, state=LogState.DELIVERED)
    return line


async def letters(sdk: AsyncQStash, count: int, **wanted: Any) -> list[DlqMessage]:
    found: list[DlqMessage] = []

    async def are_there() -> bool:
        found[:] = (await sdk.dlq.list(filter=wanted)).messages
        return len(found) >= count

    await until(are_there, f"{count} dead letters of {wanted}", wait_s=15)
    return found


# ── Publish, enqueue, batch ─────────────────────────────────────────────────────────────────────


async def test_publish_with_everything(live: Api, endpoint: Endpoint) -> None:
    """Each option of the SDK, in the message at once, in the log and at the endpoint."""
    sdk = live.sdk
    published = await sdk.message.publish(
        url=f"{endpoint.url}/200?a=[1]",
        body="hello ü",
        method="PUT",
        content_type="text/plain",
        headers={"test-header": "test-value", "Upstash-Callback-Retries": "forwarded as it is"},
        callback=f"{endpoint.url}/callback",
        failure_callback=f"{endpoint.url}/failure",
        callback_headers={"Forward-X-Callback": "c", "Retries": "1", "X-Bare": "b"},
        failure_callback_headers={"Upstash-Failure-Callback-Forward-X-Failure": "f"},
        retries=2,
        retry_delay="7000 * retried",
        timeout=30,
        content_based_deduplication=False,
        flow_control={"key": "a/b", "parallelism": 3, "rate": 4, "period": "1h30m3s"},
        label="some-label",
    )
    message = await sdk.message.get(published.message_id)
    assert (message.url, message.method, message.body, message.body_base64) == (
        f"{endpoint.url}/200?a=[1]", "PUT", "hello ü", None,
    )  # fmt: skip
    assert message.headers == {
        "Content-Type": ["text/plain"], "Test-Header": ["test-value"],
        "Upstash-Callback-Retries": ["forwarded as it is"],
    }  # fmt: skip
    callback = (f"{endpoint.url}/callback", {"X-Callback": ["c"], "X-Bare": ["b"]})
    assert (message.callback, message.callback_headers) == callback
    assert (message.failure_callback, message.failure_callback_headers) == (
        f"{endpoint.url}/failure", {"X-Failure": ["f"]},
    )  # fmt: skip
    assert (message.max_retries, message.retry_delay_expression, message.label) == (2, "7000 * retried", "some-label")
    assert message.flow_control is not None
    assert (message.flow_control.key, message.flow_control.parallelism, message.flow_control.rate) == ("a/b", 3, 4)
    assert (message.flow_control.period, message.caller_ip) == (5_403, "127.0.0.1")
    assert message.not_before == message.created_at
    assert abs(message.created_at / 1000 - time()) < 60
    line = await delivered(sdk, published.message_id)
    assert (line.label, line.retry_delay_expression, line.timeout, line.method) == (
        "some-label", "7000 * retried", 30_000, "PUT",
    )  # fmt: skip
    assert line.flow_control is not None
    assert line.body_base64 == "aGVsbG8gw7w="
    (one,) = await endpoint.has(1, "/200")
    assert (one.method, one.target, one.body) == ("PUT", "/200?a=[1]", "hello ü".encode())
    assert one.headers["test-header"] == "test-value"
    assert one.headers["upstash-callback-retries"] == "forwarded as it is"
    (callback,) = await endpoint.has(1, "/callback")
    report = json.loads(callback.body)
    assert (callback.headers["x-callback"], callback.headers["x-bare"]) == ("c", "b")
    assert (report["status"], report["sourceMessageId"], report["maxRetries"]) == (200, published.message_id, 2)
    states = [line.state for line in (await sdk.log.list(filter={"message_id": published.message_id})).logs]
    assert states == [LogState.DELIVERED, LogState.ACTIVE, LogState.CREATED]


async def test_a_get_with_a_body_is_delivered_once_and_stays_readable(live: Api, endpoint: Endpoint) -> None:
    published = await live.sdk.message.publish_json(
        url=f"{endpoint.url}/200", method="GET", body={"ex_key": "ex_value"}, headers={"test-header": "v"}
    )
    await delivered(live.sdk, published.message_id)
    (one,) = endpoint.arrived
    assert (one.method, one.body, one.headers["content-type"]) == ("GET", b'{"ex_key": "ex_value"}', "application/json")
    message = await live.sdk.message.get(published.message_id)
    assert message.body == '{"ex_key": "ex_value"}'
    await live.sdk.message.cancel(published.message_id)  # too late, but no error


async def test_a_body_that_is_no_text_is_shown_as_base64_and_none_not_at_all(api: Api, endpoint: Endpoint) -> None:
    binary = await api.sdk.message.publish(url=endpoint.url, body=b"\xff\x00")
    empty = await api.sdk.message.publish(url=endpoint.url)
    shown = await api.sdk.message.get(binary.message_id)
    assert (shown.body, shown.body_base64, shown.url, shown.headers) == (None, "/wA=", endpoint.url, None)
    shown = await api.sdk.message.get(empty.message_id)
    assert (shown.body, shown.body_base64) == (None, None)


async def test_delay_and_not_before(api: Api, endpoint: Endpoint) -> None:
    delayed = await api.sdk.message.publish(url=endpoint.url, delay="10d")
    at = int(time()) + 100
    dated = await api.sdk.message.publish(url=endpoint.url, delay=5, not_before=at)
    message = await api.sdk.message.get(delayed.message_id)
    assert message.not_before - message.created_at == 864_000_000
    assert (await api.sdk.message.get(dated.message_id)).not_before == at * 1000


async def test_deduplication(api: Api, endpoint: Endpoint) -> None:
    sdk = api.sdk
    first = await sdk.message.publish(url=endpoint.url, deduplication_id="one", body="1")
    again = await sdk.message.publish(url=f"{endpoint.url}/other", deduplication_id="one", body="2")
    assert (first.deduplicated, again.deduplicated, again.message_id) == (False, True, first.message_id)
    await sdk.message.cancel(first.message_id)
    assert (await sdk.message.publish(url=endpoint.url, deduplication_id="one")).deduplicated
    content = {"url": endpoint.url, "content_based_deduplication": True}
    kept = await sdk.message.publish(**content, body="x", headers={"A": "1"})
    assert (await sdk.message.publish(**content, body="x", headers={"A": "1"})).message_id == kept.message_id
    for other in ({"body": "y", "headers": {"A": "1"}}, {"body": "x", "headers": {"A": "2"}}, {"body": "x"}):
        assert not (await sdk.message.publish(**content, **other)).deduplicated
    assert "cannot contain ':'" in await refusal(sdk.message.publish(url=endpoint.url, deduplication_id="a:b"))


async def test_batch(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    await sdk.url_group.upsert_endpoints(url_group="group", endpoints=[{"url": f"{endpoint.url}/201"}])
    made = await sdk.message.batch(
        [
            {"url": f"{endpoint.url}/200", "body": "1", "headers": {"content-type": "a/b"}, "retries": 0, "label": "l"},
            {"url_group": "group", "body": "2"},
            {"url": f"{endpoint.url}/202", "queue": "q", "body": "3"},
            {"url_group": "group", "queue": "q"},
        ]
    )
    one, group, queued, group_queued = made
    assert isinstance(group, list)
    assert isinstance(group_queued, list)
    assert (await sdk.message.get(one.message_id)).label == "l"
    assert (await sdk.message.get(queued.message_id)).queue == "q"
    assert (await sdk.message.get(group[0].message_id)).url_group == "group"
    for message_id in (one.message_id, group[0].message_id, queued.message_id, group_queued[0].message_id):
        await delivered(sdk, message_id)
    assert endpoint.at("/200")[0].headers["content-type"] == "a/b"
    flows = await sdk.message.batch_json(
        [
            {"url": endpoint.url, "delay": 60, "flow_control": {"key": "k1", "rate": 1}},
            {"url": endpoint.url, "delay": 60, "flow_control": {"key": "k2", "rate": 23, "period": "1h30m3s"}},
            {"url": endpoint.url, "delay": 60, "flow_control": {"key": "k3", "parallelism": 5}},
        ]
    )
    found = [(await sdk.message.get(flow.message_id)).flow_control for flow in flows]
    assert [(flow.parallelism, flow.rate, flow.period) for flow in found] == [
        (None, 1, 1), (None, 23, 5_403), (5, None, 1),
    ]  # fmt: skip


async def test_a_group_gets_one_message_for_each_endpoint(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    await sdk.url_group.delete("python_url_group")  # not there: no error
    await sdk.url_group.upsert_endpoints(
        url_group="python_url_group",
        endpoints=[{"url": f"{endpoint.url}/200"}, {"url": f"{endpoint.url}/201", "name": "second"}],
    )
    made = await sdk.message.publish(url_group="python_url_group", body="b", deduplication_id="once")
    assert isinstance(made, list)
    assert [one.url for one in made] == [f"{endpoint.url}/200", f"{endpoint.url}/201"]
    for one, name in zip(made, (None, "second"), strict=True):
        line = await delivered(sdk, one.message_id)
        assert (line.url_group, line.endpoint) == ("python_url_group", name)
        message = await sdk.message.get(one.message_id)
        assert (message.url_group, message.endpoint, message.body) == ("python_url_group", name, "b")
    assert {one.headers["upstash-topic-name"] for one in endpoint.arrived} == {"python_url_group"}
    again = await sdk.message.publish(url_group="python_url_group", body="b", deduplication_id="once")
    assert [(one.message_id, one.deduplicated) for one in again] == [(one.message_id, True) for one in made]
    assert "invalid scheme" in await refusal(sdk.message.publish(url_group="nobody"))


async def test_enqueue_keeps_the_order(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    ids = []
    for number in range(5):
        made = await sdk.message.enqueue_json(queue="test_queue", url=f"{endpoint.url}/200", body=number)
        ids.append(made.message_id)
    for message_id in ids:
        await delivered(sdk, message_id)
    assert [one.body for one in endpoint.arrived] == [b"0", b"1", b"2", b"3", b"4"]
    queue = await sdk.queue.get("test_queue")
    assert (queue.parallelism, queue.lag, queue.paused) == (1, 0, False)


# ── Cancel ──────────────────────────────────────────────────────────────────────────────────────


async def test_cancel_scheduled_active_and_waiting_for_a_retry(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    scheduled = await sdk.message.publish(url=endpoint.url, delay=60)
    active = await sdk.message.publish(url=f"{endpoint.url}/sleep")
    waiting = await sdk.message.publish(url=f"{endpoint.url}/404")
    await endpoint.has(1, "/sleep")
    await events(sdk, 1, message_id=waiting.message_id, state=LogState.RETRY)
    for message_id in (scheduled.message_id, active.message_id, waiting.message_id):
        answer = await live.client.delete(f"/v2/messages/{message_id}")
        assert (answer.status_code, answer.json()) == (200, {"cancelled": 1})
        assert (await live.client.delete(f"/v2/messages/{message_id}")).json() == {"cancelled": 0}
        assert await sdk.message.cancel_many([message_id]) == 0
        states = [line.state for line in (await sdk.log.list(filter={"message_id": message_id})).logs]
        assert states[:2] == [LogState.CANCELED, LogState.CANCEL_REQUESTED]
    unknown = f"{scheduled.message_id[:-4]}zzzz"
    assert "404" in await refusal(sdk.message.cancel(unknown))
    assert "404" in await refusal(sdk.message.cancel("gibberish"))
    assert "404" in await refusal(sdk.message.get(unknown))


async def test_cancel_many_and_all_count_each_message_once(live: Api, endpoint: Endpoint) -> None:
    sdk, client = live.sdk, live.client

    async def some(count: int, **more: Any) -> list[str]:
        made = await sdk.message.batch_json([{"url": f"{endpoint.url}/x", "delay": "10d", **more}] * count)
        return [one.message_id for one in made]

    ids = [(await sdk.message.publish(url=f"{endpoint.url}/404")).message_id for _ in range(2)]
    assert await sdk.message.cancel_many([*ids, "msg_unknown", ids[0]]) == 2
    assert await sdk.message.cancel_all() == 0
    a, b, _c = await some(3)
    params: list[tuple[str, str]] = [("messageIds", a), ("messageIds", b)]
    assert (await client.delete("/v2/messages", params=params)).json() == {"cancelled": 2}
    assert (await client.delete("/v2/messages", params={"count": 100})).json() == {"cancelled": 1}
    await some(2, label="one")
    await some(2, label="two")
    await some(1, flow_control={"key": "f/1", "rate": 1})
    for params, count in [
        ([("label", "one"), ("count", "1")], 1),
        ([("label", "one"), ("label", "two")], 3),
        ([("flowControlKey", "nobody")], 0),
        ([("flowControlKey", "nobody"), ("flowControlKey", "f/1")], 1),
    ]:
        assert (await client.delete("/v2/messages", params=params)).json() == {"cancelled": count}
    await some(3)
    assert (await client.delete("/v2/messages", params=[("path", "/y"), ("path", "/x"), ("count", 1)])).json() == {
        "cancelled": 1
    }
    assert (await client.delete("/v2/messages", params={"host": "127.0.0.1", "queueName": "q"})).json() == {
        "cancelled": 0
    }
    assert await sdk.message.cancel_all() == 2
    assert not endpoint.at("/x")


# ── Logs ────────────────────────────────────────────────────────────────────────────────────────


async def test_logs_are_filtered_and_paged(live: Api, endpoint: Endpoint) -> None:
    sdk, client = live.sdk, live.client
    made = [
        await sdk.message.publish(url=f"{endpoint.url}/200?n={n}", label=f"label-{n}", retry_delay="15000")
        for n in range(2)
    ]
    for one in made:
        await delivered(sdk, one.message_id)
    lines = (await sdk.log.list(filter={"label": "label-0"})).logs
    assert len(lines) == 3
    assert {line.label for line in lines} == {"label-0"}
    assert {line.retry_delay_expression for line in lines} == {"15000"}
    both = (await sdk.log.list(filter={"message_ids": [one.message_id for one in made]})).logs
    assert len(both) == 6
    assert [line.time for line in both] == sorted((line.time for line in both), reverse=True)
    seen, cursor = [], None
    while True:
        page = await sdk.log.list(cursor=cursor, count=4)
        seen += page.logs
        cursor = page.cursor
        if not cursor:
            break
    assert seen == both
    none = (await client.get("/v2/events", params={"url": "https://nobody.example"})).json()
    assert none == {"events": []}
    for params, count in [
        ({"url": [f"{endpoint.url}/200?n=0", f"{endpoint.url}/200?n=1"]}, 6),
        ({"host": "127.0.0.1", "path": "/200"}, 6),
        ({"host": "example.org"}, 0),
        ({"state": "DELIVERED"}, 2),
        ({"state": "CANCELLED"}, 0),
        ({"state": "IN_PROGRESS"}, 2),
        ({"fromDate": 4_000_000_000_000}, 0),
        ({"toDate": 4_000_000_000_000, "callerIp": "127.0.0.1"}, 6),
        ({"count": 1}, 1),
    ]:
        answer = (await client.get("/v2/logs", params=params)).json()
        assert len(answer["logs"]) == count, params
    groups = (await client.get("/v2/events", params={"groupBy": "messageId"})).json()["messages"]
    assert [group["messageId"] for group in groups] == [one.message_id for one in reversed(made)]
    assert [len(group["events"]) for group in groups] == [3, 3]


# ── The dead letter queue ───────────────────────────────────────────────────────────────────────


async def test_dlq(live: Api, endpoint: Endpoint) -> None:
    sdk, client = live.sdk, live.client

    async def fail(count: int, **more: Any) -> list[DlqMessage]:
        ids = [
            (await sdk.message.publish(url=f"{endpoint.url}/404", retries=0, **more)).message_id for _ in range(count)
        ]
        return [letter for id_ in ids for letter in await letters(sdk, 1, message_id=id_)]

    (one,) = await fail(1, retry_delay="7000 * retried", label="l", body="b")
    assert (one.response_status, one.response_body) == (404, "404 Not Found")
    assert (one.retry_delay_expression, one.label, one.body) == ("7000 * retried", "l", "b")
    assert await sdk.dlq.get(one.dlq_id) == one
    page = await sdk.dlq.list(count=1, filter={"message_id": one.message_id, "response_status": 404})
    assert (page.messages, page.cursor) == ([one], None)
    await sdk.dlq.delete(one.dlq_id)
    assert "404" in await refusal(sdk.dlq.delete(one.dlq_id))
    assert "404" in await refusal(sdk.dlq.get(one.dlq_id))

    five = await fail(5)
    assert await sdk.dlq.delete_many([letter.dlq_id for letter in five]) == 5
    assert (await sdk.dlq.list()).messages == []
    assert await sdk.dlq.delete_many([letter.dlq_id for letter in five]) == 0

    three = await fail(3, label="again", flow_control={"key": "k", "parallelism": 10, "rate": 5, "period": "1d"})
    shown = (await client.get("/v2/dlq", params={"label": ["again", "other"], "flowControlKey": "k"})).json()
    assert len(shown["messages"]) == 3
    assert "cursor" not in shown
    assert {name: shown["messages"][0][name] for name in ("labels", "parallelism", "rate", "period")} == {
        "labels": ["again"], "parallelism": 10, "rate": 5, "period": 86_400,
    }  # fmt: skip
    misspelt = await client.delete("/v2/dlq", params={"labeel": "again", "count": 100})
    assert misspelt.status_code == 400
    none = await client.delete("/v2/dlq", params={"url": "https://nobody.example", "count": 100})
    assert (none.status_code, none.json()) == (200, {"deleted": 0})
    filters: dict[str, str | int] = {
        "messageId": "msg_x", "url": "https://a.example", "topicName": "t", "scheduleId": "s", "queueName": "q",
        "callerIp": "192.0.2.1", "label": "x", "flowControlKey": "x", "responseStatus": 999,
        "fromDate": 4_070_908_800_000, "toDate": 946_684_800_000,
    }  # fmt: skip
    for name, value in filters.items():
        retried = await client.post("/v2/dlq/retry", params={name: value, "count": 100})
        assert (retried.status_code, retried.json()) == (201, {"responses": []}), name
    retried = await client.post("/v2/dlq/retry", params={"dlqIds": [letter.dlq_id for letter in three[:2]]})
    assert retried.status_code == 201
    new = [made["messageId"] for made in retried.json()["responses"]]
    assert not {*new} & {letter.message_id for letter in three}
    assert (await client.post("/v2/dlq/retry", params={"dlqIds": three[0].dlq_id})).status_code == 404
    single = await client.post(f"/v2/dlq/retry/{three[2].dlq_id}", headers={"Upstash-Retries": "1"})
    assert single.status_code == 201
    assert (await sdk.message.get(single.json()["messageId"])).max_retries == 1
    gone = await client.delete("/v2/dlq", params={"dlqIds": [letter.dlq_id for letter in three]})
    assert (gone.status_code, gone.json()) == (200, {"deleted": 0})
    for id_ in new:  # they fail again at once
        await letters(sdk, 1, message_id=id_)
    assert (await client.post("/v2/dlq/retry", params={"label": "again", "count": 1})).json().keys() == {
        "responses", "cursor",
    }  # fmt: skip
    assert (await client.delete("/v2/dlq", params={"label": "again", "count": 1})).json()["deleted"] == 1


# ── Flow control ────────────────────────────────────────────────────────────────────────────────


async def test_flow_control(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    flow = {"key": "flow/key", "parallelism": 5, "rate": 10, "period": "1m"}
    made = await sdk.message.publish(url=f"{endpoint.url}/sleep", flow_control=flow)
    info = await sdk.flow_control.get("flow/key")
    assert (info.key, info.parallelism_max, info.rate_max, info.rate_period) == ("flow/key", 5, 10, 60)
    await endpoint.has(1)
    info = await sdk.flow_control.get("flow/key")
    assert (info.parallelism_count, info.rate_count, info.wait_list_size, info.is_paused) == (1, 1, 0, False)
    assert abs(info.rate_period_start - time()) < 60
    await sdk.flow_control.reset_rate("flow/key")
    assert (await sdk.flow_control.get("flow/key")).rate_count == 0
    await sdk.flow_control.pause("flow/key")
    assert (await sdk.flow_control.get("flow/key")).is_paused
    await sdk.message.publish(url=f"{endpoint.url}/sleep", flow_control=flow)
    assert (await sdk.flow_control.get("flow/key")).wait_list_size == 1
    await sdk.flow_control.resume("flow/key")
    await endpoint.has(2)
    await sdk.flow_control.pin("flow/key", {"parallelism": 3, "rate": 20, "period": 120})
    info = await sdk.flow_control.get("flow/key")
    assert (info.is_pinned_parallelism, info.is_pinned_rate) == (True, True)
    assert (info.parallelism_max, info.rate_max, info.rate_period) == (3, 20, 120)
    await sdk.flow_control.unpin("flow/key", {"parallelism": True})
    info = await sdk.flow_control.get("flow/key")
    assert (info.is_pinned_parallelism, info.is_pinned_rate) == (False, True)
    await sdk.flow_control.unpin("flow/key", {"parallelism": True, "rate": True})
    assert not (await sdk.flow_control.get("flow/key")).is_pinned_rate
    await sdk.message.cancel(made.message_id)
    assert "404" in await refusal(sdk.flow_control.get("nobody"))
    whole = await sdk.flow_control.get_global_parallelism()
    assert (type(whole.parallelism_max), type(whole.parallelism_count)) == (int, int)
    listed = (await live.client.get("/v2/flowControl", params={"search": "low/"})).json()
    assert [one["flowControlKey"] for one in listed] == ["flow/key"]
    assert (await live.client.get("/v2/flowControl", params={"search": "high"})).json() == []


# ── Queues, schedules, groups, keys ─────────────────────────────────────────────────────────────


async def test_queues(api: Api, endpoint: Endpoint) -> None:
    sdk = api.sdk
    await sdk.queue.delete("q1")  # not there: no error
    await sdk.queue.upsert(queue="q1", parallelism=1)
    await sdk.queue.upsert(queue="q1", parallelism=2)
    await sdk.queue.upsert("-q_2.")
    queue = await sdk.queue.get("q1")
    assert (queue.name, queue.parallelism, queue.lag, queue.paused) == ("q1", 2, 0, False)
    assert queue.updated_at >= queue.created_at > 1_700_000_000_000
    assert sorted(queue.name for queue in await sdk.queue.list()) == ["-q_2.", "q1"]
    await sdk.queue.pause("q1")
    assert (await sdk.queue.get("q1")).paused
    await sdk.queue.resume("q1")
    assert not (await sdk.queue.get("q1")).paused
    for is_paused in (True, False):
        await sdk.queue.upsert("q1", paused=is_paused)
        assert (await sdk.queue.get("q1")).paused is is_paused
    made = await sdk.message.enqueue(queue="q1", url=endpoint.url)
    assert (await sdk.queue.get("q1")).lag == 1
    await sdk.queue.delete("q1")
    await sdk.queue.delete("-q_2.")
    assert await sdk.queue.list() == []
    assert "404" in await refusal(sdk.queue.get("q1"))
    states = [line.state for line in (await sdk.log.list(filter={"message_id": made.message_id})).logs]
    assert states[0] == LogState.CANCELED


async def test_schedules(api: Api) -> None:
    sdk, url = api.sdk, "http://127.0.0.1:9/work"
    id_ = await sdk.schedule.create_json(
        cron="*/10 * * * *",
        destination="http://127.0.0.1",
        body={"a": 1},
        headers={"Bypass-Tunnel-Reminder": "client-test", "test-header": "test-value"},
        retries=5,
        retry_delay="5000 * retried",
        callback="http://127.0.0.1",
        delay=10,
        timeout="1m",
        schedule_id="-V1StGXR8_Z5jdHi6B-my",
        queue="schedule-queue",
        flow_control={"key": "k", "parallelism": 2},
        label="l",
    )
    assert id_ == "-V1StGXR8_Z5jdHi6B-my"
    found = await sdk.schedule.get(id_)
    assert (found.cron, found.destination, found.body, found.method) == (
        "*/10 * * * *", "http://127.0.0.1", '{"a": 1}', "POST",
    )  # fmt: skip
    assert found.headers == {
        "Bypass-Tunnel-Reminder": ["client-test"], "Content-Type": ["application/json"], "Test-Header": ["test-value"],
    }  # fmt: skip
    assert (found.retries, found.retry_delay_expression, found.callback, found.delay, found.timeout) == (
        5, "5000 * retried", "http://127.0.0.1", 10, 60,
    )  # fmt: skip
    assert (found.queue, found.label, found.paused) == ("schedule-queue", "l", False)
    assert found.flow_control is not None
    assert (found.flow_control.parallelism, found.flow_control.rate, found.flow_control.period) == (2, None, 1)
    await sdk.schedule.create(cron=CRON, destination=url, schedule_id=id_)  # replaces all of it
    found = await sdk.schedule.get(id_)
    assert (found.body, found.headers, found.label, found.delay, found.retries) == (None, None, None, None, 3)
    other = await sdk.schedule.create(cron="CRON_TZ=Europe/Berlin 0 8 * * 1-5", destination=url)
    assert {one.schedule_id for one in await sdk.schedule.list()} == {id_, other}
    await sdk.schedule.pause(id_)
    assert (await sdk.schedule.get(id_)).paused
    await sdk.schedule.resume(id_)
    assert not (await sdk.schedule.get(id_)).paused
    assert (await api.client.post(f"/v2/schedules/{id_}/pause")).status_code == 200  # as documented
    assert (await sdk.schedule.get(id_)).paused
    await sdk.schedule.delete(id_)
    await sdk.schedule.delete(other)
    assert await sdk.schedule.list() == []
    assert "404" in await refusal(sdk.schedule.get(id_))


async def test_a_schedule_fires(live: Api, endpoint: Endpoint) -> None:
    sdk = live.sdk
    await sdk.url_group.upsert_endpoints(url_group="g", endpoints=[{"url": f"{endpoint.url}/200", "name": "n"}])
    id_ = await sdk.schedule.create(cron="* * * * *", destination="g", body="tick", headers={"X-A": "b"})
    await live.pushing.db.execute("update schedule set next_at = now()")
    assert await live.schedules.fire_due() == 1
    (one,) = await endpoint.has(1)
    assert (one.body, one.headers["x-a"], one.headers["upstash-schedule-id"]) == (b"tick", "b", id_)
    line = await delivered(sdk, one.message_id)
    assert (line.schedule_id, line.url_group, line.endpoint) == (id_, "g", "n")
    found = await sdk.schedule.get(id_)
    assert found.last_schedule_states == {one.message_id: ScheduleState.SUCCESS}
    assert found.next_schedule_time is not None
    assert found.last_schedule_time is not None
    assert (await live.client.get("/v2/events", params={"scheduleId": id_, "state": "DELIVERED"})).json()["events"]


async def test_url_groups(api: Api) -> None:
    sdk, url = api.sdk, "http://127.0.0.1:9"
    await sdk.url_group.delete("g")
    await sdk.url_group.upsert_endpoints(
        url_group="g", endpoints=[{"url": f"{url}/200"}, {"url": f"{url}/201", "name": "two"}]
    )
    shown = (await api.client.get("/v2/topics/g")).json()
    assert shown["endpoints"] == [{"url": f"{url}/200"}, {"name": "two", "url": f"{url}/201"}]
    group = await sdk.url_group.get("g")
    assert (group.name, len(group.endpoints), group.updated_at >= group.created_at > 0) == ("g", 2, True)
    assert [one.name for one in await sdk.url_group.list()] == ["g"]
    await sdk.url_group.upsert_endpoints(url_group="g", endpoints=[{"url": f"{url}/202", "name": "two"}])
    assert [one.url for one in (await sdk.url_group.get("g")).endpoints] == [f"{url}/200", f"{url}/202"]
    await sdk.url_group.remove_endpoints(url_group="g", endpoints=[{"url": f"{url}/202"}])
    assert [one.url for one in (await sdk.url_group.get("g")).endpoints] == [f"{url}/200"]
    assert "404" in await refusal(sdk.url_group.remove_endpoints(url_group="no", endpoints=[{"url": url}]))
    await sdk.url_group.remove_endpoints(url_group="g", endpoints=[{"url": f"{url}/200"}])
    assert await sdk.url_group.list() == []
    assert "404" in await refusal(sdk.url_group.get("g"))


async def test_signing_keys(api: Api) -> None:
    before = await api.sdk.signing_key.get()
    assert (before.current, before.next) == (api.pushing.keys.current, api.pushing.keys.next)
    after = await api.sdk.signing_key.rotate()
    assert after.current == before.next
    assert after.next not in (before.current, before.next)
    assert await api.sdk.signing_key.get() == after


# ── What is not to be seen ──────────────────────────────────────────────────────────────────────


async def test_what_is_redacted_is_delivered_but_never_shown(live: Api, endpoint: Endpoint) -> None:
    sdk, secret = live.sdk, "s3cret"
    message = {
        "body": secret,
        "headers": {"Authorization": f"Bearer {secret}", "X-Secret": secret},
        "callback_headers": {"Forward-X-Secret": secret},
        "redact": {"body": True, "header": ["authorization", "X-Secret"]},
    }
    ok = await sdk.message.publish(url=f"{endpoint.url}/200", callback=f"{endpoint.url}/cb", **message)
    bad = await sdk.message.publish(url=f"{endpoint.url}/404", retries=0, **message)
    id_ = await sdk.schedule.create(destination=endpoint.url, cron=CRON, callback=f"{endpoint.url}/cb", **message)
    everything = await sdk.message.publish(
        url=endpoint.url, headers={"A": secret}, content_type=secret, redact={"header": True}
    )
    await delivered(sdk, ok.message_id)
    (letter,) = await letters(sdk, 1, message_id=bad.message_id)
    (callback,) = await endpoint.has(1, "/cb")
    for path in (
        f"/v2/messages/{ok.message_id}",
        f"/v2/messages/{everything.message_id}",
        f"/v2/events?messageId={ok.message_id}",
        f"/v2/events?messageIds={bad.message_id},{everything.message_id}&groupBy=messageId",
        "/v2/logs?host=127.0.0.1&state=CREATED",
        "/v2/dlq",
        f"/v2/dlq/{letter.dlq_id}",
        f"/v2/schedules/{id_}",
        "/v2/schedules",
    ):
        answer = await live.client.get(path)
        assert answer.status_code == 200
        assert secret not in answer.text, path
        assert "czNjcmV0" not in answer.text, path  # its base64
        assert "REDACTED:" in answer.text or "UkVEQUNURUQ6" in answer.text, path
    for one in (endpoint.at("/200")[0], endpoint.at("/404")[0]):
        assert (one.body, one.headers["authorization"], one.headers["x-secret"]) == (
            secret.encode(), f"Bearer {secret}", secret,
        )  # fmt: skip
    assert callback.headers["x-secret"] == secret
    again = (await live.client.post(f"/v2/dlq/retry/{letter.dlq_id}")).json()
    await letters(sdk, 1, message_id=again["messageId"])
    assert endpoint.at("/404")[1].body == secret.encode()
