"""`tallyd quota`: quota counters in Redis, synced to the database."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from daemon.cli.arguments import Json, parse_label, parse_settings, read_credential
from daemon.cli.connections import check_kind, prove
from daemon.cli.printing import JsonArray, note, print_json, print_json_rows, print_table
from daemon.cli.session import with_app
from daemon.domain.connection import Secret
from daemon.domain.duration import parse_duration
from daemon.domain.errors import ForbiddenError, UsageError
from daemon.domain.job import Summary
from daemon.domain.redis_url import parse_url, split_url

if TYPE_CHECKING:
    from daemon.app import App, QuotaLine
    from daemon.pollers.redis_quota import RedisQuotaPoller

PROVIDER = "redis_quota"
ROWS = 100

app = typer.Typer(help="Quotas: counters in Redis or Valkey, and what they say was used.", no_args_is_help=True)

Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
Name = Annotated[str | None, typer.Option(help="Only the source of this name; needs --tenant.")]
User = Annotated[str | None, typer.Option(help="Only of this user.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be set, and set nothing.")]


@app.command()
def add(
    tenant: Annotated[str, typer.Option(help="The tenant it belongs to.")],
    name: Annotated[str, typer.Option(help="Its name, unique in the tenant.")],
    url: Annotated[
        str, typer.Option(help="redis://, rediss://, redis+sentinel://, redis+cluster:// or Upstash's https://.")
    ],
    pattern: Annotated[str, typer.Option(help="The keys, such as 'quota:{user}'.")],
    every: Annotated[str, typer.Option(metavar="DURATION", help="From sync to sync, such as 15m.")] = "1h",
    setting: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting; repeatable.")] = None,
    credential_env: Annotated[
        str | None,
        typer.Option("--credential-env", metavar="VAR", help="Read the password or token from this variable."),
    ] = None,
    credential_file: Annotated[
        Path | None, typer.Option("--credential-file", help="Read the password or token from this file.")
    ] = None,
    credential_stdin: Annotated[
        bool, typer.Option("--credential-stdin", help="Read the password or token from stdin.")
    ] = False,
    allow_duplicate: Annotated[
        bool, typer.Option("--allow-duplicate", help="Though another source reads the same keys.")
    ] = False,
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Allow a connection without TLS beyond this machine.")
    ] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Store it without asking the server.")] = False,
    json: Json = False,
) -> None:
    """Add a source of quota counters; it is synced hourly from the next tick on."""
    settings: dict[str, Any] = parse_settings("--setting", setting) if setting else {}
    for name_, option in (("pattern", "--pattern"), ("every_s", "--every")):
        if name_ in settings:
            raise UsageError("--setting", f"{name_} has an option of its own", f"pass {option}")
    settings |= {"pattern": pattern, "every_s": _every_s(every)}
    given: Secret | None = None
    if credential_env is not None or credential_file is not None or credential_stdin:
        given = read_credential(credential_env, credential_file, from_stdin=credential_stdin)

    async def work(a: App) -> dict[str, object]:
        from daemon.app import NewConnection

        base_url, found = split_url(url)
        if not (parse_url(base_url).is_private or allow_insecure or a.settings.allow_insecure):
            raise UsageError("--url", f"{base_url} would be read in clear", "use rediss://, or pass --allow-insecure")
        if given is not None and found.reveal():
            raise UsageError("--url", "holds a password, and another one is given", "give one of them")
        credential = given or found
        poller = cast("RedisQuotaPoller", a.pollers.named(PROVIDER))
        poller.check_settings(settings)
        check_kind(poller, credential)
        if (events_url := settings.get("events_url")) is not None:
            await a.check_destination("--setting events_url", events_url)
        if no_check:
            identity = poller.identity_of(base_url, settings)
        else:
            identity = await prove(a, PROVIDER, base_url, credential, settings, option="--url")
        new = NewConnection(tenant, name, PROVIDER, base_url, credential, None, settings, identity.org_id)
        added = await a.connections.add(new, allow_duplicate=allow_duplicate)
        return {"id": added.id, "tenant": tenant, "name": name, "url": base_url, "settings": settings}

    made = with_app(work)
    if json:
        print_json(made)
    else:
        print(f"quota source {tenant}/{name} added: {made['url']}, keys like {pattern}")


@app.command()
def sync(tenant: Tenant = None, name: Name = None, json: Json = False) -> None:
    """Read the counters here and now, and write what changed; exit 1 if any source failed."""
    _check_scope(tenant, name)

    async def work(a: App) -> Summary:
        found = await a.quota_connections(tenant, name)
        if not found:
            raise UsageError("scope", "there is no such quota source", "`tallyd quota add` makes one")
        return await a.poll(found, full=False)

    summary = with_app(work)
    figures = {
        "keys": summary.items,
        "changed": summary.rows,
        "unchanged": summary.items - summary.rows,
        "duration_s": round(summary.duration_s, 3),
    }
    if json:
        print_json(figures)
    else:
        print_table(("figure", "value"), list(figures.items()), empty="")
    if summary.retried or summary.dead:
        note(f"{summary.retried + summary.dead} of {summary.connections} sources failed: see `tallyd gaps`")
        raise typer.Exit(1)


@app.command("list")
def list_(tenant: Tenant = None, name: Name = None, user: User = None, json: Json = False) -> None:
    """List the counters as they were last read."""
    _check_scope(tenant, name)

    async def work(a: App) -> list[QuotaLine]:
        await _check_source(a, tenant, name)
        if json:
            with JsonArray() as array:
                async for line in a.quotas.lines(tenant, name, user):
                    array.add(_shown(line))
            return []
        return [line async for line in a.quotas.lines(tenant, name, user, most=ROWS + 1)]

    lines = with_app(work)
    if json:
        return
    columns = ("tenant", "name", "user", "period", "value", "used", "updated_at")
    rows = [[getattr(line, column) for column in columns] for line in lines[:ROWS]]
    print_table(columns, rows, empty="no counters")
    if len(lines) > ROWS:
        note(f"the first {ROWS}; --user or --name narrows them down, --json lists all")


def _shown(line: QuotaLine) -> dict[str, object]:
    return {
        "tenant": line.tenant,
        "name": line.name,
        "user": line.user,
        "value": line.value,
        "updated_at": line.updated_at,
        "key": line.key,
        "period": line.period,
        "used": line.used,
        "epoch": line.epoch,
    }


@app.command()
def history(
    tenant: Tenant = None,
    name: Name = None,
    user: User = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many changes.")] = 100,
    json: Json = False,
) -> None:
    """List the changes of counters, the newest first."""
    _check_scope(tenant, name)

    async def work(a: App) -> list[dict[str, object]]:
        await _check_source(a, tenant, name)
        return [
            {
                "at": change.at,
                "tenant": change.tenant,
                "name": change.name,
                "user": change.user,
                "period": change.period,
                "kind": change.kind.name.lower(),
                "delta": change.delta,
                "value": change.value,
                "epoch": change.epoch,
                "revision": change.revision,
                "key": change.key,
            }
            for change in await a.quotas.changes(tenant, name, user, limit)
        ]

    rows = with_app(work)
    if json:
        print_json_rows(rows)
        return
    columns = ("at", "tenant", "name", "user", "period", "kind", "delta", "value")
    print_table(columns, [[row[column] for column in columns] for row in rows], empty="no changes")


@app.command()
def drift(
    label: Annotated[str, typer.Argument(metavar="TENANT/NAME", help="The source.")],
    every: Annotated[bool, typer.Option("--all", help="Also the counters that agree.")] = False,
    json: Json = False,
) -> None:
    """Compare a source's counters with the ledger: what they show, less what it holds."""
    tenant, name = parse_label("TENANT/NAME", label)

    async def work(a: App) -> list[dict[str, object]]:
        from daemon.by_hand import quota_drift

        return [
            {
                "tenant": line.tenant,
                "user": line.user,
                "period": line.period,
                "counter": line.counted,
                "ledger": line.booked,
                "drift": line.drift,
                "key": line.key,
            }
            async for line in quota_drift(a, tenant, name)
            if every or line.drift
        ]

    rows = with_app(work)
    if json:
        print_json_rows(rows)
        return
    columns = ("tenant", "user", "period", "counter", "ledger", "drift")
    shown = [[row[column] for column in columns] for row in rows[:ROWS]]
    print_table(columns, shown, empty="counters and ledger agree")
    if len(rows) > ROWS:
        note(f"the first {ROWS} of {len(rows)}; --json lists all")
    total = sum((row["drift"] for row in rows if isinstance(row["drift"], Decimal)), Decimal(0))
    note(f"drift in all: {total:f}")


