"""`python -m daemon.simulator [--host 127.0.0.1] [--port 0] [--seed 1] [--now 2026-11-22T10:00:00Z] [--frozen]`."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import msgspec

from daemon.domain.window import parse_rfc3339
from daemon.simulator.server import Simulator, serve
from daemon.simulator.world import Clock, World


async def _run(host: str, port: int, simulator: Simulator) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server, connections = await serve(simulator, host, port)
    listening = server.sockets[0].getsockname()[1]
    line = msgspec.json.encode({"url": f"http://{host}:{listening}", "pid": os.getpid()})
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()
    for connection in list(connections):
        connection.transport.abort()
    await server.wait_closed()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m daemon.simulator", description="Simulated AI providers.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--now", type=parse_rfc3339, default=None, help="RFC 3339; where the clock starts")
    parser.add_argument("--frozen", action="store_true", help="the clock moves only by POST /_sim/advance")
    options = parser.parse_args()
    simulator = Simulator(World(options.seed, Clock(options.now, frozen=options.frozen)))
    if sys.platform == "win32":
        asyncio.run(_run(options.host, options.port, simulator))
    else:
        import uvloop  # noqa: PLC0415  # not there on Windows

        uvloop.run(_run(options.host, options.port, simulator))


if __name__ == "__main__":
    main()
