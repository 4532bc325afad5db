"""URLs as they are published: taken apart, refused with the fix, and never rewritten."""

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon.domain.destination import URL_BYTES_MAX, check_url


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "origin", "authority", "target", "userinfo"),
    [
        ("https://example.com", "https", "example.com", 443, "https://example.com", "example.com", "/", None),
        ("http://example.com/", "http", "example.com", 80, "http://example.com", "example.com", "/", None),
        ("http://h:8080?x=1", "http", "h", 8080, "http://h:8080", "h:8080", "/?x=1", None),
        ("http://h#top", "http", "h", 80, "http://h", "h", "/", None),
        ("http://h/a?#top", "http", "h", 80, "http://h", "h", "/a?", None),
        ("http://h/a?", "http", "h", 80, "http://h", "h", "/a?", None),
        ("http://h/a//b/./../%7E;'x?y=[2]&z=%2F?", "http", "h", 80, "http://h", "h", "/a//b/./../%7E;'x?y=[2]&z=%2F?", None),
        ("HTTPS://Example.COM:443/A", "https", "example.com", 443, "https://example.com", "Example.COM:443", "/A", None),
        ("http://u:p@h:1/", "http", "h", 1, "http://h:1", "h:1", "/", "u:p"),
        ("http://u@x:p@h/", "http", "h", 80, "http://h", "h", "/", "u@x:p"),
        ("http://@h/", "http", "h", 80, "http://h", "h", "/", ""),
        ("http://h/@x:y", "http", "h", 80, "http://h", "h", "/@x:y", None),
        ("http://h?@x", "http", "h", 80, "http://h", "h", "/?@x", None),
        ("http://[::1]:8080/", "http", "::1", 8080, "http://[::1]:8080", "[::1]:8080", "/", None),
        ("http://[2606:4700::A]/", "http", "2606:4700::a", 80, "http://[2606:4700::a]", "[2606:4700::A]", "/", None),
        ("http://127.1/", "http", "127.1", 80, "http://127.1", "127.1", "/", None),
        ("http://example.com./", "http", "example.com.", 80, "http://example.com.", "example.com.", "/", None),
        ("http://my_svc:65535/", "http", "my_svc", 65535, "http://my_svc:65535", "my_svc:65535", "/", None),
        ("http://xn--bcher-kva.example/", "http", "xn--bcher-kva.example", 80, "http://xn--bcher-kva.example", "xn--bcher-kva.example", "/", None),
    ],
)  # fmt: skip
def test_a_url_is_taken_apart_as_published(url, scheme, host, port, origin, authority, target, userinfo):
    destination = check_url(url)
    assert destination.url == url
    assert (destination.scheme, destination.host, destination.port) == (scheme, host, port)
    assert (destination.origin, destination.authority) == (origin, authority)
    assert (destination.target, destination.userinfo) == (target, userinfo)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "endpoint has invalid scheme, add http:// or https://"),
        ("example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("my-group", "endpoint has invalid scheme, add http:// or https://"),
        ("ftp://example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("https:/example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("//example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("file:///etc/passwd", "endpoint has invalid scheme, add http:// or https://"),
        (" http://example.com", "endpoint has invalid scheme, add http:// or https://"),
        ("http://", "endpoint has no host, add one after http://"),
        ("https:///path", "endpoint has no host, add one after https://"),
        ("https://?x", "endpoint has no host, add one after https://"),
        ("http://u:p@/", "endpoint has no host, add one after http://"),
        ("http://:80/", "endpoint has no host, add one after http://"),
        ("http://[]/", "endpoint has no host, add one after http://"),
        ("http://h:0/", "endpoint has invalid port '0', use 1 to 65535"),
        ("http://h:/", "endpoint has invalid port '', use 1 to 65535"),
        ("http://h:65536/", "endpoint has invalid port '65536', use 1 to 65535"),
        ("http://h:-1/", "endpoint has invalid port '-1', use 1 to 65535"),
        ("http://h:+80/", "endpoint has invalid port '+80', use 1 to 65535"),
        ("http://h:8_0/", "endpoint has invalid port '8_0', use 1 to 65535"),
        ("http://h:http/", "endpoint has invalid port 'http', use 1 to 65535"),
        ("http://h:1:2/", "endpoint has invalid port '1:2', use 1 to 65535"),
        ("http://h:" + "1" * 8_000, "endpoint has invalid port '1111111111', use 1 to 65535"),
        ("http://[::1]80/", "endpoint has an invalid host, write an IPv6 address as [::1]"),
        ("http://[::1/", "endpoint has an invalid host, write an IPv6 address as [::1]"),
        ("http://::1/", "endpoint has no host, add one after http://"),
        ("http://[fe80::1%25eth0]/", "endpoint has an IPv6 address with a zone, use one without"),
        ("http://[1::2::3]/", "endpoint has an invalid IP address, correct it"),
        ("http://[127.0.0.1]/", "endpoint has an invalid IP address, correct it"),
        ("http://1.2.3.256/", "endpoint has an invalid IP address, correct it"),
        ("http://1.2.3.4.5/", "endpoint has an invalid IP address, correct it"),
        ("http://foo.08/", "endpoint has an invalid IP address, correct it"),
        ("http://a..b/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://.a/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://ex%61mple.com/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://%31%32%37.0.0.1/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://a]b/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://" + "a" * 64 + "/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://" + "a." * 127 + "/", "endpoint has an invalid host, use letters, digits, hyphens and dots"),
        ("http://b\u00fccher.example/", "endpoint has a character outside ASCII, percent-encode it (and write the host in punycode)"),
        ("http://h/\u00e9", "endpoint has a character outside ASCII, percent-encode it (and write the host in punycode)"),
        ("http://\uff11\uff12\uff17.1/", "endpoint has a character outside ASCII, percent-encode it (and write the host in punycode)"),
        ("http://h/a b", "endpoint has a space, write %20"),
        ("http://h /", "endpoint has a space, write %20"),
        ("http://h\\@evil/", "endpoint has a backslash, write / or %5C"),
        ("http://h/\r\nX: y", "endpoint has a control character, write %0D or remove it"),
        ("http://h/\x00", "endpoint has a control character, write %00 or remove it"),
        ("http://h/\x7f", "endpoint has a control character, write %7F or remove it"),
        ("http://h/\n", "endpoint has a control character, write %0A or remove it"),
        ("http://h/" + "a" * URL_BYTES_MAX, "endpoint is too long, use at most 8192 bytes"),
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_used_is_refused_with_the_fix(url, told):
    with pytest.raises(ValueError) as caught:
        check_url(url)
    assert str(caught.value) == told


def test_the_longest_url_is_taken():
    url = "http://h/" + "a" * (URL_BYTES_MAX - 9)
    assert check_url(url).url == url


@pytest.mark.parametrize("host", ["a" * 63, "a." * 126 + "a"])
def test_the_longest_hosts_are_taken(host):
    assert check_url(f"http://{host}/").host == host


def test_the_secret_of_a_url_is_not_shown():
    destination = check_url("https://me:hunter2@example.com/x?token=hunter3")
    assert "hunter" not in repr(destination)
    for bad in ("https://me:hunter2@example.com:0/", "https://me:hunter2@exa mple.com/", "https://me:hunter2@[x/"):
        with pytest.raises(ValueError) as caught:
            check_url(bad)
        assert "hunter" not in str(caught.value)


HOSTILE = st.text(st.one_of(st.sampled_from("http:/@?#[]%.\\ \r\n0x7f12"), st.characters()), max_size=60)


@given(st.one_of(HOSTILE, HOSTILE.map("http://".__add__), HOSTILE.map("https://h".__add__)))
@example("http://a@b@c/")
@example("http://\u212a/")
def test_whatever_is_taken_can_stand_in_a_request(url):
    with contextlib.suppress(ValueError):
        destination = check_url(url)
        assert destination.url == url
        assert url.isascii()
        assert url.isprintable()
        assert " " not in url
        assert destination.target.startswith("/")
        assert "#" not in destination.target
        assert 1 <= destination.port <= 65_535
        assert destination.host == destination.host.lower() != ""
        for part in (destination.host, destination.origin.partition("://")[2], destination.authority):
            assert not set(part) & set("@/?#\\%")
        assert url.lower().startswith(f"{destination.scheme}://")
        assert destination.authority in url


@given(
    st.sampled_from(["http", "https", "HTTP", "hTTps"]),
    st.none() | st.text(st.sampled_from("abc:@%!$&'()*+,;="), max_size=9),
    st.sampled_from(["example.com", "EXAMPLE.com", "10.0.0.1", "[::1]", "localhost", "0x7f.1"]),
    st.none() | st.integers(1, 65_535),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#?\\"), max_size=20),
    st.none() | st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="#\\"), max_size=20),
)
def test_each_part_of_a_url_arrives_unchanged(scheme, userinfo, host, port, path, query):
    authority = host if port is None else f"{host}:{port}"
    target = f"/{path}" if query is None else f"/{path}?{query}"
    before = "" if userinfo is None else f"{userinfo}@"
    destination = check_url(f"{scheme}://{before}{authority}{target}")
    assert (destination.scheme, destination.authority) == (scheme.lower(), authority)
    assert (destination.target, destination.userinfo) == (target, userinfo)
    assert destination.host == host.lower().strip("[]")
    assert destination.port == (port or {"http": 80, "https": 443}[scheme.lower()])
