"""Counters read from real servers: all of them, exactly, whatever else is there, and whatever happens meanwhile."""

import asyncio
import ssl
import tracemalloc
from collections import Counter as Count
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path

import anyio
import pytest
import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.crc import key_slot

from daemon.domain.collection import Counter
from daemon.domain.connection import Secret, Target
from daemon.domain.errors import (
    CredentialError,
    ForbiddenError,
    PermanentError,
    RateLimitedError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.redis_url import split_url
from daemon.http_client import HttpSettings
from daemon.pollers.redis_quota import RedisQuotaPoller
from tests.valkey_kit import (
    Calls,
    Cluster,
    Upstash,
    Valkey,
    open_cluster,
    open_relay,
    open_upstash,
    open_valkey,
    open_watched,
    until,
)

pytestmark = pytest.mark.anyio

QUICK = HttpSettings(connect_timeout_s=5.0, read_timeout_s=10.0)


@pytest.fixture(scope="module")
def shared() -> Iterator[Valkey]:
    with open_valkey() as server:
        yield server


@pytest.fixture
async def valkey(shared: Valkey) -> Valkey:
    """A server without a key, shared by the tests that leave it running."""
    async with shared.client() as client:
        await client.flushall()
        await client.config_resetstat()
    return shared


def poller(http: HttpSettings = QUICK) -> RedisQuotaPoller:
    made = RedisQuotaPoller()
    made.take_http(lambda: http)
    return made


@dataclass
class Read:
    """What one reading gave."""

    items: list[Counter] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    digest: bytes | None = None
    is_restored: bool = False
    skipped: int = 0
    calls: int = 0

    @property
    def values(self) -> dict[str, Decimal]:
        return {item.key: item.value for item in self.items}


def target(url: str, pattern: str = "quota:{user}", credential: str = "", **settings: object) -> Target:
    base_url, secret = split_url(url)
    return Target(
        "redis_quota", base_url, Secret(credential) if credential else secret, {"pattern": pattern, **settings}
    )


async def read(to: Target, known: bytes | None = None, calls: Calls | None = None, http: HttpSettings = QUICK) -> Read:
    calls = calls or Calls()
    told = Read()
    async with aclosing(poller(http).collect(to, "quota", known, calls)) as parts:
        async for part in parts:
            told.items += part.items
            told.sizes.append(len(part.items))
            told.digest, told.is_restored = part.digest, part.is_restored
            told.skipped += part.skipped
    told.calls = calls.count
    return told


# ── Keys and values ─────────────────────────────────────────────────────────────────────────────


async def test_counters_are_read_exactly_with_the_parts_of_their_keys(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.incrby("q:acme:alice:2026-11", 9_007_199_254_740_993)
        await client.incrbyfloat("q:acme:bob:2026-11", 0.1)
        await client.incrbyfloat("q:acme:bob:2026-11", 0.2)
        await client.set("q:acme:carol:2026-11", "-12.50")
        await client.set("other:alice", 1)
    told = await read(target(valkey.url, "q:{tenant}:{user}:{period}"))
    assert sorted(told.items) == [
        Counter("q:acme:alice:2026-11", "alice", "acme", "2026-11", Decimal(9_007_199_254_740_993)),
        Counter("q:acme:bob:2026-11", "bob", "acme", "2026-11", Decimal("0.3")),
        Counter("q:acme:carol:2026-11", "carol", "acme", "2026-11", Decimal("-12.5")),
    ]
    assert told.skipped == 0


async def test_hash_gives_its_field_as_the_counter_and_the_others_as_detail(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.hset(
            "quota:pro:alice", mapping={"used": 12, "limit": 100, b"\xff": "x", "bad": b"\xff", "nul": b"a\0"}
        )
        await client.set("quota:pro:bob", 7)
        await client.hset("quota:pro:carol", mapping={"limit": 100})
    told = await read(target(valkey.url, "quota:{plan}:{user}", field="used"))
    assert sorted(told.items) == [
        Counter("quota:pro:alice", "alice", None, None, Decimal(12), b'{"limit":"100","plan":"pro"}'),
        Counter("quota:pro:bob", "bob", None, None, Decimal(7), b'{"plan":"pro"}'),
    ]
    assert told.skipped == 1


@pytest.mark.parametrize(
    ("kind", "found"), [("string", {"quota:s"}), ("hash", {"quota:h"}), (None, {"quota:s", "quota:h"})]
)
async def test_type_says_which_keys_are_read_and_the_others_are_no_fault(valkey: Valkey, kind, found) -> None:
    async with valkey.client() as client:
        await client.set("quota:s", 1)
        await client.hset("quota:h", "used", 2)
    settings = {} if kind == "string" else {"field": "used"}
    told = await read(target(valkey.url, type=kind, **settings))
    assert told.values.keys() == found
    assert told.skipped == 0


async def test_what_is_no_counter_is_skipped_counted_and_told_and_ends_nothing(valkey: Valkey) -> None:
    odd: list[bytes] = [
        b"", b" 1", b"1 ", b"nan", b"inf", b"0x10", b"1_000", b"1,5", b".5", b"5.", b"+", b"--1", b"1e999", b"1e-99",
        b"9" * 65, b"\xff", "\N{ARABIC-INDIC DIGIT ONE}".encode(), b"1\n", b"x" * 1_000_000, b"1\x00",
    ]  # fmt: skip
    async with valkey.client() as client:
        for number, value in enumerate(odd):
            await client.set(f"quota:odd{number}", value)
        await client.set(b"quota:\xff\xfe", 1)
        await client.set(b"quota:a\x00b", 1)
        await client.set("quota:" + "x" * 1_000, 1)
        await client.set("quota:acme:alice", 1)
        await client.rpush("quota:list", 1)
        await client.zadd("quota:zset", {"a": 1})
        await client.hset("quota:hash", "used", 1)
        await client.set("quota:alice", 5)
        await client.set("quota:bob", "1e3")
    with structlog.testing.capture_logs() as logs:
        told = await read(target(valkey.url))
    assert told.values == {"quota:alice": Decimal(5), "quota:bob": Decimal(1000)}
    assert told.skipped == len(odd) + 7
    (event,) = logs
    assert event["event"] == "quota.skipped"
    assert (event["log_level"], event["skipped"], event["server"]) == ("warning", told.skipped, valkey.url)
    assert event["example"].startswith("quota:")


async def test_glob_characters_of_a_pattern_are_meant_literally(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.mset({"q[*]?\\^:alice": 1, "q[*]x\\^:bob": 2, "q*:carol": 3})
    told = await read(target(valkey.url, "q[*]?\\^:{user}"))
    assert told.values == {"q[*]?\\^:alice": Decimal(1)}
    assert told.skipped == 0, "the server itself left the others out"


async def test_database_of_the_url_is_the_one_that_is_read(valkey: Valkey) -> None:
    async with valkey.client(db=3) as client:
        await client.set("quota:alice", 3)
    assert (await read(target(valkey.url))).values == {}
    assert (await read(target(valkey.url.removesuffix("0") + "3"))).values == {"quota:alice": Decimal(3)}


async def test_empty_server_is_a_whole_reading_with_a_digest(valkey: Valkey) -> None:
    told = await read(target(valkey.url))
    assert told.sizes == [0]
    assert told.digest is not None


async def commands_of(server: Valkey) -> Count[str]:
    async with server.client() as client:
        stats = await client.info("commandstats")
    return Count({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()})


async def test_values_and_the_next_step_of_the_scan_share_a_round_trip(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(10_000)})
        await client.config_resetstat()
    told = await read(target(valkey.url, count=500))
    assert len(told.values) == 10_000
    asked = await commands_of(valkey)
    assert "keys" not in asked
    assert told.calls == asked["scan"] + 2, "one to connect, and one for the last values"
    assert asked["mget"] <= asked["scan"]
    assert set(asked) <= {"info", "scan", "mget", "config|resetstat"}


async def test_few_keys_among_many_are_asked_for_together(valkey: Valkey) -> None:
    """A step of a SCAN returns next to nothing then; a question for each would be most of the round trips."""
    async with valkey.client() as client:
        await client.mset({f"other:{number}": number for number in range(20_000)})
        await client.mset({f"quota:{number}": number for number in range(150)})
        await client.config_resetstat()
    told = await read(target(valkey.url, count=100))
    assert len(told.values) == 150
    assert (await commands_of(valkey))["mget"] == 2


# ── Meanwhile ───────────────────────────────────────────────────────────────────────────────────


async def test_key_that_vanishes_between_scan_and_value_is_no_item_and_no_fault(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(50)})
        await client.hset("quota:hash", "used", 1)

        async def before(call: int) -> None:
            if call == 3:  # 1 connects, 2 scans, 3 asks for the values, 4 for those of what is no string
                await client.delete(*[f"quota:{number}" for number in range(40)])
            if call == 4:
                await client.delete("quota:hash")

        told = await read(target(valkey.url, field="used"), calls=Calls(before))
    assert told.values == {f"quota:{number}": Decimal(number) for number in range(40, 50)}
    assert told.skipped == 0
    assert told.calls == 4


async def test_key_that_becomes_another_type_meanwhile_is_skipped(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.set("quota:alice", 1)

        async def before(call: int) -> None:
            if call == 3:
                await client.delete("quota:alice")
                await client.rpush("quota:alice", 1)

        told = await read(target(valkey.url, field="used"), calls=Calls(before))
    assert (told.values, told.skipped) == ({}, 1)


async def test_keyspace_that_grows_and_shrinks_during_the_scan_loses_nothing_that_stays(valkey: Valkey) -> None:
    """The server rehashes its table, and its SCAN returns some keys twice: they count once in a part."""
    stay = {f"quota:stay{number}": Decimal(number) for number in range(3_000)}
    async with valkey.client() as client:
        await client.mset({key: str(value) for key, value in stay.items()})

        async def before(call: int) -> None:
            if call % 2:
                await client.mset({f"quota:new{call}-{number}": 1 for number in range(4_000)})
            else:
                await client.delete(*[f"quota:new{call - 1}-{number}" for number in range(4_000)])

        told = await read(target(valkey.url, count=200), calls=Calls(before))
    assert {key: value for key, value in told.values.items() if "stay" in key} == stay
    assert told.skipped == 0


async def test_key_that_scan_returns_twice_in_a_part_is_one_item(valkey: Valkey) -> None:
    """Answered by a script in place of the server, since a real one does it when it likes."""
    replies = [
        b"$14\r\nrun_id:abcdefg\r\n",
        b"*2\r\n$1\r\n7\r\n*2\r\n$7\r\nquota:a\r\n$7\r\nquota:a\r\n",
        b"*2\r\n$1\r\n0\r\n*2\r\n$7\r\nquota:a\r\n$7\r\nquota:b\r\n",
        b"*2\r\n$1\r\n1\r\n$1\r\n2\r\n",
    ]
    async with answering(replies) as port:
        told = await read(target(f"redis://127.0.0.1:{port}"))
    assert [(item.key, item.value) for item in told.items] == [("quota:a", 1), ("quota:b", 2)]


@asynccontextmanager
async def answering(replies: list[bytes]) -> AsyncIterator[int]:
    """A server that answers each thing it is sent with the next of the replies, and then hangs up."""
    waiting = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while waiting and await reader.read(65_536):
            writer.write(waiting.pop(0))
            await writer.drain()
        writer.transport.abort()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()


RUN_ID = b"$14\r\nrun_id:abcdefg\r\n"


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], PermanentError),
        ([RUN_ID, b":1\r\n"], SchemaDriftError),
        ([RUN_ID, b"*2\r\n$1\r\nx\r\n*0\r\n"], SchemaDriftError),
        ([RUN_ID, b"*2\r\n$1\r\n7\r\n*0\r\n", b"*2\r\n$1\r\n7\r\n*0\r\n"], SchemaDriftError),
        ([RUN_ID, b"*2\r\n$1\r\n0\r\n*1\r\n$7\r\nquota:a\r\n", b"*0\r\n"], SchemaDriftError),
        ([RUN_ID, b"*2\r\n$1\r\n0\r\n*1\r\n$7\r\nquota:a\r\n", b"-MOVED 1 127.0.0.1:1\r\n"], PermanentError),
        ([RUN_ID, b"-NOPERM no\r\n"], ForbiddenError),
        ([RUN_ID, b"-ERR unknown command 'SCAN'\r\n"], PermanentError),
        ([RUN_ID, b"*2\r\n$1\r\n0\r\n*1\r\n$7\r\nquo"], UpstreamUnavailableError),
        ([RUN_ID], UpstreamUnavailableError),
        ([b"-LOADING\r\n"], UpstreamUnavailableError),
    ],
)
async def test_answer_that_no_server_should_give_ends_the_reading_by_its_name(replies, error) -> None:
    async with answering(replies) as port:
        with pytest.raises(error) as failed:
            await read(target(f"redis://127.0.0.1:{port}"))
    assert type(failed.value) is error


