"""The connections: who is polled, with which sealed credential."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec

from daemon.db import streams
from daemon.db.pool import Database, Record, Session, query
from daemon.db.secrets import Keyring, Place, Sealed, credential_print
from daemon.db.tenants import NAME_RULE
from daemon.domain.connection import Connection, ConnectionId, ConnectionState, Secret, Target, TenantId
from daemon.domain.errors import ConfigError, ConflictError, CredentialError, ImportRefusedError, UsageError
from daemon.domain.window import Width

_TENANT_LOCK = query("connection_tenant_lock")
_TENANTS_ENSURE = query("tenants_ensure")
_OF_TENANTS = query("connections_of_tenants")
_RESERVE = query("connection_ids_reserve")
_INSERT = query("connections_insert")
_REVIVE = query("connections_revive")
_UNPARK = query("connections_unpark_streams")
_LIST = query("connection_list")
_SEALED = query("connection_sealed")
_SET_STATE = query("connection_set_state")
_SET_CREDENTIAL = query("connection_set_credential")
_LOCK_STREAMS = query("connection_lock_streams")
_SET_SETTINGS = query("connection_set_settings")
_SEALED_BATCH = query("connections_sealed_batch")
_SEALED_LOCK = query("connections_sealed_lock")
_RESEAL = query("connections_reseal")

DEFAULT_HISTORY = timedelta(days=30)
BATCH = 500
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class NewConnection:
    """A connection to add.

    Attributes:
        base_url: without a trailing slash.
        since: None means 30 days before now, at the start of that UTC day; on revival: as it was.
        settings: None means none; on revival: as they were.
        org_id: the provider's name for the organisation, if it is known.
        line: where it stands in an imported file; 0 elsewhere.
    """

    tenant: str
    name: str
    provider: str
    base_url: str
    credential: Secret
    since: datetime | None = None
    settings: Mapping[str, Any] | None = None
    org_id: str | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Added:
    id: ConnectionId
    is_revived: bool


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """What may be shown of a connection: everything but its credential."""

    id: ConnectionId
    tenant: str
    name: str
    provider: str
    base_url: str
    settings: Mapping[str, Any]
    org_id: str | None
    since: datetime
    state: ConnectionState
    state_reason: str | None
    state_at: datetime
    created_at: datetime
    next_due_at: datetime
    changed_at: datetime
    polled_at: datetime | None
    credential_key_id: str
    parked_sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rotation:
    """`failed` names the connections whose credential does not open, with the reason."""

    resealed: int
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Imported:
    added: int
    revived: int


@dataclass(slots=True)
class _Known:
    """A connection that is stored, or will be by the same call."""

    id: int
    tenant: str
    name: str
    provider: str
    base_url: str
    print: bytes
    org_id: str | None
    state: str
    line: int = 0


@dataclass(slots=True)
class _Plan:
    inserts: list[NewConnection] = field(default_factory=list)
    revivals: list[tuple[_Known, NewConnection]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_name(text: str) -> bool:
    """Whether a tenant or a connection may be called so."""
    return _NAME.fullmatch(text) is not None


def _refusal(new: NewConnection, field_: str, problem: str, fix: str) -> str:
    return (f"line {new.line}: " if new.line else "") + f"{field_}: {problem}; {fix}"


def _is_same(known: _Known, new: NewConnection, print_: bytes) -> bool:
    """Whether both are surely of one organisation: by its id, or where that is not known, by the key."""
    if known.org_id is not None and new.org_id is not None:
        return known.org_id == new.org_id
    return known.print == print_


def _may_be_same(known: _Known, new: NewConnection) -> bool:
    """Nothing says that they are two organisations, but the name alone says that they are one."""
    return known.name == new.name and (known.org_id is None or new.org_id is None)


def _plan(news: Iterable[NewConnection], stored: Iterable[_Known], *, allow_duplicate: bool, revive: bool) -> _Plan:
    """What each new connection becomes: a row, a revival, or a problem. Pure."""
    plan = _Plan()
    by_name: dict[tuple[str, str], _Known] = {}
    by_account: dict[tuple[str, str], list[_Known]] = defaultdict(list)
    for known in stored:
        by_name[known.tenant, known.name] = known
        by_account[known.tenant, known.provider].append(known)
    for new in news:
        label = f"{new.tenant}/{new.name}"
        print_ = credential_print(new.provider, new.credential)
        account = by_account[new.tenant, new.provider]
        namesake = by_name.get((new.tenant, new.name))
        live = [known for known in account if known.state != "archived"]
        twin = next((k for k in live if k.base_url == new.base_url and _is_same(k, new, print_)), None)
        archived = [
            k
            for k in account
            if k.state == "archived" and (_is_same(k, new, print_) or (revive and _may_be_same(k, new)))
        ]
        # The surest match first: the organisation, then the key, then the name.
        archived.sort(key=lambda k: (k.org_id is None or k.org_id != new.org_id, k.print != print_, k.name != new.name))
        revived = archived[0] if archived else None
        if not is_name(new.name):
            plan.problems.append(_refusal(new, "name", f"{new.name!r} is no name", NAME_RULE))
        elif namesake is not None and namesake is not revived:
            where = f" (line {namesake.line})" if namesake.line else ""
            fix = "choose another name"
            if namesake.state != "archived":
                problem = f"connection {label} exists already{where}"
            elif namesake.provider == new.provider and _may_be_same(namesake, new):
                problem = (
                    f"{label} was the name of an archived connection, and neither key nor organisation shows that it "
                    "was this account's: another one's answers would undo its bookings"
                )
                fix = "pass --revive if it is the same organisation, else choose another name"
            else:
                problem = (
                    f"{label} was the name of an archived connection of another account, and stays with its bookings"
                )
            plan.problems.append(_refusal(new, "name", problem, fix))
        elif twin is not None and not allow_duplicate:
            where = f" (line {twin.line})" if twin.line else ""
            plan.problems.append(
                _refusal(
                    new,
                    "credential",
                    f"connection {twin.tenant}/{twin.name}{where} reads the same already, "
                    "so that it would be booked twice",
                    "use that one, or pass --allow-duplicate",
                )
            )
        else:
            if revived is not None:
                plan.revivals.append((revived, new))
                by_name.pop((revived.tenant, revived.name), None)
                account.remove(revived)
            else:
                plan.inserts.append(new)
            entry = _Known(0, new.tenant, new.name, new.provider, new.base_url, print_, new.org_id, "active", new.line)
            by_name[new.tenant, new.name] = entry
            account.append(entry)
    return plan


class ConnectionStore:
    """`grains_of` says how settings cut a connection's sources: new ones cut its streams in the same transaction."""

    def __init__(self, db: Database, keyring: Keyring, grains_of: streams.GrainOf) -> None:
        self._db = db
        self._keyring = keyring
        self._grains_of = grains_of

    async def add(self, new: NewConnection, *, allow_duplicate: bool = False, revive: bool = False) -> Added:
        """Add a connection, or revive the archived one of the same tenant, provider and organisation.

        Args:
            revive: the archived one of the same name is of the same organisation, though nothing proves it.

        Raises:
            UsageError: there is no such tenant, or the name is none.
            ConflictError: the name is taken, or an active connection reads the same organisation already.
        """
        if not is_name(new.name):
            raise UsageError("name", f"{new.name!r} is no name", NAME_RULE)
        async with self._db.transaction() as tx:
            tenant_id = await tx.fetchval(_TENANT_LOCK, new.tenant)
            if tenant_id is None:
                raise UsageError("--tenant", f"there is no tenant {new.tenant!r}", f"`tallyd tenants add {new.tenant}`")
            plan = _plan([new], await _stored(tx, [tenant_id]), allow_duplicate=allow_duplicate, revive=revive)
            if plan.problems:
                raise ConflictError(plan.problems[0])
            ids = await self._write(tx, plan, {new.tenant: tenant_id})
        return Added(ids[0], is_revived=bool(plan.revivals))

    async def add_many(
        self, news: Sequence[NewConnection], *, allow_duplicate: bool = False, revive: bool = False
    ) -> Imported:
        """Add all of them with their missing tenants, or none; otherwise as `add`.

        Raises:
            ImportRefusedError: names every line that cannot be; nothing was stored.
        """
        bad = [
            _refusal(new, "tenant", f"{new.tenant!r} is no name", NAME_RULE) for new in news if not is_name(new.tenant)
        ]
        if bad:
            raise ImportRefusedError(bad)
        async with self._db.transaction(statement_timeout_ms=120_000) as tx:
            rows = await tx.fetch(_TENANTS_ENSURE, sorted({new.tenant for new in news}))
            tenant_ids = {row["name"]: row["id"] for row in rows}
            stored = await _stored(tx, list(tenant_ids.values()))
            plan = _plan(news, stored, allow_duplicate=allow_duplicate, revive=revive)
            if plan.problems:
                raise ImportRefusedError(plan.problems)
            await self._write(tx, plan, tenant_ids)
        return Imported(len(plan.inserts), len(plan.revivals))

    async def _write(self, tx: Session, plan: _Plan, tenant_ids: Mapping[str, int]) -> list[ConnectionId]:
        now: datetime = await tx.fetchval("select now()")
        since = Width.DAY.floor(now - DEFAULT_HISTORY)
        ids = [row["id"] for row in await tx.fetch(_RESERVE, len(plan.inserts))] if plan.inserts else []
        if plan.inserts:
            rows: list[tuple[object, ...]] = []
            for connection_id, new in zip(ids, plan.inserts, strict=True):
                tenant_id = tenant_ids[new.tenant]
                place = Place(TenantId(tenant_id), ConnectionId(connection_id), new.provider)
                sealed = self._keyring.seal(new.credential, place)
                rows.append(
                    (
                        connection_id,
                        tenant_id,
                        new.name,
                        new.provider,
                        new.base_url,
                        _json(new.settings or {}),
                        sealed.blob,
                        sealed.key_id,
                        credential_print(new.provider, new.credential),
                        new.org_id,
                        new.since or since,
                    )
                )
            await tx.execute(_INSERT, *_columns(rows))
        if plan.revivals:
            rows = []
            for known, new in plan.revivals:
                place = Place(TenantId(tenant_ids[new.tenant]), ConnectionId(known.id), new.provider)
                sealed = self._keyring.seal(new.credential, place)
                rows.append(
                    (
                        known.id,
                        new.name,
                        new.base_url,
                        None if new.settings is None else _json(new.settings),
                        sealed.blob,
                        sealed.key_id,
                        credential_print(new.provider, new.credential),
                        new.org_id,
                        new.since,
                    )
                )
            revived = [ConnectionId(known.id) for known, _ in plan.revivals]
            await streams.lock_of(tx, revived)
            await tx.execute(_UNPARK, revived)
            await tx.execute(_REVIVE, *_columns(rows))
            await streams.recut(tx, revived, self._grains_of)
            ids = [*ids, *revived]
        return [ConnectionId(connection_id) for connection_id in ids]

    async def list(
        self, *, tenant: str | None = None, name: str | None = None, with_archived: bool = False
    ) -> list[ConnectionInfo]:
        """By tenant and name."""
        rows = await self._db.fetch(_LIST, tenant, name, with_archived)
        return [
            ConnectionInfo(
                **{
                    **row,
                    "settings": msgspec.json.decode(row["settings"]),
                    "parked_sources": tuple(row["parked_sources"] or ()),
                }
            )
            for row in rows
        ]

    async def get(self, tenant: str, name: str) -> Connection:
        """One connection with its credential in clear. Raises UsageError when there is none."""
        async with self._db.transaction() as tx:
            row = await self._one(tx, tenant, name)
        target = Target(
            row["provider"], row["base_url"], self._open(row), msgspec.json.decode(row["settings"], type=dict[str, Any])
        )
        return Connection(
            row["id"],
            row["tenant_id"],
            row["tenant"],
            row["name"],
            row["provider"],
            target,
            row["since"],
            row["state"],
            row["org_id"],
        )

    async def pause(self, tenant: str, name: str) -> ConnectionId:
        return await self._set_state(tenant, name, "paused", "paused by an operator")

    async def resume(self, tenant: str, name: str) -> ConnectionId:
        """Active and due at once; parked sources are tried again."""
        return await self._set_state(tenant, name, "active", None)

    async def remove(self, tenant: str, name: str) -> ConnectionId:
        """Archive it. Its bookings and its name stay; adding the same organisation again revives it."""
        return await self._set_state(tenant, name, "archived", "removed by an operator")

    async def set_credential(
        self, tenant: str, name: str, credential: Secret, *, org_id: str | None = None
    ) -> ConnectionId:
        """Replace the credential.

        Raises:
            ConflictError: the new one belongs to another organisation than what is booked here.
        """
        async with self._db.transaction() as tx:
            await tx.execute(_LOCK_STREAMS, tenant, name)
            row = await self._one(tx, tenant, name)
            if org_id is not None and row["org_id"] is not None and org_id != row["org_id"]:
                raise ConflictError(
                    f"credential: it belongs to organisation {org_id}, but {tenant}/{name} holds the bookings of "
                    f"{row['org_id']}; add another connection for it"
                )
            sealed = self._keyring.seal(credential, _place(row))
            print_ = credential_print(row["provider"], credential)
            await tx.execute(_SET_CREDENTIAL, row["id"], sealed.blob, sealed.key_id, print_, org_id)
            await tx.execute(_UNPARK, [row["id"]])
        return ConnectionId(row["id"])

    async def set_settings(self, tenant: str, name: str, settings: Mapping[str, Any]) -> ConnectionId:
        """Replace the settings, which the caller has checked. Where they cut a source anew, its next buckets follow."""
        async with self._db.transaction() as tx:
            await tx.execute(_LOCK_STREAMS, tenant, name)
            row = await self._one(tx, tenant, name)
            await tx.execute(_SET_SETTINGS, row["id"], _json(settings))
            await streams.recut(tx, [ConnectionId(row["id"])], self._grains_of)
        return ConnectionId(row["id"])

    async def rotate(self, *, batch: int = BATCH) -> Rotation:
        """Seal every credential under the first key. Each batch commits, so a run that was cut is simply run again."""
        resealed, last_id = 0, 0
        failed: list[str] = []
        while True:
            async with self._db.transaction() as tx:
                rows = await tx.fetch(_SEALED_LOCK, last_id, self._keyring.first, batch)
                if not rows:
                    return Rotation(resealed, tuple(failed))
                done: list[tuple[int, bytes]] = []
                for row in rows:
                    try:
                        done.append((row["id"], self._keyring.seal(self._open(row), _place(row)).blob))
                    except (ConfigError, CredentialError) as error:
                        failed.append(f"connection {row['id']}: {error}")
                if done:
                    await tx.execute(_RESEAL, *_columns(done), self._keyring.first)
                resealed += len(done)
                last_id = rows[-1]["id"]

    async def unopenable(self, *, batch: int = BATCH) -> Sequence[str]:
        """The credentials that no key of ours opens, with the reason; none are shown."""
        failed: list[str] = []
        last_id = 0
        while rows := await self._db.fetch(_SEALED_BATCH, last_id, None, batch):
            for row in rows:
                try:
                    self._open(row)
                except (ConfigError, CredentialError) as error:
                    failed.append(f"connection {row['id']}: {error}")
            last_id = rows[-1]["id"]
        return failed

    def _open(self, row: Record) -> Secret:
        return self._keyring.open(Sealed(row["credential_key_id"], row["credential"]), _place(row))

    async def _one(self, tx: Session, tenant: str, name: str) -> Record:
        row = await tx.fetchrow(_SEALED, tenant, name)
        if row is None:
            raise _missing(tenant, name)
        return row

    async def _set_state(self, tenant: str, name: str, state: ConnectionState, reason: str | None) -> ConnectionId:
        async with self._db.transaction() as tx:
            if state == "active":
                await tx.execute(_LOCK_STREAMS, tenant, name)
            connection_id: int | None = await tx.fetchval(_SET_STATE, tenant, name, state, reason)
            if connection_id is None:
                raise _missing(tenant, name)
            if state == "active":
                await tx.execute(_UNPARK, [connection_id])
        return ConnectionId(connection_id)


async def _stored(tx: Session, tenant_ids: Sequence[int]) -> list[_Known]:
    return [
        _Known(
            row["id"],
            row["tenant"],
            row["name"],
            row["provider"],
            row["base_url"],
            row["credential_print"],
            row["org_id"],
            row["state"],
        )
        for row in await tx.fetch(_OF_TENANTS, tenant_ids)
    ]


def _missing(tenant: str, name: str) -> UsageError:
    return UsageError("connection", f"there is no connection {tenant}/{name}", "see `tallyd connections list`")


def _place(row: Record) -> Place:
    return Place(row["tenant_id"], row["id"], row["provider"])


def _json(value: Mapping[str, Any]) -> str:
    return msgspec.json.encode(value, order="sorted").decode()


def _columns(rows: Sequence[Sequence[object]]) -> tuple[list[object], ...]:
    """Rows as one array per column, for `unnest`."""
    return tuple(list(column) for column in zip(*rows, strict=True))
