"""Accounts of the queue's API: tenants of the queue, with tokens, limits and signing keys of their own.

A token is stored as its SHA-256 and shown once. Signing keys have to be read again, so they are sealed like credentials.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import NamedTuple

import msgspec

from daemon.db.pool import Database, Record, Session, query
from daemon.db.secrets import Keyring, Sealed
from daemon.domain.account import LIMIT_NAMES, Account, AccountId, Limits, SigningKeys, check_limits
from daemon.domain.connection import Secret
from daemon.domain.dev import DevAccount
from daemon.domain.errors import ConfigError, ConflictError, CredentialError, DataRejectedError, UsageError

KNOWN_S = 1.0
"""For so long a token is taken for what it was: a revoked one may be let in once more."""
KNOWN_MAX = 10_000
NAME_RULE = "use 1 to 100 letters, digits, dots, dashes and underscores, a letter or digit first"

_ADD = query("account_add")
_SEAL = query("account_seal")
_SET_LIMITS = query("account_limits")
_NAMED = query("account_named")
_OF = query("account_of")
_LIST = query("account_list")
_KEYS_LOCK = query("account_keys_lock")
_KEYS = query("account_keys")
_SEALED = query("account_sealed")
_SEALED_ALL = query("account_sealed_all")
_TOKEN_ADD = query("token_add")
_TOKEN_LIST = query("token_list")
_TOKEN_REVOKE = query("token_revoke")
_TOKEN_FIND = query("token_find")

_LIMITS = frozenset(LIMIT_NAMES)


class _Keys(msgspec.Struct):
    current: str
    next: str


class AccountPlace(NamedTuple):
    """The row that signing keys belong to."""

    account_id: AccountId

    @property
    def associated_data(self) -> bytes:
        return f"tallyd.account.v1\0{self.account_id}".encode()

    @property
    def owner(self) -> str:
        return f"the signing keys of account {self.account_id}"


class Caller(NamedTuple):
    """Who a bearer token stands for."""

    account: Account
    is_read_only: bool


@dataclass(frozen=True, slots=True)
class TokenLine:
    account: str
    name: str
    is_read_only: bool
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class AccountLine:
    name: str
    is_dev: bool
    limits: Mapping[str, int]
    created_at: datetime
    tokens: int


class AccountStore:
    """Args:
    defaults: the limits of an account that has none of its own.
    lets_dev_in: accept accounts whose token is public; only `tallyd dev` does.
    """

    def __init__(
        self, db: Database, keyring: Keyring, defaults: Limits | None = None, *, lets_dev_in: bool = False
    ) -> None:
        self._db = db
        self._keyring = keyring
        self._defaults = defaults or Limits()
        self._lets_dev_in = lets_dev_in
        self._callers: dict[bytes, tuple[float, Caller | None]] = {}
        self._limits: dict[AccountId, tuple[float, Limits]] = {}
        self._opened: dict[bytes, SigningKeys] = {}

    # Who calls

    async def authenticate(self, token: str) -> Caller | None:
        """Whom a bearer token stands for; None for nobody. What is known is known for 1 s."""
        hash_ = _hash(token)
        known = self._callers.get(hash_)
        if known is not None and monotonic() - known[0] < KNOWN_S:
            return known[1]
        row = await self._db.fetchrow(_TOKEN_FIND, hash_)
        caller = None if row is None or row["is_dev"] > self._lets_dev_in else self._caller(row)
        if len(self._callers) >= KNOWN_MAX:
            self._callers.clear()
        self._callers[hash_] = (monotonic(), caller)
        return caller

    async def limits_of(self, account: AccountId) -> Limits:
        """The limits of an account, known for 1 s."""
        known = self._limits.get(account)
        if known is not None and monotonic() - known[0] < KNOWN_S:
            return known[1]
        row = await self._db.fetchrow(_OF, account)
        limits = self._defaults if row is None else self._limits_in(row)
        self._limits[account] = (monotonic(), limits)
        return limits

    def _caller(self, row: Record) -> Caller:
        return Caller(Account(AccountId(row["id"]), row["name"], self._limits_in(row)), row["is_read_only"])

    def _limits_in(self, row: Record) -> Limits:
        own: dict[str, int] = msgspec.json.decode(row["limits"], type=dict[str, int])
        return dataclasses.replace(self._defaults, **{name: own[name] for name in own.keys() & _LIMITS})

    # Accounts and tokens

    async def add(
        self,
        name: str,
        limits: Mapping[str, int] | None = None,
        keys: SigningKeys | None = None,
        *,
        is_dev: bool = False,
    ) -> AccountId:
        """Make an account with fresh signing keys, if there is none of the name; with `limits`, set them.

        Raises:
            UsageError: the name is none, or a limit is not known or too low.
        """
        async with self._db.transaction() as tx:
            return await self.ensure_in(tx, name, limits, keys, is_dev=is_dev)

    async def ensure_in(
        self,
        tx: Session,
        name: str,
        limits: Mapping[str, int] | None = None,
        keys: SigningKeys | None = None,
        *,
        is_dev: bool = False,
    ) -> AccountId:
        """The same, in the caller's transaction."""
        own = {} if limits is None else dict(limits)
        check_limits(own)
        text = msgspec.json.encode(own).decode()
        try:
            id_: int | None = await tx.fetchval(_ADD, name, is_dev, text)
        except DataRejectedError as error:
            raise UsageError("account", f"{name!r} is no name for an account", NAME_RULE) from error
        if id_ is not None:
            sealed = self._seal(AccountId(id_), keys or SigningKeys(_new_key(), _new_key()))
            await tx.execute(_SEAL, id_, sealed.key_id, sealed.blob)
            return AccountId(id_)
        if limits is not None:
            await tx.execute(_SET_LIMITS, name, text)
        row = await tx.fetchrow(_NAMED, name)
        assert row is not None  # accounts are never deleted
        return AccountId(row["id"])

    async def named(self, name: str) -> AccountId:
        """Raises UsageError when there is no such account."""
        row = await self._db.fetchrow(_NAMED, name)
        if row is None:
            raise UsageError("account", f"there is no account {name!r}", "see `tallyd tokens list`")
        return AccountId(row["id"])

    async def accounts(self) -> list[AccountLine]:
        """By name."""
        return [
            AccountLine(
                row["name"],
                row["is_dev"],
                msgspec.json.decode(row["limits"], type=dict[str, int]),
                row["created_at"],
                row["tokens"],
            )
            for row in await self._db.fetch(_LIST)
        ]

    async def add_token(self, account: AccountId, name: str, *, is_read_only: bool = False) -> Secret:
        """A fresh token, which nobody will see again.

        Raises:
            UsageError: the account has one of that name.
        """
        token = Secret(f"tly_{secrets.token_urlsafe(32)}")
        if await self._db.fetchval(_TOKEN_ADD, account, name, _hash(token.reveal()), is_read_only, False) is None:
            raise UsageError("NAME", f"token {name} exists already", "revoke it first, or choose another name")
        return token

    async def tokens(self, *, with_revoked: bool = False) -> list[TokenLine]:
        """By account and name."""
        return [TokenLine(**row) for row in await self._db.fetch(_TOKEN_LIST, with_revoked)]

    async def revoke_token(self, account: str, name: str) -> None:
        """Within a second no process accepts it any more. Raises UsageError when there is no such token."""
        if await self._db.fetchval(_TOKEN_REVOKE, account, name) is None:
            raise UsageError("NAME", f"account {account!r} has no token {name!r}", "see `tallyd tokens list`")

    async def ensure_dev(self, account: DevAccount) -> None:
        """Make a public account as it is known everywhere, also if its keys were rotated since.

        Raises:
            ConflictError: somebody's own account has that name.
        """
        id_ = await self.add(account.name, keys=account.keys, is_dev=True)
        row = await self._db.fetchrow(_OF, id_)
        if row is None or not row["is_dev"]:
            raise ConflictError(
                f"account {account.name} exists already, and is not for development; use another database"
            )
        sealed = self._seal(id_, account.keys)
        await self._db.execute(_SEAL, id_, sealed.key_id, sealed.blob)
        await self._db.execute(_TOKEN_ADD, id_, "default", _hash(account.token), False, True)

    # Signing keys

    async def keys(self, account: AccountId) -> SigningKeys:
        row = await self._db.fetchrow(_KEYS, account)
        assert row is not None
        return self.opened(account, row["key_id"], row["keys"])

    async def rotate_keys(self, account: AccountId, *, both: bool = False) -> SigningKeys:
        """The next key becomes the current one, at once; receivers hold both.

        Args:
            both: neither stays, so that no receiver knows them: where the secret key that sealed them is lost.
        """
        async with self._db.transaction() as tx:
            row = await tx.fetchrow(_KEYS_LOCK, account)
            assert row is not None
            current = _new_key() if both else self.opened(account, row["key_id"], row["keys"]).next
            keys = SigningKeys(current, _new_key())
            sealed = self._seal(account, keys)
            await tx.execute(_SEAL, account, sealed.key_id, sealed.blob)
        return keys

    def opened(self, account: AccountId, key_id: str, blob: bytes) -> SigningKeys:
        """Sealed signing keys in clear; the same ones are opened once.

        Raises:
            ConfigError: the key that sealed them is not among ours.  CredentialError: they were altered.
        """
        if (keys := self._opened.get(blob)) is None:
            clear = self._keyring.open(Sealed(key_id, blob), AccountPlace(account)).reveal()
            pair = msgspec.json.decode(clear, type=_Keys)
            if len(self._opened) >= KNOWN_MAX:
                self._opened.clear()
            keys = self._opened[blob] = SigningKeys(pair.current, pair.next)
        return keys

    async def reseal(self) -> tuple[int, tuple[str, ...]]:
        """Seal all signing keys under the first secret key: how many, and which could not be opened."""
        failed: list[str] = []
        done = 0
        async with self._db.transaction() as tx:
            for row in await tx.fetch(_SEALED):
                try:
                    sealed = self._seal(row["id"], self.opened(row["id"], row["key_id"], row["keys"]))
                except (ConfigError, CredentialError) as error:
                    failed.append(f"account {row['id']}: {error}")
                    continue
                if row["key_id"] != sealed.key_id:
                    await tx.execute(_SEAL, row["id"], sealed.key_id, sealed.blob)
                    done += 1
        return done, tuple(failed)

    async def unopenable(self) -> list[str]:
        """The accounts whose signing keys no key of ours opens, with the reason."""
        failed: list[str] = []
        for row in await self._db.fetch(_SEALED_ALL):
            try:
                self.opened(row["id"], row["key_id"], row["keys"])
            except (ConfigError, CredentialError) as error:
                failed.append(f"account {row['name']}: {error}")
        return failed

    def _seal(self, account: AccountId, keys: SigningKeys) -> Sealed:
        clear = msgspec.json.encode(_Keys(keys.current, keys.next)).decode()
        return self._keyring.seal(Secret(clear), AccountPlace(account))


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _new_key() -> str:
    return f"sig_{secrets.token_urlsafe(24)}"
