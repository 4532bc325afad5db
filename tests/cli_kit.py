"""The command line in this process, on a database of its own: what a script would get of each call."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog

from daemon.cli.main import main

KEY = base64.b64encode(b"k" * 32).decode()


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tallyd = Callable[..., Result]


@contextmanager
def commands(
    database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Tallyd]:
    """Runs commands in `folder`, and leaves logging as it was."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TALLYD_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYD_SECRET_KEY", KEY)
    root = logging.getLogger()
    before = root.handlers[:], root.level

    def run(*arguments: str) -> Result:
        return Result(main(arguments), *capsys.readouterr())

    yield run
    root.handlers[:], root.level = before
    structlog.reset_defaults()


__all__ = ["KEY", "Result", "Tallyd", "commands"]
