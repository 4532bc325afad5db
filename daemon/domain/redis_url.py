"""Where quota counters are kept: the URL of a Redis or Valkey, told apart from its password."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from daemon.domain.address import Address
from daemon.domain.connection import Secret
from daemon.domain.errors import UsageError

Kind = Literal["server", "sentinel", "cluster", "rest"]

FORMS = (
    "redis://host:6379/0, rediss:// for TLS, redis+sentinel://host:26379,host:26379/master-name/0, "
    "redis+cluster://host:6379, or https://name.upstash.io"
)
DATABASES_MAX = 1_000_000
_KINDS: dict[str, tuple[Kind, bool]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
    "http": ("rest", False),
    "https": ("rest", True),
}
_PORTS = {"server": 6379, "cluster": 6379, "sentinel": 26379}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A base URL, taken apart.

    Attributes:
        hosts: of the server; of the sentinels, or of some nodes of the cluster, in the order in which they are asked.
        master: the name under which the sentinels know the server; empty for other kinds.
    """

    scheme: str
    kind: Kind
    is_tls: bool
    hosts: tuple[Address, ...]
    database: int = 0
    master: str = ""

    def __str__(self) -> str:
        hosts = ",".join(str(host) for host in self.hosts)
        if self.kind == "rest":
            host, port = self.hosts[0].host, self.hosts[0].port
            return f"{self.scheme}://{host if port == (443 if self.is_tls else 80) else self.hosts[0]}"
        master = f"/{self.master}" if self.master else ""
        return f"{self.scheme}://{hosts}{master}" + ("" if self.kind == "cluster" else f"/{self.database}")

    @property
    def is_private(self) -> bool:
        """Whether nobody beyond this machine could read what is sent."""
        return self.is_tls or all(host.is_loopback for host in self.hosts)


def split_url(text: str) -> tuple[str, Secret]:
    """The base URL in its one spelling, and the credential: `user:password`, `:password`, a token, or empty for none.

    Raises:
        UsageError: naming what is wrong with the field `url`. The text is never repeated, since it holds a password.
    """
    parts, user_info = _take_apart(text)
    url = _read(parts)
    if user_info is None:
        return str(url), Secret("")
    user, colon, password = user_info.partition(":")
    user, password = _plain(user), _plain(password)
    if url.kind == "rest":
        return str(url), Secret(password or user)
    if user and not password:
        raise UsageError("url", "it names a user and no password", "write redis://user:password@host or drop the user")
    if ":" in user:
        raise UsageError("url", "the user's name holds a colon", "use one without")
    return str(url), Secret(f"{user}:{password}" if colon and password else "")


def parse_url(base_url: str) -> RedisUrl:
    """A base URL as `split_url` made it. Raises UsageError for another one, and for one that holds a password."""
    parts, user_info = _take_apart(base_url)
    if user_info is not None:
        raise UsageError("url", "it holds a user or password", "give them as the credential")
    return _read(parts)


def split_credential(credential: Secret) -> tuple[str | None, str | None]:
    """(user, password) of a credential: `user:password`, `:password`, or a password that holds no colon."""
    text = credential.reveal()
    user, colon, password = text.partition(":")
    return (user or None, password or None) if colon else (None, text or None)


def _take_apart(text: str) -> tuple[SplitResult, str | None]:
    fix = f"write {FORMS}"
    if not text.isprintable() or any(character.isspace() for character in text):
        raise UsageError("url", "it holds blanks or characters that no URL has", "percent-encode them in a password")
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise UsageError("url", "it is no URL", fix) from error
    if parts.scheme not in _KINDS:
        raise UsageError("url", f"scheme {parts.scheme or 'missing'!r} is unknown", fix)
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise UsageError(
            "url", "it has a query or fragment", "percent-encode ? and # in a password; options are settings"
        )
    user_info, at, hosts = parts.netloc.rpartition("@")
    return parts._replace(netloc=hosts), user_info if at else None


def _read(parts: SplitResult) -> RedisUrl:
    kind, is_tls = _KINDS[parts.scheme]
    default = _PORTS.get(kind, 443 if is_tls else 80)
    hosts = tuple(_host(host, default) for host in parts.netloc.split(","))
    if len(hosts) > 1 and kind in ("server", "rest"):
        raise UsageError("url", "it names several hosts", "several are for redis+sentinel:// and redis+cluster://")
    if len(set(hosts)) < len(hosts):
        raise UsageError("url", "it names a host twice", "name each once")
    steps = [step for step in parts.path.split("/") if step]
    master = ""
    if kind == "sentinel":
        if not steps or not _NAME.fullmatch(steps[0]):
            raise UsageError(
                "url", "it lacks the name of the master", "write redis+sentinel://host:26379/master-name/0"
            )
        master = steps.pop(0)
    if kind == "rest" and steps:
        raise UsageError("url", "it has a path", "write https://name.upstash.io")
    database = _database(steps)
    if kind == "cluster" and database:
        raise UsageError("url", "a cluster is read in its database 0", "leave the number out")
    return RedisUrl(parts.scheme, kind, is_tls, hosts, database, master)


def _host(text: str, default: int) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(default)
    if not (port.isascii() and port.isdecimal() and 0 < int(port) <= 65_535):
        raise UsageError("url", "a port is no number from 1 to 65535", "write host:6379")
    if host.startswith("[") and host.endswith("]"):
        try:
            return Address(str(ipaddress.IPv6Address(host[1:-1])), int(port))
        except ValueError as error:
            raise UsageError("url", "an IPv6 address in it is none", "write it as [::1]:6379") from error
    if not _NAME.fullmatch(host):
        problem = "a host's name is missing, or holds characters that none has"
        raise UsageError("url", problem, "percent-encode : / ? # [ ] @ in a password, and IPv6 as [::1]:6379")
    return Address(host.lower(), int(port))


def _database(steps: list[str]) -> int:
    if not steps:
        return 0
    number = steps[0]
    if len(steps) > 1 or not (number.isascii() and number.isdecimal()) or int(number) > DATABASES_MAX:
        raise UsageError("url", "its path is no database number", "write redis://host:6379/0")
    return int(number)


def _plain(quoted: str) -> str:
    try:
        return unquote_to_bytes(quoted).decode()
    except UnicodeDecodeError as error:
        raise UsageError("url", "its user or password is not UTF-8", "percent-encode the bytes of UTF-8") from error


__all__ = ["FORMS", "RedisUrl", "parse_url", "split_credential", "split_url"]
