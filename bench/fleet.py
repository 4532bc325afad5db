"""Many simulated connections, and `tallyd` as its own process working on them."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from time import perf_counter
from typing import Any
from urllib.request import Request, urlopen

import anyio
import anyio.to_thread
import msgspec
import psutil  # type: ignore[import-untyped]  # it has no types

from bench.stage import Stage

TALLYD = (sys.executable, "-m", "daemon")
WATCH_S = 0.02
PROVIDERS = ("openai", "anthropic")


class Fleet:
    """The connections of one database at one simulator."""

    def __init__(self, stage: Stage, database_url: str, simulator_url: str) -> None:
        self._stage = stage
        self._simulator_url = simulator_url
        self.env: Mapping[str, str] = environment(stage, database_url)
        self.peak_bytes = 0
        self.took_s = 0.0

    async def set_up(self, count: int, *, requests_per_hour: int, hours: int = 3) -> None:
        """Half OpenAI, half Anthropic, each with a few hours of history."""
        profile = {"history_days": 1, "requests_per_hour": requests_per_hour, "projects": 1, "keys": 2}
        for provider in PROVIDERS:
            await self._control("orgs", {"provider": provider, "profile": profile})
        await self.import_connections(count, hours=hours)

    async def import_connections(self, count: int, *, hours: int, providers: Sequence[str] = PROVIDERS) -> None:
        """The connections alone, for a provider that needs no setting up."""
        since = (datetime.now(UTC) - timedelta(hours=hours)).replace(minute=0, second=0, microsecond=0).isoformat()
        path = self._stage.folder / "fleet.jsonl"
        path.write_bytes(
            msgspec.json.Encoder().encode_lines(
                [self._connection(number, since, providers[number % len(providers)]) for number in range(count)]
            )
        )
        await self.run("connections", "import", str(path), "--json")

    def _connection(self, number: int, since: str, provider: str) -> dict[str, str]:
        is_openai = provider == "openai"
        return {
            "tenant": f"tenant-{number % 100}",
            "provider": provider,
            "name": f"connection-{number}",
            "credential": f"sk-admin-bench{number}" if is_openai else f"sk-ant-admin01-bench{number}",
            "base_url": self._simulator_url + ("/v1" if is_openai else ""),
            "since": since,
        }

    async def _control(self, call: str, body: object) -> None:
        request = Request(f"{self._simulator_url}/_sim/{call}", data=msgspec.json.encode(body), method="POST")
        with await anyio.to_thread.run_sync(lambda: urlopen(request, timeout=10)) as answer:
            assert answer.status == 200

    def start(self, *arguments: str, **env: str) -> Popen[bytes]:
        return Popen([*TALLYD, *arguments], stdout=PIPE, env={**self.env, **env})

    async def run(self, *arguments: str) -> bytes:
        """Run a command to its end; `took_s` and `peak_bytes` are then its time and its largest resident set."""
        began = perf_counter()
        child = self.start(*arguments)
        reader = anyio.to_thread.run_sync
        self.peak_bytes = 0
        output = b""

        async def read() -> None:
            nonlocal output
            assert child.stdout is not None
            output = await reader(child.stdout.read)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            process = psutil.Process(child.pid)
            while child.poll() is None:
                self.peak_bytes = max(self.peak_bytes, resident_bytes(process))
                await anyio.sleep(WATCH_S)
        self.took_s = perf_counter() - began
        assert child.returncode == 0, (arguments, child.returncode, output[-500:])
        assert child.stdout is not None
        child.stdout.close()
        return output

    async def summary(self, *arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(await self.run(*arguments, "--json"))
        return found


def environment(stage: Stage, database_url: str) -> dict[str, str]:
    """For a `tallyd` of its own: nothing of this shell's settings, and a listener on whatever port is free."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("TALLYD_") and "QSTASH_" not in name
    }
    return {
        **inherited,
        "TALLYD_DATABASE_URL": database_url,
        "TALLYD_SECRET_KEY": base64.b64encode(b"k" * 32).decode(),
        "TALLYD_DATA_DIR": str(stage.folder / "data"),
        "TALLYD_LOG_LEVEL": "warning",
        "TALLYD_LISTEN": "127.0.0.1:0",
    }


def resident_bytes(process: psutil.Process) -> int:
    """The resident set of that process alone; 0 when it has just ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def script(name: str) -> Path:
    """An installed command of this Python."""
    return Path(sys.executable).with_name(name)