async def test_silent_server_ends_the_reading_after_its_time() -> None:
    async with answering([RUN_ID, b""]) as port:
        with pytest.raises(UpstreamUnavailableError):
            await read(target(f"redis://127.0.0.1:{port}"), http=HttpSettings(read_timeout_s=0.2))


async def test_reply_that_came_too_late_is_not_taken_for_the_next_one(valkey: Valkey) -> None:
    """A try that was given up half-way leaves replies behind; the next try is not to read those."""
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(3_000)})

        class Impatient(Calls):
            async def run(self, send):
                if self.count:
                    with anyio.CancelScope() as scope:
                        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, scope.cancel)
                        await send()
                return await super().run(send)

        told = await read(target(valkey.url), calls=Impatient())
    assert told.values == {f"quota:{number}": Decimal(number) for number in range(3_000)}


async def test_cancelled_reading_leaves_no_connection_open(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(3_000)})
        arrived = anyio.Event()

        async def before(call: int) -> None:
            if call == 3:
                arrived.set()
                await anyio.sleep_forever()

        async with anyio.create_task_group() as group:
            group.start_soon(read, target(valkey.url), None, Calls(before))
            await arrived.wait()
            group.cancel_scope.cancel()

        async def is_alone() -> bool:
            return len(await client.client_list()) == 1

        await until(is_alone)


