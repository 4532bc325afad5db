"""`tallyd tick`, `poll` and `backfill`: the work, run by a person's hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json, parse_label, parse_time
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.connection import ConnectionId
from daemon.domain.errors import UsageError
from daemon.domain.job import Summary

if TYPE_CHECKING:
    from daemon.app import App, BackfillReport, TickReport

All = Annotated[bool, typer.Option("--all", help="Every active connection.")]
Tenant = Annotated[str | None, typer.Option(help="The active connections of this tenant.")]
OneConnection = Annotated[str | None, typer.Option("--connection", metavar="TENANT/NAME", help="This connection.")]


def register(app: typer.Typer) -> None:
    app.command()(tick)
    app.command()(poll)
    app.command()(backfill)


def tick(
    slot: Annotated[str | None, typer.Option(metavar="TIME", help="Start of a slot; default: the current one.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Run the batches here, and print their summary.")] = False,
    json: Json = False,
) -> None:
    """Make the tick of a slot: enqueue every due connection, once however often it is asked."""
    start = parse_time("--slot", slot)

    async def work(a: App) -> TickReport:
        return await a.tick(start, wait=wait)

    report = with_app(work)
    made = {
        "slot": report.slot,
        "created": report.created,
        "connections": report.connections,
        "batches": report.batches,
    }
    if wait:
        head = {"slot": report.slot, "created": report.created, "batches": report.batches}
        _finish(report.summary or Summary(), json=json, extra={} if json else head)
    elif json:
        print_json(made)
    elif report.created:
        print(f"tick made: {report.connections} connections in {report.batches} batches")
    else:
        print("the slot has its tick already")


def poll(
    is_all: All = False,
    tenant: Tenant = None,
    connection: OneConnection = None,
    full: Annotated[
        bool, typer.Option("--full", help="Re-read every bucket since the start, whatever the ladder says.")
    ] = False,
    json: Json = False,
) -> None:
    """Poll connections here and now, and print the summary; exit 1 if any source failed."""
    _check_scope(is_all=is_all, tenant=tenant, connection=connection)

    async def work(a: App) -> Summary:
        return await a.poll(await _chosen(a, tenant, connection), full=full)

    _finish(with_app(work), json=json)


def backfill(
    start: Annotated[str, typer.Option("--from", metavar="TIME", help="First instant to read.")],
    end: Annotated[str, typer.Option("--to", metavar="TIME", help="Instant after the last.")],
    is_all: All = False,
    tenant: Tenant = None,
    connection: OneConnection = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be read, and do nothing.")] = False,
    json: Json = False,
) -> None:
    """Enqueue the reading of a past span at low priority; what is booked already is not booked again."""
    first, last = parse_time("--from", start), parse_time("--to", end)
    assert first is not None  # both are required
    assert last is not None
    if last <= first:
        raise UsageError("--to", f"{end} is not after --from {start}", "give a later instant")
    if tenant is not None or connection is not None:
        _check_scope(is_all=is_all, tenant=tenant, connection=connection)

    async def work(a: App) -> BackfillReport:
        return await a.backfill(await _chosen(a, tenant, connection), first, last, dry_run=dry_run)

    report = with_app(work)
    if json:
        print_json({"connections": report.connections, "jobs": report.jobs, "dry_run": report.is_dry_run})
    else:
        print(f"{'would enqueue' if dry_run else 'enqueued'} {report.jobs} jobs for {report.connections} connections")


def _check_scope(*, is_all: bool, tenant: str | None, connection: str | None) -> None:
    if is_all + (tenant is not None) + (connection is not None) != 1:
        raise UsageError("scope", "is to be given in exactly one way", "pass one of --all, --tenant or --connection")


async def _chosen(a: App, tenant: str | None, connection: str | None) -> list[ConnectionId]:
    """The active connections asked for; a parked or paused one only where it is named itself."""
    if connection is not None:
        owner, name = parse_label("--connection", connection)
        found = await a.connections.list(tenant=owner, name=name)
        if not found:
            raise UsageError("--connection", f"there is no connection {connection}", "see `tallyd connections list`")
        if found[0].state == "paused":
            raise UsageError("--connection", f"{connection} is paused", f"`tallyd connections resume {connection}`")
        return [found[0].id]
    if tenant is not None and tenant not in {known.name for known in await a.tenants.list()}:
        raise UsageError("--tenant", f"there is no tenant {tenant!r}", "see `tallyd tenants list`")
    return [found.id for found in await a.connections.list(tenant=tenant) if found.state == "active"]


def _finish(summary: Summary, *, json: bool, extra: dict[str, object] | None = None) -> None:
    figures = {
        "connections": summary.connections,
        "unchanged": summary.unchanged,
        "stored": summary.stored,
        "restated": summary.restated,
        "retried": summary.retried,
        "dead": summary.dead,
        "requests": summary.requests,
        "requests_saved": summary.requests_saved,
        "rows": summary.rows,
        "items": summary.items,
        "duration_s": round(summary.duration_s, 3),
    }
    if json:
        print_json(figures)
    else:
        print_table(("figure", "value"), [*(extra or {}).items(), *figures.items()], empty="")
    if summary.retried or summary.dead:
        raise typer.Exit(1)
