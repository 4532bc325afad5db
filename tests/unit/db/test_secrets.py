"""Sealed credentials: they open in their own row, under their own key, unchanged, or not at all."""

import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.db.secrets import (
    Keyring,
    Place,
    Sealed,
    add_key_to_file,
    drop_old_keys_from_file,
    load_or_create_key_file,
    new_key,
    parse_keys,
)
from daemon.domain.connection import ConnectionId, Secret, TenantId
from daemon.domain.errors import ConfigError, CredentialError

OLD, NEW = b"o" * 32, b"n" * 32
PLACE = Place(TenantId(1), ConnectionId(2), "openai")
SECRET = Secret("sk-admin-secret")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_what_was_sealed_opens(text: str) -> None:
    ring = Keyring([OLD])
    assert ring.open(ring.seal(Secret(text), PLACE), PLACE) == Secret(text)


@given(st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, flip: int) -> None:
    ring = Keyring([OLD])
    sealed = ring.seal(SECRET, PLACE)
    blob = bytearray(sealed.blob)
    blob[position % len(blob)] ^= flip
    with pytest.raises(CredentialError, match="altered or belongs to another row"):
        ring.open(Sealed(sealed.key_id, bytes(blob)), PLACE)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 27])
def test_truncated_blob_is_noticed(length: int) -> None:
    ring = Keyring([OLD])
    sealed = ring.seal(SECRET, PLACE)
    with pytest.raises(CredentialError):
        ring.open(Sealed(sealed.key_id, sealed.blob[:length]), PLACE)


@pytest.mark.parametrize(
    "other", [PLACE._replace(tenant_id=3), PLACE._replace(connection_id=21), PLACE._replace(provider="anthropic")]
)
def test_ciphertext_does_not_open_in_another_row(other: Place) -> None:
    ring = Keyring([OLD])
    with pytest.raises(CredentialError):
        ring.open(ring.seal(SECRET, PLACE), other)


def test_first_key_seals_and_all_open() -> None:
    old, both, new = Keyring([OLD]), Keyring([NEW, OLD]), Keyring([NEW])
    sealed = old.seal(SECRET, PLACE)
    assert both.open(sealed, PLACE) == SECRET
    assert both.seal(SECRET, PLACE).key_id == new.first
    with pytest.raises(ConfigError, match=f"sealed under key {sealed.key_id}, which is not given"):
        new.open(sealed, PLACE)


def test_same_secret_seals_differently_each_time() -> None:
    ring = Keyring([OLD])
    assert len({ring.seal(SECRET, PLACE).blob for _ in range(50)}) == 50


def test_nothing_prints_a_secret() -> None:
    ring = Keyring([OLD])
    assert "sk-admin" not in f"{SECRET!r} {SECRET} {ring.seal(SECRET, PLACE)!r} {ring!r}"
    assert "oooo" not in repr(ring)


def test_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret.key"
    first = load_or_create_key_file(path)
    assert load_or_create_key_file(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret.key"]


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    barrier = threading.Barrier(8)
    found: list[Secret] = []

    def start() -> None:
        barrier.wait()
        found.append(load_or_create_key_file(path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret.key"
    load_or_create_key_file(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_key_file(path)


def test_broken_key_file_is_named_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "secret.key"
    path.touch(0o600)
    with pytest.raises(ConfigError, match=r"secret\.key: key 1 has 0 bytes"):
        load_or_create_key_file(path)
    assert path.read_text() == ""


def test_key_file_rotates_in_two_steps(tmp_path: Path) -> None:
    """Between them a crash loses nothing: both keys are in the file."""
    path = tmp_path / "secret.key"
    (old,) = parse_keys(load_or_create_key_file(path).reveal())
    new, kept = parse_keys(add_key_to_file(path).reveal())
    assert kept == old
    drop_old_keys_from_file(path)
    assert parse_keys(load_or_create_key_file(path).reveal()) == (new,)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_new_keys_are_good_and_differ() -> None:
    assert len({parse_keys(new_key()) for _ in range(20)}) == 20
