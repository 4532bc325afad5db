"""Where a message may go: which IP addresses are the internet, and which belong to us, our neighbours or nobody.

Whoever publishes a message chooses its URL, and tallyd sends the request from inside the operator's network. So the
address is judged, not the name, and the list is our own: `ipaddress.is_global` calls 192.0.0.8, 224.0.0.1,
192.88.99.1, fec0::1, 64:ff9b:1::1 and all of 2002::/16 global.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import unquote_to_bytes

LOOPBACK = "loopback address"
PRIVATE = "private address"
SHARED = "shared address"
LINK_LOCAL = "link-local address"
METADATA = "metadata address"
MULTICAST = "multicast address"
UNSPECIFIED = "unspecified address"
BROADCAST = "broadcast address"
DOCUMENTATION = "documentation address"
RESERVED = "reserved address"
NO_ADDRESS = "name that is no IP address"

_OWN = frozenset({LOOPBACK, PRIVATE, SHARED})

# First match wins. IANA's special-purpose registries, read 2026-11-20, and the clouds' metadata services, each from its
# vendor's documentation: they hand credentials to whoever asks from inside.
_SPECIAL = (
    ("169.254.169.254", METADATA),  # AWS, Azure, Google, Oracle, DigitalOcean, OpenStack
    ("169.254.170.2", METADATA),  # AWS ECS: a task's credentials
    ("169.254.170.23", METADATA),  # AWS EKS: a pod's credentials
    ("169.254.42.42", METADATA),  # Scaleway
    ("100.100.100.200", METADATA),  # Alibaba
    ("168.63.129.16", METADATA),  # Azure's own service on each machine, a public address by its number
    ("192.0.0.192", METADATA),  # Oracle Classic
    ("fd00:ec2::254", METADATA),  # AWS
    ("fd00:ec2::23", METADATA),  # AWS EKS
    ("fd20:ce::254", METADATA),  # Google
    ("fd00:42::42", METADATA),  # Scaleway
    ("0.0.0.0", UNSPECIFIED),  # Linux connects it to this machine  # noqa: S104  # nobody binds it here
    ("0.0.0.0/8", RESERVED),
    ("10.0.0.0/8", PRIVATE),
    ("100.64.0.0/10", SHARED),  # behind a carrier's NAT; overlay networks use it as a private one
    ("127.0.0.0/8", LOOPBACK),
    ("169.254.0.0/16", LINK_LOCAL),
    ("172.16.0.0/12", PRIVATE),
    ("192.0.0.0/24", RESERVED),
    ("192.0.2.0/24", DOCUMENTATION),
    ("192.31.196.0/24", RESERVED),
    ("192.52.193.0/24", RESERVED),
    ("192.88.99.0/24", RESERVED),  # 6to4 relays, given up in 2015
    ("192.168.0.0/16", PRIVATE),
    ("192.175.48.0/24", RESERVED),
    ("198.18.0.0/15", RESERVED),  # benchmarks
    ("198.51.100.0/24", DOCUMENTATION),
    ("203.0.113.0/24", DOCUMENTATION),
    ("224.0.0.0/4", MULTICAST),
    ("255.255.255.255", BROADCAST),
    ("240.0.0.0/4", RESERVED),
    ("::", UNSPECIFIED),
    ("::1", LOOPBACK),
    ("fc00::/7", PRIVATE),
    ("fe80::/10", LINK_LOCAL),
    ("fec0::/10", PRIVATE),  # site-local, the forerunner of fc00::/7
    ("ff00::/8", MULTICAST),
    ("2001::/23", RESERVED),
    ("2001:db8::/32", DOCUMENTATION),
    ("3fff::/20", DOCUMENTATION),
    ("2620:4f:8000::/48", RESERVED),
)


def _table(version: int) -> tuple[tuple[int, int, str], ...]:
    """First address and mask as numbers, which compare in a fraction of the time that `ipaddress` takes."""
    networks = [(ipaddress.ip_network(text), reason) for text, reason in _SPECIAL]
    return tuple(
        (int(network.network_address), int(network.netmask), reason)
        for network, reason in networks
        if network.version == version
    )


_SPECIAL_4 = _table(4)
_SPECIAL_6 = _table(6)
_UNSPECIFIED_6 = 0
_LOOPBACK_6 = 1
_UNICAST_6 = 1  # 2000::/3, the only part of IPv6 that is given out: everything else is refused


def _problem_4(value: int) -> str | None:
    for first, mask, reason in _SPECIAL_4:
        if value & mask == first:
            return reason
    return None


def _problem_6(value: int) -> str | None:
    for first, mask, reason in _SPECIAL_6:
        if value & mask == first:
            return reason
    return None if value >> 125 == _UNICAST_6 else RESERVED


def inner_addresses(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """The IPv4 addresses that an IPv6 address stands for: whoever connects to it may end up at any of them.

    Mapped (::ffff:0:0/96), compatible (::/96), translated (::ffff:0:0:0/96), NAT64 (64:ff9b::/96, and 64:ff9b:1::/96
    of the local-use prefix), 6to4 (2002::/16), and Teredo (2001::/32), which holds a server and a client.
    """
    value = int(address)
    low = value & 0xFFFF_FFFF
    high = value >> 32
    if high == 0:
        return () if value in (_UNSPECIFIED_6, _LOOPBACK_6) else (IPv4Address(low),)
    if high in (0xFFFF, 0xFFFF_0000, 0x0064_FF9B << 64, 0x0064_FF9B_0001 << 48):
        return (IPv4Address(low),)
    if value >> 112 == 0x2002:
        return (IPv4Address(value >> 80 & 0xFFFF_FFFF),)
    if value >> 96 == 0x2001_0000:
        return (IPv4Address(value >> 64 & 0xFFFF_FFFF), IPv4Address(low ^ 0xFFFF_FFFF))
    return ()


def parse_allow(text: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """`10.1.0.0/16, fd00::/8, 127.0.0.1`. Raises ValueError, which names the entry and what to write instead."""
    return tuple(_network(entry) for part in text.split(",") if (entry := part.strip()))


def _network(entry: str) -> IPv4Network | IPv6Network:
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        pass
    try:
        wide = ipaddress.ip_network(entry, strict=False)
    except ValueError:
        raise ValueError(
            f"{entry!r} is no network; write an address or a CIDR block, such as 10.1.0.0/16 or fd00::/8"
        ) from None
    raise ValueError(f"{entry!r} has bits set beyond its prefix; write {wide} or {entry.partition('/')[0]}")


@dataclass(frozen=True, slots=True)
class Guard:
    """Says of each address whether a message may go there.

    Attributes:
        allowed: networks that are open whatever they are. An IPv6 address that stands for an IPv4 one is also open if
            that one is in here.
        allows_all: for development: loopback (127.0.0.0/8, ::1), private (10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16,
            fc00::/7, fec0::/10) and shared (100.64.0.0/10) addresses are open too. Metadata services, link-local,
            multicast, broadcast, unspecified, documentation and reserved addresses stay closed.
    """

    allowed: tuple[IPv4Network | IPv6Network, ...] = ()
    allows_all: bool = False

    def problem(self, address: str | IPv4Address | IPv6Address) -> str | None:
        """None if a message may go there, else the kind of address that it is, such as `loopback address`."""
        if isinstance(address, str):
            try:
                address = ipaddress.ip_address(address)
            except ValueError:
                return NO_ADDRESS
        if isinstance(address, IPv4Address):
            return self._judge(address, _problem_4(int(address)))
        if address.scope_id is not None:  # networks hold no address that names its interface
            address = IPv6Address(int(address))
        inner = inner_addresses(address)
        if not inner:
            return self._judge(address, _problem_6(int(address)))
        if self._is_allowed(address):
            return None
        for each in inner:
            if (problem := self._judge(each, _problem_4(int(each)))) is not None:
                return problem
        return None

    def _is_allowed(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self.allowed)

    def _judge(self, address: IPv4Address | IPv6Address, problem: str | None) -> str | None:
        if problem is None or (self.allows_all and problem in _OWN) or self._is_allowed(address):
            return None
        return problem


# UTS 46 drops these from a host: soft hyphen, joiners, variation selectors, and the like.
_IGNORED = re.compile("[\u00ad\u034f\u180b-\u180f\u200b-\u200d\u2060-\u2064\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
_BLANK = re.compile(r"[\s\x00]")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+", re.ASCII)
_OCTAL = re.compile(r"0[0-7]*", re.ASCII)


def literal_host(host: str) -> IPv4Address | IPv6Address | None:
    """The address that a URL's host spells, in any way that a resolver or a browser would read it; None for a name.

    As in the URL Standard (https://url.spec.whatwg.org/#host-parsing): percent-encoding is undone and full-width digits
    are folded; a host whose last label is a number is an IPv4 address, of one to four parts, each decimal, octal
    (`0177`) or hexadecimal (`0x7f`), the last one filling what is left (`127.1`, `2130706433`).

    Raises:
        ValueError: brackets without an IPv6 address, numbers that are no IPv4 address (`1.2.3.256`), blanks.
    """
    if "%" in host and not host.startswith("["):
        host = unquote_to_bytes(host).decode("utf-8", "replace")
    if not host.isascii():
        host = unicodedata.normalize("NFKC", _IGNORED.sub("", host)).replace("\u3002", ".")
    if _BLANK.search(host) is not None:  # `inet_aton` stops reading there
        raise ValueError("a host holds no blanks")
    if host.startswith("[") or ":" in host:
        return _ipv6(host)
    parts = host.split(".")
    if parts[-1] == "" and len(parts) > 1:
        parts.pop()
    if _NUMBER.fullmatch(parts[-1]) is None:
        return None
    return _ipv4(host, parts)


def _ipv6(host: str) -> IPv6Address:
    inside = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return IPv6Address(inside.replace("%25", "%", 1))
    except ValueError:
        raise ValueError(f"{host!r} is no IPv6 address") from None


def _ipv4(host: str, parts: list[str]) -> IPv4Address:
    numbers = [_number(part) for part in parts] if len(parts) <= 4 else [-1]
    *before, last = numbers
    room = 256 ** (4 - len(before))
    if any(not 0 <= number <= 255 for number in before) or not 0 <= last < room:
        raise ValueError(f"{host!r} is no IPv4 address")
    value = last
    for index, number in enumerate(before):
        value += number << 8 * (3 - index)
    return IPv4Address(value)


def _number(part: str) -> int:
    """One part of an IPv4 address, or -1. `int` alone would take signs, underscores and the digits of any script."""
    if _NUMBER.fullmatch(part) is None or len(part) > 255:
        return -1
    if part[:2] in ("0x", "0X"):
        return int(part[2:] or "0", 16)
    if part[0] != "0":
        return int(part)
    return int(part, 8) if _OCTAL.fullmatch(part) else -1
