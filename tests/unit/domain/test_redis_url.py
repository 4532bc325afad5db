"""URLs of servers with counters: what they mean, and that no password stays in one or is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.connection import Secret
from daemon.domain.errors import UsageError
from daemon.domain.redis_url import parse_url, split_credential, split_url


@pytest.mark.parametrize(
    ("text", "base_url", "credential"),
    [
        ("redis://localhost", "redis://localhost:6379/0", ""),
        ("redis://HOST:6380/3/", "redis://host:6380/3", ""),
        ("redis://user:pass@host:6379/0", "redis://host:6379/0", "user:pass"),
        ("rediss://:p%40%3A%2F@host", "rediss://host:6379/0", ":p@:/"),
        ("redis://[::1]:7/1", "redis://[::1]:7/1", ""),
        ("redis://[0:0::1]", "redis://[::1]:6379/0", ""),
        ("redis+sentinel://:pw@a,b:2,[::1]/main/4", "redis+sentinel://a:26379,b:2,[::1]:26379/main/4", ":pw"),
        ("rediss+cluster://u:p@a,b", "rediss+cluster://a:6379,b:6379", "u:p"),
        ("https://name.upstash.io/", "https://name.upstash.io", ""),
        ("https://default:token@name.upstash.io", "https://name.upstash.io", "token"),
        ("https://token@name.upstash.io:444", "https://name.upstash.io:444", "token"),
    ],
)
def test_url_is_split_from_its_secret_and_has_one_spelling(text, base_url, credential) -> None:
    assert split_url(text) == (base_url, Secret(credential))
    assert split_url(base_url) == (base_url, Secret(""))
    assert str(parse_url(base_url)) == base_url


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "scheme"),
        ("localhost:6379", "scheme"),
        ("unix:///run/valkey.sock", "scheme"),
        ("redis://", "host's name"),
        ("redis://:hunter2@", "host's name"),
        ("redis://:hunter2@host:0", "port"),
        ("redis://:hunter2@host:65536", "port"),
        ("redis://:hunter2@host:x", "port"),
        ("redis://:hunter2@a,b", "several hosts"),
        ("redis://:hunter2@host/x", "database"),
        ("redis://:hunter2@host/1/2", "database"),
        ("redis://:hunter2@host/99999999999", "database"),
        ("redis://:hunter2@host?db=1", "query"),
        ("redis://:hunter2#x@host", "query or fragment"),
        ("redis://:hunter2/x@host", "port|host's name"),
        ("redis://hunter2@host", "no password"),
        ("redis://hun%3Ater:2@host", "colon"),
        ("redis://:hunter2%ff@host", "UTF-8"),
        ("redis://:hunter2@ho st", "blanks"),
        ("redis://:hunter2@ho\nst", "blanks"),
        ("redis://[::1", "no URL"),
        ("redis://:hunter2@[::x]:1", "IPv6|no URL"),
        ("redis+sentinel://:hunter2@host", "name of the master"),
        ("redis+sentinel://:hunter2@a:1,a:1/m", "twice"),
        ("redis+cluster://:hunter2@host/1", "database 0"),
        ("https://hunter2@host/path", "path"),
    ],
)
def test_url_that_cannot_be_is_refused_and_never_repeated(text, told) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        split_url(text)
    assert refused.value.field == "url"
    assert "hunter2" not in str(refused.value)


def test_base_url_that_holds_a_password_is_refused() -> None:
    with pytest.raises(UsageError, match="credential"):
        parse_url("redis://:hunter2@host:6379/0")


@given(user=st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=8), password=st.text(min_size=1))
def test_credential_of_a_url_says_user_and_password_again(user, password) -> None:
    from urllib.parse import quote

    try:
        quoted = quote(password, safe="")
    except UnicodeEncodeError:  # half of a surrogate pair
        return
    _, credential = split_url(f"redis://{quote(user)}:{quoted}@host")
    assert split_credential(credential) == (user or None, password)


def test_password_alone_needs_no_colon() -> None:
    assert split_credential(Secret("hunter2")) == (None, "hunter2")
    assert split_credential(Secret("")) == (None, None)


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("redis://127.0.0.1", True),
        ("redis://cache", False),
        ("rediss://cache", True),
        ("redis+cluster://localhost,cache", False),
    ],
)
def test_only_tls_and_this_machine_are_private(text, is_private) -> None:
    assert parse_url(split_url(text)[0]).is_private is is_private