async def test_many_keys_are_read_in_bounded_memory(valkey: Valkey) -> None:
    """Twice as many keys as an hour ago must not be what ends the process."""
    count = 100_000
    async with valkey.client() as client:
        for first in range(0, count, 10_000):
            await client.mset({f"quota:user{number}": number for number in range(first, first + 10_000)})
    total, found, biggest = 0, 0, 0
    tracemalloc.start()
    try:
        async with aclosing(poller().collect(target(valkey.url), "quota", None, Calls())) as parts:
            async for part in parts:
                biggest = max(biggest, len(part.items))
                found += len(part.items)
                total += sum(int(item.value) for item in part.items)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found, total) == (count, count * (count - 1) // 2)
    assert biggest < 3_000
    assert peak_bytes < 8 << 20


# ── Refusals and outages ────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def guarded() -> Iterator[Valkey]:
    """`reader` and `writer` may do what the how-to says and no more; `blind` may not even look for keys."""
    users = [
        "reader on >readers-word ~quota:* +info +scan +mget +hgetall +type",
        "writer on >writers-word ~quota:* +info +type +set +eval +hexists +hset",
        "blind on >blind-word ~* +info",
    ]
    with open_valkey(
        "--requirepass", "default-word", *[part for user in users for part in ("--user", *user.split())]
    ) as server:
        yield server


async def test_credential_opens_the_server_and_few_rights_are_enough(guarded: Valkey) -> None:
    async with guarded.client(password="default-word") as client:
        await client.mset({"quota:alice": 1})
        await client.hset("quota:bob", "used", 2)
    url = f"127.0.0.1:{guarded.port}"
    for login in ("redis://:default-word@", "redis://reader:readers-word@"):
        told = await read(target(login + url, field="used"))
        assert told.values == {"quota:alice": 1, "quota:bob": 2}
    assert (await read(target(f"redis://{url}", credential="default-word", field="used"))).skipped == 0
    writer = target(f"redis://writer:writers-word@{url}", field="used")
    changes = {"quota:alice": Decimal(3), "quota:bob": Decimal(4)}
    assert await poller().write(writer, changes, Calls()) == changes.keys()
    with pytest.raises(ForbiddenError):
        await poller().write(target(f"redis://reader:readers-word@{url}"), changes, Calls())


@pytest.mark.parametrize(
    ("login", "error"),
    [
        ("", CredentialError),
        (":wrong-word@", CredentialError),
        ("nobody:wrong-word@", CredentialError),
        ("blind:blind-word@", ForbiddenError),
    ],
)
async def test_refused_credential_is_told_without_it(guarded: Valkey, login, error) -> None:
    to = target(f"redis://{login}127.0.0.1:{guarded.port}")
    for ask in (read(to), poller().identify(to, Calls())):
        with pytest.raises(error) as failed:
            await ask
        assert type(failed.value) is error
        assert "-word" not in str(failed.value)


async def test_password_that_the_server_does_not_want_is_a_credential_at_fault(valkey: Valkey) -> None:
    with pytest.raises(CredentialError, match="without any password"):
        await read(target(valkey.url, credential=":some-word"))


async def test_server_that_repeats_the_password_does_not_make_us_repeat_it() -> None:
    with open_valkey("--rename-command", "AUTH", "") as server, pytest.raises(PermanentError) as failed:
        await read(target(server.url, credential=":some-word"))
    assert "unknown command" in str(failed.value)
    assert "some-word" not in str(failed.value)


async def test_database_that_is_not_there_is_no_outage(valkey: Valkey) -> None:
    with pytest.raises(PermanentError, match="index is out of range"):
        await read(target(valkey.url.removesuffix("0") + "999"))


async def test_nobody_at_the_port_is_an_outage_in_which_nothing_was_sent() -> None:
    from tests.valkey_kit import free_ports

    with pytest.raises(UpstreamUnavailableError) as failed:
        await read(target(f"redis://127.0.0.1:{free_ports()[0]}"))
    assert not failed.value.maybe_sent


async def test_server_that_dies_mid_scan_ends_the_reading_and_the_parts_before_stay_good() -> None:
    with open_valkey() as server:
        async with server.client() as client:
            await client.mset({f"quota:{number}": number for number in range(5_000)})
        found = 0

        async def before(call: int) -> None:
            if call == 4:
                server.kill()

        async def take_all() -> None:
            nonlocal found
            async for part in poller().collect(target(server.url), "quota", None, Calls(before)):
                found += len(part.items)

        with pytest.raises(UpstreamUnavailableError):
            await take_all()
    assert 0 < found < 5_000


async def test_connection_that_is_lost_is_made_anew_and_the_scan_goes_on(valkey: Valkey) -> None:
    """What the caller tries again begins where it was: the cursor is good as long as the server is the same one."""
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(5_000)})

        class Retrying(Calls):
            retried = 0

            async def run(self, send):
                try:
                    return await super().run(send)
                except UpstreamUnavailableError:
                    self.retried += 1
                    return await super().run(send)

        async def before(call: int) -> None:
            if call == 4:
                await client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")

        calls = Retrying(before)
        told = await read(target(valkey.url), calls=calls)
    assert calls.retried == 1
    assert len(told.values) == 5_000


