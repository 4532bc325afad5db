"""`tallyd resources`: REST collections, synced in two steps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.arguments import Json, credential_from_env, parse_base_url
from daemon.cli.connections import check_kind, prove
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import set_up_logs, settings, with_app
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App, ResourceRun, SyncReport

app = typer.Typer(help="Resources: REST collections, read again where they changed.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The TOML file that declares the collection.")]
CredentialEnv = Annotated[
    str, typer.Option("--credential-env", metavar="VAR", help="Read the credential from this variable, once.")
]
AllowInsecure = Annotated[bool, typer.Option("--allow-insecure", help="Allow http:// beyond this machine.")]
Tenant = Annotated[str | None, typer.Option(help="Only of this tenant.")]
Name = Annotated[str | None, typer.Option(help="Only the collection of this name.")]


@app.command()
def check(
    file: File,
    credential_env: CredentialEnv,
    limit: Annotated[int, typer.Option(min=0, max=100, help="Resources to look at.")] = 3,
    allow_insecure: AllowInsecure = False,
    json: Json = False,
) -> None:
    """Try a declaration on its API, without writing anything; exit 1 if a resource would be read again each time."""
    import anyio

    from daemon.app import read_resource_file, try_resources

    chosen = settings()
    set_up_logs(chosen)
    declared = read_resource_file(file)
    url = parse_base_url("base_url", declared.base_url, allow_insecure=allow_insecure or chosen.allow_insecure)
    credential = credential_from_env("--credential-env", credential_env)
    trial = anyio.run(try_resources, chosen, declared, url, credential, limit)
    found = asdict(trial) | {"name": declared.name, "base_url": url, "share": trial.share and trial.share._asdict()}
    if json:
        print_json(found)
    else:
        more = " and more pages" if trial.has_more else ""
        print(f"{declared.name}: {trial.page_items} ids on the first page{more}, {trial.versions} with a version")
        print_table(
            ("id", "version", "kept_bytes", "is_stable", "fields"),
            [(t.id, t.version or "gone", t.kept_bytes, t.is_stable, ", ".join(t.fields)) for t in trial.tried],
            empty="no resource was looked at",
        )
        print(
            f"calls: {trial.calls} for this; of a hundred resources, beside the list, {trial.unchanged_calls} where "
            f"nothing changed and {trial.changed_calls} where all did"
        )
    if trial.refused:
        note(f"{len(trial.refused)} ids cannot be asked for, such as {trial.refused[0]!r}")
    if unstable := [tried.id for tried in trial.tried if not tried.is_stable]:
        note(f"the version of {unstable[0]} differs at a second look; it would be read again each time")
        raise typer.Exit(1)


@app.command()
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="The tenant it belongs to.")],
    credential_env: CredentialEnv,
    allow_insecure: AllowInsecure = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Store it without asking the API.")] = False,
    json: Json = False,
) -> None:
    """Add a collection as a connection of a tenant; it is synced from the next tick on."""
    from daemon.app import RESOURCE_PROVIDER, NewConnection, read_resource_file

    declared = read_resource_file(file)
    credential = credential_from_env("--credential-env", credential_env)

    async def work(a: App) -> dict[str, Any]:
        url = parse_base_url("base_url", declared.base_url, allow_insecure=allow_insecure or a.settings.allow_insecure)
        own = dict(declared.settings)
        check_kind(a.pollers.named(RESOURCE_PROVIDER), credential)
        if not no_check:
            await prove(a, RESOURCE_PROVIDER, url, credential, own)
        # Two collections of one API have one credential.
        new = NewConnection(tenant, declared.name, RESOURCE_PROVIDER, url, credential, None, own)
        added = await a.connections.add(new, allow_duplicate=True)
        return {"id": added.id, "tenant": tenant, "name": declared.name, "base_url": url, "every_s": own["every_s"]}

    made = with_app(work)
    if json:
        print_json(made)
    else:
        print(f"collection {tenant}/{declared.name} added, listed every {made['every_s']} s")


@app.command()
def sync(tenant: Tenant = None, name: Name = None, json: Json = False) -> None:
    """List the active collections here and now, and read what changed; exit 1 if anything failed."""

    async def work(a: App) -> SyncReport:
        return await a.sync_resources(tenant, name)

    report = asdict(with_app(work))
    if json:
        print_json(report)
    else:
        print_table(("figure", "value"), list(report.items()), empty="")
    if report["failed"]:
        raise typer.Exit(1)


@app.command("list")
def list_(tenant: Tenant = None, name: Name = None, json: Json = False) -> None:
    """List the collections, each with its newest listing and what came of it."""

    async def work(a: App) -> list[ResourceRun]:
        runs = await a.resource_runs(tenant, name)
        if name is not None and not runs:
            raise UsageError("--name", f"there is no collection {name}", "see `tallyd resources list`")
        return runs

    rows = [run._asdict() for run in with_app(work)]
    if json:
        print_json(rows)
    else:
        columns = (
            "tenant",
            "name",
            "state",
            "stored",
            "stored_gone",
            "listed",
            "changed",
            "failed",
            "batches",
            "ended_at",
        )
        print_table(columns, [[row[column] for column in columns] for row in rows], empty="no collections")
