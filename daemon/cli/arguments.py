"""How words on the command line become values: times, windows, labels, settings, URLs, credentials."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from daemon.domain.connection import Secret
from daemon.domain.errors import UsageError
from daemon.domain.window import parse_rfc3339

if TYPE_CHECKING:
    from daemon.app import MessageId
    from daemon.domain.ports import Poller

CREDENTIAL_BYTES_MAX = 64 * 1024
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)

Account = Annotated[str, typer.Option("--account", metavar="ACCOUNT", help="The account it belongs to.")]
AnyAccount = Annotated[str | None, typer.Option("--account", metavar="ACCOUNT", help="Only of this account.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Name them, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Label = Annotated[str, typer.Argument(metavar="TENANT/NAME", help="The connection.")]
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help="First instant, RFC 3339 or a UTC date.")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Instant after the last.")]


def parse_time(field: str, text: str | None) -> datetime | None:
    """An instant from RFC 3339 or from a date, which means its start in UTC. Raises UsageError naming the field."""
    if text is None:
        return None
    fix = "write it as 2026-11-22T10:00:00Z or 2026-11-22"
    try:
        if _DATE.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        if "T" not in text.upper() and " " not in text:
            raise ValueError(f"{text!r} is no time")
        return parse_rfc3339(text)
    except (ValueError, OverflowError) as error:
        problem = str(error) if "time zone" in str(error) else f"{text!r} is no time"
        raise UsageError(field, problem.partition(";")[0], fix) from error


def parse_span(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """The half-open span of a report. Raises UsageError when it ends before it starts."""
    start, end = parse_time("--since", since), parse_time("--until", until)
    if start is not None and end is not None and end < start:
        raise UsageError("--until", f"{until} is before --since {since}", "swap them")
    return start, end


def parse_label(field: str, text: str) -> tuple[str, str]:
    """(tenant, name) of `TENANT/NAME`."""
    tenant, slash, name = text.partition("/")
    if not slash or not tenant or not name or "/" in name:
        raise UsageError(field, f"{text!r} is no connection", "write it as TENANT/NAME")
    return tenant, name


def parse_message_id(field: str, text: str) -> MessageId:
    from daemon.app import MessageId

    if (id_ := MessageId.parse(text)) is None:
        raise UsageError(field, f"{text!r} is no id of a message", "write it as msg_..., as publishing has answered it")
    return id_


def parse_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_settings(field: str, pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; a value is JSON where it reads as such, else text. Dots reach into objects."""
    import msgspec

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, raw = pair.partition("=")
        if not equals or not key:
            raise UsageError(field, f"{pair!r} is no setting", "write it as key=value")
        try:
            value = msgspec.json.decode(raw)
        except msgspec.DecodeError:
            value = raw
        *path, last = key.split(".")
        place = settings
        for step in path:
            place = place.setdefault(step, {})
            if not isinstance(place, dict):
                raise UsageError(field, f"{key} reaches into {step}, which has a value already", "give one of them")
        place[last] = value
    return settings


def parse_base_url(field: str, text: str, *, allow_insecure: bool) -> str:
    """A base URL without its trailing slash: https, or http to this machine, or as `allow_insecure` permits."""
    fix = "write it as https://host/path"
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(field, f"{text!r} is no URL: {error}", fix) from error
    if parts.scheme not in ("https", "http") or not host or any(c.isspace() or not c.isprintable() for c in text):
        raise UsageError(field, f"{text!r} is no http(s) URL", fix)
    if parts.username is not None or parts.password is not None:
        raise UsageError(field, "holds a user or password", "give the key as the credential")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise UsageError(field, f"{text!r} has a query or fragment", fix)
    if parts.scheme == "http" and not allow_insecure and not _is_loopback(host):
        raise UsageError(field, f"{text} would send the key in clear", "use https, or pass --allow-insecure")
    return text.rstrip("/")


def own_url(poller: Poller) -> str:
    """Where a provider's own API stands. Raises UsageError for what everybody runs at an address of theirs."""
    if not poller.default_base_url:
        raise UsageError("--base-url", f"{poller.provider} has no address of its own", "give that of yours")
    return poller.default_base_url


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_credential(variable: str | None, file: Path | None, *, from_stdin: bool) -> Secret:
    """The credential from exactly one place, without surrounding white space."""
    names = "--credential-env, --credential-file or --credential-stdin"
    if (variable is not None) + (file is not None) + from_stdin != 1:
        raise UsageError("credential", "is to be given in exactly one way", f"pass one of {names}")
    if variable is not None:
        return credential_from_env("--credential-env", variable)
    if file is not None:
        try:
            with file.open("rb") as stream:
                raw = stream.read(CREDENTIAL_BYTES_MAX + 1)
        except OSError as error:
            raise UsageError(
                "--credential-file", f"cannot read {file}: {error.strerror}", "give a readable file"
            ) from error
        return check_text("--credential-file", raw)
    return check_text("--credential-stdin", sys.stdin.buffer.read(CREDENTIAL_BYTES_MAX + 1))


def credential_from_env(field: str, variable: str) -> Secret:
    if variable not in os.environ:
        raise UsageError(field, f"the variable {variable} is not set", "export it first")
    return check_text(field, os.environ[variable].encode("utf-8", "surrogateescape"))


def check_text(field: str, raw: bytes) -> Secret:
    """A credential that can travel in a header. The messages never quote it."""
    if len(raw) > CREDENTIAL_BYTES_MAX:
        raise UsageError(field, f"is longer than {CREDENTIAL_BYTES_MAX} bytes", "give the key alone")
    try:
        text = raw.decode("ascii").strip()
    except UnicodeDecodeError:
        raise UsageError(field, "holds characters beyond ASCII", "give the key alone") from None
    if not text:
        raise UsageError(field, "is empty", "give the key")
    if not text.isprintable():
        raise UsageError(field, "holds line breaks or control characters", "give one key alone")
    return Secret(text)