async def test_server_that_restarts_mid_scan_ends_the_reading_however_often_it_is_tried_again() -> None:
    """Its table has another order now, and its values may be older: the cursor would skip keys in silence."""
    with open_valkey() as server:
        async with server.client() as client:
            await client.mset({f"quota:{number}": number for number in range(5_000)})
            await client.save()

        async def before(call: int) -> None:
            if call == 4:
                server.kill()
                server.start()

        class Stubborn(Calls):
            async def run(self, send):
                for _ in range(3):
                    try:
                        return await super().run(send)
                    except UpstreamUnavailableError as error:
                        failed = error
                raise failed

        with pytest.raises(UpstreamUnavailableError, match="another server"):
            await read(target(server.url), calls=Stubborn(before))


async def test_server_that_was_restored_from_a_snapshot_is_known_by_its_digest() -> None:
    with open_valkey() as server:
        async with server.client() as client:
            await client.set("quota:alice", 10)
            await client.save()
            await client.set("quota:alice", 99)
        first = await read(target(server.url))
        again = await read(target(server.url), first.digest)
        assert (again.digest, again.is_restored) == (first.digest, False)
        server.kill()
        server.start()
        after = await read(target(server.url), first.digest)
    assert after.values == {"quota:alice": Decimal(10)}
    assert after.is_restored
    assert after.digest != first.digest
    assert not first.is_restored, "what is read for the first time was not restored"