@app.command("write-back")
def write_back(
    label: Annotated[str, typer.Argument(metavar="TENANT/NAME", help="The source.")],
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Set the counters of a source to what the ledger holds; never adds, and makes no key."""
    tenant, name = parse_label("TENANT/NAME", label)

    async def work(a: App) -> dict[str, object]:
        from daemon.by_hand import quota_write_back

        try:
            differ, written = await quota_write_back(a, tenant, name, dry_run=dry_run)
        except ForbiddenError as error:
            raise ForbiddenError(
                f"{label}: {error}; grant SET for strings, and EVAL, TYPE, HEXISTS and HSET for hashes"
            ) from error
        return {"source": label, "differ": differ, "written": written, "dry_run": dry_run}

    made = with_app(work)
    if json:
        print_json(made)
    elif dry_run:
        print(f"would set {made['differ']} counters of {label}")
    else:
        print(f"{made['written']} of {made['differ']} counters of {label} set")


def _every_s(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        problem, _, fix = str(error).partition("; ")
        raise UsageError("--every", problem, fix) from error


async def _check_source(a: App, tenant: str | None, name: str | None) -> None:
    """A source that is paused or archived has its counters still."""
    if tenant is not None and not await a.quotas.has_source(tenant, name):
        where = tenant if name is None else f"{tenant}/{name}"
        raise UsageError(
            "--tenant" if name is None else "--name", f"{where} has no quota source", "see `tallyd connections list`"
        )


def _check_scope(tenant: str | None, name: str | None) -> None:
    if name is not None and tenant is None:
        raise UsageError("--name", "says nothing without its tenant", "pass --tenant too")
