"""Redaction: which fields are named, and that nothing of them is left."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.redaction import Redaction, parse_redaction

BODY = Redaction(body=True, all_headers=False, headers=frozenset())
ALL = Redaction(body=False, all_headers=True, headers=frozenset())
TOKEN = st.text(alphabet="!#$%&'*+.^_`|~0123456789abcXYZ-", min_size=1, max_size=8)
REDACTIONS = st.builds(
    Redaction, st.booleans(), st.booleans(), st.frozensets(TOKEN.map(str.lower), min_size=1, max_size=4)
)


def named(*names: str, body: bool = False) -> Redaction:
    return Redaction(body=body, all_headers=False, headers=frozenset(names))


def redacted(original: bytes) -> str:
    return "REDACTED:" + sha256(original).hexdigest()


@pytest.mark.parametrize(
    ("text", "redaction", "normal"),
    [
        ("body", BODY, "body"),
        (" Body ", BODY, "body"),
        ("body,body", BODY, "body"),
        ("header", ALL, "header"),
        ("headers", ALL, "header"),
        ("HEADERS", ALL, "header"),
        ("header[Authorization]", named("authorization"), "header[authorization]"),
        ("Headers[X-Secret]", named("x-secret"), "header[x-secret]"),
        ("header[B], headers[a],header[b]", named("a", "b"), "header[a],header[b]"),
        ("header[x],body", named("x", body=True), "body,header[x]"),
        ("header[x], header, body", Redaction(True, True, frozenset({"x"})), "body,header,header[x]"),
        ("header[body]", named("body"), "header[body]"),
    ],
)
def test_fields_are_read_and_written_in_one_form(text: str, redaction: Redaction, normal: str) -> None:
    assert parse_redaction(text) == redaction
    assert redaction.text == normal


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        ("body,", "''"),
        ("body header", "'body header'"),
        ("body;header", "'body;header'"),
        ("bodies", "'bodies'"),
        ("body[x]", "'body[x]'"),
        ("header[]", "'header[]'"),
        ("header[ x ]", "'header[ x ]'"),
        ("header[a b]", "'header[a b]'"),
        ("header[a,b]", "'header[a'"),
        ("header[x", "'header[x'"),
        ("header[x]]", "'header[x]]'"),
        ("header[\0]", r"'header[\x00]'"),
        ("header[\N{LATIN SMALL LETTER E WITH ACUTE}]", "names no field"),
        ("header[\N{KELVIN SIGN}]", "names no field"),
        ("\N{LATIN SMALL LETTER LONG S}body", "names no field"),
        ("header\N{LATIN SMALL LETTER LONG S}", "names no field"),
        ("authorization", "'authorization', which names no field; write body, header or header[Name]"),
        ("body," * 1024 + "body", "5124 characters"),
    ],
)
def test_other_fields_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^has ") as caught:
        parse_redaction(text)
    assert says in str(caught.value)


@given(REDACTIONS)
def test_what_is_stored_is_read_back(redaction: Redaction) -> None:
    assert parse_redaction(redaction.text) == redaction


@given(st.text(max_size=40) | st.text(alphabet="bodyheadrs[],X ", max_size=20))
def test_any_text_is_refused_or_can_be_stored(text: str) -> None:
    try:
        redaction = parse_redaction(text)
    except ValueError:
        return
    assert parse_redaction(redaction.text) == redaction


def test_a_body_gives_way_to_its_hash() -> None:
    assert BODY.of_body(b"\xff secret") == redacted(b"\xff secret").encode()
    assert BODY.of_body(b"") == b""
    assert ALL.of_body(b"secret") == b"secret"


def test_named_headers_give_way_whatever_their_case() -> None:
    headers = {"X-Secret": ["one", "two", ""], "Content-Type": ["text/plain"]}
    shown = named("x-secret").of_headers(headers)
    assert shown == {
        "X-Secret": [redacted(b"one"), redacted(b"two"), redacted(b"")],
        "Content-Type": ["text/plain"],
    }
    assert headers["X-Secret"] == ["one", "two", ""], "the original is still to be delivered"
    shown["Content-Type"].append("changed")
    assert headers["Content-Type"] == ["text/plain"]


def test_all_headers_give_way() -> None:
    assert ALL.of_headers({"A": ["1"], "B": ("2",)}) == {"A": [redacted(b"1")], "B": [redacted(b"2")]}
    assert BODY.of_headers({"A": ("1",)}) == {"A": ["1"]}
    assert ALL.of_headers({}) == {}


@given(REDACTIONS, st.dictionaries(TOKEN, st.lists(st.text(st.characters()), max_size=3), max_size=4))
def test_each_value_is_either_as_it_was_or_a_hash(redaction: Redaction, headers: dict[str, list[str]]) -> None:
    shown = redaction.of_headers(headers)
    assert list(shown) == list(headers)
    for name, values in headers.items():
        is_hidden = redaction.all_headers or name.lower() in redaction.headers
        assert shown[name] == ([redacted(value.encode()) for value in values] if is_hidden else values)


def test_a_lone_surrogate_is_hashed_too() -> None:
    """A batch is JSON, which can hold what no encoding can."""
    (value,) = ALL.of_headers({"A": ["\ud800"]})["A"]
    assert value == redacted(b"\xed\xa0\x80")
