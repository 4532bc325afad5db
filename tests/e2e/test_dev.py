"""`tallyd dev` as whoever develops against QStash meets it: the real process, the official SDK, a receiver that verifies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import anyio.to_thread
import pytest
from qstash import AsyncQStash, Receiver
from qstash.errors import QStashError

from daemon.db import embedded
from daemon.domain.dev import DEV_ACCOUNTS
from tests.books_kit import until
from tests.cli_kit import Result, command
from tests.e2e.conftest import COMMAND_S
from tests.http_kit import local_client
from tests.push_kit import Endpoint, Reply, open_endpoint

pytestmark = pytest.mark.anyio

USER = DEV_ACCOUNTS[0]
START_S = 45.0
END_S = 3.0
"""How long whoever presses Ctrl-C waits."""


class Dev:
    """One `tallyd dev`."""

    def __init__(self, process: subprocess.Popen[str], told: dict[str, Any]) -> None:
        self.process = process
        self.told = told
        self.url: str = told["url"]

    @asynccontextmanager
    async def client(self, token: str = USER.token) -> AsyncIterator[AsyncQStash]:
        client = AsyncQStash(token, base_url=self.url, retry=False)
        try:
            yield client
        finally:
            await client.http._client.aclose()  # the SDK offers no way to close its connections

    async def publish(self, url: str, **fields: Any) -> str:
        """A message's id."""
        async with self.client() as client:
            published = await client.message.publish(url=url, body="x", **fields)
        assert not isinstance(published, list)
        return published.message_id

    async def knows(self, message: str) -> bool:
        async with self.client() as client:
            try:
                return (await client.message.get(message)).message_id == message
            except QStashError:
                return False

    async def keys(self, token: str = USER.token) -> tuple[str, str]:
        async with self.client(token) as client:
            keys = await client.signing_key.get()
        return keys.current, keys.next

    async def interrupt(self) -> float:
        """Ctrl-C; seconds until it has ended."""
        start = monotonic()
        self.process.send_signal(signal.SIGINT)
        code = await anyio.to_thread.run_sync(self.process.wait)
        assert code == 0, self.process.stderr and self.process.stderr.read()
        return monotonic() - start


