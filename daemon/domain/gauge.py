"""A figure as it stands now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value for each tuple of label values. None leaves a value out: what is unknown is not 0."""

    name: str
    help: str
    labels: Sequence[str]
    values: Sequence[tuple[tuple[str, ...], float | None]]
