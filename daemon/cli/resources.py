"""`tallyd resources`: REST collections, synced in two steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.arguments import Json, credential_from_env, parse_base_url
from daemon.cli.connections import check_kind
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import set_up_logs, settings, with_app
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    ForbiddenError,
    PermanentError,
    TransientError,
    UsageError,
)

if TYPE_CHECKING:
    from daemon.app import App, ResourceRun
    from daemon.by_hand import SyncReport
    from daemon.pollers._resource_trial import Trial

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
    """Try a declaration on its API, without writing anything; exit 1 if it reads nothing, or all of it each time."""
    import anyio

    from daemon.by_hand import read_resource_file, try_resources

    chosen = settings()
    set_up_logs(chosen)
    declared = read_resource_file(file)
    url = parse_base_url("base_url", declared.base_url, allow_insecure=allow_insecure or chosen.allow_insecure)
    credential = credential_from_env("--credential-env", credential_env)
    with _refusals(url):
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
    for doubt in _doubts(declared.settings, trial):
        note(doubt)
    if faults := _faults(declared.settings, trial):
        for fault in faults:
            note(fault)
        raise typer.Exit(1)


def _doubts(settings: Mapping[str, Any], trial: Trial) -> Iterator[str]:
    """What may be right, and often is a slip of the pen."""
    listing = settings.get("list") or {}
    if listing.get("paging") and not trial.has_more:
        yield f"list.paging: the first page is the last one; right only if there are no more than {trial.page_items}"
    seen = {name for tried in trial.tried for name in tried.fields}
    if seen and (absent := [name for name in settings["detail"].get("fields", ()) if name not in seen]):
        yield f"detail.fields: {', '.join(absent)} stands in none of these"


def _faults(settings: Mapping[str, Any], trial: Trial) -> list[str]:
    """What would read nothing, or everything each time."""
    faults = []
    version = (settings.get("list") or {}).get("version")
    if version is not None and trial.page_items and not trial.versions:
        faults.append(f"list.version: no item has {version}; each resource would be asked for each time")
    if trial.tried and all(tried.version is None for tried in trial.tried):
        faults.append("detail.path: none of these is there, though the list has them; compare it with the API's pages")
    if unstable := [tried.id for tried in trial.tried if not tried.is_stable]:
        faults.append(f"the version of {unstable[0]} differs at a second look; it would be read again each time")
    return faults


@contextmanager
def _refusals(base_url: str) -> Iterator[None]:
    """The API's refusals, said in the words of the file."""
    try:
        yield
    except (CredentialError, ForbiddenError) as error:
        raise CredentialError(
            f"credential: refused by {base_url}: {error}; give one that may read the collection, as [auth] sends it"
        ) from error
    except BadRequestError as error:
        raise PermanentError(
            f"path: {base_url} has no such call: {error}; compare the paths and params of list, check and detail with the API"
        ) from error
    except (TransientError, TimeoutError) as error:
        raise PermanentError(
            f"base_url: {base_url} gives no answer: {str(error) or 'none in time'}; correct it, or try again when it does"
        ) from error


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
    from daemon.app import RESOURCE_PROVIDER, NewConnection
    from daemon.by_hand import read_resource_file

    declared = read_resource_file(file)
    credential = credential_from_env("--credential-env", credential_env)

    async def work(a: App) -> dict[str, Any]:
        url = parse_base_url("base_url", declared.base_url, allow_insecure=allow_insecure or a.settings.allow_insecure)
        own = dict(declared.settings)
        check_kind(a.pollers.named(RESOURCE_PROVIDER), credential)
        if not no_check:
            with _refusals(url):
                await a.identify(RESOURCE_PROVIDER, url, credential, own)
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
        from daemon.by_hand import sync_resources

        return await sync_resources(a, tenant, name)

    report = asdict(with_app(work))
    if json:
        print_json(report)
    else:
        print_table(("figure", "value"), list(report.items()), empty="")
    if report["failed"]:
        note(f"{report['failed']} failed, and are tried again by `tallyd run`; then see `tallyd dlq list`")
    if report["left"]:
        note(f"{report['left']} of {report['batches']} batches came to no end; see `tallyd dlq list`")
    if report["failed"] or report["left"]:
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
