"""Booking changed and unchanged rows: 100 connections with 50 rows each.

Every round takes fresh hours and books them twice: as new rows, and again with every number changed. The reference is
one `insert ... select from unnest ... on conflict do update` of the same rows into a table of the same shape.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from bench.books import ROWS, Books, open_books
from bench.report import Line, Target
from bench.stage import Stage, summarise
from daemon.domain.window import Window
from daemon.sinks.ledger import Effect

ROUNDS = 12
Ours = Callable[[Books, Window, int, Effect], Awaitable[float]]


async def settle_in_sql(stage: Stage) -> list[Line]:
    """One flush of ready pieces: fences, comparison, rows, ledger, buckets, cursors, summary, settling."""

    async def settle(books: Books, window: Window, edition: int, expected: Effect) -> float:
        return await books.settle(await books.pieces(books.answers(window, edition), window), window, expected)

    return await _against_upsert(stage, "settle in SQL", settle, Target("≥", 0.5))


async def bytes_to_commit(stage: Stage) -> list[Line]:
    """The whole way of the same rows: parse, key, hash, price, settle."""

    async def go(books: Books, window: Window, edition: int, expected: Effect) -> float:
        return await books.whole_way(books.answers(window, edition), window, expected)

    return await _against_upsert(stage, "bytes to commit", go, Target("≥", 0.25))


async def unchanged_again(stage: Stage) -> list[Line]:
    """The same rows read again, when nothing changed, against the rate at which changed ones are booked."""
    settled: list[tuple[float, float]] = []
    probed: list[tuple[float, float]] = []
    grouped: list[tuple[float, float]] = []
    async with open_books(stage) as books:
        for _ in range(stage.size(ROUNDS, 2) + 1):
            window = books.fresh_window()
            answers = books.answers(window, 2)
            await books.settle(await books.pieces(books.answers(window, 1), window), window, _new(books))
            changed_whole = await books.whole_way(answers, window, _restated(books))
            changed = await books.settle(await books.pieces(books.answers(window, 3), window), window, _restated(books))
            answers = books.answers(window, 3)
            settled.append((await books.settle(await books.pieces(answers, window), window, Effect()), changed))
            grouped.append((await books.whole_way(answers, window, Effect()), changed_whole))
            probed.append((await books.probe_again(window, 3), changed_whole))
        await books.check()
    name = f"unchanged, {books.rows:,} rows again"
    return [
        Line(f"{name}: settle", *_shown(settled, "changed, settle"), Target("≥", 10)),
        Line(f"{name}: probe to commit", *_shown(probed, "changed, bytes to commit"), Target("≥", 10)),
        Line(
            f"{name}: grouped bytes to commit",
            *_shown(grouped, "changed, bytes to commit"),
            note="only where a probe is not possible, or a ladder read is due",
        ),
    ]


async def _against_upsert(stage: Stage, name: str, ours: Ours, target: Target) -> list[Line]:
    new: list[tuple[float, float]] = []
    again: list[tuple[float, float]] = []
    async with open_books(stage) as books:
        for number in range(stage.size(ROUNDS, 2) + 1):
            window = books.fresh_window()
            for pairs, edition, expected in ((new, 1, _new(books)), (again, 2, _restated(books))):
                pieces = await books.pieces(books.answers(window, edition), window)
                if number % 2:
                    theirs = await books.upsert(pieces)
                    mine = await ours(books, window, edition, expected)
                else:
                    mine = await ours(books, window, edition, expected)
                    theirs = await books.upsert(pieces)
                pairs.append((mine, theirs))
        await books.check()
    shape = f"{len(books.accounts)} x {ROWS}"
    return [
        Line(f"{name}, {shape} new rows", *_shown(new, "bare upsert"), target),
        Line(f"{name}, {shape} restated rows", *_shown(again, "bare upsert"), target),
    ]


def _shown(pairs: list[tuple[float, float]], reference: str) -> tuple[float, str, float, str, float]:
    ours, theirs, ratio = summarise(pairs[1:])  # the first round prepares statements and fills caches
    return ours, "rows/s", theirs, reference, ratio


def _new(books: Books) -> Effect:
    return Effect(new=books.rows)


def _restated(books: Books) -> Effect:
    return Effect(restated=books.rows, restated_closed=books.rows)
