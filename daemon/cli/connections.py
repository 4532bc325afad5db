"""`tallyd connections`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.arguments import (
    Json,
    Label,
    own_url,
    parse_base_url,
    parse_label,
    parse_settings,
    parse_time,
    read_credential,
)
from daemon.cli.printing import note, print_json, print_table
from daemon.cli.session import with_app
from daemon.domain.connection import Identity, Secret
from daemon.domain.errors import CredentialError, ForbiddenError, PermanentError, TransientError, UsageError

if TYPE_CHECKING:
    from daemon.app import App, Kin
    from daemon.domain.ports import Poller

NOTED_MAX = 5

app = typer.Typer(help="Connections: a tenant's accounts at the providers.", no_args_is_help=True)

CredentialEnv = Annotated[
    str | None, typer.Option("--credential-env", metavar="VAR", help="Read the key from this variable, once.")
]
CredentialFile = Annotated[Path | None, typer.Option("--credential-file", help="Read the key from this file.")]
CredentialStdin = Annotated[bool, typer.Option("--credential-stdin", help="Read the key from stdin.")]
AllowInsecure = Annotated[bool, typer.Option("--allow-insecure", help="Allow http:// beyond this machine.")]
Revive = Annotated[
    bool,
    typer.Option("--revive", help="The archived one of this name is the same organisation; book on where it ended."),
]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Store it without asking the provider.")]


def check_kind(poller: Poller, credential: Secret) -> None:
    """Refuse a key that is plainly of another kind, before anything is sent."""
    try:
        poller.check_credential(credential.reveal())
    except CredentialError as error:
        raise UsageError("credential", str(error)) from error


async def prove(
    a: App, provider: str, base_url: str, credential: Secret, settings: dict[str, Any], *, option: str = "--base-url"
) -> Identity:
    """Ask the provider who the key belongs to; refusals say what to do.

    Args:
        option: by which the URL was given.
    """
    try:
        return await a.identify(provider, base_url, credential, settings)
    except (CredentialError, ForbiddenError) as error:
        raise CredentialError(f"credential: refused by {base_url}: {error}; give a key that may read usage") from error
    except (TransientError, TimeoutError) as error:
        reason = str(error).rstrip(".") or "no answer in time"
        raise PermanentError(
            f"{option}: {base_url} gives no answer: {reason}; correct it, or pass --no-check"
        ) from error
    except PermanentError as error:
        raise PermanentError(
            f"{option}: {base_url} does not answer as {provider} does: {error}; correct it, or pass --no-check"
        ) from error


@app.command()
def add(
    tenant: Annotated[str, typer.Option(help="The tenant it belongs to.")],
    provider: Annotated[str, typer.Option(help="openai, anthropic, or another that is installed.")],
    name: Annotated[str, typer.Option(help="Its name, unique in the tenant.")],
    credential_env: CredentialEnv = None,
    credential_file: CredentialFile = None,
    credential_stdin: CredentialStdin = False,
    base_url: Annotated[str | None, typer.Option(help="In place of the provider's own, such as a gateway.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Book from here on; default: 30 days before now.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting; repeatable.")] = None,
    allow_duplicate: Annotated[
        bool, typer.Option("--allow-duplicate", help="Though another connection reads the same organisation.")
    ] = False,
    revive: Revive = False,
    allow_insecure: AllowInsecure = False,
    no_check: NoCheck = False,
    json: Json = False,
) -> None:
    """Add a connection, or revive the archived one of the same organisation."""
    start = parse_time("--since", since)
    settings = parse_settings("--setting", setting) if setting else None
    credential = read_credential(credential_env, credential_file, from_stdin=credential_stdin)

    async def work(a: App) -> dict[str, object]:
        from daemon.app import NewConnection

        poller = a.pollers.named(provider)
        a.check_settings(provider, settings or {})
        check_kind(poller, credential)
        url = parse_base_url(
            "--base-url",
            base_url or own_url(poller),
            allow_insecure=allow_insecure or a.settings.allow_insecure,
        )
        identity = Identity(None) if no_check else await prove(a, provider, url, credential, settings or {})
        new = NewConnection(tenant, name, provider, url, credential, start, settings, identity.org_id)
        added = await a.connections.add(new, allow_duplicate=allow_duplicate, revive=revive)
        _say_kin(f"{tenant}/{name}", await a.kin_of(added.id))
        return {
            "id": added.id,
            "tenant": tenant,
            "name": name,
            "provider": provider,
            "base_url": url,
            "org_id": identity.org_id,
            "org_name": identity.org_name,
            "revived": added.is_revived,
        }

    made = with_app(work)
    if json:
        print_json(made)
    else:
        whose = made["org_name"] or made["org_id"]
        print(f"connection {tenant}/{name} {'revived' if made['revived'] else 'added'}{f' ({whose})' if whose else ''}")


def _say_kin(label: str, kin: Sequence[Kin]) -> None:
    """Whose money it may be too. Several lines of one kind become one."""
    twins = [other.label for other in kin if other.is_duplicate]
    beyond = [f"{other.label} ({other.provider})" for other in kin if not other.is_duplicate]
    if twins:
        note(f"note: {_shown(twins)} reads the same organisation as {label}; for each bucket one of them counts")
    if beyond:
        note(
            f"note: {label} and {_shown(beyond)} may tell the same money, one as a gateway and one as the vendor; what "
            "both tell counts as the vendor's. See `tallyd overlaps`"
        )


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:NOTED_MAX]) + (f" and {len(labels) - NOTED_MAX} more" if len(labels) > NOTED_MAX else "")


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Only of this tenant.")] = None,
    with_archived: Annotated[bool, typer.Option("--all", help="Archived connections too.")] = False,
    json: Json = False,
) -> None:
    """List the connections; credentials are never shown."""

    async def work(a: App) -> list[dict[str, object]]:
        return [
            {
                "id": c.id,
                "tenant": c.tenant,
                "name": c.name,
                "provider": c.provider,
                "base_url": c.base_url,
                "settings": c.settings,
                "org_id": c.org_id,
                "since": c.since,
                "state": c.state,
                "state_reason": c.state_reason,
                "parked_sources": c.parked_sources,
                "polled_at": c.polled_at,
                "changed_at": c.changed_at,
                "next_due_at": c.next_due_at,
                "created_at": c.created_at,
            }
            for c in await a.connections.list(tenant=tenant, with_archived=with_archived)
        ]

    rows = with_app(work)
    if json:
        print_json(rows)
    else:
        columns = ("tenant", "name", "provider", "state", "state_reason", "org_id", "since", "polled_at")
        print_table(columns, [[row[c] for c in columns] for row in rows], empty="no connections")


@app.command("test")
def prove_stored(label: Label, json: Json = False) -> None:
    """Ask the provider whether the stored credential is good; exit 1 if not."""
    tenant, name = parse_label("TENANT/NAME", label)

    async def work(a: App) -> Identity:
        target = (await a.connections.get(tenant, name)).target
        return await prove(a, target.provider, target.base_url, target.credential, dict(target.settings))

    identity = with_app(work)
    if json:
        print_json({"connection": label, "ok": True, "org_id": identity.org_id, "org_name": identity.org_name})
    else:
        print(f"{label}: the credential is good ({identity.org_name or identity.org_id or 'organisation not told'})")


@app.command()
def pause(label: Label, json: Json = False) -> None:
    """Stop polling a connection until it is resumed."""
    _change(label, "pause", "paused", json=json)


@app.command()
def resume(label: Label, json: Json = False) -> None:
    """Poll a paused or parked connection again, with the next tick."""
    _change(label, "resume", "active", json=json)


@app.command()
def remove(label: Label, json: Json = False) -> None:
    """Archive a connection; its bookings stay, and adding it again revives it."""
    _change(label, "remove", "archived", json=json)


def _change(label: str, verb: str, state: str, *, json: bool) -> None:
    tenant, name = parse_label("TENANT/NAME", label)

    async def work(a: App) -> int:
        connection_id: int = await getattr(a.connections, verb)(tenant, name)
        return connection_id

    connection_id = with_app(work)
    if json:
        print_json({"id": connection_id, "connection": label, "state": state})
    else:
        print(f"connection {label} is {state}")


@app.command("set-credential")
def set_credential(
    label: Label,
    credential_env: CredentialEnv = None,
    credential_file: CredentialFile = None,
    credential_stdin: CredentialStdin = False,
    no_check: NoCheck = False,
    json: Json = False,
) -> None:
    """Replace a connection's credential, and try it again at once if it was parked."""
    tenant, name = parse_label("TENANT/NAME", label)
    credential = read_credential(credential_env, credential_file, from_stdin=credential_stdin)

    async def work(a: App) -> Identity:
        found = await a.connections.list(tenant=tenant, name=name)
        if not found:
            raise UsageError("TENANT/NAME", f"there is no connection {label}", "see `tallyd connections list`")
        stored = found[0]
        check_kind(a.pollers.named(stored.provider), credential)
        identity = Identity(None)
        if not no_check:
            identity = await prove(a, stored.provider, stored.base_url, credential, dict(stored.settings))
        await a.connections.set_credential(tenant, name, credential, org_id=identity.org_id)
        return identity

    identity = with_app(work)
    if json:
        print_json({"connection": label, "org_id": identity.org_id})
    else:
        print(f"connection {label} has a new credential")


