"""Where a message may go: hostile addresses and hostile spellings of them."""

import contextlib
import ipaddress
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemon.domain.network import Guard, inner_addresses, literal_host, parse_allow

GUARD = Guard()
DEVELOPMENT = Guard(allows_all=True)


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1", "loopback address"),
        ("127.255.255.254", "loopback address"),
        ("::1", "loopback address"),
        ("0.0.0.0", "unspecified address"),
        ("::", "unspecified address"),
        ("0.1.2.3", "reserved address"),
        ("10.0.0.1", "private address"),
        ("172.16.0.1", "private address"),
        ("172.31.255.255", "private address"),
        ("192.168.1.1", "private address"),
        ("fc00::1", "private address"),
        ("fdff::1", "private address"),
        ("fec0::1", "private address"),
        ("100.64.0.1", "shared address"),
        ("100.127.255.255", "shared address"),
        ("169.254.0.1", "link-local address"),
        ("fe80::1", "link-local address"),
        ("fe80::1%eth0", "link-local address"),
        ("febf::1", "link-local address"),
        ("169.254.169.254", "metadata address"),
        ("169.254.170.2", "metadata address"),
        ("100.100.100.200", "metadata address"),
        ("168.63.129.16", "metadata address"),
        ("fd00:ec2::254", "metadata address"),
        ("fd20:ce::254", "metadata address"),
        ("224.0.0.1", "multicast address"),
        ("239.255.255.255", "multicast address"),
        ("ff02::1", "multicast address"),
        ("ff0e::1", "multicast address"),
        ("255.255.255.255", "broadcast address"),
        ("240.0.0.1", "reserved address"),
        ("192.0.0.8", "reserved address"),
        ("192.0.0.9", "reserved address"),
        ("192.88.99.1", "reserved address"),
        ("198.18.0.1", "reserved address"),
        ("198.19.255.255", "reserved address"),
        ("192.0.2.1", "documentation address"),
        ("198.51.100.1", "documentation address"),
        ("203.0.113.1", "documentation address"),
        ("2001:db8::1", "documentation address"),
        ("3fff::1", "documentation address"),
        ("100::1", "reserved address"),
        ("2001:2::1", "reserved address"),
        ("5f00::1", "reserved address"),
        ("4000::1", "reserved address"),
        ("64:ff9b:1::1", "reserved address"),
        ("64:ff9b:1:7f00:0:100:808:808", "reserved address"),
        ("::ffff:127.0.0.1", "loopback address"),
        ("::ffff:169.254.169.254", "metadata address"),
        ("::127.0.0.1", "loopback address"),
        ("::ffff:0:10.0.0.1", "private address"),
        ("64:ff9b::10.0.0.1", "private address"),
        ("64:ff9b:1::127.0.0.1", "loopback address"),
        ("2002:7f00:1::1", "loopback address"),
        ("2002:a9fe:a9fe::", "metadata address"),
        ("2001:0:808:808::80ff:fffe", "loopback address"),
        ("2001:0:a00:1::f7f7:f7f7", "private address"),
        ("localhost", "name that is no IP address"),
        ("", "name that is no IP address"),
    ],
)
def test_addresses_that_are_not_the_internet_are_named(address, problem):
    assert GUARD.problem(address) == problem


@pytest.mark.parametrize(
    "address",
    [
        "8.8.8.8",
        "1.0.0.1",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "126.255.255.255",
        "128.0.0.1",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.1.1",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2606:4700:4700::1111",
        "2001:4860:4860::8888",
        "2001:200::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "64:ff9b:1::8.8.8.8",
        "2002:808:808::1",
        "2001:0:808:808::f7f7:f7f7",
    ],
)
def test_the_internet_is_open(address):
    assert GUARD.problem(address) is None
    assert GUARD.problem(ip_address(address)) is None
    assert DEVELOPMENT.problem(address) is None


@given(st.ip_addresses())
@example(ip_address("192.0.0.170"))
@example(ip_address("2001:1::1"))
def test_what_the_standard_library_calls_not_global_is_closed(address):
    """The list may only be stricter than `is_global`; where IPv4 hides within, the inner address is what counts."""
    inner = inner_addresses(address) if address.version == 6 else ()
    if not address.is_global and not inner:
        assert GUARD.problem(address) is not None
    if any(not each.is_global for each in inner):
        assert GUARD.problem(address) is not None


