"""The commands of the live views and `trace`, on a terminal and without."""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from daemon.cli.main import main
from tests.conftest import run_sql
from tests.tick_kit import TICK


@pytest.fixture
def database(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALLYD_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYD_SECRET_KEY", base64.b64encode(b"k" * 32).decode())
    run_sql(database_url, TICK, "insert into worker (info) values (E'tallyd\\x1b[2J on alpha')")
    return database_url


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return code, *capsys.readouterr()


def words(line: str) -> list[str]:
    return line.split()


def printed_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = printed(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_status_json_only_gains_keys(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed_json(capsys, "status")
    assert list(found) == [
        "now", "tenants", "connections", "parked_sources", "dead_letters", "unpriced_rows", "lag_s", "due", "replicas",
        "queue", "ticks", "handovers", "qstash_paused_s",
    ]  # fmt: skip
    assert found["ticks"] == [
        {
            "slot_at": "2026-11-20T10:00:00Z",
            "created_at": "2026-11-20T10:00:01Z",
            "connections": 9,
            "batches": 2,
            "batches_done": 1,
            "finished_at": None,
            "via": "qstash",
            "request_id": "req-1",
            "deadline_at": "2026-11-20T10:05:01Z",
            "done_in_time": 1,
            "expected": 2,
            "done": 1,
            "complete": False,
        }
    ]
    assert found["handovers"] == [
        {
            "slot_at": "2026-11-20T10:00:00Z", "batches": 2, "published": 1, "delivery": 1, "failure": 0, "refusal": 0,
            "waiting": 0, "deadline": 1,
        }
    ]  # fmt: skip


def test_status_shows_ticks_hand_over_and_pause(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(database, "insert into pause values ('qstash', '', now() + interval '3 hours 1 second', E'spent\\x07')")
    code, out, _ = printed(capsys, "status")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert words("2026-11-20 10:00:00 qstash 9 1/2 1/2 10:05:01 - no") in lines
    assert words("2026-11-20 10:00:00 2 1 1 0 0 0 1") in lines
    assert words("QStash paused for another 3 h 00 min: spent\\x07") in lines


def test_top_prints_one_frame_where_there_is_no_terminal(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "top", "--once")
    assert code == 0
    assert "tallyd\\x1b[2J on alpha" in out
    assert "\x1b" not in out
    found = printed_json(capsys, "top")
    assert list(found) == [
        "now", "replicas", "running", "running_total", "queue", "kinds", "minutes", "settled_for_s", "failures",
    ]  # fmt: skip
    assert [(job["id"], job["connections"], job["tenant"]) for job in found["running"]] == [(12, 1, None)]
    assert found["queue"]["running"] == 1
    assert [(f["job"], f["outcome"]) for f in found["failures"]] == [(11, "retry")]


@pytest.mark.parametrize("what", ["req-1", "11", "2026-11-20T10:00:00Z", "2026-11-20T11:00:00+01:00", "seq:6", "msg-2"])
def test_trace_takes_every_form(database: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    found = printed_json(capsys, "trace", what)
    assert found["tick"]["request_id"] == "req-1"
    assert next(b["sums"] for b in found["bookings"] if b["source"] == "costs") == [
        {"currency": "EUR", "basis": "provider", "amount": "7"},
        {"currency": "USD", "basis": "local", "amount": "0.5"},
        {"currency": "USD", "basis": "provider", "amount": "-1"},
    ]


def test_request_id_may_look_like_a_job_id(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_sql(database, "update tick set request_id = '4711'")
    assert printed_json(capsys, "trace", "4711")["jobs_total"] == 3


@pytest.mark.parametrize(
    "what", ["nope", "99", "seq:99", "seq:x", "seq:", "2026-11-20T10:05:00Z", "2026-11-20T10:00", "9" * 30, "é", "a\nb"]
)
def test_unknown_id_is_refused_with_the_forms(database: str, capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, err = printed(capsys, "trace", what)
    assert (code, out) == (2, "")
    assert err.startswith("error: ID: nothing is known of ")
    assert all(form in err for form in ("a request id", "a job id", "2026-11-22T10:00:00Z", "seq:N"))


def test_trace_shows_the_road_and_says_what_is_cut(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, "trace", "req-1")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert words("tick 2026-11-20 10:00:00 UTC via qstash, made 10:00:01") in lines
    assert words("batches 1 of 2 done, 1 by 10:05:01: incomplete") in lines
    assert words("11 1 10:00:02 10:00:03 delivery 10:00:04 200 m-11") in lines
    assert words("12 2 - - deadline - - -") in lines
    booked = "acme/main costs 6 11 10:00:07 1 1 0 7 EUR provider; 0.5 USD local; -1 USD provider"
    assert words(booked) in lines
    code, _, err = printed(capsys, "trace", "req-1", "--limit", "1")
    assert (code, err.splitlines()) == (
        0,
        [
            "note: 1 of 4 jobs are shown; --limit shows more",
            "note: 1 of 2 reads of these are shown; --limit shows more",
        ],
    )


@contextmanager
def on_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environ
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What comes until `wanted` has come; the suite's time-out ends waiting in vain."""
    seen = b""
    with suppress(OSError):  # the other side is closed
        while wanted not in seen and (more := os.read(terminal, 65_536)):
            seen += more
    assert wanted in seen, seen
    return seen


@pytest.mark.parametrize(
    ("arguments", "shown", "end"),
    [(("top",), b"REPLICA", "q"), (("status", "--watch"), b"complete", "signal"), (("top",), b"REPLICA", "ctrl-c")],
)
def test_live_view_ends_well_and_gives_the_terminal_back(
    database: str, arguments: tuple[str, ...], shown: bytes, end: str
) -> None:
    with on_a_terminal(*arguments, "--every", "0.2") as (process, terminal):
        seen = read_until(terminal, shown)
        assert b"\x1b[?1049h" in seen
        match end:
            case "q":
                os.write(terminal, b"q")
            case "signal":
                process.send_signal(signal.SIGTERM)
            case _:
                process.send_signal(signal.SIGINT)
        read_until(terminal, b"\x1b[?1049l")
        if arguments[0] == "status":
            read_until(terminal, b"complete")  # the last frame stays
        assert process.wait() == 0
