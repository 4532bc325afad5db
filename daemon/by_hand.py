"""What the commands do with quotas and resources: the daemon's own work, begun by a person and done here and now."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from daemon.app import RESOURCE_PROVIDER, App, http_settings
from daemon.config import Settings
from daemon.db import resources
from daemon.domain.connection import Secret, Target
from daemon.domain.errors import UpstreamUnavailableError, UsageError
from daemon.pollers._resource_spec import parse_document, parse_settings
from daemon.worker.caller import CountingCaller, RetrySettings
from daemon.worker.governor import Governor, GovernorSettings
from daemon.worker.quota import Drift, compare, settable, write_back

if TYPE_CHECKING:
    from daemon.pollers._resource_trial import Trial

FILE_BYTES_MAX = 16 * 1024 * 1024


# ── Quotas ──────────────────────────────────────────────────────────────────────────────────────


async def quota_drift(app: App, tenant: str, name: str) -> AsyncIterator[Drift]:
    """Each counter of a source against the ledger.

    Raises:
        PermanentError: its settings do not say what the counters measure.
    """
    connection = await app.connections.get(tenant, name)
    stream = await app.quotas.stream_of(connection.id)
    if stream is None:
        raise UsageError("TENANT/NAME", f"{tenant}/{name} was never synced", "`tallyd quota sync` first")
    async for lines in compare(app.quota_deps, connection, stream):
        for line in lines:
            yield line


async def quota_write_back(app: App, tenant: str, name: str, *, dry_run: bool) -> tuple[int, int]:
    """Set a source's counters to the ledger's figures: how many differed, and how many were set.

    They are read first, or what they counted since the last sync would be overwritten without having been counted.

    Raises:
        UpstreamUnavailableError: they cannot be read now; nothing is set.
    """
    connection = await app.connections.get(tenant, name)
    if not dry_run:
        read = await app.poll([connection.id], full=False)
        if read.retried or read.dead:
            raise UpstreamUnavailableError(f"{tenant}/{name} cannot be read, so nothing is set: see `tallyd gaps`")
    lines = [line async for line in quota_drift(app, tenant, name) if settable(line) is not None]
    stream = await app.quotas.stream_of(connection.id)
    if dry_run or stream is None:
        return len(lines), 0
    return len(lines), await write_back(app.quota_deps, connection, stream, lines)


# ── Resources ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ResourceFile:
    """A collection as a file declares it; `settings` are its connection's."""

    name: str
    base_url: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What `tallyd resources sync` did.

    Attributes:
        calls_saved: against a program that makes every call for every resource.
        left: batches that came to no end: they wait for another try, or are dead letters.
    """

    resources: int
    changed: int
    unchanged: int
    failed: int
    gone: int
    calls: int
    calls_saved: int
    batches: int
    left: int
    duration_s: float


async def sync_resources(app: App, tenant: str | None, name: str | None) -> SyncReport:
    """List the active collections of this scope here and now, and work their batches off.

    Raises:
        UsageError: there is none.
        TransientError: a listing did not come to its end.
    """
    began = monotonic()
    chosen = [run for run in await app.resource_runs(tenant, name) if run.state == "active"]
    if not chosen:
        raise UsageError("scope", "there is no active collection", "see `tallyd resources list`")
    ids = [run.connection_id for run in chosen]
    polled = await app.poll(ids, full=False)
    # What failed waits for its retry; the other batches come to their end here.
    await app.help_while(lambda: resources.open_batches(app.db, ids))
    runs = [run for run in await app.resource_runs(tenant, name) if run.connection_id in ids]

    def total(figure: str) -> int:
        return sum(getattr(run, figure) or 0 for run in runs)

    return SyncReport(
        resources=total("listed"),
        changed=total("changed"),
        unchanged=total("unchanged"),
        failed=total("failed") + polled.retried + polled.dead,
        gone=total("gone"),
        calls=total("calls") + polled.requests,
        calls_saved=max(0, total("calls_saved") - polled.requests),
        batches=total("batches"),
        left=max(0, total("batches") - total("batches_done")),
        duration_s=round(monotonic() - began, 3),
    )


async def try_resources(settings: Settings, file: ResourceFile, base_url: str, credential: Secret, limit: int) -> Trial:
    """Try a collection's declaration on its API; nothing is stored, and no database is needed.

    Returns what was found, with the number of calls.
    """
    from daemon.http_client import HttpClient  # noqa: PLC0415 - takes 0.3 s to import
    from daemon.pollers._resource_trial import try_out  # noqa: PLC0415 - imports the client

    target = Target(RESOURCE_PROVIDER, base_url, credential, file.settings)
    async with HttpClient(http_settings(settings)) as http:
        governor = Governor(GovernorSettings(), monotonic)
        caller = CountingCaller(http, governor, target, "check", RetrySettings(tries=1))
        trial = await try_out(parse_settings(file.settings), target, caller, limit)
    trial.calls = caller.requests
    return trial


def read_resource_file(path: Path) -> ResourceFile:
    """A collection's declaration. Raises UsageError naming the field and the fix."""
    document = parse_document(read_text("FILE", path))
    ids: list[str] = []
    if document.ids_file is not None:
        lines = read_text("ids_file", path.parent / document.ids_file).splitlines()
        ids = [line.strip() for line in lines if line.strip()]
    return ResourceFile(document.name, document.base_url, document.settings(ids))


def read_text(field: str, path: Path) -> str:
    """A text file of at most `FILE_BYTES_MAX`."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise UsageError(field, f"{path} has more than {FILE_BYTES_MAX} bytes", "give a smaller file")
        return raw.decode("utf-8")
    except OSError as error:
        raise UsageError(field, f"cannot read {path}: {error.strerror}", "give a readable file") from error
    except UnicodeDecodeError as error:
        raise UsageError(field, f"{path} is no text in UTF-8", "give a text file") from error