# ── Who it is ───────────────────────────────────────────────────────────────────────────────────


async def test_same_keys_of_the_same_server_have_one_identity(valkey: Valkey) -> None:
    async def name(url: str, **settings: object) -> str | None:
        return (await poller().identify(target(url, **settings), Calls())).org_id

    first = await name(valkey.url)
    assert first == f"127.0.0.1:{valkey.port}/0 quota:*"
    assert await name(f"redis://127.0.0.1:{valkey.port}", pattern="quota:{account}") == first
    assert await name(valkey.url, pattern="limit:{user}") != first
    assert await name(valkey.url.removesuffix("0") + "1") != first


# ── Written back ────────────────────────────────────────────────────────────────────────────────


async def test_write_sets_what_is_there_and_makes_nothing(valkey: Valkey) -> None:
    async with valkey.client() as client:
        await client.set("quota:alice", 5, ex=1_000)
        await client.hset("quota:bob", mapping={"used": 5, "limit": 10})
        await client.hset("quota:carol", mapping={"limit": 10})
        await client.rpush("quota:list", 1)
        changes = {
            "quota:alice": Decimal("7.00"),
            "quota:bob": Decimal("1E+2"),
            "quota:carol": Decimal(1),
            "quota:list": Decimal(1),
            "quota:gone": Decimal(1),
        }
        there = await poller().write(target(valkey.url, field="used", count=2), changes, Calls())
        assert there == {"quota:alice", "quota:bob"}
        assert await client.get("quota:alice") == b"7"
        assert 0 < await client.ttl("quota:alice") <= 1_000
        assert await client.incr("quota:alice") == 8, "it is a number for INCR still"
        assert await client.hgetall("quota:bob") == {b"used": b"100", b"limit": b"10"}
        assert await client.hgetall("quota:carol") == {b"limit": b"10"}
        assert await client.exists("quota:gone") == 0
        assert await client.lrange("quota:list", 0, -1) == [b"1"]


