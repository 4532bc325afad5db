"""The URL of a message, taken apart but never rewritten: it is stored, signed and requested exactly as published."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from daemon.domain.network import literal_host

URL_BYTES_MAX = 8_192
_PORTS = {"http": 80, "https": 443}

_SCHEME = re.compile(r"(https?)://", re.ASCII | re.IGNORECASE)
_REFUSED = re.compile(r"[^\x21-\x5b\x5d-\x7e]")
_LABELS = re.compile(r"(?!.{254})(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Destination:
    """What a checked URL says.

    Attributes:
        url: as published.
        scheme: `http` or `https`.
        host: lower-case, an IPv6 address without its brackets; otherwise as published, odd spellings of IPv4 too.
        port: the scheme's own where the URL names none.
        origin: scheme, host and port, the port only where it is not the scheme's own. Without userinfo.
        authority: host and port as published, for the `Host` header. Without userinfo.
        target: path and query as published, for the request line; it begins with a slash. The fragment is not sent.
        userinfo: what stands before the `@`, percent-encoded: a secret. None without an `@`.
    """

    url: str = field(repr=False)
    scheme: str
    host: str
    port: int
    origin: str
    authority: str
    target: str = field(repr=False)
    userinfo: str | None = field(repr=False, default=None)


def check_url(url: str) -> Destination:
    """Take a URL apart.

    Only `http` and `https`, a host, ports 1 to 65535, at most 8 KiB, printable ASCII without spaces and backslashes:
    whoever publishes has percent-encoded the rest already, and doing it here would change what gets signed.

    Raises:
        ValueError: its text says what is wrong and what to write, and repeats nothing of the URL but its port.
    """
    scheme_end = _SCHEME.match(url)
    if scheme_end is None:
        raise ValueError("endpoint has invalid scheme, add http:// or https://")
    if len(url) > URL_BYTES_MAX:
        raise ValueError(f"endpoint is too long, use at most {URL_BYTES_MAX} bytes")
    if (refused := _REFUSED.search(url)) is not None:
        raise ValueError(_told(refused[0]))
    scheme = scheme_end[1].lower()
    start = scheme_end.end()
    end = len(url)
    for mark in "/?#":
        if (at := url.find(mark, start, end)) >= 0:
            end = at
    before, at_sign, authority = url[start:end].rpartition("@")
    host, port = _host_and_port(authority, scheme)
    target = url[end:].partition("#")[0]
    shown = f"[{host}]" if ":" in host else host
    return Destination(
        url=url,
        scheme=scheme,
        host=host,
        port=port,
        origin=f"{scheme}://{shown}" if port == _PORTS[scheme] else f"{scheme}://{shown}:{port}",
        authority=authority,
        target=target if target.startswith("/") else "/" + target,
        userinfo=before if at_sign else None,
    )


def _told(character: str) -> str:
    if not character.isascii():
        return "endpoint has a character outside ASCII, percent-encode it (and write the host in punycode)"
    if character == " ":
        return "endpoint has a space, write %20"
    if character == "\\":
        return "endpoint has a backslash, write / or %5C"
    return f"endpoint has a control character, write %{ord(character):02X} or remove it"


def _host_and_port(authority: str, scheme: str) -> tuple[str, int]:
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        colon, digits = rest[:1], rest[1:]
        if not bracket or colon not in ("", ":"):
            raise ValueError("endpoint has an invalid host, write an IPv6 address as [::1]")
        if "%" in host:
            raise ValueError("endpoint has an IPv6 address with a zone, use one without")
    else:
        host, colon, digits = authority.partition(":")
    if not host:
        raise ValueError(f"endpoint has no host, add one after {scheme}://")
    host = host.lower()
    if authority.startswith("[") or _LABELS.fullmatch(host):
        try:
            literal_host(f"[{host}]" if authority.startswith("[") else host)
        except ValueError:
            raise ValueError("endpoint has an invalid IP address, correct it") from None
    else:
        raise ValueError("endpoint has an invalid host, use letters, digits, hyphens and dots")
    if not colon:
        return host, _PORTS[scheme]
    # At most five digits, so that a long number costs nothing; the scheme's own port may be written out.
    if not digits.isdecimal() or len(digits) > 5 or not 1 <= int(digits) <= 65_535:
        raise ValueError(f"endpoint has invalid port {digits[:10]!r}, use 1 to 65535")
    return host, int(digits)
