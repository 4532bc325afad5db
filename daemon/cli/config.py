"""`tallyd config`."""

from __future__ import annotations

import typer

from daemon.cli.arguments import Json
from daemon.cli.printing import print_json, print_table
from daemon.cli.session import settings

app = typer.Typer(help="Settings: flag, environment, file, default.", no_args_is_help=True)


@app.command()
def show(json: Json = False) -> None:
    """Print every setting's effective value and where it came from; secrets as ***."""
    shown = list(settings().shown())
    if json:
        print_json({name: {"value": value, "origin": origin} for name, value, origin in shown})
    else:
        rows = [[name, str(value) if value is not None else None, origin] for name, value, origin in shown]
        print_table(("setting", "value", "origin"), rows, empty="")


@app.command()
def check(json: Json = False) -> None:
    """Check all settings; exit 2 naming every problem."""
    settings()
    if json:
        print_json({"ok": True})
    else:
        print("settings are good")


@app.command("new-key")
def new_key(json: Json = False) -> None:
    """Print a fresh key for TALLYD_SECRET_KEY."""
    from daemon.app import new_key as make

    key = make()
    if json:
        print_json({"key": key})
    else:
        print(key)
