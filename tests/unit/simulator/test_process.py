"""The simulator as its own process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx
import pytest

from tests.unit.simulator.conftest import OPENAI_HEADERS, at

COSTS = f"/v1/organization/costs?start_time={at('2026-11-20T00:00:00Z')}&group_by=line_item"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_serves_the_same_bytes_and_ends_cleanly(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "daemon.simulator", "--seed", "5", "--now", "2026-11-22T10:00:00Z", "--frozen"]
    bodies = set()
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["pid"] == process.pid
            with httpx.Client(base_url=told["url"]) as client:
                bodies.add(client.get(COSTS, headers=OPENAI_HEADERS).content)
                process.send_signal(number)  # an open connection does not hold it up
                assert process.wait(10) == 0
    assert len(bodies) == 1