@pytest.mark.parametrize(
    ("settings", "there"),
    [({}, {"quota:s"}), ({"type": "string"}, {"quota:s"}), ({"type": "hash", "field": "used"}, {"quota:h"})],
)
async def test_write_of_one_type_leaves_the_other_alone(valkey: Valkey, settings, there) -> None:
    async with valkey.client() as client:
        await client.set("quota:s", 1)
        await client.hset("quota:h", "used", 1)
        changes = {"quota:s": Decimal("0.000001"), "quota:h": Decimal("0.000001")}
        assert await poller().write(target(valkey.url, **settings), changes, Calls()) == there
        both = {await client.get("quota:s"), await client.hget("quota:h", "used")}
    assert both == {b"1", b"0.000001"}


# ── TLS ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A CA of this test's own, and beside it a certificate for 127.0.0.1."""
    now = datetime.now(UTC)

    def certificate(name: str, key, issuer: str, signer, *extensions) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(signer, hashes.SHA256())

    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate("tests", root_key, "tests", root_key, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    leaf = certificate("valkey", key, "tests", root_key, names)
    pem = serialization.Encoding.PEM
    (tmp_path / "ca.pem").write_bytes(root.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(leaf.public_bytes(pem) + private)
    return tmp_path


async def test_tls_is_checked_against_the_bundle_of_the_connection_or_of_the_process(valkey, authority) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority / "server.pem")
    async with valkey.client() as client:
        await client.set("quota:alice", 1)
    bundle = str(authority / "ca.pem")
    async with open_relay(valkey, context) as port:
        url = f"rediss://127.0.0.1:{port}"
        assert (await read(target(url, ca_bundle=bundle))).values == {"quota:alice": 1}
        assert (await read(target(url), http=HttpSettings(ca_bundle=bundle))).values == {"quota:alice": 1}
        with pytest.raises(UpstreamUnavailableError, match="certificate verify failed"):
            await read(target(url))
        with pytest.raises(UpstreamUnavailableError, match="certificate"):
            await read(target(f"rediss://localhost:{port}", ca_bundle=bundle))
        with pytest.raises(UpstreamUnavailableError):
            await read(target(f"redis://127.0.0.1:{port}"), http=HttpSettings(read_timeout_s=2))
        with pytest.raises(PermanentError, match="CA bundle"):
            await read(target(url, ca_bundle=str(authority / "none.pem")))


# ── Sentinel ────────────────────────────────────────────────────────────────────────────────────


async def test_sentinel_names_the_master_and_the_one_after_a_failover() -> None:
    with open_watched("--requirepass", "a-word", "--masterauth", "a-word") as watched:
        async with watched.sentinel.client() as sentinel:
            await sentinel.execute_command("SENTINEL", "SET", "quotas", "auth-pass", "a-word")
        async with watched.master.client(password="a-word") as client:
            await client.set("quota:alice", 1)
        to = target(watched.url, credential=":a-word")
        first = await read(to)
        assert first.values == {"quota:alice": 1}
        lost = watched.url.replace("/quotas/", "/others/")
        with pytest.raises(UpstreamUnavailableError, match="knows no master others"):
            await read(target(lost, credential=":a-word"))
    # A server without a password: how the sentinel and the replica settle it is asked of them in clear.
    with open_watched() as watched:
        async with watched.master.client() as client:
            await client.set("quota:alice", 2)
        first = await read(target(watched.url))
        await watched.fail_over()
        after = await read(target(watched.url), first.digest)
        assert after.values == first.values == {"quota:alice": 2}
        assert after.is_restored, "what took over may lack the last writes"


async def test_sentinel_that_is_down_is_passed_over(valkey: Valkey) -> None:
    from tests.valkey_kit import free_ports

    (gone,) = free_ports()
    with open_watched() as watched:
        url = watched.url.replace("//", f"//127.0.0.1:{gone},")
        assert (await read(target(url))).values == {}
    with pytest.raises(UpstreamUnavailableError):
        await read(target(f"redis+sentinel://127.0.0.1:{gone}/quotas"))


async def test_server_that_is_a_replica_is_not_read_in_place_of_the_master() -> None:
    with open_watched() as watched:
        answer = f"*2\r\n$9\r\n127.0.0.1\r\n${len(str(watched.replica.port))}\r\n{watched.replica.port}\r\n".encode()
        async with answering([answer]) as port:
            with pytest.raises(UpstreamUnavailableError, match="no master"):
                await read(target(f"redis+sentinel://127.0.0.1:{port}/quotas"))


# ── Cluster ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as nodes:
        asyncio.run(nodes.join())
        yield nodes


async def fill(cluster: Cluster, keys: dict[str, object]) -> None:
    """Each key to the node that holds its slot."""
    share = -(-16_384 // len(cluster.nodes))
    for place, node in enumerate(cluster.nodes):
        async with node.client() as client:
            await client.flushall()
            pipeline = client.pipeline(transaction=False)
            for key, value in keys.items():
                if key_slot(key.encode()) // share == place:
                    if isinstance(value, dict):
                        pipeline.hset(key, mapping=value)
                    else:
                        pipeline.set(key, value)
            await pipeline.execute()


async def test_all_masters_of_a_cluster_are_read_and_written(cluster: Cluster) -> None:
    counters: dict[str, object] = {f"quota:user{number}": number for number in range(3_000)}
    await fill(cluster, {**counters, "quota:{tag}a": 1, "quota:{tag}b": 2, "quota:hash": {"used": 9, "limit": 10}})
    to = target(cluster.url, field="used")
    told = await read(to)
    assert told.values == {
        **{key: Decimal(str(value)) for key, value in counters.items()},
        "quota:{tag}a": 1, "quota:{tag}b": 2, "quota:hash": 9,
    }  # fmt: skip
    assert told.digest is not None
    assert not (await read(to, told.digest)).is_restored
    changes = dict.fromkeys((*told.values, "quota:gone"), Decimal(5))
    assert await poller().write(to, changes, Calls()) == told.values.keys()
    assert set((await read(to)).values.values()) == {Decimal(5)}


@pytest.mark.parametrize("is_done", [False, True], ids=["on its way", "moved"])
async def test_slot_that_moves_during_the_reading_loses_no_key_of_its_part(is_done: bool) -> None:
    """The keys were found on the one node; by the time their values are asked for, they are at another."""
    keys: dict[str, object] = {f"quota:{{tag}}{number}": number for number in range(20)}
    slot = key_slot(b"{tag}")
    with open_cluster() as nodes:
        await nodes.join()
        await fill(nodes, keys)
        place = slot // -(-16_384 // len(nodes.nodes))
        source, there = nodes.nodes[place], nodes.nodes[(place + 1) % len(nodes.nodes)]

        async def before(call: int) -> None:
            if call != 3 + place:  # 1 connects, the next ones find nothing at the nodes before, then comes the SCAN
                return
            async with source.client() as old, there.client() as new:
                old_id = await old.execute_command("CLUSTER", "MYID")
                new_id = await new.execute_command("CLUSTER", "MYID")
                await new.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old_id)
                await old.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new_id)
                await old.execute_command("MIGRATE", "127.0.0.1", there.port, "", 0, 5_000, "KEYS", *keys)
                for node in (new, old) if is_done else ():
                    await node.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new_id)

        told = await read(target(nodes.url), calls=Calls(before))
    assert told.values == {key: Decimal(str(value)) for key, value in keys.items()}
    assert told.skipped == 0


