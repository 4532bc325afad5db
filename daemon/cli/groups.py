"""`tallyd groups`: URL groups, and whether their endpoints answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Account, AnyAccount, Json
from daemon.cli.printing import masked, print_json, print_table
from daemon.cli.session import account_of, accounts_of, with_app
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App, Group

app = typer.Typer(help="URL groups: one name for many endpoints.", no_args_is_help=True)


@app.command("list")
def list_(account: AnyAccount = None, json: Json = False) -> None:
    """List the groups by name."""

    async def work(a: App) -> list[dict[str, object]]:
        return [
            {
                "account": name,
                "group": group.name,
                "endpoints": len(group.endpoints),
                "created_at": group.created_at,
                "updated_at": group.updated_at,
            }
            for name, id_ in (await accounts_of(a, account)).items()
            for group in await a.groups.list(id_)
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("account", "group", "endpoints", "created_at", "updated_at")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no URL groups")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="GROUP", help="The group's name.")],
    account: Account = "default",
    json: Json = False,
) -> None:
    """Show a group's endpoints, and the names of its default headers."""

    async def work(a: App) -> Group | None:
        return await a.groups.get(await account_of(a, account), name)

    found = with_app(work)
    if found is None:
        raise _missing(account, name)
    if json:
        print_json(
            {
                "account": account,
                "group": found.name,
                "endpoints": [{"name": endpoint.name, "url": masked(endpoint.url)} for endpoint in found.endpoints],
                "headers": list(found.headers),
                "created_at": found.created_at,
                "updated_at": found.updated_at,
            }
        )
        return
    print_table(("endpoint", "url"), [[e.name, masked(e.url)] for e in found.endpoints], empty="no endpoints")
    if found.headers:
        print(f"default headers: {', '.join(found.headers)}")


@app.command()
def audit(
    name: Annotated[str | None, typer.Argument(metavar="GROUP", help="Only this group.")] = None,
    account: AnyAccount = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=120, help="Seconds for one endpoint.")] = 10.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say whom it would ask, and ask nobody.")] = False,
    json: Json = False,
) -> None:
    """Ask every endpoint for its OPTIONS, from here, and name those that are dead; exit 1 if any is."""

    async def work(a: App) -> list[dict[str, object]]:
        from daemon.app import probe

        groups = [
            (owner, group)
            for owner, id_ in (await accounts_of(a, account)).items()
            for group in await a.groups.list(id_)
            if name in (None, group.name)
        ]
        if name is not None and not groups:
            raise _missing(account, name)
        urls = [endpoint.url for _, group in groups for endpoint in group.endpoints]
        probes = {} if dry_run else await probe(a.push_client, urls, timeout_s=timeout)
        return [
            {
                "account": owner,
                "group": group.name,
                "endpoint": endpoint.name,
                "url": masked(endpoint.url),
                "ok": found and found.is_alive,
                "status": found and found.status,
                "took_ms": found and found.took_ms,
                "problem": None if found is None or found.problem is None else masked(found.problem),
            }
            for owner, group in groups
            for endpoint in group.endpoints
            for found in [probes.get(endpoint.url)]
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("account", "group", "endpoint", "url", "status", "took_ms", "problem")
        verdicts = {True: "ok", False: "DEAD", None: None}
        print_table(
            ("", *columns),
            [[verdicts[row["ok"]], *(row[c] for c in columns)] for row in rows],  # type: ignore[index]  # a bool, seen as object
            empty="no endpoints",
        )
    if any(row["ok"] is False for row in rows):
        raise typer.Exit(1)


def _missing(account: str | None, name: str) -> UsageError:
    whose = "there is no URL group" if account is None else f"account {account} has no URL group"
    return UsageError("GROUP", f"{whose} {name!r}", "see `tallyd groups list`")