WRAPPED = [
    lambda four: IPv6Address(0xFFFF << 32 | four),
    lambda four: IPv6Address(0xFFFF << 48 | four),
    lambda four: IPv6Address(int(IPv6Address("64:ff9b::")) | four),
    lambda four: IPv6Address(int(IPv6Address("64:ff9b:1::")) | four),
    lambda four: IPv6Address(0x2002 << 112 | four << 80 | 1),
    lambda four: IPv6Address(0x2001 << 112 | 0x08080808 << 64 | four ^ 0xFFFF_FFFF),
    lambda four: IPv6Address(0x2001 << 112 | four << 64 | 0x08080808 ^ 0xFFFF_FFFF),
]


@given(st.ip_addresses(v=4), st.sampled_from(WRAPPED))
@example(IPv4Address("127.0.0.1"), WRAPPED[0])
@example(IPv4Address("0.0.0.1"), WRAPPED[2])
def test_an_ipv4_address_is_judged_the_same_however_it_is_wrapped(four, wrap):
    wrapped = wrap(int(four))
    for guard in (GUARD, DEVELOPMENT, Guard(allowed=(ip_network("10.1.0.0/16"),))):
        assert guard.problem(wrapped) == guard.problem(four)
        assert guard.problem(f"{wrapped}%1") == guard.problem(four)


def test_allowed_networks_open_what_is_inside_them_and_nothing_else():
    guard = Guard(allowed=parse_allow("10.1.0.0/16, ::1, fd12::/16"))
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "2002:a01:203::", "::1", "fd12::5"):
        assert guard.problem(address) is None
    assert guard.problem("10.2.0.1") == "private address"
    assert guard.problem("127.0.0.1") == "loopback address"
    assert guard.problem("fd13::1") == "private address"
    assert guard.problem("::ffff:10.2.0.1") == "private address"


def test_the_outer_network_of_a_wrapped_address_can_be_allowed_too():
    guard = Guard(allowed=parse_allow("64:ff9b::/96"))
    assert guard.problem("64:ff9b::10.0.0.1") is None
    assert guard.problem("10.0.0.1") == "private address"


def test_a_scope_does_not_keep_an_address_out_of_an_allowed_network():
    guard = Guard(allowed=parse_allow("fe80::/10"))
    assert guard.problem("fe80::1%eth0") is None


def test_both_ends_of_a_teredo_address_must_be_allowed():
    both = "2001:0:a00:1::f5ff:fffd"  # server 10.0.0.1, client 10.0.0.2
    assert Guard(allowed=parse_allow("10.0.0.1")).problem(both) == "private address"
    assert Guard(allowed=parse_allow("10.0.0.2")).problem(both) == "private address"
    assert Guard(allowed=parse_allow("10.0.0.1,10.0.0.2")).problem(both) is None


def test_the_development_switch_opens_our_own_networks_only():
    for address in ("127.0.0.1", "::1", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "fd00::1", "fec0::1"):
        assert DEVELOPMENT.problem(address) is None
    for address in (
        "169.254.169.254",
        "fd00:ec2::254",
        "100.100.100.200",
        "169.254.1.1",
        "fe80::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "240.0.0.1",
        "192.0.2.1",
    ):
        assert DEVELOPMENT.problem(address) is not None


def test_allow_lists_are_read():
    assert parse_allow("") == ()
    assert parse_allow(" 10.0.0.0/8 ,\n::1,192.168.1.1, ") == (
        ip_network("10.0.0.0/8"),
        ip_network("::1/128"),
        ip_network("192.168.1.1/32"),
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10.0.0.0/8, example.com", "'example.com' is no network; write an address or a CIDR block"),
        ("10.0.0.0/33", "'10.0.0.0/33' is no network"),
        ("10.0.0.1/8", "'10.0.0.1/8' has bits set beyond its prefix; write 10.0.0.0/8 or 10.0.0.1"),
        ("fd00::1/8", "'fd00::1/8' has bits set beyond its prefix; write fd00::/8 or fd00::1"),
        ("0x7f.1", "'0x7f.1' is no network"),
        ("10.0.0.0/8 fd00::/8", "is no network"),
    ],
)
def test_a_bad_entry_of_an_allow_list_is_named_with_the_fix(text, told):
    with pytest.raises(ValueError) as caught:
        parse_allow(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.1", "127.0.0.1"),
        ("127.65535", "127.0.255.255"),
        ("0x7f.1", "127.0.0.1"),
        ("0X7F.0x0.0x0.0X1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("0000177.0.0.01", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("4294967295", "255.255.255.255"),
        ("0", "0.0.0.0"),
        ("0x", "0.0.0.0"),
        ("0x.0x.0x.1", "0.0.0.1"),
        ("%31%32%37.0.0.1", "127.0.0.1"),
        ("127%2E0%2e0%2E1", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"),
        ("%EF%BC%91%EF%BC%92%EF%BC%97.1", "127.0.0.1"),
        ("127\u30020\uff0e0\uff611", "127.0.0.1"),
        ("\u2460\u2461\u2466.1", "127.0.0.1"),
        ("127.0.0\u200b.1", "127.0.0.1"),
        ("12\u00ad7.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("[::ffff:7f00:1]", "::ffff:127.0.0.1"),
        ("[::FFFF:127.0.0.1]", "::ffff:127.0.0.1"),
        ("[fe80::1%25eth0]", "fe80::1%eth0"),
        ("fe80::1%eth0", "fe80::1%eth0"),
    ],
)
def test_a_literal_is_read_in_each_of_its_spellings(host, address):
    assert literal_host(host) == ip_address(address)


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "example.com.",
        "localhost",
        "a.b1",
        "1.a",
        "0xg",
        "0x7f.example",
        "1e3",
        "a-1",
        "_1",
        "",
        ".",
        "-1",
    ],
)
def test_names_are_no_literals(host):
    assert literal_host(host) is None


