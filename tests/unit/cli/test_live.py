"""The live views, without a terminal and without a database: what a frame shows, and that following outlives an absence."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime

import anyio
import pytest
from rich.console import Console

from daemon.app import Activity, QueueStats
from daemon.cli.live import Away, draw_top, follow, framed, section, share, span
from daemon.cli.main import main
from daemon.db.activity import Failure, KindCount, Minute, Replica, RunningJob
from daemon.domain.errors import PermanentError, StorageUnavailableError

NOW = datetime(2026, 11, 26, 14, 38, 19, tzinfo=UTC)
QUIET = QueueStats(0, 0, 0, 0, 0, 0, None, None)


def activity(**changed: object) -> Activity:
    return replace(Activity(NOW, (), (), 0, (), tuple(Minute(ago, {}) for ago in range(15)), 900.0, ()), **changed)


def running(number: int) -> RunningJob:
    return RunningJob(number, "poll", None, 1, 1, 2.0, datetime(2026, 11, 26, 14, 35, tzinfo=UTC), 100, None)


def text(what: object, width: int = 80, height: int = 24) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, height=height, force_terminal=True, color_system=None).print(what)
    return stream.getvalue()


# ── Following ───────────────────────────────────────────────────────────────────────────────────


class Stop(Exception):  # noqa: N818
    pass


@pytest.mark.anyio
async def test_following_outlives_an_absence_and_says_since_when() -> None:
    """The last good answer stays in view; how long it is old is told by the clock, not by counting."""
    answers = iter(["first", StorageUnavailableError("database: gone"), TimeoutError(), "second"])
    instants = iter([100.0, 101.0, 104.0, 109.5, 120.0])
    shown: list[tuple[str | None, Away | None]] = []
    pauses = 0

    async def read() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def pause() -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 4:
            raise Stop

    with pytest.raises(Stop):
        await follow(read, lambda found, away: shown.append((found, away)), pause, lambda: next(instants))
    assert shown == [
        ("first", None),
        ("first", Away(3.0, "database: gone")),
        ("first", Away(8.5, "database: no answer in time")),
        ("second", None),
    ]


@pytest.mark.anyio
async def test_absence_at_the_first_look_is_shown_too() -> None:
    shown: list[object] = []

    async def read() -> str:
        raise StorageUnavailableError("database: gone")

    async def pause() -> None:
        raise Stop

    with pytest.raises(Stop):
        await follow(read, lambda found, away: shown.append((found, away)), pause, iter([1.0, 3.0]).__next__)
    assert shown == [(None, Away(2.0, "database: gone"))]


@pytest.mark.anyio
async def test_following_ends_with_an_error_that_waiting_cannot_mend() -> None:
    async def read() -> str:
        raise PermanentError("no such table")

    with pytest.raises(PermanentError):
        await follow(read, lambda *_: None, anyio.lowlevel.checkpoint)


def test_absence_is_told_above_what_was_found_last() -> None:
    frame = framed(
        lambda found, width, height: f"{found} {width}x{height}",
        "as it was",
        Away(75, "database:\x1b[2J gone"),
        80,
        24,
        title="tallyd top",
    )
    assert text(frame).splitlines() == [
        " tallyd top: no answer for 75 s: database:\\x1b[2J gone; trying on ",
        "as it was 80x23",
    ]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["top"], "top"), (["status", "--watch"], "--watch"), (["status", "--watch", "--json"], "--watch")],
)
def test_without_a_terminal_following_is_refused_with_the_way_out(
    arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is opened: no database is there in this test."""
    assert main(["--database-url", "postgresql://nobody@127.0.0.1:1/nothing", *arguments]) == 2
    problem = capsys.readouterr().err
    assert problem.startswith(f"error: {field}: ")
    assert "--json" in problem


# ── Frames ──────────────────────────────────────────────────────────────────────────────────────


BUSY = activity(
    replicas=(
        Replica(1, "tallyd 0.1.0 all on alpha pid 1", 0.4, 7_500, 3, {"done": 120, "retry": 1}),
        Replica(2, "tallyd 0.1.0 all on beta pid 1", 47.0, 90, 0, {}),
    ),
    running=tuple(running(number) for number in range(41, 71)),
    running_total=500,
    kinds=(KindCount("poll", "available", 12, is_cut=False), KindCount("poll", "discarded", 10_000, is_cut=True)),
    minutes=(Minute(0, {"done": 120, "retry": 1}), Minute(4, {"done": 5, "snooze": 2}), Minute(5, {"dead": 9})),
    failures=(Failure(NOW, 77, "poll_one", 2, "retry", 1, 12, "HTTP 503\x1b[31m\nfrom the provider"),),
)
BUSY_QUEUE = QueueStats(12, 0, 0, 0, 500, 7, 3.2, 2.0)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (140, 12), (200, 100), (70, 12)])
def test_frame_fits_its_terminal(width: int, height: int) -> None:
    lines = text(draw_top((BUSY, BUSY_QUEUE), width, height), width, height).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    for name in ("REPLICA", "RUNNING", "QUEUE", "SETTLED", "FAILURE"):
        assert any(name in line for line in lines), name


