"""Addresses to listen on, and who can reach them."""

from __future__ import annotations

import pytest

from daemon.domain.address import Address, is_loopback, is_private, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", Address("127.0.0.1", 8080)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("[0:0:0:0:0:0:0:1]:1", Address("::1", 1)),
    ],
)
def test_an_address_is_read_and_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "8080", ":8080", "host", "host:", "host:x", "host:65536", "host:-1", "::1:80", "[x]:1", "h:\u0661"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)


@pytest.mark.parametrize(
    ("host", "loopback", "private"),
    [
        ("127.0.0.1", True, True),
        ("127.9.9.9", True, True),
        ("::1", True, True),
        ("[::1]", True, True),
        ("LocalHost", True, True),
        ("dev.localhost", True, True),
        ("10.0.0.1", False, True),
        ("192.168.1.1", False, True),
        ("169.254.169.254", False, True),
        ("tallyd", False, True),
        ("tallyd.default.svc", False, True),
        ("box.local", False, True),
        ("tallyd.example.com", False, False),
        ("93.184.216.34", False, False),
        ("0.0.0.0", False, True),
    ],
)
def test_who_can_reach_a_host_is_told_by_its_spelling(host: str, loopback: bool, private: bool) -> None:
    assert (is_loopback(host), is_private(host)) == (loopback, private)