@pytest.mark.parametrize(
    "host",
    [
        "1.2.3.256",
        "1.2.3.4.5",
        "256.1",
        "1.16777216",
        "4294967296",
        "0x100000000",
        "9" * 5_000,
        "08.0.0.1",
        "0.0.0.09",
        "1..2",
        ".1",
        "foo.1",
        "foo.0x1",
        "1.2.3.4.5.6.7.8.",
        "1_0.1",
        "+1.1",
        "127.0.0.1 x",
        "127.0.0.1%00",
        "127.0.0.1%0a",
        "[::1",
        "::1]",
        "[127.0.0.1]",
        "[]",
        "1::2::3",
        "[::ffff:0x7f.1]",
        "[v1.x]",
    ],
)
def test_numbers_that_are_no_address_are_refused(host):
    """A resolver might read them somehow; nobody publishes to them by intent."""
    with pytest.raises(ValueError):
        literal_host(host)


@st.composite
def spelled(draw):
    """An IPv4 address and one of the ways in which `inet_aton` reads it."""
    value = draw(st.integers(0, 2**32 - 1))
    count = draw(st.integers(1, 4))
    rest = 8 * (5 - count)
    numbers = [value >> 8 * (3 - index) & 0xFF for index in range(count - 1)] + [value & (1 << rest) - 1]
    forms = ["{}", "0{:o}", "00{:o}", "0x{:x}", "0X{:X}", "0x0{:x}"]
    text = ".".join(draw(st.sampled_from(forms)).format(number) for number in numbers)
    wide = draw(st.sets(st.sampled_from("0123456789.")))
    dots = {ord("."): draw(st.sampled_from(["\uff0e", "\u3002", "\uff61", "%2e"]))}
    digits = {ord(digit): chr(ord(digit) + 0xFEE0) for digit in wide - {"."}}
    return value, text.translate(digits | (dots if "." in wide else {}))


@given(spelled())
def test_no_spelling_hides_an_address(case):
    value, text = case
    assert literal_host(text) == IPv4Address(value)


@given(st.text(st.sampled_from("0123456789abcdefxX. \n"), max_size=20))
@example("0177.1")
@example("1.2.3.4.")
def test_what_the_c_library_takes_for_an_address_is_never_taken_for_a_name(host):
    try:
        expected = IPv4Address(socket.inet_aton(host))
    except OSError:
        return
    with contextlib.suppress(ValueError):  # refused, which is as good
        assert literal_host(host) == expected


@given(st.text(max_size=40))
def test_no_host_breaks_the_reader(host):
    with contextlib.suppress(ValueError):
        address = literal_host(host)
        assert address is None or isinstance(address, IPv4Address | IPv6Address)


@given(st.ip_addresses(v=6))
def test_ipv6_literals_are_read_as_they_are_written(address):
    assert literal_host(f"[{address}]") == address
    assert literal_host(address.exploded.upper()) == address


def test_unicast_ipv6_is_open_but_for_its_special_parts():
    """Everything outside 2000::/3 is closed, so that a prefix nobody has thought of is not an opening."""
    for high in range(0, 0x10000, 0x100):
        address = IPv6Address(high << 112 | 1 << 80 | 1)
        if inner_addresses(address):
            continue
        assert (GUARD.problem(address) is None) == (
            address in IPv6Network("2000::/3") and address not in IPv6Network("2001::/23")
        )


def test_the_list_is_stricter_than_is_global_where_that_is_wrong():
    for text in ("192.0.0.9", "192.88.99.1", "224.0.0.1", "fec0::1", "64:ff9b:1::1", "2002:a00:1::1"):
        assert GUARD.problem(text) is not None
    assert ipaddress.ip_address("224.0.0.1").is_global, "why the list is ours"
