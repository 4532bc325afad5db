"""Every way in which an answer breaks, over a real socket."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.unit.simulator.conftest import OPENAI_HEADERS, Sim, at

pytestmark = pytest.mark.anyio

HOURS = f"/v1/organization/usage/completions?start_time={at('2026-11-22T00:00:00Z')}&bucket_width=1h&limit=5"
MESSAGES = "/v1/organizations/usage_report/messages?starting_at=2026-11-22T00:00:00Z&bucket_width=1h&limit=5"
RANKED = (
    "/v1/organizations/analytics/usage?starting_at=2026-11-21T00:00:00Z&ending_at=2026-11-22T12:00:00Z"
    "&time_bucket_width=1h&group_by[]=model&group_by[]=api_key_id&limit=10"
)


async def raw(sim: Sim, path: str, headers: dict[str, str]) -> tuple[bytes, bytes]:
    """Head and body exactly as they arrive, until the server closes; an abrupt end is an end."""
    url = sim.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    lines = [f"GET {path} HTTP/1.1", "host: x", "connection: close", *(f"{n}: {v}" for n, v in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    received = b""
    try:
        while piece := await reader.read(65536):
            received += piece
    except ConnectionResetError:
        received += b"<reset>"
    writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("status", [401, 403, 408, 429, 500, 503])
async def test_openai_errors_have_its_shape(sim: Sim, status: int) -> None:
    await sim.fault(str(status))
    answer = await sim.get(HOURS)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["openai-organization"]
    assert (await sim.get(HOURS)).status_code == 200


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (529, "overloaded_error"),
    ],
)
async def test_anthropic_errors_have_its_shape(sim: Sim, status: int, kind: str) -> None:
    await sim.fault(str(status))
    answer = await sim.get(MESSAGES)
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == answer.headers["request-id"]


@pytest.mark.parametrize(
    ("how", "header", "value"),
    [
        ("seconds", "retry-after", "7"),
        ("date", "retry-after", "Sun, 22 Nov 2026 10:20:07 GMT"),
        ("ms", "retry-after-ms", "7000"),
        ("none", None, None),
    ],
)
async def test_a_429_says_when_to_return_or_does_not(sim: Sim, how: str, header: str | None, value: str | None) -> None:
    await sim.fault("429", retry_after=how, retry_after_s=7)
    answer = await sim.get(HOURS)
    found = {name: answer.headers[name] for name in ("retry-after", "retry-after-ms") if name in answer.headers}
    assert found == ({} if header is None else {header: value})


@pytest.mark.parametrize(("kind", "status"), [("502", 502), ("not_json", 200)])
async def test_html_comes_where_json_should(sim: Sim, kind: str, status: int) -> None:
    await sim.fault(kind)
    answer = await sim.get(HOURS)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html")
    with pytest.raises(ValueError, match="Expecting value"):
        answer.json()


async def test_a_body_is_cut_below_its_length(sim: Sim) -> None:
    await sim.fault("truncated_body")
    head, body = await raw(sim, HOURS, OPENAI_HEADERS)
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    assert 0 < len(body) < length
    await sim.fault("truncated_body")
    with pytest.raises(httpx.RemoteProtocolError):
        await sim.get(HOURS)


async def test_a_connection_is_reset_after_the_headers(sim: Sim) -> None:
    await sim.fault("reset_after_headers")
    head, body = await raw(sim, HOURS, OPENAI_HEADERS)
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b"<reset>"


async def test_a_held_request_gets_nothing(sim: Sim) -> None:
    await sim.fault("timeout", hold_s=60)
    with pytest.raises(httpx.ReadTimeout):
        await sim.client.get(HOURS, headers=OPENAI_HEADERS, timeout=0.05)
    await sim.fault("timeout", hold_s=0.01)
    assert await raw(sim, HOURS, OPENAI_HEADERS) == (b"<reset>", b"")


async def test_a_body_drips_and_is_whole(sim: Sim) -> None:
    whole = (await sim.get(HOURS)).content
    await sim.fault("slow_drip", drip_s=0.001)
    async with sim.client.stream("GET", HOURS, headers=OPENAI_HEADERS) as answer:
        pieces = [piece async for piece in answer.aiter_raw()]
    assert len(pieces) > 3
    assert b"".join(pieces) == whole
    assert (await sim.get(HOURS)).status_code == 200


async def test_the_date_header_can_lie(sim: Sim) -> None:
    await sim.fault("skewed_date", skew_s=-3600)
    assert (await sim.get(HOURS)).headers["date"] == "Sun, 22 Nov 2026 09:20:00 GMT"
    assert (await sim.get(HOURS)).headers["date"] == "Sun, 22 Nov 2026 10:20:00 GMT"


@pytest.mark.parametrize("path", [HOURS, MESSAGES, RANKED])
async def test_paging_breaks_its_contract(sim: Sim, path: str) -> None:
    await sim.fault("has_more_without_cursor")
    page = await sim.json(path)
    assert (page["has_more"], page["next_page"]) == (True, None)

    await sim.fault("repeat_cursor", count=3)
    first = await sim.json(path)
    again = await sim.json(f"{path}&page={first['next_page']}")
    assert first["data"] == again["data"]
    assert (
        first["next_page"] == again["next_page"] == (await sim.json(f"{path}&page={again['next_page']}"))["next_page"]
    )

    await sim.fault("truncated_chain")
    short = await sim.json(path)
    assert (short["has_more"], short["next_page"]) == (False, None)
    assert len(await sim.chain(path)) > len(short["data"])


@pytest.mark.parametrize("path", [HOURS, MESSAGES, RANKED])
async def test_cursors_lead_past_the_end(sim: Sim, path: str) -> None:
    await sim.fault("empty_past_end", count=3)
    page = await sim.json(path)
    cursors = []
    while page["data"]:
        page = await sim.json(f"{path}&page={page['next_page']}")
    for _ in range(2):
        assert (page["data"], page["has_more"]) == ([], True)
        cursors.append(page["next_page"])
        page = await sim.json(f"{path}&page={page['next_page']}")
    assert page["data"] == []
    assert len(set(cursors)) == 2


async def test_data_grows_between_pages_and_ranked_rows_move(sim: Sim) -> None:
    still = await sim.chain(RANKED)
    await sim.fault("grow_between_pages", count=3, requests=40)
    moved = await sim.chain(RANKED)

    def named(rows: list[Any]) -> list[tuple[Any, ...]]:
        return [(row["starting_at"], row["group"]["model"], row["group"]["api_key_id"]) for row in rows]

    assert len(set(named(still))) == len(still)
    after = await sim.chain(RANKED)
    assert len(set(named(after))) == len(after)
    # A row was listed twice, or was missed, because others overtook it.
    assert named(moved) != named(after)
    assert len(set(named(moved))) < len(moved) or set(named(moved)) != set(named(after))


async def test_an_answer_lacks_rows_once(sim: Sim) -> None:
    full = await sim.json(HOURS)
    await sim.fault("drop_rows", rows=1)
    await sim.fault("drop_rows")
    fewer, emptied = await sim.json(HOURS), await sim.json(HOURS)
    counts = [sum(len(bucket["results"]) for bucket in page["data"]) for page in (full, fewer, emptied)]
    assert counts[0] > max(counts[1:])
    assert len(emptied["data"]) == len(full["data"])
    assert await sim.json(HOURS) == full
    rows = (await sim.json(RANKED))["data"]
    await sim.fault("drop_rows", rows=2)
    assert (await sim.json(RANKED))["data"] == rows[:-2]


async def test_results_are_called_result(sim: Sim) -> None:
    await sim.fault("result_field")
    assert all("result" in bucket and "results" not in bucket for bucket in (await sim.json(HOURS))["data"])


async def test_a_fault_waits_for_the_request_that_it_names(sim: Sim) -> None:
    await sim.fault("500", provider="openai", key="sk-admin-test", path_contains="completions", query_contains="page=",
                    skip=1, count=2)  # fmt: skip
    other = await sim.get(HOURS, authorization="Bearer sk-admin-other")
    first = await sim.get(HOURS)
    follow = f"{HOURS}&page={first.json()['next_page']}"
    statuses = [(await sim.get(follow)).status_code for _ in range(4)]
    assert (other.status_code, first.status_code, statuses) == (200, 200, [200, 500, 500, 200])
    assert (await sim.get(MESSAGES)).status_code == 200


async def test_random_faults_follow_their_seed_and_are_counted(sim: Sim) -> None:
    async def run() -> list[int]:
        await sim.control("POST", "faults", {"rate": 0.5, "kinds": ["429", "500", "529"], "seed": 3})
        return [(await sim.get(path)).status_code for path in [HOURS, MESSAGES] * 20]

    first = await run()
    assert await run() == first
    assert set(first) == {200, 429, 500, 529}
    stats = await sim.control("GET", "stats")
    assert sum(stats["faults"].values()) == 2 * sum(status != 200 for status in first)
    assert sum(stats["requests"].values()) == sum(stats["statuses"].values()) == 80
    await sim.control("DELETE", "faults")
    assert {(await sim.get(HOURS)).status_code for _ in range(20)} == {200}
    await sim.control("DELETE", "stats")
    assert (await sim.control("GET", "stats"))["requests"] == {}


async def test_every_transient_kind_breaks_something(sim: Sim) -> None:
    await sim.control("POST", "faults", {"rate": 1, "kinds": "all-transient", "hold_s": 0.001, "drip_s": 0.0001})
    for _ in range(60):
        await raw(sim, HOURS, OPENAI_HEADERS)
    served = (await sim.control("GET", "stats"))["faults"]
    assert set(served) == {
        "429", "500", "502", "503", "timeout", "truncated_body", "slow_drip", "reset_after_headers"
    }  # fmt: skip


async def test_a_hundred_at_once_are_all_answered(sim: Sim) -> None:
    async def one(n: int) -> str:
        key = f"sk-admin-{n}"
        answer = await sim.client.get(HOURS, headers={"authorization": f"Bearer {key}"})
        return str(answer.headers["openai-organization"])

    assert len(set(await asyncio.gather(*(one(n) for n in range(100))))) == 100


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"GET /_sim/health HTTP/1.1\r\ncontent-length: nine\r\n\r\n", 400),
        (b"POST /_sim/grow HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /_sim/grow HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n", 413),
        (b"GET /" + b"x" * 70_000, 431),
        (b"GET /elsewhere HTTP/1.1\r\nconnection: close\r\n\r\n", 404),
    ],
)
async def test_what_is_not_http_is_refused(sim: Sim, request_bytes: bytes, status: int) -> None:
    reader, writer = await asyncio.open_connection(sim.client.base_url.host, sim.client.base_url.port)
    writer.write(request_bytes)
    assert (await reader.readline()).startswith(f"HTTP/1.1 {status}".encode())
    writer.close()


async def test_requests_in_pieces_and_in_a_row_are_answered_in_order(sim: Sim) -> None:
    reader, writer = await asyncio.open_connection(sim.client.base_url.host, sim.client.base_url.port)
    one = b"GET /_sim/health HTTP/1.1\r\nhost: x\r\n\r\n"
    two = b"GET /_sim/stats HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    for piece in (one[:9], one[9:] + two[:20], two[20:]):
        writer.write(piece)
        await writer.drain()
    received = await reader.read()
    writer.close()
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.index(b'"status":"ok"') < received.index(b'"queued_faults"')
