"""`tallyd run` as its own process, and what processes cost the machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import anyio
import anyio.to_thread
import asyncpg
import msgspec
import psutil  # type: ignore[import-untyped]  # it has no types

START_S = 60.0
END_S = 90.0


class Replica:
    """One `tallyd run`. Its log is a file, as a service's is, so that a process that nobody reads never blocks.

    Attributes:
        url: of its listener.
    """

    def __init__(self, env: Mapping[str, str], log: Path, *arguments: str) -> None:
        self._log = log
        self.url = ""
        with log.open("wb") as stderr:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "daemon", "run", *arguments],
                env={**env, "TALLYD_LOG_LEVEL": "info", "TALLYD_LOG_FORMAT": "json"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        self.process = psutil.Process(self.child.pid)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log's lines of that event."""
        lines = self._log.read_bytes().splitlines()
        return [found for line in lines if (found := _decoded(line)).get("event") == name]

    async def until_started(self) -> None:
        with anyio.fail_after(START_S):
            while not (started := self.events("daemon.started")):
                assert self.child.poll() is None, self._log.read_text()
                await anyio.sleep(0.05)
        self.url = started[0]["listens"].get("listen", "")

    async def get(self, path: str) -> bytes:
        """What its listener answers with 200."""

        def ask() -> bytes:
            with urlopen(self.url + path, timeout=30) as answer:
                body: bytes = answer.read()
                assert answer.status == 200, (path, body)
                return body

        return await anyio.to_thread.run_sync(ask)

    async def ended(self) -> None:
        """Wait for its end, which has to be an orderly one."""
        code = await anyio.to_thread.run_sync(self.child.wait, END_S)
        assert code == 0, (code, self._log.read_text()[-3000:])


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError:  # a line that is still being written, or a traceback's
        return {}
    return found if isinstance(found, dict) else {}


@asynccontextmanager
async def replica(env: Mapping[str, str], log: Path, *arguments: str) -> AsyncIterator[Replica]:
    """A replica that has started; ended in order at the end, unless it has ended by itself."""
    made = Replica(env, log, *arguments)
    try:
        await made.until_started()
        yield made
        if made.child.poll() is None:
            made.child.terminate()
            await made.ended()
    finally:
        if made.child.poll() is None:
            made.child.kill()
            made.child.wait()


def cpu_s(process: psutil.Process) -> float:
    """User and system seconds of that process alone."""
    times = process.cpu_times()
    return float(times.user + times.system)


class PostgresCpu:
    """What the database server costs, all its processes together; 0 when it is on another machine."""

    def __init__(self, postmaster: psutil.Process | None) -> None:
        self._postmaster = postmaster

    @classmethod
    async def find(cls, url: str) -> PostgresCpu:
        connection: asyncpg.Connection = await asyncpg.connect(url)
        try:
            backend = await connection.fetchval("select pg_backend_pid()")
            postmaster = psutil.Process(backend).parent()
        except psutil.NoSuchProcess:
            postmaster = None
        finally:
            await connection.close()
        is_one = postmaster is not None and "postgres" in postmaster.name()
        return cls(postmaster if is_one else None)

    def cpu_s(self) -> float:
        """Seconds so far; those of processes that have ended are with their parent."""
        if self._postmaster is None:
            return 0.0
        times = self._postmaster.cpu_times()
        total = float(times.user + times.system + times.children_user + times.children_system)
        for child in self._postmaster.children(recursive=True):
            try:
                total += cpu_s(child)
            except psutil.NoSuchProcess:
                continue
        return total
