"""`python -m bench [NAME ...] [--quick] [--json]`: run figures and print one table. Exit code 3: a target was missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import anyio
import msgspec

from bench import (
    alarms,
    booking,
    bulk,
    claims,
    delivery,
    drain,
    gatekeeping,
    goodbye,
    idle,
    memory,
    multitude,
    polling,
    publish,
    punctuality,
    push,
    quotas,
    replicas,
    rescue,
    resources,
    startup,
    tick,
)
from bench.report import Line, machine, print_table
from bench.stage import Stage, has_uvloop, server
from daemon.telemetry.logs import configure

Figure = Callable[[Stage], Awaitable[Sequence[Line]]]

FIGURES: Mapping[str, Figure] = {
    "tick": tick.orchestrate_tick,
    "settle": booking.settle_in_sql,
    "road": booking.bytes_to_commit,
    "unchanged": booking.unchanged_again,
    "drain": drain.throughput,
    "pickup": claims.pickup,
    "flat": claims.flatness,
    "fair": claims.fairness,
    "polling": polling.loopback,
    "simulator": polling.end_to_end,
    "startup": startup.commands,
    "memory": memory.one_large_tick,
    "growth": memory.many_ticks,
    "rescue": rescue.lost_replica,
    "delivery": delivery.deliveries,
    "replicas": replicas.one_tick,
    "idle": idle.nothing_due,
    "goodbye": goodbye.under_load,
    "publish": publish.accepted,
    "push": push.deliver,
    "delays": punctuality.delays,
    "waiting": multitude.flatness,
    "schedules": alarms.schedules,
    "bodies": bulk.in_flight,
    "gates": gatekeeping.one_by_one,
    "quotas": quotas.one_million,
    "resources": resources.two_steps,
}


async def _run(names: Sequence[str], *, is_quick: bool, is_json: bool) -> bool:
    lines: list[Line] = []
    facts = machine()
    with server() as (url, folder):
        stage = Stage(url, folder, is_quick)
        facts["postgres"] = ", ".join(f"{name} {value}" for name, value in (await stage.settings()).items())
        try:
            for name in names:
                began = perf_counter()
                lines += await FIGURES[name](stage)
                print(f"{name}: {perf_counter() - began:.1f} s", file=sys.stderr)
        finally:
            await stage.drop_templates()
    if is_quick:
        lines = [replace(line, target=None) for line in lines]  # tiny sizes are judged by nothing
    facts["load at the end"] = machine()["load"]
    if is_json:
        print(msgspec.json.encode({"machine": facts, "figures": [line.as_json() for line in lines]}).decode())
    else:
        print_table(facts, lines)
    return all(line.is_met is not False for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(FIGURES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all? The numbers mean nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    if unknown := set(options.names) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    configure(level="warning")
    names = options.names or list(FIGURES)

    async def run() -> bool:
        return await _run(names, is_quick=options.quick, is_json=options.json)

    is_met = anyio.run(run, backend_options={"use_uvloop": has_uvloop()})
    return 0 if is_met else 3


if __name__ == "__main__":
    sys.exit(main())
