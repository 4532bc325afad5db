"""Credentials sealed with AES-256-GCM, bound to the row they stand in.

A sealed credential is nonce (12 bytes), ciphertext and tag. Its associated data names tenant, connection and provider,
so that a ciphertext copied into another row does not open there. The connection's id is therefore taken from the
sequence before the row is written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemon.domain.connection import ConnectionId, Secret, TenantId
from daemon.domain.errors import ConfigError, CredentialError

KEY_BYTES = 32
NONCE_BYTES = 12


class Row(Protocol):
    """Where a secret stands: it opens nowhere else."""

    @property
    def associated_data(self) -> bytes: ...
    @property
    def owner(self) -> str: ...


class Place(NamedTuple):
    """The row that a credential belongs to."""

    tenant_id: TenantId
    connection_id: ConnectionId
    provider: str

    @property
    def associated_data(self) -> bytes:
        return f"tallyd.connection.v1\0{self.tenant_id}\0{self.connection_id}\0{self.provider}".encode()

    @property
    def owner(self) -> str:
        return f"the stored credential of connection {self.connection_id}"


@dataclass(frozen=True, slots=True)
class Sealed:
    key_id: str
    blob: bytes


def new_key() -> str:
    """A fresh key, as `TALLYD_SECRET_KEY` wants it."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def parse_keys(text: str) -> tuple[bytes, ...]:
    """The keys of a comma-separated list. Raises ValueError, which never quotes the text."""
    keys: list[bytes] = []
    for position, part in enumerate(text.split(","), start=1):
        try:
            key = base64.b64decode(part.strip(), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"key {position} is no base64; make one with `tallyd config new-key`") from None
        if len(key) != KEY_BYTES:
            raise ValueError(f"key {position} has {len(key)} bytes, not 32; make one with `tallyd config new-key`")
        if key in keys:
            raise ValueError(f"key {position} is there twice; remove one")
        keys.append(key)
    return tuple(keys)


def credential_print(provider: str, credential: Secret) -> bytes:
    """The same key at the same provider means the same organisation."""
    return hashlib.sha256(f"{provider}\0{credential.reveal()}".encode()).digest()


class Keyring:
    """Seals under the first key, opens under any."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = {hashlib.sha256(key).hexdigest()[:8]: AESGCM(key) for key in keys}
        self.first = next(iter(self._ciphers))

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._ciphers)})"

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._ciphers

    def seal(self, credential: Secret, place: Row) -> Sealed:
        nonce = os.urandom(NONCE_BYTES)
        text = credential.reveal().encode()
        return Sealed(self.first, nonce + self._ciphers[self.first].encrypt(nonce, text, place.associated_data))

    def open(self, sealed: Sealed, place: Row) -> Secret:
        """The credential in clear.

        Raises:
            ConfigError: the key that sealed it is not among ours; an operator's matter, no fault of the connection.
            CredentialError: the ciphertext was changed, or belongs to another row.
        """
        cipher = self._ciphers.get(sealed.key_id)
        if cipher is None:
            raise ConfigError(
                [f"secret_key: a credential is sealed under key {sealed.key_id}, which is not given; add that key back"]
            )
        try:
            clear = cipher.decrypt(sealed.blob[:NONCE_BYTES], sealed.blob[NONCE_BYTES:], place.associated_data)
        except (InvalidTag, ValueError) as error:  # ValueError: a blob shorter than its nonce or tag
            raise CredentialError(
                f"{place.owner} was altered or belongs to another row; "
                "set it again with `tallyd connections set-credential`"
            ) from error
        return Secret(clear.decode())


def load_or_create_key_file(path: Path) -> Secret:
    """The key in `path`, made on first use with mode 600. Raises ConfigError when others may read it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):  # another process made one meanwhile: that one counts
            # A link appears whole or not at all, and never replaces a file.
            _write(path, new_key(), os.link)
    mode = path.stat().st_mode
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise ConfigError([f"secret_key: {path} can be read by others (mode {stat.S_IMODE(mode):o}); chmod 600 {path}"])
    text = path.read_text(encoding="utf-8").strip()
    try:
        parse_keys(text)
    except ValueError as error:
        raise ConfigError([f"secret_key: {path}: {error}"]) from error
    return Secret(text)


def add_key_to_file(path: Path) -> Secret:
    """Put a new key before those of a key file, and return them all. The old ones still open what they sealed."""
    keys = Secret(f"{new_key()},{load_or_create_key_file(path).reveal()}")
    _write(path, keys.reveal(), os.replace)
    return keys


def drop_old_keys_from_file(path: Path) -> None:
    """Keep only the first key: nothing may be sealed under another any more."""
    _write(path, load_or_create_key_file(path).reveal().partition(",")[0], os.replace)


def _write(path: Path, text: str, put: Callable[[Path, Path], None]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        put(draft, path)
    finally:
        draft.unlink(missing_ok=True)
