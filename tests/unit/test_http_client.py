"""The door out, over transports that never leave the process."""

import asyncio
import inspect
import json
from urllib.parse import parse_qsl

import aiohttp
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.errors import (
    BadRequestError,
    ConfigError,
    CredentialError,
    ForbiddenError,
    PermanentError,
    RateLimitedError,
    SchemaDriftError,
    TransientError,
    UpstreamUnavailableError,
)
from daemon.http_client import (
    LEAVE_JOB_S,
    RETRY_AFTER_S_MAX,
    HttpClient,
    HttpSettings,
    as_httpx,
    as_ours,
    build_url,
    error_for,
    retry_after_s,
    ssl_context,
)

pytestmark = pytest.mark.anyio
BASE = "https://api.example.com/v1"
KEY = "sk-admin-very-secret"


def classes(module, *roots):
    return sorted(
        {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, roots)},
        key=lambda kind: kind.__name__,
    )


def blank(kind):
    """An instance without its arguments, which differ from class to class."""
    error = kind.__new__(kind)
    if isinstance(error, aiohttp.ClientConnectorError):
        error._os_error = OSError(111, "refused")
    return error


@pytest.mark.parametrize(
    "kind", [*classes(aiohttp, aiohttp.ClientError), asyncio.TimeoutError, OSError, ConnectionResetError]
)
def test_every_failure_of_aiohttp_has_a_name_in_httpx(kind):
    assert type(as_httpx(blank(kind))) is not httpx.TransportError


@pytest.mark.parametrize("kind", classes(httpx, httpx.HTTPError, httpx.InvalidURL, httpx.StreamError))
def test_every_failure_of_httpx_has_a_name_of_ours(kind):
    error = as_ours(blank(kind), "api.example.com")
    assert isinstance(error, UpstreamUnavailableError | PermanentError)
    assert isinstance(error, PermanentError) == (kind in {httpx.InvalidURL, httpx.UnsupportedProtocol})


@pytest.mark.parametrize(
    ("kind", "maybe_sent"),
    [
        (aiohttp.ClientConnectorError, False),
        (aiohttp.ClientConnectorDNSError, False),
        (aiohttp.ClientConnectorSSLError, False),
        (aiohttp.ClientConnectorCertificateError, False),
        (aiohttp.ClientProxyConnectionError, False),
        (aiohttp.ClientHttpProxyError, False),
        (aiohttp.ServerFingerprintMismatch, False),
        (aiohttp.ConnectionTimeoutError, False),
        (aiohttp.ServerDisconnectedError, True),
        (aiohttp.SocketTimeoutError, True),
        (aiohttp.ServerTimeoutError, True),
        (aiohttp.ClientOSError, True),
        (aiohttp.ClientPayloadError, True),
        (asyncio.TimeoutError, True),
        (ConnectionResetError, True),
    ],
)
def test_only_failures_before_the_request_left_are_called_unsent(kind, maybe_sent):
    assert as_ours(as_httpx(blank(kind)), "host").maybe_sent is maybe_sent


OPENAI = {"error": {"message": "no", "type": "invalid_request_error", "param": "start_time", "code": "too_old"}}
ANTHROPIC = {"type": "error", "error": {"type": "not_found_error", "message": "no"}, "request_id": "req_1"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (301, BadRequestError),
        (304, BadRequestError),
        (307, BadRequestError),
        (400, BadRequestError),
        (401, CredentialError),
        (402, BadRequestError),
        (403, ForbiddenError),
        (404, BadRequestError),
        (405, BadRequestError),
        (408, UpstreamUnavailableError),
        (409, UpstreamUnavailableError),
        (410, BadRequestError),
        (422, BadRequestError),
        (425, UpstreamUnavailableError),
        (429, RateLimitedError),
        (500, UpstreamUnavailableError),
        (502, UpstreamUnavailableError),
        (503, UpstreamUnavailableError),
        (504, UpstreamUnavailableError),
        (529, UpstreamUnavailableError),
    ],
)
@pytest.mark.parametrize("body", [OPENAI, ANTHROPIC, "<html>", {"error": "plain"}, [], {"error": {"code": 429}}, None])
async def test_status_says_what_to_do(status, kind, body):
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, content=content))
    async with HttpClient(transport=transport) as client:
        with pytest.raises(kind) as caught:
            await client.get(BASE, "/x")
    assert type(caught.value) is kind


def test_both_error_shapes_give_code_and_param():
    first = error_for(400, {}, json.dumps(OPENAI).encode())
    assert (first.status, first.code, first.param) == (400, "too_old", "start_time")
    second = error_for(404, {}, json.dumps(ANTHROPIC).encode())
    assert (second.status, second.code, second.param) == (404, "not_found_error", None)
    without_code = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
    assert error_for(400, {}, json.dumps(without_code).encode()).code == "invalid_request_error"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
