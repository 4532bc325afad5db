"""The real processes: a simulator, and as many `tallyd` as a test wants, each ended by its own pid.

A process takes most of a second to start. What sets a test up, and what reads the books at its end, runs `here`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.books_kit import SECRET_KEY, Sim, open_sim, until
from tests.cli_kit import Result, command

COMMAND_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(int(os.environ.get("TALLYD_TEST_E2E_TIMEOUT", "180"))))


class Replica:
    """One `tallyd run`. Its log is a file, so that a process that nobody reads never blocks."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon", "run"], env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def log(self) -> list[dict[str, Any]]:
        """The lines written so far; a line that is no JSON is a traceback's."""
        lines = self._log.read_text(errors="replace").splitlines()
        return [json.loads(line) if line.startswith("{") else {"event": line, "level": "raw"} for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == name]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def has_logged(self, name: str, *, wait_s: float = 30.0) -> None:
        async def is_so() -> bool:
            assert self.process.poll() is None or self.events(name), self._log.read_text()
            return bool(self.events(name))

        await until(is_so, f"{name} in the log", wait_s=wait_s)

    async def ended(self, *, wait_s: float = 30.0) -> int:
        async def is_so() -> bool:
            return self.process.poll() is not None

        await until(is_so, f"pid {self.process.pid} ends: {self._log.read_text()[-2000:]}", wait_s=wait_s)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Tallyd:
    """The command line, in an environment of its own."""

    command = (sys.executable, "-m", "daemon")

    def __init__(self, database_url: str, folder: Path) -> None:
        self._folder = folder
        self.replicas: list[Replica] = []
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith("TALLYD_")} | {
            "TALLYD_DATABASE_URL": database_url,
            "TALLYD_DATA_DIR": str(folder),
            "TALLYD_SECRET_KEY": SECRET_KEY,
            "TALLYD_TICK_SECONDS": "2",
            "TALLYD_LOG_FORMAT": "json",
            "TALLYD_DRAIN_S": "10",
            "TALLYD_LISTEN": "127.0.0.1:0",
        }

    async def __call__(self, *arguments: str, stdin: str | None = None, **environment: str) -> Result:
        with anyio.fail_after(COMMAND_S):
            done = await anyio.run_process(
                [*self.command, *arguments],
                input=None if stdin is None else stdin.encode(),
                env=self.environment | environment,
                check=False,
                cwd=self._folder,
            )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def here(self, *arguments: str, stdin: str | None = None, **environment: str) -> Result:
        """The same command without a process of its own, where the process is not what is tested."""
        return await anyio.to_thread.run_sync(command, arguments, self.environment | environment, self._folder, stdin)

    def run(self, **environment: str) -> Replica:
        """Start `tallyd run`."""
        replica = Replica(self.environment | environment, self._folder / f"replica-{len(self.replicas)}.log")
        self.replicas.append(replica)
        return replica


@pytest.fixture
def tallyd(database_url: str, tmp_path: Path) -> Iterator[Tallyd]:
    made = Tallyd(database_url, tmp_path)
    yield made
    for replica in made.replicas:
        replica.kill()


@pytest.fixture
async def sim() -> AsyncIterator[Sim]:
    process = subprocess.Popen(  # noqa: ASYNC220 - it is started, not waited for
        [sys.executable, "-m", "daemon.simulator", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = await anyio.to_thread.run_sync(process.stdout.readline)
        async with open_sim(json.loads(line)["url"]) as opened:
            yield opened
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
