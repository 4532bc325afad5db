"""The resident set of a daemon that takes and delivers large bodies at the same time."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import anyio
import anyio.to_thread

from bench.fleet import resident_bytes
from bench.mail import Endpoint, Mail, body, endpoint, settings
from bench.replica import Replica, replica
from bench.report import Line, Target
from bench.sender import post, sender
from bench.stage import Stage

MIB = 2**20
BODY_BYTES = MIB
IN_FLIGHT = 64
HOLD_S = 1
TIGHT_MIB = 16
SAMPLE_S = 0.01


async def in_flight(stage: Stage) -> list[Line]:
    """As many publishes and as many deliveries of 1 MiB at once as connections and slots allow, then with tight budgets."""
    tight = {"TALLYD_V2_BYTES_MAX": str(TIGHT_MIB * MIB), "TALLYD_PUSH_BYTES_MAX": str(TIGHT_MIB * MIB)}
    what = f"{IN_FLIGHT} publishes and {IN_FLIGHT} deliveries of {BODY_BYTES // MIB} MiB at once"
    wide, wide_rest, most = await _peak(stage, {})
    narrow, narrow_rest, narrow_most = await _peak(stage, tight)
    return [
        Line(
            f"memory, {what}", wide, "MiB", wide_rest, "at rest", wide / wide_rest, Target("≤", WIDE_MAX, "ours"),
            f"{most} deliveries at once",
        ),
        Line(
            f"the same, budgets of {TIGHT_MIB} MiB for each way", narrow, "MiB", narrow_rest, "at rest",
            narrow / narrow_rest, Target("≤", NARROW_MAX, "ours"), f"{narrow_most} deliveries at once",
        ),
    ]  # fmt: skip


WIDE_MAX = 600
NARROW_MAX = 250


async def _peak(stage: Stage, budgets: dict[str, str]) -> tuple[float, float, int]:
    """Resident MiB at most, and at rest; and how many deliveries there were at once."""
    count = stage.size(2, 1) * IN_FLIGHT
    async with stage.database() as url, endpoint() as there, Mail.open(stage, url) as mail:
        token = (await mail.accounts.add_token(mail.account, "bench")).reveal()
        env = {**settings(stage, url, IN_FLIGHT), **budgets}
        async with replica(env, stage.folder / "bulk.log") as daemon:
            with sender() as pool:
                await _send(pool, daemon, there, token, IN_FLIGHT, 1_000)  # what is loaded or connected on first use
                await mail.until_settled()
                rest = resident_bytes(daemon.process) / MIB
                peak = rest

                async def watch() -> None:
                    nonlocal peak
                    while True:
                        peak = max(peak, resident_bytes(daemon.process) / MIB)
                        await anyio.sleep(SAMPLE_S)

                async with anyio.create_task_group() as group:
                    group.start_soon(watch)
                    await _send(pool, daemon, there, token, count, BODY_BYTES)
                    await mail.until_settled()
                    group.cancel_scope.cancel()
                _, _, most = await there.seen()
        await mail.check_delivered(count + IN_FLIGHT)
    return peak, rest, most


async def _send(
    pool: ProcessPoolExecutor, daemon: Replica, there: Endpoint, token: str, count: int, bytes_: int
) -> None:
    await there.reset(count)
    port = urlsplit(daemon.url).port
    assert port is not None
    bodies = [body(number, bytes_) for number in range(count)]
    path = f"/v2/publish/{there.url}/hold/{HOLD_S}"
    done = await anyio.to_thread.run_sync(partial(pool.submit, post, port, path, bodies, IN_FLIGHT, token))
    shipped = await anyio.to_thread.run_sync(done.result)
    assert {status for status, _ in shipped.answers} == {200}, shipped.answers.most_common(2)
    await there.until_all(count, every_s=0.1)
