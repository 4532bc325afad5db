"""Words to values: what is taken, and that a refusal names the field."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli.arguments import (
    check_text,
    parse_base_url,
    parse_label,
    parse_settings,
    parse_span,
    parse_time,
    read_credential,
)
from daemon.domain.connection import Secret
from daemon.domain.errors import UsageError


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-11-22", datetime(2026, 11, 22, tzinfo=UTC)),
        ("2026-11-22T10:00:00Z", datetime(2026, 11, 22, 10, tzinfo=UTC)),
        ("2026-11-22T10:00:00.5+02:00", datetime(2026, 11, 22, 8, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-11-22 10:00Z", datetime(2026, 11, 22, 10, tzinfo=UTC)),
    ],
)
def test_times_that_are_taken(text: str, instant: datetime) -> None:
    assert parse_time("--since", text) == instant


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T10:00:00",
        "2026-11-22T10:00",
        "yesterday",
        "",
        "2026-13-01",
        "20261122",
        "2026-W47-7",
        "0001-01-01T00:00:00+14:00",
    ],
)
def test_times_that_are_refused_name_the_field_and_the_fix(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--since: .*write it as 2026-11-22T10:00:00Z"):
        parse_time("--since", text)


@given(st.text())
def test_any_text_is_a_time_or_a_usage_error(text: str) -> None:
    try:
        found = parse_time("--since", text)
    except UsageError as error:
        field = error.field
    else:
        field = "--since" if found is not None and found.tzinfo is UTC else "no instant"
    assert field == "--since"


def test_span_that_ends_before_it_starts() -> None:
    with pytest.raises(UsageError, match="--until: 2026-01-01 is before --since 2026-01-02"):
        parse_span("2026-01-02", "2026-01-01")


@pytest.mark.parametrize("text", ["acme", "/main", "acme/", "a/b/c", ""])
def test_label_needs_both_halves(text: str) -> None:
    with pytest.raises(UsageError, match="TENANT/NAME"):
        parse_label("--connection", text)


def test_settings_read_json_values_and_dots() -> None:
    pairs = ["api=analytics", 'group_by.completions=["model"]', "group_by.costs=[]", "n=3", "gone=null", "t=a=b"]
    assert parse_settings("--setting", pairs) == {
        "api": "analytics",
        "group_by": {"completions": ["model"], "costs": []},
        "n": 3,
        "gone": None,
        "t": "a=b",
    }
    for bad in (["api"], ["=x"], ["a=1", "a.b=2"]):
        with pytest.raises(UsageError, match="--setting"):
            parse_settings("--setting", bad)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://gateway.example:8443/", "https://gateway.example:8443"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
        ("http://127.8.9.1", "http://127.8.9.1"),
        ("http://localhost:1/", "http://localhost:1"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_urls_that_are_taken(text: str, url: str) -> None:
    assert parse_base_url("--base-url", text, allow_insecure=False) == url


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://api.openai.com/v1", "send the key in clear; use https, or pass --allow-insecure"),
        ("http://127.0.0.1.evil.example", "send the key in clear"),
        ("http://localhost.evil.example", "send the key in clear"),
        ("http://10.0.0.1", "send the key in clear"),
        ("ftp://x", "no http"),
        ("api.openai.com", "no http"),
        ("https://", "no http"),
        ("https://u:p@x", "holds a user or password"),
        ("https://x?a=b", "query"),
        ("https://x/#a", "query or fragment"),
        ("https://x:99999", "no URL"),
        ("https://[::1", "no URL"),
        ("https://x y", "no http"),
        ("https://x\n", "no http"),
        ("", "no http"),
    ],
)
def test_urls_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=r"^--base-url: ") as caught:
        parse_base_url("--base-url", text, allow_insecure=False)
    assert problem in str(caught.value)


def test_insecure_url_is_taken_when_allowed() -> None:
    assert parse_base_url("x", "http://10.0.0.1/", allow_insecure=True) == "http://10.0.0.1"


def test_credential_comes_from_exactly_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("  sk-1\n")
    monkeypatch.setenv("A_KEY", "\tsk-2 ")
    assert read_credential(None, file, from_stdin=False) == Secret("sk-1")
    assert read_credential("A_KEY", None, from_stdin=False) == Secret("sk-2")
    for variable, path, stdin in ((None, None, False), ("A_KEY", file, False), (None, file, True)):
        with pytest.raises(UsageError, match="exactly one way"):
            read_credential(variable, path, from_stdin=stdin)
    with pytest.raises(UsageError, match="--credential-env: the variable NO_KEY is not set"):
        read_credential("NO_KEY", None, from_stdin=False)
    with pytest.raises(UsageError, match="--credential-file: cannot read"):
        read_credential(None, tmp_path / "none", from_stdin=False)


@pytest.mark.parametrize("raw", [b"", b" \n", b"sk-1\nsk-2", b"sk-\x00", "sk-ä".encode(), b"\xff\xfe", b"x" * 70_000])
def test_text_that_is_no_credential_is_refused_without_being_quoted(raw: bytes) -> None:
    with pytest.raises(UsageError, match=r"^credential: ") as caught:
        check_text("credential", raw)
    assert "sk-" not in str(caught.value)
