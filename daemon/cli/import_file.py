"""`tallyd connections import`: JSON lines to connections; every bad line is named, and then nothing is stored."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from daemon.app import App, NewConnection
from daemon.cli.arguments import check_text, credential_from_env, own_url, parse_base_url, parse_time
from daemon.domain.errors import CredentialError, DaemonError, ImportRefusedError, UsageError
from daemon.domain.ports import Poller
from daemon.pollers.registry import check_settings

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REQUIRED = ("tenant", "provider", "name")
_KNOWN = frozenset((*_REQUIRED, "credential", "credential_env", "base_url", "since", "settings"))
LINE_BYTES_MAX = 256 * 1024
CHECKS_AT_ONCE = 16


async def import_file(
    app: App, path: Path, *, is_checking: bool, allow_duplicate: bool, revive: bool, allow_insecure: bool
) -> dict[str, int]:
    """Import a file and count its lines. Raises ImportRefusedError naming every bad line."""
    with _progress() as progress:
        lines = _read(path)
        news, problems = parse_lines(lines, app.pollers, allow_insecure=allow_insecure)
        if not problems and is_checking:
            task = progress and (progress, progress.add_task("proving credentials", total=len(news)))
            news, problems = await _proven(app, news, task or None)
        if problems:
            raise ImportRefusedError(problems)
        if progress:
            progress.add_task(f"storing {len(news)} connections", total=None)
        report = await app.connections.add_many(news, allow_duplicate=allow_duplicate, revive=revive)
    return {"lines": len(news), "added": report.added, "revived": report.revived}


def parse_lines(
    lines: Iterable[bytes], pollers: Mapping[str, Poller], *, allow_insecure: bool
) -> tuple[list[NewConnection], list[str]]:
    """The connections of the good lines, and a sentence for each bad one, with its number and field."""
    news: list[NewConnection] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            news.append(replace(_parse(line, pollers, allow_insecure=allow_insecure), line=number))
        except CredentialError as error:
            problems.append(f"line {number}: credential: {error}")
        except DaemonError as error:
            problems.append(f"line {number}: {error}")
    return news, problems


def _parse(line: bytes, pollers: Mapping[str, Poller], *, allow_insecure: bool) -> NewConnection:
    if len(line) > LINE_BYTES_MAX:
        raise UsageError("line", f"is longer than {LINE_BYTES_MAX} bytes", "split it")
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError("line", f"is no JSON: {error}", "write one JSON object per line") from error
    if not isinstance(found, dict):
        raise UsageError("line", "is no JSON object", "write one JSON object per line")
    if unknown := sorted(found.keys() - _KNOWN):
        raise UsageError(unknown[0], "unknown key", f"use {', '.join(sorted(_KNOWN))}")
    for key in (*_REQUIRED, "credential", "credential_env", "base_url", "since"):
        if key in _REQUIRED and key not in found:
            raise UsageError(key, "is missing", "add it")
        if key in found and not (isinstance(found[key], str) and found[key].strip()):
            raise UsageError(key, "is no text, or empty", "give a text")
    if ("credential" in found) + ("credential_env" in found) != 1:
        raise UsageError("credential", "is to be given in exactly one way", "use credential or credential_env")
    settings: dict[str, Any] | None = found.get("settings")
    if settings is not None and not isinstance(settings, dict):
        raise UsageError("settings", "is no JSON object", "write it as {...}")
    if found["provider"] not in pollers:
        raise UsageError(
            "provider", f"unknown provider {found['provider']!r}", f"use one of {', '.join(sorted(pollers))}"
        )
    poller = pollers[found["provider"]]
    check_settings(poller, settings or {})
    if "credential" in found:
        credential = check_text("credential", found["credential"].encode())
    else:
        credential = credential_from_env("credential_env", found["credential_env"])
    poller.check_credential(credential.reveal())
    return NewConnection(
        found["tenant"],
        found["name"],
        found["provider"],
        parse_base_url("base_url", found.get("base_url") or own_url(poller), allow_insecure=allow_insecure),
        credential,
        parse_time("since", found.get("since")),
        settings,
    )


async def _proven(
    app: App, news: list[NewConnection], task: tuple[Progress, TaskID] | None
) -> tuple[list[NewConnection], list[str]]:
    limiter = anyio.CapacityLimiter(CHECKS_AT_ONCE)
    proven: list[NewConnection] = list(news)
    problems: dict[int, str] = {}

    async def prove(index: int, new: NewConnection) -> None:
        async with limiter:
            try:
                identity = await app.identify(new.provider, new.base_url, new.credential, new.settings or {})
                proven[index] = replace(new, org_id=identity.org_id)
            except (DaemonError, TimeoutError) as error:
                problems[new.line] = f"line {new.line}: credential: {str(error) or 'no answer in time'}"
            if task is not None:
                task[0].advance(task[1])

    async with anyio.create_task_group() as tasks:
        for index, new in enumerate(news):
            tasks.start_soon(prove, index, new)
    return proven, [problems[line] for line in sorted(problems)]


def _read(path: Path) -> list[bytes]:
    if str(path) == "-":
        return sys.stdin.buffer.read().split(b"\n")
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError("FILE", f"cannot read {path}: {error.strerror}", "give a readable file, or -") from error


@contextmanager
def _progress() -> Iterator[Progress | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield progress