async def test_few_rights_are_enough_in_a_cluster(cluster: Cluster) -> None:
    await fill(cluster, {f"quota:{number}": number for number in range(100)})
    rights = "ACL SETUSER reader on >readers-word ~quota:* +info +scan +mget +hgetall +type +cluster|slots +asking"
    for node in cluster.nodes:
        async with node.client() as client:
            await client.execute_command(*rights.split())
    url = cluster.url.replace("//", "//reader:readers-word@")
    assert len((await read(target(url))).values) == 100


async def test_cluster_behind_a_plain_url_says_how_to_write_it(cluster: Cluster) -> None:
    await fill(cluster, {f"quota:{number}": number for number in range(100)})
    with pytest.raises(PermanentError, match=r"redis\+cluster://|CROSSSLOT"):
        await read(target(cluster.nodes[0].url))


async def test_cluster_url_of_a_plain_server_is_refused(valkey: Valkey) -> None:
    with pytest.raises(PermanentError, match="cluster support disabled"):
        await read(target(f"redis+cluster://127.0.0.1:{valkey.port}"))


async def test_cluster_that_lost_a_node_is_an_outage() -> None:
    with open_cluster() as nodes:
        await nodes.join()
        nodes.nodes[2].kill()
        with pytest.raises(UpstreamUnavailableError):
            await read(target(nodes.url))