class Shell:
    """A terminal in a folder: its environment, and what is started from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_dir = folder / "dev"
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {
            name: text for name, text in os.environ.items() if not name.startswith("TALLYD_") and "QSTASH" not in name
        }

    def popen(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "daemon", *arguments], env=self.environment | environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    async def dev(self, *flags: str, **environment: str) -> Dev:
        """Start it, and wait until it serves."""
        process = self.popen("dev", "--json", "-port", "0", "--data-dir", str(self.folder), *flags, **environment)
        assert process.stdout is not None
        text = ""
        with anyio.fail_after(START_S):
            while not text.endswith("}\n"):
                line = await anyio.to_thread.run_sync(process.stdout.readline)
                assert line, process.stderr and process.stderr.read()
                text += line
        return Dev(process, json.loads(text))

    async def __call__(self, *arguments: str, **environment: str) -> Result:
        process = self.popen(*arguments, **environment)
        with anyio.fail_after(COMMAND_S):
            out, err = await anyio.to_thread.run_sync(process.communicate)
        return Result(process.returncode, out, err)

    async def here(self, *arguments: str, **environment: str) -> Result:
        """The same command without a process of its own, where the process is not what is tested."""
        return await anyio.to_thread.run_sync(command, arguments, self.environment | environment, self.folder, None)


@pytest.fixture
def shell() -> Iterator[Shell]:
    folder = Path(tempfile.mkdtemp(prefix="tallyd-dev-"))
    folder.chmod(0o755)  # as root the database server runs as another user
    made = Shell(folder)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()
    embedded.stop(made.data_dir)
    shutil.rmtree(folder)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with open_endpoint() as opened:
        yield opened


async def test_official_sdk_publishes_and_its_receiver_verifies(shell: Shell, endpoint: Endpoint) -> None:
    dev = await shell.dev()
    assert dev.told == {
        "url": dev.url,
        "token": USER.token,
        "current_signing_key": USER.keys.current,
        "next_signing_key": USER.keys.next,
        "data_dir": str(shell.data_dir),
    }
    assert dev.url.startswith("http://127.0.0.1:")
    assert await dev.keys() == (USER.keys.current, USER.keys.next)
    async with dev.client() as client:
        published = await client.message.publish_json(url=f"{endpoint.url}/hook", body={"n": 1})
    assert not isinstance(published, list)
    [arrived] = await endpoint.has(1)
    assert (arrived.method, arrived.target, json.loads(arrived.body)) == ("POST", "/hook", {"n": 1})
    assert arrived.message_id == published.message_id
    Receiver(dev.told["current_signing_key"], dev.told["next_signing_key"]).verify(
        signature=arrived.headers["upstash-signature"], body=arrived.body.decode(), url=f"{endpoint.url}/hook"
    )
    assert embedded.status(shell.data_dir).is_running
    took_s = await dev.interrupt()
    assert took_s < END_S
    assert not embedded.status(shell.data_dir).is_running
    assert dev.process.stderr is not None
    assert dev.process.stderr.read() == "", "it says nothing that nobody asked for"


async def test_every_public_user_is_let_in(shell: Shell) -> None:
    dev = await shell.dev()
    for account in DEV_ACCOUNTS:
        assert await dev.keys(account.token) == (account.keys.current, account.keys.next)
    async with local_client(base_url=dev.url) as client:
        assert (await client.get("/v2/keys", headers={"Authorization": "Bearer other"})).status_code == 401
    # Another start knows them as everybody does.
    async with dev.client() as client:
        assert (await client.signing_key.rotate()).current == USER.keys.next
    await dev.interrupt()
    assert await (await shell.dev()).keys() == (USER.keys.current, USER.keys.next)


async def test_messages_outlive_a_restart_and_fresh_forgets_them(shell: Shell, endpoint: Endpoint) -> None:
    dev = await shell.dev()
    later = await dev.publish(f"{endpoint.url}/later", delay="1h")
    await dev.publish(f"{endpoint.url}/soon", delay="1s")
    await dev.interrupt()
    dev = await shell.dev()
    assert await dev.knows(later)
    await endpoint.has(1, "/soon")

    in_use = await shell("dev", "--fresh", "--port", "0", "--data-dir", str(shell.folder))
    assert (in_use.code, in_use.out) == (2, "")
    assert in_use.err.startswith("error: --fresh: a process uses the database in ")
    assert await dev.knows(later)

    await dev.interrupt()
    dev = await shell.dev("--fresh")
    assert not await dev.knows(later)
    await dev.interrupt()


async def test_ctrl_c_does_not_wait_for_a_slow_receiver(shell: Shell, endpoint: Endpoint) -> None:
    """What was cut off is delivered after the next start."""
    release = anyio.Event()

    async def wait(_: object) -> Reply:
        await release.wait()
        return Reply()

    endpoint.judge = wait
    dev = await shell.dev()
    published = await dev.publish(f"{endpoint.url}/slow")
    await endpoint.has(1)
    assert await dev.interrupt() < END_S
    release.set()
    await shell.dev()
    arrived = await endpoint.has(2)
    assert {one.message_id for one in arrived} == {published}


async def test_shell_that_was_told_of_the_server_can_start_it_again(shell: Shell) -> None:
    """`QSTASH_...` in the environment is for clients; the port is the server's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = shell.popen(
        "dev", "--data-dir", str(shell.folder), QSTASH_DEV_PORT=str(port), QSTASH_URL=f"http://127.0.0.1:{port}",
        QSTASH_TOKEN=USER.token, QSTASH_CURRENT_SIGNING_KEY=USER.keys.current,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    with anyio.fail_after(START_S):
        while len(lines) < 7:
            lines.append(await anyio.to_thread.run_sync(process.stdout.readline))
    assert lines[0] == f"tallyd dev serves the QStash API at http://127.0.0.1:{port}\n"
    assert [line.strip() for line in lines[2:6]] == [
        f"export QSTASH_URL=http://127.0.0.1:{port}",
        f"export QSTASH_TOKEN={USER.token}",
        f"export QSTASH_CURRENT_SIGNING_KEY={USER.keys.current}",
        f"export QSTASH_NEXT_SIGNING_KEY={USER.keys.next}",
    ]
    taken = await shell("dev", "-port", str(port), "--data-dir", str(shell.folder))
    assert (taken.code, taken.out) == (2, "")
    assert f"error: listen: 127.0.0.1:{port} is in use" in taken.err
    process.send_signal(signal.SIGINT)
    _, err = await anyio.to_thread.run_sync(process.communicate)
    assert process.returncode == 0
    assert err.splitlines() == [
        f"starting; what is stored is kept in {shell.data_dir}",
        "Ctrl-C ends it; `tallyd dev --fresh` begins anew",
    ]


async def test_production_never_lets_public_tokens_in(shell: Shell) -> None:
    """Not even where a database holds their accounts: the tokens are printed in everybody's documentation."""
    dev = await shell.dev()
    await dev.interrupt()
    environment = {"TALLYD_DATA_DIR": str(shell.data_dir), "TALLYD_LISTEN": "127.0.0.1:0", "TALLYD_LOG_FORMAT": "json"}
    # The public account itself gets a token of its own: the account is refused, not the token alone.
    own = await shell.here("tokens", "add", "own", "--json", **environment)
    theirs = await shell.here("tokens", "add", "mine", "--account", USER.name, "--json", **environment)
    process = shell.popen("run", **environment)
    assert process.stderr is not None
    url = ""
    with anyio.fail_after(START_S):
        while not url:
            line = json.loads(await anyio.to_thread.run_sync(process.stderr.readline))
            url = line.get("listens", {}).get("listen", "")
    async with local_client(base_url=url) as client:

        async def status(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            read = (await client.get("/v2/keys", headers=headers)).status_code
            sent = await client.post("/v2/publish/https://example.com/", headers=headers | {"Upstash-Delay": "1h"})
            assert (read == 401) == (sent.status_code == 401)
            return read

        async def serves() -> bool:
            return (await client.get("/healthz")).status_code == 200

        await until(serves, "the daemon serves")
        assert await status(own.json["token"]) == 200
        for token in (*(account.token for account in DEV_ACCOUNTS), theirs.json["token"]):
            assert await status(token) == 401
    process.send_signal(signal.SIGTERM)
    await anyio.to_thread.run_sync(process.communicate)
