"""Patterns of keys: what they refuse, what they let through to the server, and how they take a key apart."""

import re
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.errors import UsageError
from daemon.pollers._quota_pattern import CHARS_MAX, compile_pattern


def glob_matches(glob: bytes, key: str) -> bool:
    """MATCH as the server does it, for globs that hold stars and escaped literals."""
    steps = re.findall(r"\\(.)|(\*)|([^\\*])", glob.decode(), re.DOTALL)
    regex = "".join(".*" if star else re.escape(escaped or plain) for escaped, star, plain in steps)
    return re.fullmatch(regex, key, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("pattern", "key", "parts"),
    [
        ("quota:{user}", "quota:alice", {"user": "alice"}),
        ("quota:{user}", "quota:a-b_c.d@e.example", {"user": "a-b_c.d@e.example"}),
        ("quota:{user}", "quota:a\nb", {"user": "a\nb"}),
        ("quota:{user}", "quota:acme:alice", None),
        ("quota:{user}", "quota:", None),
        ("quota:{user}", "xquota:alice", None),
        ("quota:{user}", "quota:alice ", {"user": "alice "}),
        ("quota:{user*}", "quota:auth0:|alice", {"user": "auth0:|alice"}),
        (
            "quota:{tenant}:{user}:{period}",
            "quota:acme:alice:2026-11",
            {"tenant": "acme", "user": "alice", "period": "2026-11"},
        ),
        ("quota:{tenant}:{user}:{period}", "quota:acme:al:ice:2026-11", None),
        (
            "quota:{tenant}:{user*}:{period}",
            "quota:acme:al:ice:2026-11",
            {"tenant": "acme", "user": "al:ice", "period": "2026-11"},
        ),
        ("a:{user}:b", "a:x:y:b", None),
        ("a:{user*}:b", "a:x:y:b", {"user": "x:y"}),
        ("a:{user*}:b", "a::b:b", {"user": ":b"}),
        ("{user}", "any:thing", {"user": "any:thing"}),
        ("u{user}x", "uxxx", {"user": "xx"}),
        ("q[*]?\\^{user}", "q[*]?\\^al", {"user": "al"}),
        ("q:{{{user}}}:tokens", "q:{alice}:tokens", {"user": "alice"}),
        ("kürzel:{user}", "kürzel:jörg", {"user": "jörg"}),
        ("{tenant}:used:{user}", "acme:used:used", {"tenant": "acme", "user": "used"}),
        ("q:{user}:{plan}", "q:al:pro", {"user": "al", "plan": "pro"}),
    ],
)
def test_key_is_taken_apart_in_one_way_or_not_at_all(pattern, key, parts) -> None:
    compiled = compile_pattern(pattern)
    assert compiled.take_apart(key) == parts
    if parts is not None:
        assert glob_matches(compiled.glob, key), "the server would not even return it"


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("", "0 characters"),
        ("x" * (CHARS_MAX + 1), f"{CHARS_MAX + 1} characters"),
        ("quota:*", "0 named parts"),
        ("quota:{user", "a part without a name"),
        ("quota:{}", "a part without a name"),
        ("quota:{User}", "a part without a name"),
        ("quota:{us er}", "a part without a name"),
        ("quota:{user**}", "a part without a name"),
        ("quota:user}", "without its {"),
        ("quota:{user}:{user}", "user twice"),
        ("quota:{tenant}{user}", "nothing between them"),
        ("quota:{tenant}x{user}", "'x' between two parts"),
        ("quota:{tenant}:x{user}", "':x' between two parts"),
        ("quota:{tenant*}:{user*}", "two parts with a star"),
        ("quota:\x00{user}", "cannot be printed"),
        (":".join(f"{{p{n}}}" for n in range(9)), "9 named parts"),
    ],
)
def test_pattern_that_cannot_work_is_refused_with_its_reason(pattern, told) -> None:
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        compile_pattern(pattern)
    assert refused.value.field == "settings.pattern"
    assert refused.value.fix


def test_parts_of_other_names_are_known_apart() -> None:
    assert compile_pattern("{plan}:{user}:{period}:{region}").others == ("plan", "region")


WORD = st.text(st.characters(codec="utf-8", exclude_characters=":\x00"), min_size=1, max_size=12)


@given(tenant=WORD, user=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), period=WORD)
def test_parts_that_were_put_together_come_apart_again(tenant, user, period) -> None:
    compiled = compile_pattern("q[{tenant}:{user*}:{period}]")
    if "[" in tenant or "]" in period:
        return
    key = f"q[{tenant}:{user}:{period}]"
    assert glob_matches(compiled.glob, key)
    assert compiled.take_apart(key) == {"tenant": tenant, "user": user, "period": period}


@given(key=st.text(alphabet="a:{}[]*x", max_size=60))
def test_what_is_taken_apart_makes_the_key_again(key) -> None:
    parts = compile_pattern("a:{tenant}:{user*}:x:{period}").take_apart(key)
    assert parts is None or "a:{tenant}:{user}:x:{period}".format(**parts) == key


def test_odd_key_costs_no_more_than_a_plain_one() -> None:
    """A regex that tries all ways would not come back from this one: 2 to the power of its length."""
    compiled = compile_pattern("a:{tenant}:{user*}:{period}:z")
    began = perf_counter()
    assert compiled.take_apart("a" + ":" * 1_000 + "y") is None
    assert perf_counter() - began < 5