async def test_error_text_never_repeats_the_key(status):
    body = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "x"}}).encode()
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, content=body))
    async with HttpClient(transport=transport) as client:
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY, "x-blank": " "}):
            with pytest.raises((PermanentError, TransientError)) as caught:
                await client.get(BASE, "/x", headers=headers)
            assert KEY not in str(caught.value)
            assert KEY not in repr(caught.value)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Sun, 22 Nov 2026 10:00:30 GMT", "date": "Sun, 22 Nov 2026 10:00:00 GMT"}, 30.0),
        ({"retry-after": "Sun, 22 Nov 2026 09:00:00 GMT", "date": "Sun, 22 Nov 2026 10:00:00 GMT"}, 0.0),
        ({"retry-after": "Fri, 01 Jan 1999 00:00:00 GMT"}, 0.0),
        ({"retry-after": "99999999999"}, RETRY_AFTER_S_MAX),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after-ms": "-5"}, 0.0),
    ],
)
def test_retry_after_is_read_in_each_of_its_forms(headers, seconds):
    assert retry_after_s(headers) == seconds


@given(st.dictionaries(st.sampled_from(["retry-after", "retry-after-ms", "date"]), st.text()))
def test_retry_after_never_fails_and_stays_bounded(headers):
    seconds = retry_after_s(headers)
    assert seconds is None or 0 <= seconds <= RETRY_AFTER_S_MAX


def test_should_retry_false_leaves_the_job_but_stays_transient():
    told = error_for(429, {"x-should-retry": "false", "retry-after": "1"}, b"")
    assert isinstance(told, RateLimitedError)
    assert told.retry_after_s == LEAVE_JOB_S
    assert error_for(500, {"x-should-retry": "false"}, b"").retry_after_s == LEAVE_JOB_S
    assert isinstance(error_for(400, {"x-should-retry": "true"}, b""), UpstreamUnavailableError)
    assert isinstance(error_for(401, {"x-should-retry": "true"}, b""), CredentialError)


@given(st.lists(st.tuples(st.text(min_size=1), st.text())))
def test_query_arrives_in_order_and_unchanged(params):
    try:
        for name, value in params:
            (name + value).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate has no bytes
    query = httpx.URL(build_url(BASE, "/usage", params)).query.decode()
    assert parse_qsl(query, keep_blank_values=True) == params


async def test_request_bytes_are_those_that_were_asked_for():
    seen = []

    def answer(request):
        seen.append(request)
        return httpx.Response(200, json={}, headers={"set-cookie": "tenant=a"})

    async with HttpClient(transport=httpx.MockTransport(answer)) as client:
        for _ in range(2):
            await client.get(
                BASE + "/~me%7E", "/usage", [("group_by[]", "a"), ("group_by[]", "b"), ("page", "p_A+/==")]
            )
    assert seen[1].url.raw_path == b"/v1/~me%7E/usage?group_by%5B%5D=a&group_by%5B%5D=b&page=p_A%2B%2F%3D%3D"
    assert seen[1].headers["user-agent"].startswith("tallyd/")
    assert "cookie" not in seen[1].headers


async def test_answer_larger_than_the_limit_is_refused():
    transport = httpx.MockTransport(lambda _request: httpx.Response(200, content=b"x" * 1_001))
    async with HttpClient(HttpSettings(body_bytes_max=1_000), transport) as client:
        with pytest.raises(SchemaDriftError, match="larger than the limit of 1000 bytes"):
            await client.get(BASE, "/x")
    async with HttpClient(HttpSettings(body_bytes_max=1_001), transport) as client:
        assert len((await client.get(BASE, "/x")).body) == 1_001


@pytest.mark.parametrize("key", ["sk-admin-\nX: y", "sk-ädmin", "sk-\x00"])
async def test_key_that_no_header_can_carry_is_named_without_being_shown(key):
    transport = httpx.MockTransport(lambda _request: httpx.Response(200))
    async with HttpClient(transport=transport) as client:
        with pytest.raises(CredentialError) as caught:
            await client.get(BASE, "/x", headers={"authorization": f"Bearer {key}"})
    assert key not in str(caught.value)


@pytest.mark.parametrize("base_url", ["not a url", "ftp://example.com", "http://[::1", "http://exa mple.com:99999"])
async def test_base_url_that_cannot_be_used_is_permanent(base_url):
    async with HttpClient() as client:
        with pytest.raises(PermanentError, match="base URL"):
            await client.get(base_url, "/x")


def test_unreadable_ca_bundle_is_a_config_error(tmp_path):
    broken = tmp_path / "ca.pem"
    broken.write_text("nothing")
    for path in (broken, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="CA bundle"):
            ssl_context(HttpSettings(ca_bundle=str(path)))


async def test_post_sends_the_body_as_it_is():
    asked = []

    def answer(request):
        asked.append(request)
        return httpx.Response(200, json={})

    async with HttpClient(transport=httpx.MockTransport(answer)) as http:
        await http.post(BASE, "/query", b'{"a": 1}', {"content-type": "application/json"})
    (request,) = asked
    assert (request.method, str(request.url), request.content) == ("POST", f"{BASE}/query", b'{"a": 1}')
    assert request.headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", ["ThrottlingException", "com.amazonaws.ce#LimitExceededException"])
def test_what_aws_calls_throttled_is_a_rate_limit(kind):
    body = json.dumps({"__type": kind, "message": "Rate exceeded"}).encode()
    assert isinstance(error_for(400, {}, body), RateLimitedError)


def test_another_400_of_aws_is_a_bad_request():
    body = json.dumps({"__type": "ValidationException", "message": "no"}).encode()
    error = error_for(400, {}, body)
    assert isinstance(error, BadRequestError)
    assert error.code == "ValidationException"