@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40)])
def test_jobs_that_a_limit_holds_have_a_column_of_their_own(width: int, height: int) -> None:
    assert "pending" not in text(draw_top((BUSY, BUSY_QUEUE), width, height), width, height)
    held = replace(BUSY, kinds=(*BUSY.kinds, KindCount("push", "pending", 9_999, is_cut=False)))
    lines = text(draw_top((held, BUSY_QUEUE), width, height), width, height).splitlines()
    assert all(len(line) <= width for line in lines)
    assert any("pending" in line for line in lines)
    assert any("push" in line and "9,999" in line for line in lines)


def test_narrow_frame_shows_what_happens_and_what_is_left_out() -> None:
    shown = text(draw_top((BUSY, BUSY_QUEUE), 80, 24))
    for part in (
        "14:38:19 UTC  1 replica, 500 running, 7 dead, 12 waiting for 3.2 s",
        "120 done, 1 retry",
        "47 s",
        "2 h 05 min",
        "slot 14:35:00, 100 connections",
        "system",
        "10,000+",
    ):
        assert part in shown, part
    told = sum("slot 14:35:00" in line for line in shown.splitlines())
    assert f"... and {500 - told} more" in shown


def test_control_characters_of_a_note_do_not_reach_the_terminal() -> None:
    for height in (24, None):
        shown = text(draw_top((BUSY, BUSY_QUEUE), 140, height), 140)
        assert "HTTP 503\\x1b[31m\\x0afrom the provider" in shown
        assert "\x1b[31m" not in shown


def settled_lines(found: Activity) -> dict[str, list[str]]:
    lines = text(draw_top((found, QUIET), 200, None), 200).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("SETTLED"))
    rows = [line.split() for line in lines[start + 1 : start + 4] if line.startswith("last")]
    return {" ".join(row[:3]): row[3:] for row in rows}


def test_throughput_sums_the_minutes_of_each_window() -> None:
    """done, retry, dead, worker lost, then what else there was; and all of them a second."""
    assert settled_lines(BUSY) == {
        "last 1 min": ["120", "1", "0", "0", "0", "2.0"],
        "last 5 min": ["125", "1", "0", "0", "2", "0.4"],
        "last 15 min": ["125", "1", "9", "0", "2", "0.2"],
    }


def test_throughput_names_the_shorter_time_that_the_log_was_read_for() -> None:
    cut = activity(minutes=(Minute(0, {"done": 600}), Minute(1, {"done": 300})), settled_for_s=90.0)
    assert settled_lines(cut) == {
        "last 1 min": ["600", "0", "0", "0", "10.0"],
        "last 90 s": ["900", "0", "0", "0", "10.0"],
    }


def test_quiet_frame_says_so() -> None:
    shown = text(draw_top((activity(), QUIET), 80, 24))
    assert "0 replicas, 0 running, 0 dead, 0 waiting" in shown
    assert shown.count("\nnone") == 4


def test_section_without_lines_left_still_says_how_many() -> None:
    rows = [[n, "x"] for n in range(5)]
    assert text(section(("n", "what"), rows, empty="none", lines=1)).split() == ["n", "what", "...", "and", "5", "more"]
    assert "more" not in text(section(("n", "what"), rows, empty="none", lines=5))


@pytest.mark.parametrize(
    ("lines", "wanted", "given"),
    [
        (10, [2, 3], [2, 3]),
        (4, [9, 1, 9], [2, 1, 1]),
        (9, [9, 1, 3], [5, 1, 3]),
        (1, [5, 5], [1, 1]),
        (3, [0, 9], [0, 3]),
    ],
)
def test_lines_are_shared_in_turn(lines: int, wanted: list[int], given: list[int]) -> None:
    assert share(lines, wanted) == given


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-1, "0.0 s"),
        (9.96, "10.0 s"),
        (10, "10 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7_199, "119 min"),
        (7_200, "2 h 00 min"),
        (172_800, "2 d 0 h"),
    ],
)
def test_spans_read_well(seconds: float, told: str) -> None:
    assert span(seconds) == told
