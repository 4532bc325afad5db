"""`docs/reference/v2-openapi.json` against the server: requests made from the document, right ones and wrong ones alike."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from daemon.web.v2.app import RESOURCES
from tests.books_kit import until
from tests.conftest import in_database, run_sql
from tests.v2_kit import Api, open_api

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs/reference/v2-openapi.json").read_text("utf-8"))
METHODS = ("get", "post", "patch", "delete", "put")
OPERATIONS = sorted(
    f"{method.upper()} {path}" for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
)
HERE = "http://127.0.0.1:9"
EXAMPLES = int(os.environ.get("TALLYD_TEST_V2_EXAMPLES", "12"))
"""Of each operation."""


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        found: Any = DOCUMENT
        for piece in node["$ref"].removeprefix("#/").split("/"):
            found = found[piece]
        node = found
    return node


# ── The document by itself ──────────────────────────────────────────────────────────────────────


def test_every_reference_and_schema_in_the_document_is_sound() -> None:
    text = json.dumps(DOCUMENT)
    for target in set(re.findall(r'"\$ref": "([^"]+)"', text)):
        assert resolved({"$ref": target})
    for kind in ("parameters", "schemas", "responses"):
        for name in DOCUMENT["components"][kind]:
            assert f'"#/components/{kind}/{name}"' in text, f"{kind}/{name} is not used"
    for schema in DOCUMENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for path, item in DOCUMENT["paths"].items():
        for operation in item.values():
            names = {p["name"] for p in map(resolved, operation.get("parameters", [])) if p["in"] == "path"}
            assert names == set(re.findall(r"\{(\w+)\}", path)), path


def test_the_document_has_what_the_server_serves() -> None:
    served = {(name, method) for name, methods in RESOURCES.items() for method in methods}
    told = {(one.split("/")[2], one.split(" ")[0]) for one in OPERATIONS}
    assert told == served


# ── Requests ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sent:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


KNOWN: dict[str, list[str]] = {
    "destination": [HERE, f"{HERE}//a?x=[1]", "there", "nobody", f"http:/{HERE[7:]}/x", "ftp://x", "http://10.0.0.1"],
    "queue": ["there", "new"],
    "queueName": ["there", "new"],
    "urlGroup": ["there", "new"],
    "scheduleId": ["there", "new"],
    "flowControlKey": ["there", "new", "a/b"],
    "Upstash-Callback": [HERE, f"{HERE}/cb?x=1"],
    "Upstash-Failure-Callback": [HERE, f"{HERE}/cb?x=1"],
    "Upstash-Redact-Fields": ["body", "header", "headers[X-A], body"],
    "Upstash-Label": ["l", "a,b"],
    "label": ["l", "a,b"],
    "url": [f"{HERE}/", HERE],
}
"""Values that mean something; `messageId`, `dlqId` and `cursor` are added when there are some."""

NOISE = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="%0aAfF/?#&=.;:,+-_*()[]{}<>\\\"'\u00fc\u2028\U0001f600 ", max_size=30),
    st.sampled_from(
        ["", "0", "-1", "1e9", "9" * 40, "null", "true", "%00", "%FF", "..", "a" * 3_000, "\x00", "NaN", "\u0661"]
    ),
)


def rightly(parameter: dict[str, Any]) -> st.SearchStrategy[str]:
    """Values as the document has them."""
    name, schema = parameter["name"], parameter["schema"]
    if schema.get("type") == "array":
        schema = schema["items"]
    choices: list[st.SearchStrategy[str]] = []
    if name in KNOWN:
        choices.append(st.sampled_from(KNOWN[name]))
    if "enum" in schema:
        choices.append(st.sampled_from([str(value) for value in schema["enum"]]))
    if "examples" in schema:
        choices.append(st.sampled_from(schema["examples"]))
    if "integer" in (kinds := [schema.get("type")] if not isinstance(schema.get("type"), list) else schema["type"]):
        choices.append(st.integers(schema.get("minimum", 0), schema.get("maximum", 1 << 40)).map(str))
    if "boolean" in kinds:
        choices.append(st.sampled_from(["true", "false", "True"]))
    if not choices and "pattern" in schema:
        choices.append(
            st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True).filter(lambda t: len(t) < 300)
        )
    return (
        st.one_of(choices) if choices else st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=20)
    )


def any_value(parameter: dict[str, Any]) -> st.SearchStrategy[str]:
    # Mostly right: a request with several wrong values never comes to what is behind the first check.
    return st.integers(0, 7).flatmap(lambda n: NOISE if n == 0 else rightly(parameter))


def any_json(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    schema = resolved(schema)
    kinds = schema.get("type", "string")
    kind = kinds if isinstance(kinds, str) else kinds[0]
    if "examples" in schema:
        return st.sampled_from([*schema["examples"], HERE, "there"])
    if "oneOf" in schema:
        return st.one_of([any_json(one) for one in schema["oneOf"]])
    if kind == "array":
        return st.lists(any_json(schema["items"]), max_size=3)
    if kind == "object" and "properties" in schema:
        named = {name: any_json(one) for name, one in schema["properties"].items()}
        required = set(schema.get("required", []))
        return st.fixed_dictionaries(
            {name: one for name, one in named.items() if name in required},
            optional={name: one for name, one in named.items() if name not in required},
        )
    if kind == "object":
        some = st.sampled_from(["Upstash-Delay", "Upstash-Forward-X", "upstash-label", "Upstash-Retries", "\u00fc", ""])
        return st.dictionaries(some, st.sampled_from(["1s", "1", "x", "\u00fc", ""]), max_size=2)
    if kind == "integer":
        return st.integers(-1, 300)
    if kind == "boolean":
        return st.booleans()
    return st.sampled_from(["there", "new", HERE, "\u00fc\u0000", ""]) | st.from_regex(
        r"[A-Za-z0-9._-]{1,9}", fullmatch=True
    )


def any_body(operation: dict[str, Any]) -> st.SearchStrategy[bytes]:
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return st.one_of(st.just(b""), st.binary(max_size=60))
    right = any_json(content["application/json"]["schema"]).map(lambda value: json.dumps(value).encode())
    wrong = st.one_of(
        st.binary(max_size=30),
        st.sampled_from([b"", b"null", b"[]", b"{}", b"[[[", b'{"a":' * 2_000, b'"\\ud800 "', b"\xff", b"1e999"]),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
    )
    return st.integers(0, 5).flatmap(lambda n: wrong if n == 0 else right)


@st.composite
def requests(draw: st.DrawFn, name: str) -> Sent:
    method, _, target = name.partition(" ")
    operation = DOCUMENT["paths"][target][method.lower()]
    headers: list[tuple[str, str]] = []
    query: list[str] = []
    parameters = [resolved(one) for one in operation.get("parameters", [])]
    places = [one for one in parameters if one["in"] == "path"]
    others = [one for one in parameters if one["in"] != "path"]
    for parameter in places:
        value = draw(any_value(parameter))
        as_it_is = parameter.get("x-raw") or (name_is_key(parameter) and draw(st.booleans()))
        target = target.replace(f"{{{parameter['name']}}}", raw(value) if as_it_is else quote(value, safe=""), 1)
    chosen = draw(st.lists(st.sampled_from(others), max_size=4, unique_by=lambda one: one["name"])) if others else []
    chosen += [one for one in others if one.get("required") and one not in chosen]
    for parameter in chosen:
        value = draw(any_value(parameter))
        if parameter["in"] == "header":
            if draw(st.integers(0, 4)):
                headers.append((parameter["name"], re.sub(r"[\r\n\x00]", " ", value)))
            else:
                query.append(f"{parameter['name'].lower()}={quote(value)}")
        else:
            query.append(f"{parameter['name']}={quote(value)}")
    if draw(st.integers(0, 9)) == 0:
        query.append(draw(NOISE.map(quote)))
    if query:
        target += ("&" if "?" in target else "?") + "&".join(query)
    if not draw(st.integers(0, 19)):
        headers.append(("Upstash-Forward-X-A", draw(NOISE.map(lambda text: re.sub(r"[\r\n\x00]", " ", text)))))
    return Sent(method, target, tuple(headers), draw(any_body(operation)))


def name_is_key(parameter: dict[str, Any]) -> bool:
    return bool(parameter["name"] == "flowControlKey")


def raw(text: str) -> str:
    """As a client would paste it, but for what would end the request line."""
    return re.sub(r"[\s\x00-\x20\x7f#]", "", text, flags=re.ASCII)


# ── The server ──────────────────────────────────────────────────────────────────────────────────


class Tried:
    """A server in another thread, one connection to it, and what is stored."""

    def __init__(self, portal: BlockingPortal, api: Api) -> None:
        self._portal = portal
        self._api = api
        self._pipe: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def send(self, request: Sent) -> tuple[int, bytes, int, int]:
        """The answer's status and body; and a digest of what is stored before and after it."""
        return self._portal.call(self._send, request)

    async def close(self) -> None:
        if self._pipe is not None:
            self._pipe[1].close()
            await self._pipe[1].wait_closed()

    async def _send(self, request: Sent) -> tuple[int, bytes, int, int]:
        before = await self._stored()
        with anyio.fail_after(10):
            status, body = await self._exchange(request)
        return status, body, before, await self._stored()

    async def _exchange(self, request: Sent) -> tuple[int, bytes]:
        if self._pipe is None:
            place = urlsplit(self._api.url)
            self._pipe = await asyncio.open_connection(place.hostname, place.port)
        reader, writer = self._pipe
        lines = [
            f"{request.method} {request.target} HTTP/1.1", "Host: x", f"Authorization: Bearer {self._api.token.reveal()}",
            *(f"{name}: {value}" for name, value in request.headers), f"Content-Length: {len(request.body)}", "", "",
        ]  # fmt: skip
        writer.write("\r\n".join(lines).encode("utf-8", "surrogatepass") + request.body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        assert length is not None
        body = await reader.readexactly(int(length[1]))
        if "connection: close" in head:
            await self.close()
            self._pipe = None
        return int(head.split(" ")[1]), body

    async def _stored(self) -> int:
        tables = ("message", "job", "payload", "event", "schedule", "gate", "url_group", "endpoint", "dead", "held")
        text = " || ' ' || ".join(f"(select coalesce(sum(hashtext(t::text)), 0) from {table} t)" for table in tables)
        digest: int = await self._api.pushing.db.fetchval(f"select hashtext({text})")
        return digest


async def fill(api: Api) -> None:
    """Something of everything, two dead letters among it, and no worker that would change it."""
    client = api.client
    for path, body in (
        ("queues", {"queueName": "there", "parallelism": 2}),
        ("topics/there/endpoints", {"endpoints": [{"url": HERE, "name": "n"}, {"url": f"{HERE}/2"}]}),
        ("flowControl/there/pause", {}),
    ):
        assert (await client.post(f"/v2/{path}", json=body)).status_code == 200
    cron = {"Upstash-Cron": "1 1 1 1 1", "Upstash-Schedule-Id": "there", "Upstash-Label": "a,b"}
    assert (await client.post(f"/v2/schedules/{HERE}", headers=cron, content=b"\xff")).status_code == 200
    everything = {
        "Upstash-Retries": "0", "Content-Type": "a/b", "Upstash-Forward-X": "\u00fc".encode(), "Upstash-Label": "l",
        "Upstash-Callback": HERE, "Upstash-Callback-Forward-A": "b", "Upstash-Failure-Callback": HERE,
        "Upstash-Retry-Delay": "1", "Upstash-Timeout": "1s", "Upstash-Redact-Fields": "body",
    }  # fmt: skip
    async with api.pushing.working():
        for _ in range(2):
            assert (await client.post(f"/v2/publish/{HERE}/", headers=everything, content=b"b")).status_code == 200

        async def are_dead() -> bool:
            return len((await client.get("/v2/dlq?label=l&responseStatus=0")).json()["messages"]) >= 2

        await until(are_dead, "two dead letters", wait_s=15)
        await api.client.delete("/v2/messages")  # what their callbacks still wait for
        await api.pushing.is_quiet()
    letters = (await client.get("/v2/dlq")).json()["messages"]
    waiting = await client.post(
        f"/v2/publish/{HERE}/", headers={"Upstash-Delay": "9d", "Upstash-Flow-Control-Key": "there",
                                         "Upstash-Flow-Control-Value": "rate=1"},
    )  # fmt: skip
    KNOWN["dlqId"] = KNOWN["dlqIds"] = [letter["dlqId"] for letter in letters]
    KNOWN["messageId"] = KNOWN["messageIds"] = [waiting.json()["messageId"], letters[0]["messageId"], "msg_unknown"]
    KNOWN["cursor"] = [(await client.get(f"/v2/{path}?count=1")).json()["cursor"] for path in ("events", "dlq")]


@pytest.fixture(scope="module")
def tried(server_url: str, template: str) -> Iterator[Tried]:
    name = f"tallyd_test_{secrets.token_hex(6)}"
    run_sql(server_url, f"create database {name} template {template}")
    with (
        start_blocking_portal("asyncio") as portal,
        portal.wrap_async_context_manager(open_api(in_database(server_url, name))) as api,
    ):
        portal.call(fill, api)
        tried = Tried(portal, api)
        yield tried
        portal.call(tried.close)
    run_sql(server_url, f"drop database {name} with (force)")


@cache
def answer_schema(operation: str, status: int) -> Draft202012Validator | None:
    """What the document says of an answer; None: it has no body."""
    method, _, path = operation.partition(" ")
    answers = DOCUMENT["paths"][path][method.lower()]["responses"]
    found = answers.get(str(status)) or answers.get(f"{status // 100}XX")
    assert found is not None, f"{operation} never says {status}"
    content = resolved(found).get("content")
    if content is None:
        return None
    return Draft202012Validator({**content["application/json"]["schema"], "components": DOCUMENT["components"]})


@pytest.mark.timeout(60)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_server_answers_as_the_document_says(tried: Tried, operation: str) -> None:
    """Whatever is asked: no defect shows, what is refused changes nothing, and every answer is as it was described."""

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=[*HealthCheck], print_blob=True
    )
    @given(requests(operation))
    def check(request: Sent) -> None:
        status, body, before, after = tried.send(request)
        assert status < 500, body
        if status >= 400:
            assert before == after, "what was refused has changed something"
        if request.method == "GET":
            assert before == after
        schema = answer_schema(operation, status)
        if schema is None:
            assert body == b""
        else:
            schema.validate(json.loads(body))

    check()