# ── Upstash ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def upstash(valkey: Valkey) -> AsyncIterator[Upstash]:
    async with open_upstash(valkey) as database:
        yield database


async def test_upstash_is_read_and_written_like_any_server(valkey: Valkey, upstash: Upstash) -> None:
    async with valkey.client() as client:
        await client.mset({f"quota:{number}": number for number in range(2_500)})
        await client.hset("quota:jörg", mapping={"used": 7, "limit": 9})
        await client.set(b"quota:\xff", 1)
        await client.rpush("quota:list", 1)
        await client.set("quota:OK", "OK")
        to = target(upstash.url, credential=upstash.token, field="used")
        told = await read(to)
        assert len(told.values) == 2_501
        assert told.values["quota:jörg"] == 7
        assert told.skipped == 3
        assert (told.digest, told.is_restored) == (None, False)
        assert not (await read(to, b"known from another server")).is_restored
        assert len(upstash.pipelines) < 20
        changes = {"quota:1": Decimal(5), "quota:jörg": Decimal(6), "quota:gone": Decimal(1)}
        assert await poller().write(to, changes, Calls()) == {"quota:1", "quota:jörg"}
        assert await client.mget("quota:1", "quota:gone") == [b"5", None]
        assert await client.hgetall("quota:jörg") == {b"used": b"6", b"limit": b"9"}
    assert not any(name.startswith("upstash-telemetry") for headers in upstash.headers for name in headers)


async def test_upstash_names_itself_by_its_host(upstash: Upstash) -> None:
    to = target(upstash.url, credential=upstash.token)
    identity = await poller().identify(to, Calls())
    assert identity.org_id == f"{upstash.url.removeprefix('http://')} quota:*"


@pytest.mark.parametrize(
    ("status", "headers", "body", "error"),
    [
        (401, {}, b'{"error":"Unauthorized"}', CredentialError),
        (403, {}, b'{"error":"NOPERM"}', ForbiddenError),
        (429, {"retry-after": "7"}, b'{"error":"Too Many Requests"}', RateLimitedError),
        (400, {}, b'{"error":"ERR max daily request limit exceeded"}', RateLimitedError),
        (503, {}, b"<html>", UpstreamUnavailableError),
        (200, {}, b"<html>", SchemaDriftError),
        (200, {}, b"{}", SchemaDriftError),
        (200, {}, b"[]", SchemaDriftError),
        (200, {}, b'[{"result":"not base 64"}]', SchemaDriftError),
        (200, {}, b'[{"error":"WRONGPASS no"}]', CredentialError),
        (200, {}, b'[{"error":"ERR max daily request limit exceeded"}]', RateLimitedError),
        (200, {}, b"[" + b" " * 2_000_000 + b"]", SchemaDriftError),
    ],
)
async def test_refusal_of_upstash_has_its_name_and_not_the_token(upstash, status, headers, body, error) -> None:
    upstash.says.append((status, headers, body))
    with pytest.raises(error) as failed:
        await read(target(upstash.url, credential=upstash.token), http=HttpSettings(body_bytes_max=1_000_000))
    assert type(failed.value) is error
    assert upstash.token not in str(failed.value)
    if status == 429:
        assert failed.value.retry_after_s == 7
    assert upstash.says == [], "asked once: tries are the caller's business"


async def test_wrong_token_and_nobody_at_the_port_are_told_apart(upstash: Upstash) -> None:
    from tests.valkey_kit import free_ports

    with pytest.raises(CredentialError):
        await read(target(upstash.url, credential="another-token"))
    with pytest.raises(CredentialError, match="line break"):
        await read(target(upstash.url, credential="another\ntoken"))
    with pytest.raises(UpstreamUnavailableError):
        await read(target(f"http://127.0.0.1:{free_ports()[0]}", credential="a-token"))
