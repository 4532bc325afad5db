"""What a figure reports, and the one table that all of them end up in."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil  # type: ignore[import-untyped]  # it has no types
from rich.console import Console
from rich.table import Table

from daemon import __version__

LIBRARIES = ("asyncpg", "aiohttp", "httpx", "msgspec", "anyio", "uvloop", "pgqueuer", "genai-prices")


@dataclass(frozen=True, slots=True)
class Target:
    """`of` names what is judged: our value, or its ratio to the reference."""

    op: Literal["≤", "≥"]
    bound: float
    of: Literal["ours", "ratio"] = "ratio"

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.op == "≤" else value >= self.bound


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        ours, reference: medians of their rounds, in `unit`.
        ratio: the median of the rounds' ratios where there were rounds, since neighbours in time share their noise.
        target: None for what is told as information.
    """

    figure: str
    ours: float
    unit: str
    reference: float | None = None
    reference_name: str = ""
    ratio: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.target is None:
            return None
        judged = self.ours if self.target.of == "ours" else self.ratio
        assert judged is not None, self.figure
        return self.target.is_met(judged)

    def as_json(self) -> dict[str, Any]:
        target = None if self.target is None else f"{self.target.op} {self.target.bound:g} ({self.target.of})"
        return {
            "figure": self.figure,
            "ours": self.ours,
            "unit": self.unit,
            "reference": self.reference,
            "reference_name": self.reference_name,
            "ratio": self.ratio,
            "target": target,
            "is_met": self.is_met,
            "note": self.note,
        }


def machine() -> dict[str, str]:
    """Where this was measured, and with what."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": platform.platform(),
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "tallyd": __version__,
        "libraries": ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def print_table(facts: dict[str, str], lines: Sequence[Line]) -> None:
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    for name, value in facts.items():
        console.print(f"{name:10} {value}")
    table = Table("figure", "ours", "reference", "ratio", "target", "met", box=None, pad_edge=False)
    for line in lines:
        table.add_row(
            line.figure + (f"\n  [dim]{line.note}[/dim]" if line.note else ""),
            f"{_number(line.ours)} {line.unit}",
            "" if line.reference is None else f"{_number(line.reference)} {line.unit} ({line.reference_name})",
            "" if line.ratio is None else f"{line.ratio:.2f}",
            _target(line),
            {True: "yes", False: "[bold]NO[/bold]", None: "-"}[line.is_met],
        )
    console.print(table)


def _target(line: Line) -> str:
    if line.target is None:
        return ""
    unit = "x" if line.target.of == "ratio" else f" {line.unit}"
    return f"{line.target.op} {line.target.bound:g}{unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
