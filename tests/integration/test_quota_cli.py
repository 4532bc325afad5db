"""What the commands of quota counters say of a real Valkey: words, exit codes and JSON."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest
from redis import Redis

from daemon.db.pool import Database
from tests.cli_kit import Result, Tallyd
from tests.ledger_kit import assert_laws
from tests.valkey_kit import open_valkey


@pytest.fixture
def valkey() -> Iterator[str]:
    with open_valkey() as server:
        yield server.url


@pytest.fixture
def redis(valkey: str) -> Iterator[Redis]:
    with Redis.from_url(valkey) as client:
        yield client


def add(tallyd: Tallyd, url: str, *, name: str = "q", pattern: str = "quota:{user}") -> Result:
    tallyd("tenants", "add", "acme")
    return tallyd("quota", "add", "--tenant", "acme", "--name", name, "--url", url, "--pattern", pattern, "--json")


async def laws_hold(database_url: str) -> None:
    db = await Database.open(database_url, pool_max=2)
    try:
        await assert_laws(db)
    finally:
        await db.close()


def test_counters_go_from_valkey_to_the_list(tallyd: Tallyd, valkey: str, redis: Redis, database_url: str) -> None:
    redis.mset({"quota:ann": 5, "quota:bob": "2.50", "other:x": 9})
    assert add(tallyd, valkey).code == 0
    first = tallyd("quota", "sync", "--json")
    assert first.code == 0, first.err
    assert set(first.json) == {"keys", "changed", "unchanged", "duration_s"}
    assert (first.json["keys"], first.json["changed"], first.json["unchanged"]) == (2, 2, 0)
    redis.incrby("quota:ann", 3)
    second = tallyd("quota", "sync", "--json").json
    assert (second["keys"], second["changed"], second["unchanged"]) == (2, 1, 1)
    lines = tallyd("quota", "list", "--json").json
    assert [(line["tenant"], line["name"], line["user"], line["value"], line["used"]) for line in lines] == [
        ("acme", "q", "ann", 8, 8),
        ("acme", "q", "bob", 2.5, 2.5),
    ]
    assert all(line["updated_at"].endswith("Z") for line in lines)
    history = tallyd("quota", "history", "--user", "ann", "--json").json
    assert [(change["kind"], change["delta"]) for change in history] == [("grown", 3), ("new", 5)]
    anyio.run(laws_hold, database_url)


REFUSED: list[tuple[list[str], int, str]] = [
    (["--url", "http//x", "--pattern", "quota:{user}"], 2, "url"),
    (["--url", "redis://127.0.0.1:1/0", "--pattern", "quota:{user}"], 1, "--no-check"),
    (["--url", "@", "--pattern", "quota:*"], 2, "pattern"),
    (["--url", "@", "--pattern", "quota:{user}", "--setting", "colour=red"], 2, "colour"),
    (["--url", "@", "--pattern", "quota:{user}", "--setting", "events_url=ftp://x"], 2, "events_url"),
    (["--url", "@", "--pattern", "quota:{user}", "--every", "1"], 2, "every_s"),
    (["--url", "@", "--pattern", "quota:{user}", "--setting", "pattern=x"], 2, "--pattern"),
    (["--url", "redis://10.1.2.3/0", "--pattern", "quota:{user}"], 2, "--allow-insecure"),
    (["--url", "@"], 2, "pattern"),
]


def test_wrong_input_names_the_field(tallyd: Tallyd, valkey: str) -> None:
    tallyd("tenants", "add", "acme")
    for options, code, named in REFUSED:
        given = [valkey if option == "@" else option for option in options]
        result = tallyd("quota", "add", "--tenant", "acme", "--name", "q", *given)
        assert (result.code, named in result.err) == (code, True), (options, result.err)
        assert len(result.err.splitlines()) == 1, result.err
    assert tallyd("quota", "list", "--json").json == []


def test_the_same_keys_twice_are_refused(tallyd: Tallyd, valkey: str, redis: Redis) -> None:
    redis.set("quota:ann", 1)
    assert add(tallyd, valkey).code == 0
    again = add(tallyd, valkey, name="again")
    assert again.code == 1
    assert "acme/q" in again.err
    assert add(tallyd, valkey, name="other", pattern="limit:{user}").code == 0


def test_a_password_never_shows(tallyd: Tallyd, redis: Redis, valkey: str) -> None:
    redis.config_set("requirepass", "s3cret-pass")
    wrong = add(tallyd, valkey.replace("redis://", "redis://:wrong-pass@"))
    assert wrong.code == 1
    assert "refused" in wrong.err
    assert "wrong-pass" not in wrong.err
    right = add(tallyd, valkey.replace("redis://", "redis://:s3cret-pass@"))
    assert right.code == 0, right.err
    assert "s3cret-pass" not in right.out + right.err
    shown = tallyd("connections", "list", "--json")
    assert "s3cret-pass" not in shown.out
    assert tallyd("quota", "sync", "--json").code == 0


def test_a_source_that_is_not_there_is_named(tallyd: Tallyd, valkey: str) -> None:
    assert add(tallyd, valkey).code == 0
    for command in ("list", "history"):
        for scope, named in (
            (("--tenant", "nope"), "--tenant: nope has no quota source"),
            (("--tenant", "acme", "--name", "nope"), "--name: acme/nope has no quota source"),
        ):
            refused = tallyd("quota", command, *scope)
            assert (refused.code, refused.out, named in refused.err) == (2, "", True), refused
        assert tallyd("quota", command, "--tenant", "acme", "--json").json == []
    tallyd("connections", "pause", "acme/q")
    assert tallyd("quota", "list", "--tenant", "acme", "--name", "q").code == 0, "what was counted stays"


def test_every_takes_a_duration(tallyd: Tallyd, valkey: str) -> None:
    for every, seconds in (("15m", 900), ("90", 90)):
        tallyd("tenants", "add", f"t{seconds}")
        added = tallyd(
            "quota", "add", "--tenant", f"t{seconds}", "--name", "q", "--url", valkey, "--pattern", "quota:{user}",
            "--every", every, "--json",
        )  # fmt: skip
        assert added.json["settings"]["every_s"] == seconds
    for every, named in (("soon", "--every"), ("5s", "every_s")):
        refused = tallyd(
            "quota", "add", "--tenant", "t90", "--name", "r", "--url", valkey, "--pattern", "r:{user}", "--every", every
        )  # fmt: skip
        assert (refused.code, named in refused.err) == (2, True), refused.err
