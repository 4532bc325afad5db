"""`tallyd tokens`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Account, Json
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.account import LIMIT_NAMES, check_limits
from daemon.domain.errors import UsageError

if TYPE_CHECKING:
    from daemon.app import App

app = typer.Typer(help="Tokens: who may use the queue's API, for which account.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The token's name, unique in its account.")]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
NAME_FIX = "use 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first"


@app.command()
def add(
    name: Name,
    account: Account = "default",
    read_only: Annotated[bool, typer.Option("--read-only", help="It may look, and change nothing.")] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="A limit of the account, in place of those it has; repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a token, and its account if there is none; it is printed this once."""
    limits = _parse_limits(limit)
    for field, text in (("NAME", name), ("--account", account)):
        if not NAME.fullmatch(text):
            raise UsageError(field, f"{text!r} is no name", NAME_FIX)

    async def work(a: App) -> tuple[str, Mapping[str, int]]:
        id_ = await a.accounts.add(account)
        [before] = [line.limits for line in await a.accounts.accounts() if line.name == account]
        token = await a.accounts.add_token(id_, name, is_read_only=read_only)
        if limits:
            await a.accounts.add(account, limits)
        return token.reveal(), before

    token, before = with_app(work)
    if json:
        print_json({"account": account, "name": name, "token": token, "read_only": read_only})
    else:
        print(token)
        note(f"This is token {name} of account {account}. Keep it: it is stored as a hash, and not shown again.")
    if limits and limits != before:
        note(f"Account {account} now has the limits {_shown(limits)}" + (f", not {_shown(before)}." if before else "."))


@app.command("list")
def list_(
    with_revoked: Annotated[bool, typer.Option("--all", help="Revoked tokens too.")] = False, json: Json = False
) -> None:
    """List the tokens by account; what they are is never shown."""

    async def work(a: App) -> list[dict[str, object]]:
        accounts = {line.name: line for line in await a.accounts.accounts()}
        return [
            {
                "account": token.account,
                "name": token.name,
                "read_only": token.is_read_only,
                "limits": accounts[token.account].limits,
                "created_at": token.created_at,
                "revoked_at": token.revoked_at,
            }
            for token in await a.accounts.tokens(with_revoked=with_revoked)
            if token.account in accounts
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
        return
    columns = ["account", "name", "read_only", "limits", "created_at", *(["revoked_at"] if with_revoked else [])]
    for row in rows:
        row["limits"] = _shown(row["limits"]) or None  # type: ignore[arg-type]  # a mapping, seen as object
    print_table(columns, [[row[c] for c in columns] for row in rows], empty="no tokens; `tallyd tokens add NAME`")


@app.command()
def revoke(name: Name, account: Account = "default", json: Json = False) -> None:
    """Let a token in no more; every process knows within a second."""

    async def work(a: App) -> None:
        await a.accounts.revoke_token(account, name)

    with_app(work)
    if json:
        print_json({"account": account, "name": name})
    else:
        print(f"token {name} of account {account} revoked")


def _parse_limits(pairs: list[str] | None) -> dict[str, int]:
    limits: dict[str, int] = {}
    for pair in pairs or ():
        name, equals, number = pair.partition("=")
        if not equals or name not in LIMIT_NAMES:
            raise UsageError(
                "--limit", f"{pair!r} names no limit", f"write NAME=NUMBER, with one of {', '.join(LIMIT_NAMES)}"
            )
        if not (number.isascii() and number.isdecimal() and len(number) < 16):
            raise UsageError("--limit", f"{pair!r} has no number", "give a whole number")
        limits[name] = int(number)
    try:
        check_limits(limits)
    except UsageError as error:
        raise UsageError("--limit", error.problem, error.fix) from error
    return limits


def _shown(limits: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in limits.items())
