"""Requests over loopback, a hundred in flight, and polling the simulator from the probe to the commit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic, perf_counter

import anyio
import httpx

from bench.fleet import Fleet
from bench.report import Line, Target
from bench.stage import Stage, alternate, process, simulator
from daemon.domain.connection import Secret
from daemon.domain.connection import Target as Provider
from daemon.http_client import AiohttpTransport, HttpClient, HttpSettings, build_url
from daemon.worker.caller import CountingCaller, RetrySettings
from daemon.worker.governor import Governor, GovernorSettings

IN_FLIGHT = 100
PATH = "/organization/usage/completions"
PARAMS = (
    ("start_time", "1795000000"),
    ("bucket_width", "1h"),
    *(("group_by", name) for name in ("model", "project_id", "user_id", "api_key_id")),
    ("limit", "24"),
)
HEADERS = {"authorization": "Bearer sk-admin-bench"}
Get = Callable[[], Awaitable[object]]


async def loopback(stage: Stage) -> list[Line]:
    """The way a worker asks (caller, governor, client) against a bare loop on the same transport."""
    requests = stage.size(10_000, 300)
    settings = HttpSettings(connections_max=IN_FLIGHT)
    with process("-m", "bench.echo_server") as (_, ready):
        base = f"http://127.0.0.1:{int(ready)}"
        transport = AiohttpTransport(settings)
        async with HttpClient(settings) as client:
            governor = Governor(GovernorSettings(total=IN_FLIGHT, per_host=IN_FLIGHT), monotonic)
            provider = Provider("openai", base, Secret("sk-admin-bench"))

            def asking(number: int) -> Get:
                caller = CountingCaller(client, governor, provider, f"org-{number}", RetrySettings())
                return lambda: caller.get(PATH, PARAMS, HEADERS)

            url = build_url(base, PATH, PARAMS)

            async def bare() -> None:
                # A loop over many connections has another URL each time, so it is parsed each time here too.
                response = await transport.handle_async_request(httpx.Request("GET", url, headers=HEADERS))
                assert response.status_code == 200
                await response.aread()
                await response.aclose()

            rounds = await alternate(
                stage.size(9, 1), lambda: _rate(requests, asking), lambda: _rate(requests, lambda _: bare)
            )
        await transport.aclose()
    return [
        Line(
            f"polling over loopback, {IN_FLIGHT} in flight", rounds.ours, "requests/s", rounds.reference,
            "bare loop, same transport", rounds.ratio, Target("≥", 0.7),
        )
    ]  # fmt: skip


async def _rate(requests: int, maker: Callable[[int], Get]) -> float:
    left = requests

    async def ask(get: Get) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await get()

    began = perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(IN_FLIGHT):
            group.start_soon(ask, maker(number))
    return requests / (perf_counter() - began)


async def end_to_end(stage: Stage) -> list[Line]:
    """New connections read for the first time by `tallyd poll --all`, the simulator beside it; then once more."""
    count = stage.size(500, 10)
    lines = []
    async with stage.database() as url:
        with simulator() as sim:
            fleet = Fleet(stage, url, sim)
            await fleet.set_up(count, requests_per_hour=4)
            for name in ("new connections", "the same again"):
                done = await fleet.summary("poll", "--all")
                note = (
                    f"{done['requests']:,} requests, {done['rows']:,} rows in {fleet.took_s:.1f} s, start-up included"
                )
                rate = done["requests"] / fleet.took_s
                lines.append(Line(f"simulator to ledger, {count} {name}", rate, "requests/s", note=note))
    return lines
