"""`tallyd tenants`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import with_app

if TYPE_CHECKING:
    from daemon.app import App

app = typer.Typer(help="Tenants: who the money is booked for.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The tenant's name.")]


@app.command()
def add(name: Name, json: Json = False) -> None:
    """Add a tenant, or bring a removed one back."""

    async def work(a: App) -> int:
        return await a.tenants.add(name)

    tenant_id = with_app(work)
    if json:
        print_json({"id": tenant_id, "name": name})
    else:
        print(f"tenant {name} added")


@app.command("list")
def list_(
    with_removed: Annotated[bool, typer.Option("--all", help="Removed tenants too.")] = False, json: Json = False
) -> None:
    """List the tenants."""

    async def work(a: App) -> list[dict[str, object]]:
        return [
            {
                "id": tenant.id,
                "name": tenant.name,
                "connections": tenant.connections,
                "created_at": tenant.created_at,
                "removed_at": tenant.removed_at,
            }
            for tenant in await a.tenants.list(with_removed=with_removed)
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("name", "connections", "created_at", "removed_at")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no tenants; `tallyd tenants add NAME`")


@app.command()
def remove(name: Name, json: Json = False) -> None:
    """Archive a tenant and its connections; its bookings stay."""

    async def work(a: App) -> int:
        return await a.tenants.remove(name)

    tenant_id = with_app(work)
    if json:
        print_json({"id": tenant_id, "name": name})
    else:
        print(f"tenant {name} removed; its bookings stay")
