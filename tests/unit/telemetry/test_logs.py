"""No secret passes into a log line, however deep it lies."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.domain.connection import Secret
from daemon.telemetry import logs
from daemon.telemetry.logs import configure, redact_text

SECRET = "aVerySecretValue1234"


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    configure(level="info", style="json", stream=stream)
    yield stream
    root.handlers[:], root.level = before
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize(
    "text",
    [
        f"key sk-{SECRET} refused",
        f"key sk-admin-{SECRET}-x refused",
        f"key sk-ant-admin01-{SECRET}_AA refused",
        f"sk-proj-{SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"authorization: bearer {SECRET}=",
        f"{{'Authorization': 'Bearer {SECRET}'}}",
        f'{{"x-api-key": "{SECRET}"}}',
        f"X-Api-Key: {SECRET}",
        f'{{"password":"{SECRET}"}}',
        f"GET https://x.example/a?token={SECRET}&limit=4",
        f"GET https://x.example/a?limit=4&access_token={SECRET}",
        f"GET https://x.example/a?api_key={SECRET}",
        f"https://s3.example/o?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
        f"https://blob.example/o?sv=1&sig={SECRET}",
        f"postgresql://me:{SECRET}@db.example/x",
        f"http://user:{SECRET}@proxy:3128",
        f"Upstash-Signature: {SECRET}",
        f"secret_key: {SECRET} is refused",
        f"secret_key: a{SECRET} is refused",
        f"password: not-{SECRET} is refused",
        f"secret_key=the{SECRET}",
        f"{{'token': 'an+{SECRET}'}}",
        f"eyJhbGciOiJIUzI1NiJ9.eyJ{SECRET}.c2ln{SECRET}",
    ],
)
def test_secret_is_taken_out_of_text(text: str) -> None:
    redacted = redact_text(text)
    assert SECRET not in redacted
    assert "***" in redacted


@pytest.mark.parametrize(
    "text",
    [
        "input_tokens=1200 output_tokens=7",
        "stored 3 rows of acme/main, model gpt-5-mini, project proj_abc",
        "https://api.openai.com/v1/organization/costs?start_time=1&limit=7&page=page_AAAA",
        "task-force risk-averse disk-full",
        "token limit reached",
        "secret_key: a credential is sealed under key be5a6ecf, which is not given; add that key back",
        "secret_key: not set, and a database of your own needs one",
        "secret_key: key 1 is no base64; make one with `tallyd config new-key`",
        "credential: is empty; give the key",
    ],
)
def test_harmless_text_stays(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    "fields",
    [
        {"api_key": SECRET},
        {"credential": SECRET},
        {"headers": {"Authorization": SECRET, "x-api-key": SECRET}},
        {"headers": [("Authorization", f"Basic {SECRET}"), ("Cookie", SECRET)]},
        {"deep": [{"a": ({"b": [f"sk-{SECRET}"]},)}]},
        {"raw": f"Bearer {SECRET}".encode()},
        {"url": f"https://x.example/?token={SECRET}"},
        {"held": Secret(SECRET)},
        {"error": ValueError(f"sk-{SECRET} is bad")},
        {f"sk-{SECRET}": 1},
        {"nested": {"TALLYD_SECRET_KEY": SECRET}},
    ],
)
def test_secret_in_a_field_is_masked(out: io.StringIO, fields: dict[str, Any]) -> None:
    structlog.get_logger().info("poll.failed", **fields)
    assert SECRET not in out.getvalue()
    assert json.loads(out.getvalue())["event"] == "poll.failed"


def test_secret_in_a_chained_exception_is_masked_and_the_trace_is_kept(out: io.StringIO) -> None:
    try:
        try:
            raise ValueError(f"GET https://x.example/?api_key={SECRET}")
        except ValueError as error:
            raise RuntimeError(f"refused: Bearer {SECRET}") from error
    except RuntimeError:
        structlog.get_logger().exception("poll.crashed")
    line = json.loads(out.getvalue())
    assert SECRET not in out.getvalue()
    assert "RuntimeError: refused: Bearer ***" in line["exception"]
    assert "ValueError: GET https://x.example/?api_key=***" in line["exception"]
    assert "test_logs.py" in line["exception"]


def test_secret_in_a_library_log_is_masked(out: io.StringIO) -> None:
    try:
        raise ValueError(f"sk-{SECRET}")
    except ValueError:
        logging.getLogger("aiohttp.client").exception("GET %s", f"https://x.example/?token={SECRET}")
    assert SECRET not in out.getvalue()
    assert json.loads(out.getvalue())["level"] == "error"


def test_bound_context_is_in_every_line_and_counts_stay(out: io.StringIO) -> None:
    structlog.contextvars.bind_contextvars(job_id=7, token=12)
    structlog.get_logger().info("job.finished", input_tokens=1200, slot=datetime(2026, 11, 22, 10, 5, tzinfo=UTC))
    structlog.get_logger().debug("poll.page_fetched")
    (line,) = out.getvalue().splitlines()
    found = json.loads(line)
    assert (found["job_id"], found["token"], found["input_tokens"], found["level"]) == (7, 12, 1200, "info")
    assert found["timestamp"].endswith("Z")
    assert found["slot"] == "2026-11-22T10:05:00Z"


def test_console_style_masks_too() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        configure(style="console", stream=stream)
        structlog.get_logger().warning("poll.failed", token=SECRET)
    finally:
        root.handlers[:], root.level = before
        structlog.reset_defaults()
    assert SECRET not in stream.getvalue()
    assert "poll.failed" in stream.getvalue()


@given(st.text(alphabet="sk-_ .,/:=?&;\"'eyJabcXYZ0123456789tokenpasswordBearerauthorization\u017f\u00a0\t@"))
@settings(max_examples=500)
def test_looking_for_signs_first_changes_nothing(text: str) -> None:
    """A rule is only tried on a text that holds what it cannot do without."""
    whole = text
    for pattern, replacement in logs._RULES:
        whole = pattern.sub(replacement, whole)
    assert redact_text(text) == whole
