"""How long commands take from exec to exit, against an interpreter that does nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from time import perf_counter

import anyio.to_thread

from bench.fleet import script
from bench.report import Line, Target
from bench.stage import Stage, alternate

COMMANDS = (
    (("--version",), 0.4),
    (("--help",), 0.4),
    (("usage", "--since", "2026-11-01", "--until", "2026-11-02", "--json"), 1.2),
)


async def commands(stage: Stage) -> list[Line]:
    """`usage` finds the embedded server running, as after `tallyd db start`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TALLYD_")}
    env["TALLYD_DATA_DIR"] = str(stage.folder / "start")
    tallyd = str(script("tallyd"))

    async def took(*arguments: str) -> float:
        began = perf_counter()
        await anyio.to_thread.run_sync(
            lambda: subprocess.run(arguments, env=env, check=True, stdout=subprocess.DEVNULL)
        )
        return perf_counter() - began

    lines = []
    await took(tallyd, "db", "start")
    try:
        for arguments, bound in COMMANDS:
            await took(tallyd, *arguments)  # compiles, migrates
            rounds = await alternate(
                stage.size(15, 1), partial(took, tallyd, *arguments), partial(took, sys.executable, "-c", "pass")
            )
            lines.append(
                Line(
                    f"tallyd {arguments[0]}", rounds.ours, "s", rounds.reference, "python -c pass", rounds.ratio,
                    Target("≤", bound, "ours"),
                )
            )  # fmt: skip
    finally:
        await took(tallyd, "db", "stop")
    return lines
