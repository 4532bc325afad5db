"""`tallyd keys`: what an account's deliveries are signed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.arguments import Account, Json
from daemon.cli.printing import MASK, note, print_json, print_table
from daemon.cli.session import account_of, with_app

if TYPE_CHECKING:
    from daemon.app import App, SigningKeys

app = typer.Typer(help="Signing keys: how receivers know that a message is ours.", no_args_is_help=True)
Reveal = Annotated[bool, typer.Option("--reveal", help="Print the keys themselves, not ***.")]


@app.command()
def show(account: Account = "default", reveal: Reveal = False, json: Json = False) -> None:
    """Show that an account's signing keys are there, or with --reveal what they are."""

    async def work(a: App) -> SigningKeys:
        return await a.accounts.keys(await account_of(a, account))

    _show(account, with_app(work), reveal=reveal, json=json)


@app.command()
def rotate(
    account: Account = "default",
    both: Annotated[
        bool, typer.Option("--both", help="Replace both keys, so that receivers refuse until they have the new ones.")
    ] = False,
    reveal: Reveal = False,
    json: Json = False,
) -> None:
    """Sign with the next key from now on, and make a new next one."""

    async def work(a: App) -> SigningKeys:
        return await a.accounts.rotate_keys(await account_of(a, account), both=both)

    _show(account, with_app(work), reveal=reveal, json=json)
    shown = "these keys" if reveal else f"what `tallyd keys show --account {account} --reveal` prints"
    if both:
        note(f"Receivers refuse every message until they have {shown}.")
    else:
        note(
            "Messages are signed with what was the next key, which receivers that hold both keys accept; "
            f"give them {shown} before the next rotation."
        )


def _show(account: str, keys: SigningKeys, *, reveal: bool, json: bool) -> None:
    current, following = (keys.current, keys.next) if reveal else (MASK, MASK)
    rows = [["QSTASH_CURRENT_SIGNING_KEY", current], ["QSTASH_NEXT_SIGNING_KEY", following]]
    if json:
        print_json({"account": account, "current": current, "next": following})
    elif reveal:
        for name, key in rows:
            print(f"export {name}={key}")
    else:
        print_table(("key", "value"), rows, empty="")