@app.command("set")
def set_(
    label: Label,
    pairs: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Settings to change; null removes one.")],
    json: Json = False,
) -> None:
    """Change settings of a connection; those that cut its buckets take effect at a bucket's start."""
    tenant, name = parse_label("TENANT/NAME", label)
    given = parse_settings("KEY=VALUE", pairs)

    async def work(a: App) -> dict[str, Any]:
        target = (await a.connections.get(tenant, name)).target
        changed = {key: value for key, value in {**target.settings, **given}.items() if value is not None}
        a.check_settings(target.provider, changed)
        await a.regroup(tenant, name, changed)
        return changed

    changed = with_app(work)
    if json:
        print_json({"connection": label, "settings": changed})
    else:
        print(f"connection {label} has new settings")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON lines; - reads stdin.", allow_dash=True)],
    check: Annotated[bool, typer.Option("--check", help="Prove each credential at its provider first.")] = False,
    allow_duplicate: Annotated[
        bool, typer.Option("--allow-duplicate", help="Though two of them read the same organisation.")
    ] = False,
    revive: Revive = False,
    allow_insecure: AllowInsecure = False,
    json: Json = False,
) -> None:
    """Import connections, all of the file or nothing.

    A line: {"tenant", "provider", "name", "credential" or "credential_env", "base_url"?, "since"?, "settings"?}.
    Missing tenants are created.
    """
    from daemon.cli.import_file import import_file

    async def work(a: App) -> dict[str, int]:
        return await import_file(
            a,
            file,
            is_checking=check,
            allow_duplicate=allow_duplicate,
            revive=revive,
            allow_insecure=allow_insecure or a.settings.allow_insecure,
        )

    report = with_app(work)
    if json:
        print_json(report)
    else:
        print(f"{report['added']} added, {report['revived']} revived, of {report['lines']} lines")
    if not report["lines"]:
        note(f"{file} holds no lines")
