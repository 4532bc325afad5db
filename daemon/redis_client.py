"""The door to Redis and Valkey: one connection per server and reading, every failure under a name of ours.

redis-py opens the connections and speaks the protocol, but none of its pools, retries and redirections is used: each
round trip is one that the caller counts, limits and tries again, and a connection that was opened anew says which
server it leads to, since the cursor of a SCAN means nothing to another one. Upstash's REST API takes the same commands.
"""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from collections.abc import Sequence
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self, cast

import anyio
import hiredis
import msgspec
import redis.exceptions as theirs
from redis.asyncio import Connection, SSLConnection
from redis.asyncio.sentinel import MasterNotFoundError, SlaveNotFoundError
from redis.crc import key_slot
from upstash_redis.errors import UpstashError
from upstash_redis.http import AsyncHttpClient, make_headers

from daemon.domain.address import Address
from daemon.domain.connection import Secret
from daemon.domain.errors import (
    BadRequestError,
    ConfigError,
    CredentialError,
    DaemonError,
    ForbiddenError,
    PermanentError,
    RateLimitedError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.redis import WRONG_TYPE, Command, Node, Reply, Store
from daemon.domain.redis_url import RedisUrl, split_credential
from daemon.http_client import AiohttpTransport, HttpSettings, error_for, ssl_context
from daemon.http_client import as_ours as http_as_ours

REDIRECTIONS_MAX = 5
_SLOTS = 16_384


# ── Failures ────────────────────────────────────────────────────────────────────────────────────

# What each exception of the libraries means for the caller, the class itself and not its bases: AuthenticationError is
# a ConnectionError there, and a server that is loading its data is one too.
KINDS: dict[type[BaseException], type[DaemonError]] = {
    theirs.AskError: UpstreamUnavailableError,
    theirs.AuthenticationError: CredentialError,
    theirs.AuthenticationWrongNumberOfArgsError: CredentialError,
    theirs.AuthorizationError: ForbiddenError,
    theirs.BusyLoadingError: UpstreamUnavailableError,
    theirs.ChildDeadlockedError: PermanentError,
    theirs.ClusterCrossSlotError: PermanentError,
    theirs.ClusterDownError: UpstreamUnavailableError,
    theirs.ClusterError: UpstreamUnavailableError,
    theirs.ConnectionError: UpstreamUnavailableError,
    theirs.CrossSlotTransactionError: PermanentError,
    theirs.DataError: PermanentError,
    theirs.ExecAbortError: PermanentError,
    theirs.ExternalAuthProviderError: UpstreamUnavailableError,
    theirs.IncorrectPolicyType: PermanentError,
    theirs.InvalidPipelineStack: PermanentError,
    theirs.InvalidResponse: PermanentError,
    theirs.LockError: PermanentError,
    theirs.LockNotOwnedError: PermanentError,
    theirs.MasterDownError: UpstreamUnavailableError,
    theirs.MaxConnectionsError: UpstreamUnavailableError,
    theirs.ModuleError: PermanentError,
    theirs.MovedError: UpstreamUnavailableError,
    theirs.NoPermissionError: ForbiddenError,
    theirs.NoScriptError: PermanentError,
    theirs.NoSuchFieldsetError: PermanentError,
    theirs.OutOfMemoryError: UpstreamUnavailableError,
    theirs.PubSubError: PermanentError,
    theirs.ReadOnlyError: UpstreamUnavailableError,
    theirs.RedisClusterException: UpstreamUnavailableError,
    theirs.RedisError: PermanentError,
    theirs.ResponseError: PermanentError,
    theirs.SlotNotCoveredError: UpstreamUnavailableError,
    theirs.TimeoutError: UpstreamUnavailableError,
    theirs.TryAgainError: UpstreamUnavailableError,
    theirs.WatchError: PermanentError,
    MasterNotFoundError: UpstreamUnavailableError,
    SlaveNotFoundError: UpstreamUnavailableError,
    UpstashError: PermanentError,
    OSError: UpstreamUnavailableError,  # TimeoutError is one
}

# The same of errors that reach us as text alone: the rest of redis-py's ResponseError, and all of Upstash's.
_CODES: dict[str, type[DaemonError]] = {
    "BUSY": UpstreamUnavailableError,
    "CLUSTERDOWN": UpstreamUnavailableError,
    "LOADING": UpstreamUnavailableError,
    "MASTERDOWN": UpstreamUnavailableError,
    "MISCONF": UpstreamUnavailableError,
    "NOAUTH": CredentialError,
    "NOPERM": ForbiddenError,
    "NOREPLICAS": UpstreamUnavailableError,
    "OOM": UpstreamUnavailableError,
    "READONLY": UpstreamUnavailableError,
    "TRYAGAIN": UpstreamUnavailableError,
    "UNKILLABLE": UpstreamUnavailableError,
    "WRONGPASS": CredentialError,
}
PROBLEM_CHARS_MAX = 300


def as_ours(error: Exception, where: str, secrets: Sequence[str] = (), *, maybe_sent: bool = True) -> DaemonError:
    """Our name for a failure of the libraries.

    Args:
        where: the server, as its URL names it.
        secrets: a server without AUTH repeats the password in its refusal, and a parser what it could not read.
        maybe_sent: False while the connection was not even open.
    """
    status = getattr(error, "status_code", None)
    text = str(error) or type(error).__name__
    for secret in secrets:
        text = text.replace(secret, "***")
    problem = f"{where}: {f'{status} ' if status else ''}{text}"[:PROBLEM_CHARS_MAX]
    ours = next((KINDS[kind] for kind in type(error).__mro__ if kind in KINDS), PermanentError)
    if ours is PermanentError:
        ours = _CODES.get(text.partition(" ")[0], ours)
        if "limit exceeded" in text:  # Upstash: requests of the day, or bandwidth of the month
            ours = RateLimitedError
    if ours is UpstreamUnavailableError:
        return UpstreamUnavailableError(problem, maybe_sent=maybe_sent)
    return ours(problem)


# ── What a reading works with ───────────────────────────────────────────────────────────────────


def open_store(url: RedisUrl, credential: Secret, settings: HttpSettings) -> Store:
    """Not connected yet: the first round trip does that, under the limits of whoever sends it.

    Raises:
        PermanentError: the CA bundle cannot be read, or the token cannot be sent.
    """
    try:
        if url.kind == "rest":
            return _Rest(url, credential, settings)
        links = _Links(url, credential, settings)
    except ConfigError as error:
        raise PermanentError(str(error)) from error
    if url.kind == "cluster":
        return _Cluster(url, links)
    return _Single(url, links)


# ── Connections ─────────────────────────────────────────────────────────────────────────────────


class _Links:
    """Makes the connections of one URL."""

    def __init__(self, url: RedisUrl, credential: Secret, settings: HttpSettings) -> None:
        self._url = url
        self._user, self._password = split_credential(credential)
        self._settings = settings
        self._tls: SSLContext | None = ssl_context(settings) if url.is_tls else None
        self._made: list[_Link] = []

    def make(self, address: Address, *, is_sentinel: bool = False, has_password: bool = True) -> _Link:
        options: dict[str, Any] = {
            "host": address.host,
            "port": address.port,
            "socket_connect_timeout": self._settings.connect_timeout_s,
            "socket_timeout": self._settings.read_timeout_s,
            # RESP2, and nothing said about ourselves: what every server, proxy and list of rights knows.
            "protocol": 2,
            "driver_info": None,
        }
        if not is_sentinel:
            options["db"] = self._url.database
        if has_password:
            options["username"], options["password"] = self._user, self._password
        if self._tls is None:
            connection: Connection = Connection(**options)
        else:
            secure = SSLConnection(**options)
            secure.ssl_context.context = self._tls  # the same roots as for HTTP, in place of the system's
            connection = secure
        link = _Link(
            connection, str(address), [self._password] if self._password else [], self._settings.total_timeout_s
        )
        self._made.append(link)
        return link

    async def aclose(self) -> None:
        for link in self._made:
            await link.aclose()


class _Link:
    """One connection, opened by the first round trip, and again by the one after it was lost."""

    def __init__(self, connection: Connection, name: str, secrets: Sequence[str], total_s: float) -> None:
        self._connection = connection
        self._secrets = secrets
        self._total_s = total_s
        self.name = name

    @property
    def is_open(self) -> bool:
        return bool(self._connection.is_connected)

    async def open(self) -> None:
        try:
            await self._connection.connect()  # type: ignore[no-untyped-call]  # redis-py types its commands alone
        except (theirs.RedisError, OSError) as error:
            await self.aclose()
            raise as_ours(error, self.name, self._secrets, maybe_sent=False) from error

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, errors of single commands as values among them.

        redis-py closes a connection on which it did not come to the end of a reply, for whatever reason: what nobody
        has read is never taken for the answer to the next round trip.
        """
        connection = self._connection
        try:
            with anyio.fail_after(self._total_s):
                await connection.send_packed_command([_pack(command) for command in commands], check_health=False)
                # A timer for each reply costs more than the reply: the first shows that the server answers.
                return [await self._read(None if place == 0 else math.inf) for place in range(len(commands))]
        except (theirs.RedisError, OSError) as error:
            raise as_ours(error, self.name, self._secrets) from error

    async def _read(self, timeout_s: float | None) -> Any:
        try:
            return await self._connection.read_response(timeout=timeout_s)
        except theirs.ResponseError as error:
            return error

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        return [self.checked(reply) for reply in await self.send(commands)]

    def checked(self, reply: Any) -> Reply:
        if isinstance(reply, Exception):
            if str(reply).startswith("WRONGTYPE"):
                return WRONG_TYPE
            if isinstance(reply, theirs.MovedError):
                raise PermanentError(f"{self.name}: it belongs to a cluster; write the URL as redis+cluster://")
            raise as_ours(reply, self.name, self._secrets) from reply
        return cast("Reply", reply)

    async def aclose(self) -> None:
        await self._connection.disconnect(nowait=True)


def _pack(command: Command) -> bytes:
    # Its stub knows commands without arguments alone.
    return cast("bytes", hiredis.pack_command(command))  # type: ignore[arg-type]


def _fields(reply: Reply) -> dict[str, str]:
    """The lines of an INFO."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


class _Server:
    """A node that is one and the same server from the first round trip to the last."""

    def __init__(self, link: _Link, *, is_named_by_sentinel: bool = False) -> None:
        self._link = link
        self._is_named_by_sentinel = is_named_by_sentinel
        self._is_another = False
        self.run_id: str | None = None

    async def open(self) -> None:
        await self._link.open()
        sections: list[Command] = [("INFO", "server")]
        if self._is_named_by_sentinel:
            sections.append(("INFO", "replication"))
        server, *replication = [_fields(reply) for reply in await self._link.ask(sections)]
        if replication and replication[0].get("role") != "master":
            await self._link.aclose()
            raise UpstreamUnavailableError(f"{self._link.name}: named by a sentinel, and no master (any more)")
        run_id = server.get("run_id")
        if self.run_id is not None and run_id != self.run_id:
            self._is_another = True
        self.run_id = run_id

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        if not self._link.is_open and not self._is_another:
            await self.open()
        if self._is_another:
            # Its keys stand in another order, and their values may be older: what was read so far is no part of this.
            raise UpstreamUnavailableError(
                f"{self._link.name}: another server answers than at the start of the reading"
            )
        return await self._link.send(commands)

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        return [self._link.checked(reply) for reply in await self.send(commands)]

    def groups(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        return [list(keys)] if keys else []


class _Owner:
    """Closes the connections at the end."""

    def __init__(self, url: RedisUrl, links: _Links) -> None:
        self._url = url
        self._links = links

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._links.aclose()


class _Single(_Owner):
    """One server, at an address of its own or at the one that its sentinels know."""

    def __init__(self, url: RedisUrl, links: _Links) -> None:
        super().__init__(url, links)
        self._server: _Server | None = None

    async def connect(self) -> Sequence[Node]:
        return [await self._opened()]

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        return await (await self._opened()).ask(commands)

    async def _opened(self) -> _Server:
        if self._server is None:
            is_named = self._url.kind == "sentinel"
            address = await self._locate() if is_named else self._url.hosts[0]
            server = _Server(self._links.make(address), is_named_by_sentinel=is_named)
            await server.open()
            self._server = server
        return self._server

    async def _locate(self) -> Address:
        """Ask the sentinels one after the other, since some of them may be down, or cut off with an old master."""
        question: Command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.master)
        problems = []
        for host in self._url.hosts:
            for has_password in (False, True):
                link = self._links.make(host, is_sentinel=True, has_password=has_password)
                try:
                    await link.open()
                    (reply,) = await link.ask([question])
                except CredentialError as error:
                    if has_password:
                        raise
                    problems.append(str(error))
                    continue
                except UpstreamUnavailableError as error:
                    problems.append(str(error))
                    break
                finally:
                    await link.aclose()
                if isinstance(reply, list) and len(reply) == 2:
                    name, port = (cast("bytes", part).decode() for part in reply)
                    return Address(name, int(port))
                problems.append(f"{host}: knows no master {self._url.master}")
                break
        raise UpstreamUnavailableError("; ".join(problems)[:PROBLEM_CHARS_MAX], maybe_sent=False)


# ── A cluster ───────────────────────────────────────────────────────────────────────────────────


class _Cluster(_Owner):
    """All masters of a cluster. Commands on keys that have moved are sent on, as the servers say."""

    def __init__(self, url: RedisUrl, links: _Links) -> None:
        super().__init__(url, links)
        self._nodes: dict[Address, _ClusterNode] = {}
        self._holders: list[Address | None] = [None] * _SLOTS

    async def connect(self) -> Sequence[Node]:
        masters = await self._map()
        for address in masters:
            await self.node(address)
        return [self._nodes[address] for address in masters]

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        if not self._nodes:
            await self.connect()
        by_node: dict[Address, list[int]] = {}
        for place, command in enumerate(commands):
            holder = self._holders[key_slot(_key(command))]
            if holder is None:
                raise UpstreamUnavailableError(f"{self._url}: no node serves a slot of the cluster")
            by_node.setdefault(holder, []).append(place)
        replies: list[Reply] = [None] * len(commands)
        for address, places in by_node.items():
            answers = await (await self.node(address)).ask([commands[place] for place in places])
            for place, answer in zip(places, answers, strict=True):
                replies[place] = answer
        return replies

    async def node(self, address: Address) -> _ClusterNode:
        if address not in self._nodes:
            node = _ClusterNode(self, self._links.make(address))
            await node.open()
            self._nodes[address] = node
        return self._nodes[address]

    async def _map(self) -> list[Address]:
        """Who holds which slots, from the first node of the URL that tells."""
        problems = []
        for host in self._url.hosts:
            link = self._links.make(host)
            try:
                await link.open()
                (reply,) = await link.ask([("CLUSTER", "SLOTS")])
            except UpstreamUnavailableError as error:
                problems.append(str(error))
                continue
            finally:
                await link.aclose()
            self._holders = [None] * _SLOTS
            for first, last, master, *_ in cast("list[Any]", reply):
                name, port = master[0], master[1]
                # A node that does not know its own name leaves it out: it is the one that was asked.
                holder = Address(name.decode() if name else host.host, port)
                self._holders[first : last + 1] = [holder] * (last + 1 - first)
            masters = list(dict.fromkeys(holder for holder in self._holders if holder is not None))
            if None in self._holders:
                problems.append(f"{host}: no node serves some slots of the cluster")
                continue
            return masters
        raise UpstreamUnavailableError("; ".join(problems)[:PROBLEM_CHARS_MAX], maybe_sent=False)


class _ClusterNode(_Server):
    def __init__(self, cluster: _Cluster, link: _Link) -> None:
        super().__init__(link)
        self._cluster = cluster

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        replies = await self.send(commands)
        for _ in range(REDIRECTIONS_MAX):
            moved: dict[tuple[Address, bool], list[int]] = {}
            for place, reply in enumerate(replies):
                if isinstance(reply, theirs.AskError):  # MovedError is one
                    is_asking = not isinstance(reply, theirs.MovedError)
                    address = Address(reply.host or self._link.name.rpartition(":")[0], reply.port)
                    moved.setdefault((address, is_asking), []).append(place)
            if not moved:
                break
            for (address, is_asking), places in moved.items():
                await self._follow(address, [commands[place] for place in places], places, replies, is_asking=is_asking)
        return [self._link.checked(reply) for reply in replies]

    async def _follow(
        self,
        address: Address,
        commands: Sequence[Command],
        places: Sequence[int],
        replies: list[Any],
        *,
        is_asking: bool,
    ) -> None:
        asking: list[Command] = [("ASKING",)] if is_asking else []
        there = await self._cluster.node(address)
        answers = await there.send([step for command in commands for step in (*asking, command)])
        for place, answer in zip(places, answers[len(asking) :: 1 + len(asking)], strict=True):
            replies[place] = answer

    def groups(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        """By slot: a command that names keys of several is refused."""
        by_slot: dict[int, list[bytes]] = {}
        for key in keys:
            by_slot.setdefault(key_slot(key), []).append(key)
        return list(by_slot.values())


def _key(command: Command) -> bytes:
    key = command[3] if command[0] == "EVAL" else command[1]
    return key if isinstance(key, bytes) else str(key).encode()


# ── Upstash ─────────────────────────────────────────────────────────────────────────────────────


class _RestClient(AsyncHttpClient):
    """Upstash's client over our own transport: it has no deadline, retries by itself, does not look at the status, lets
    one command's error hide the answers of the others, and cannot read a key that is not UTF-8.
    """

    def __init__(self, settings: HttpSettings, host: str) -> None:
        super().__init__(encoding="base64", retries=0, retry_interval=0.0)
        self._host = host
        self._bytes_max = settings.body_bytes_max
        self._transport = AiohttpTransport(settings)

    async def execute(
        self, url: str, headers: dict[str, str], command: list[Any], from_pipeline: bool = True
    ) -> list[Any]:
        """One pipeline: what each command answered, errors as values among them."""
        assert from_pipeline
        sent = {**headers, "accept": "application/json", "accept-encoding": "gzip", "content-type": "application/json"}
        request = self._client.build_request("POST", url, headers=sent, content=msgspec.json.encode(command))
        body = bytearray()
        try:
            response = await self._transport.handle_async_request(request)
            try:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > self._bytes_max:
                        break
            finally:
                await response.aclose()
        except Exception as error:  # httpx's, whose home is http_client
            raise http_as_ours(error, self._host) from error
        if len(body) > self._bytes_max:
            raise SchemaDriftError(
                f"{self._host}: the answer is larger than the limit of {self._bytes_max} bytes", bytes(body)
            )
        if response.status_code != 200:
            raise self._refusal(response.status_code, response.headers, bytes(body), headers["Authorization"])
        try:
            return [self._plain(answer) for answer in msgspec.json.decode(body, type=list[_RestAnswer])]
        except (msgspec.MsgspecError, UnicodeDecodeError, binascii.Error) as error:
            raise SchemaDriftError(f"{self._host}: the answer is no pipeline's: {error}", bytes(body)) from error

    def _refusal(self, status: int, headers: Any, body: bytes, authorization: str) -> DaemonError:
        error = error_for(status, headers, body, [authorization.rsplit(maxsplit=1)[-1]])
        if isinstance(error, BadRequestError) and "limit exceeded" in str(error):
            return RateLimitedError(f"{self._host} {error}")
        return error

    def _plain(self, answer: _RestAnswer) -> Any:
        return UpstashError(answer.error) if answer.error is not None else _decoded(answer.result)

    async def close(self) -> None:
        await super().close()  # type: ignore[no-untyped-call]  # nor does Upstash this one
        await self._transport.aclose()


class _RestAnswer(msgspec.Struct):
    result: Any = None
    error: str | None = None


def _decoded(result: Any) -> Any:
    """What the header `Upstash-Encoding: base64` has done, undone: texts are encoded, but for OK."""
    if isinstance(result, list):
        return [_decoded(part) for part in result]
    if isinstance(result, str):
        return b"OK" if result == "OK" else b64decode(result, validate=True)
    return result


class _Rest:
    """A database of Upstash: one node, which does not tell when it was restored."""

    run_id: str | None = None

    def __init__(self, url: RedisUrl, credential: Secret, settings: HttpSettings) -> None:
        self._url = f"{url}/pipeline"
        self._name = str(url.hosts[0])
        self._token = credential.reveal()
        self._client = _RestClient(settings, self._name)
        if not self._token.isascii() or not self._token.isprintable():
            raise CredentialError("the token holds a line break or another character that no HTTP header can carry")

    async def connect(self) -> Sequence[Node]:
        await self.ask([("PING",)])
        return [self]

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        texts = [[part.decode() if isinstance(part, bytes) else str(part) for part in command] for command in commands]
        headers = make_headers(self._token, "base64", allow_telemetry=False)
        answers = await self._client.execute(self._url, headers, texts)
        if len(answers) != len(commands):
            raise SchemaDriftError(f"{self._name}: {len(answers)} answers to {len(commands)} commands")
        return [self._checked(answer) for answer in answers]

    def _checked(self, answer: Any) -> Reply:
        if isinstance(answer, UpstashError):
            if str(answer).startswith("WRONGTYPE"):
                return WRONG_TYPE
            raise as_ours(answer, self._name, [self._token] if self._token else [])
        return cast("Reply", answer)

    def groups(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        return [list(keys)] if keys else []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()


__all__ = ["as_ours", "open_store"]
