"""Where a listener listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Address:
    """A host (a name, or an IP address without brackets) and a TCP port; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name other than localhost counts as reachable from outside."""
        return is_loopback(self.host)


def parse_address(text: str) -> Address:
    """`127.0.0.1:8080`, `[::1]:8080`, `localhost:0`. Raises ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError(f"{text!r} has an IPv6 address without brackets")
    if not colon or not host or not port.isascii() or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{text!r} is no host and port")
    return Address(host, int(port))


def is_loopback(host: str) -> bool:
    """Whether a host of a URL or a listener is this machine itself."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.") or host.lower().endswith(".localhost")


def is_private(host: str) -> bool:
    """Whether a host cannot be reached from the internet, as far as its spelling tells."""
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        lower = host.lower().rstrip(".")
        return is_loopback(host) or "." not in lower or lower.endswith((".local", ".internal", ".lan", ".svc"))
