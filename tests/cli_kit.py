"""The command line in this process, on a database of its own: what a script would get of each call."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog

from daemon.cli.main import main

KEY = base64.b64encode(b"k" * 32).decode()
ONE_AT_A_TIME = threading.Lock()
"""The environment, the folder and the standard streams are those of the whole process."""


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


def command(arguments: tuple[str, ...], environment: Mapping[str, str], folder: Path, stdin: str | None) -> Result:
    """One command with streams and an environment of its own. Commands start an event loop: call it in a thread that
    has none.

    Args:
        environment: these variables, and none of tallyd's beside them.
    """
    out, err = io.StringIO(), io.StringIO()
    with ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("TALLYD_") and name not in environment]:
            patch.delenv(name)
        for name, text in environment.items():
            patch.setenv(name, text)
        patch.chdir(folder)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode())))
        root = logging.getLogger()
        handlers, level, config = root.handlers[:], root.level, structlog.get_config()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = main(arguments)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            structlog.configure(**config)
    return Result(code, out.getvalue(), err.getvalue())


__all__ = ["KEY", "Result", "Tallyd", "command", "commands"]
