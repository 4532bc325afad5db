"""`tallyd names`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.collection import NameKind
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App, NameSpan

KINDS: tuple[str, ...] = get_args(NameKind)

app = typer.Typer(help="Names: what the projects, keys and people in the reports are called.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """A group even while it has one command."""


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Only of this kind: {', '.join(KINDS)}.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Every name that was ever seen, not the newest.")] = False,
    json: Json = False,
) -> None:
    """List the newest name of each id, with the time in which it was one; also of what is gone."""
    if kind is not None and kind not in KINDS:
        raise UsageError("--kind", f"unknown kind {kind!r}", f"use one of {', '.join(KINDS)}")

    async def work(a: App) -> list[NameSpan]:
        return await a.names(tenant=tenant, kind=kind, with_history=history)

    found = with_app(work)
    if json:
        print_json([span._asdict() for span in found])
    else:
        columns = ("tenant", "connection", "kind", "id", "name", "since", "until")
        print_table(columns, [[*span] for span in found], empty="no names are known")
