"""Readiness, and what the service manager is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from daemon.domain.errors import StorageUnavailableError
from daemon.telemetry import health as module
from daemon.telemetry.health import FAILED, Health
from daemon.telemetry.systemd import ServiceManager

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_each_check_tells_what_is_wrong_and_none_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECK_S", 0.01)
    health = Health(Clock())

    async def well() -> str | None:
        return None

    async def ill() -> str | None:
        return "it limps"

    async def away() -> str | None:
        raise StorageUnavailableError("database: away")

    for name, check in (("a", well), ("b", ill), ("c", away), ("d", anyio.sleep_forever)):
        health.add(name, check)  # type: ignore[arg-type]
    with capture_logs() as logs:
        found = await health.problems()
    assert found == {
        "service": None, "a": None, "b": "it limps", "c": FAILED, "d": FAILED,
    }  # fmt: skip
    assert [(line["check"], line["reason"]) for line in logs] == [
        ("c", "database: away"), ("d", "no answer within 0.01 s"),
    ]  # fmt: skip


async def test_a_crowd_that_asks_costs_one_check_a_second() -> None:
    clock, asked = Clock(), 0
    health = Health(clock)

    async def check() -> str | None:
        nonlocal asked
        asked += 1
        await anyio.lowlevel.checkpoint()
        return None

    health.add("database", check)
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(health.problems)
    assert asked == 1
    clock.now = 1.0
    await health.problems()
    assert asked == 2


async def test_draining_shows_at_once() -> None:
    health = Health(Clock())
    assert not any((await health.problems()).values())
    health.is_draining = True
    assert (await health.problems())["service"] == "it is draining"


# ── The service manager ─────────────────────────────────────────────────────────────────────────


def heard(listener: socket.socket) -> bytes:
    listener.settimeout(5)
    return listener.recv(4096)


def test_a_manager_hears_what_it_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000000"})
        assert manager.watchdog_s == 30.0
        manager.ready("all well")
        assert heard(listener) == b"READY=1\nSTATUS=all well"
        manager.alive()
        assert heard(listener) == b"WATCHDOG=1"
        manager.stopping("draining")
        assert heard(listener) == b"STOPPING=1\nSTATUS=draining"


def test_an_abstract_socket_is_written_with_an_at() -> None:
    name = f"tallyd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        ServiceManager({"NOTIFY_SOCKET": "@" + name}).status("here")
        assert heard(listener) == b"STATUS=here"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"WATCHDOG_USEC": "1000000"},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_nobody_there_is_no_trouble(env: dict[str, str]) -> None:
    """The watchdog of a parent is not ours, and a manager that went away must not end the service."""
    manager = ServiceManager(env)
    assert manager.watchdog_s is None
    manager.ready("alone")
    manager.alive()
