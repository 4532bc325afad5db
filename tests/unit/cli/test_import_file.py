"""Lines of an import: every bad one is named with its number and field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.cli.import_file import parse_lines
from daemon.domain.connection import Secret
from daemon.pollers.registry import load_pollers

GOOD = {"tenant": "acme", "provider": "openai", "name": "main", "credential": "sk-admin-abcdefghijkl"}


def parse(*lines: object) -> tuple[list[str], list[str]]:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    news, problems = parse_lines(raw, load_pollers(), allow_insecure=False)
    return [new.name for new in news], problems


def test_good_line_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_ACME", "sk-admin-other0000000 ")
    line = {**GOOD, "base_url": "https://gateway.example/v1/", "since": "2026-01-01", "settings": {}}
    del line["credential"]
    line["credential_env"] = "KEY_OF_ACME"
    (new,), problems = parse_lines([b"", json.dumps(line).encode()], load_pollers(), allow_insecure=False)
    assert problems == []
    assert (new.base_url, new.line, new.credential) == (
        "https://gateway.example/v1",
        2,
        Secret("sk-admin-other0000000"),
    )
    assert new.since is not None
    assert new.since.year == 2026


@pytest.mark.parametrize(
    ("line", "start"),
    [
        (b"{", "line 1: line: is no JSON"),
        (b"[1]", "line 1: line: is no JSON object"),
        (b"\xff\xff", "line 1: line: is no JSON"),
        (b'"\x80"', "line 1: line: is no JSON"),
        (b"[" * 100_000, "line 1: line: is no JSON"),
        ({**GOOD, "nmae": "x"}, "line 1: nmae: unknown key; use base_url, credential"),
        ({k: v for k, v in GOOD.items() if k != "tenant"}, "line 1: tenant: is missing"),
        ({**GOOD, "name": 7}, "line 1: name: is no text"),
        ({**GOOD, "name": ""}, "line 1: name: is no text, or empty"),
        (
            {**GOOD, "provider": "opnai"},
            "line 1: provider: unknown provider 'opnai'; use one of anthropic, http_resource, litellm, openai,",
        ),
        ({**GOOD, "credential_env": "X"}, "line 1: credential: is to be given in exactly one way"),
        ({k: v for k, v in GOOD.items() if k != "credential"}, "line 1: credential: is to be given in exactly one"),
        ({**GOOD, "credential": "sk-ant-admin01-x"}, "line 1: credential: "),
        (
            {**GOOD, "base_url": "http://api.example"},
            "line 1: base_url: http://api.example would send the key in clear",
        ),
        ({**GOOD, "since": "2026-01-01T00:00:00"}, "line 1: since: "),
        ({**GOOD, "settings": []}, "line 1: settings: is no JSON object"),
        ({**GOOD, "settings": {"colour": 1}}, "line 1: "),
    ],
)
def test_bad_line_is_named(line: object, start: str) -> None:
    names, problems = parse(line)
    assert names == []
    assert len(problems) == 1
    assert problems[0].startswith(start)
    assert "sk-a" not in problems[0].replace("sk-admin-...", "")


def test_every_bad_line_is_named_not_only_the_first() -> None:
    names, problems = parse(GOOD, b"{", {**GOOD, "name": "b"}, b"null")
    assert names == ["main", "b"]
    assert [problem.split(":")[0] for problem in problems] == ["line 2", "line 4"]


@given(st.binary())
def test_any_bytes_are_a_connection_or_a_problem(raw: bytes) -> None:
    news, problems = parse_lines([raw], load_pollers(), allow_insecure=False)
    assert news == []
    assert len(problems) == (1 if raw.strip() else 0)
