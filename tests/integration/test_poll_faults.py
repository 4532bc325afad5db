"""Answers that break: what heals by itself, what waits for a person, and that neither holds up anyone else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest

from daemon.app import NewConnection
from daemon.domain.connection import Secret
from daemon.domain.errors import CredentialError
from daemon.domain.job import JobId
from daemon.domain.ports import Answer
from daemon.simulator.faults import ALL_TRANSIENT
from tests.books_kit import Books, credential, midnight, open_books, simulator_here, with_deps

pytestmark = pytest.mark.anyio

COMPLETIONS = "/usage/completions"
TRANSIENT = (*ALL_TRANSIENT, "408", "529")
POISON = ("repeat_cursor", "has_more_without_cursor", "not_json")
FOREVER = 1_000


@pytest.fixture
async def books(database_url: str) -> AsyncIterator[Books]:
    async with simulator_here() as sim, open_books(database_url, sim) as opened:
        yield opened


async def heal(books: Books) -> None:
    await books.sim.control("DELETE", "faults")
    await books.forget_pauses()


# ── Tier 1 and 2: transient ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", TRANSIENT)
async def test_one_transient_fault_is_ridden_out_within_the_job(books: Books, kind: str) -> None:
    name = "a" if kind == "529" else "o"
    await books.add(name, "anthropic" if kind == "529" else "openai")
    await books.fault(name, kind, retry_after_s=0, hold_s=0.6, drip_s=0.001)
    summary = await books.poll()
    assert (summary.retried, summary.dead) == (0, 0)
    await books.assert_equal()


@pytest.mark.parametrize("kind", ["500", "timeout", "truncated_body", "reset_after_headers", "502", "503"])
async def test_what_outlives_tier_one_waits_alone_and_once(books: Books, kind: str) -> None:
    """Rule of schedule 11: ticks during an outage add no chain of retries; and 99 good sub-jobs do not wait."""
    await books.add("ill")
    await books.add("well")
    await books.add("other", "anthropic")
    await books.fault(
        "ill", kind, count=FOREVER, path_contains=COMPLETIONS, retry_after="seconds", retry_after_s=0, hold_s=0.6
    )
    first = await books.tick()
    assert (first.connections, first.retried, first.dead) == (3, 1, 0)
    await books.assert_equal("well", "other")
    await books.assert_equal("ill", but=["completions"])
    stream = await books.stream("ill", "completions")
    assert (stream["covered_to"], stream["last_seq"], stream["read_at"]) == (None, 0, None)
    for _ in range(3):
        await books.forget_pauses()
        assert (await books.tick()).retried == 0
    assert [row["kind"] for row in await books.db.fetch("select kind from job")] == ["poll_one"]
    await heal(books)
    await books.run_queue()
    await books.assert_equal()
    assert (await books.stream("ill", "completions"))["open_job"] is None


async def test_the_retry_queue_ends_in_one_dead_letter(books: Books) -> None:
    await books.add("ill")
    await books.fault("ill", "500", count=FOREVER, path_contains=COMPLETIONS)
    await books.tick()
    (letter,) = [row["id"] for row in await books.db.fetch("select id from job")]
    for _ in range(5):
        await books.forget_pauses()
        assert not await books.count("dead")
        await books.db.execute("update due set run_at = now()")
        await books.app.jobs.promote()
        await run_one(books)
    assert [row["id"] for row in await books.db.fetch("select id from dead")] == [letter]
    detail = await books.app.queue.dead_show(JobId(letter))
    assert detail is not None
    assert [attempt.attempt for attempt in detail.attempts] == [1, 2, 3, 4, 5]
    assert all("500" in (attempt.note or "") for attempt in detail.attempts)
    await heal(books)
    assert await books.app.queue.dead_replay([JobId(letter)]) == {letter}
    await books.run_queue()
    await books.assert_equal()
    assert not await books.count("job")


async def run_one(books: Books) -> None:
    """Claim and run what is ready, once."""
    from daemon.worker.local import LocalWorker

    async def claim(worker: object) -> object:
        return (await books.app.jobs.claim(worker, 10)).jobs  # type: ignore[arg-type]

    await LocalWorker(books.app.jobs, books.app.run_job, 4).run(claim)  # type: ignore[arg-type]


async def test_a_polite_pause_is_kept_and_told_to_the_others(books: Books) -> None:
    """A Retry-After beyond the sub-job's budget goes to the retry queue and into the shared pauses."""
    await books.add("ill")
    await books.add("well")
    await books.fault("ill", "429", retry_after_s=90, path_contains=COMPLETIONS)
    summary = await books.tick()
    assert summary.dead == 0
    assert summary.retried == 13, "the organisation is paused, so every source of it waits"
    assert await books.db.fetchval("select count(*) from due where run_at > now() + interval '80 seconds'") == 13
    assert await books.db.fetchval("select count(*) from pause where until > now() + interval '80 seconds'") == 1
    await books.assert_equal("well")


# ── Tier 3: poison ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", POISON)
async def test_a_poisoned_answer_books_nothing_and_holds_up_nobody(books: Books, kind: str) -> None:
    for n in range(5):
        await books.add(f"well-{n}", "openai" if n % 2 else "anthropic")
    await books.add("ill")
    await books.fault("ill", kind, count=FOREVER, path_contains=COMPLETIONS)
    first = await books.tick()
    assert (first.connections, first.retried, first.dead) == (6, 0, 1)
    await books.assert_equal(*(f"well-{n}" for n in range(5)))
    await books.assert_equal("ill", but=["completions"])
    stream = await books.stream("ill", "completions")
    assert (stream["covered_to"], stream["covered_from"], stream["last_seq"]) == (None, None, 0)
    assert not await books.db.fetchval("select count(*) from usage_row where stream_id = $1", stream["id"])

    for _ in range(3):
        await books.tick()
    assert not await books.count("due")
    (letter,) = await books.db.fetch("select d.id, d.attempt, d.reason, j.body from dead d join job j using (id)")
    assert letter["reason"]
    body = msgspec.json.decode(letter["body"])
    assert (body["connections"], body["source"]) == ([books.ids["ill"]], "completions")

    await heal(books)
    await books.app.queue.dead_replay([JobId(letter["id"])])
    await books.run_queue()
    await books.assert_equal()
    assert not await books.count("dead")


@pytest.mark.parametrize("kind", POISON)
async def test_poison_after_good_reads_moves_no_cursor(books: Books, kind: str) -> None:
    await books.add("ill")
    await books.poll()
    await books.sim.grow("openai", "ill", 40)
    before = await books.stream("ill", "completions")
    await books.fault("ill", kind, count=FOREVER, path_contains=COMPLETIONS, query_contains="group_by")
    assert (await books.poll()).dead == 1
    after = await books.stream("ill", "completions")
    unmoved = ("covered_from", "covered_to", "last_seq", "last_start", "last_end", "probe_digest", "read_at")
    assert {name: after[name] for name in unmoved} == {name: before[name] for name in unmoved}
    await heal(books)
    assert (await books.poll()).dead == 0
    await books.assert_equal()


async def test_a_cursor_past_the_end_is_the_end(books: Books) -> None:
    """Seen live on costs: cursors for ever after the last bucket."""
    await books.add("odd")
    await books.fault("odd", "empty_past_end", count=FOREVER)
    assert (await books.poll()).dead == 0
    await books.assert_equal()


async def test_a_field_of_another_name_is_drift_with_its_evidence(books: Books) -> None:
    await books.add("ill", "anthropic")
    await books.fault("ill", "result_field", count=FOREVER, path_contains="usage_report")
    assert (await books.tick()).dead == 1
    reason = await books.db.fetchval("select reason from dead")
    assert "results" in reason
    assert "starting_at" in reason, "the first bytes of the answer are kept"
    assert credential("anthropic", "ill") not in reason


async def test_a_chain_cut_short_never_zeroes_what_is_booked(books: Books) -> None:
    """A first page that says it is the last one: its answer is a 200, and only the second witness shows the loss."""
    await books.add("cut", "anthropic", row_cap=40, requests_per_hour=3, models=["claude-haiku-4-5-20251001"], keys=1)
    await books.poll()
    await books.assert_equal()
    rows = await books.count("ledger")
    await books.fault("cut", "truncated_chain", path_contains="usage_report", query_contains="group_by")
    await books.poll(full=True)
    assert await books.count("ledger") == rows
    await books.poll(full=True)
    await books.assert_equal()
    assert not await books.db.fetchval("select count(*) from bucket where pending_since is not null")


async def test_hostile_text_goes_to_the_dead_letters_alone(books: Books) -> None:
    for name in ("before", "ill", "after"):
        await books.add(name)
    edit = await books.play("ill", "hostile_text")
    summary = await books.tick()
    assert summary.connections == 3
    assert summary.dead >= 1
    await books.assert_equal("before", "after")
    dead = {row["source"] for row in await books.db.fetch("select s.source from stream s where s.dead_job is not null")}
    assert dead == {"completions", "costs"}, "the bill names the model too"
    await books.assert_equal("ill", but=dead)
    assert edit["edit"]
    await books.play("ill", "restore")
    letters = [JobId(row["id"]) for row in await books.db.fetch("select id from dead")]
    await books.app.queue.dead_replay(letters)
    await books.run_queue()
    await books.assert_equal()


# ── Refusals ────────────────────────────────────────────────────────────────────────────────────


async def test_a_revoked_key_parks_the_connection_until_it_works_again(books: Books) -> None:
    await books.add("revoked")
    await books.add("well")
    await books.poll()
    await books.sim.grow("openai", "revoked", 10)
    await books.sim.grow("openai", "well", 10)
    await books.fault("revoked", "401", path_contains=COMPLETIONS)
    await books.tick()
    assert (await books.state("revoked"), await books.state("well")) == ("parked", "active")
    await books.poll("well")
    await books.assert_equal("well")
    assert not await books.count("dead"), "a key is a person's business, not a dead letter's"
    assert (await books.tick()).connections == 1, "a parked connection is not asked for"
    await books.poll("revoked")
    assert await books.state("revoked") == "active"
    await books.assert_equal()


async def test_a_key_that_is_refused_again_stays_parked(books: Books) -> None:
    """Some answers before the 401 do not free what the 401 parks."""
    await books.add("main")
    await books.db.execute("update connection set state = 'parked', state_reason = 'revoked'")
    await books.fault("main", "401", skip=1, count=FOREVER)
    await books.poll()
    (found,) = await books.app.connections.list()
    assert found.state == "parked"
    assert "401" in (found.state_reason or "")


class KeySetMeanwhile:
    """The door out; the credential is set anew before the first answer."""

    def __init__(self, books: Books, error: CredentialError | None) -> None:
        self._books = books
        self._error = error
        self._is_set = False

    async def get(
        self,
        base_url: str,
        path: str,
        params: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        if not self._is_set:
            self._is_set = True
            key = Secret(credential("openai", "main"))
            await self._books.app.connections.set_credential("acme", "main", key)
            # What another batch has found out about the new key.
            if self._error is None:
                await self._books.db.execute("update connection set state = 'parked', state_reason = 'new key: 401'")
        if self._error is not None:
            raise self._error
        return await self._books.app.poll_deps.http.get(base_url, path, params, headers)


@pytest.mark.parametrize(("answer", "state"), [("401", "active"), ("good", "parked")])
async def test_what_a_key_meets_with_tells_nothing_about_the_one_set_meanwhile(
    books: Books, answer: str, state: str
) -> None:
    """The usual rotation: the new key is set, the old one revoked; the batch under way still holds the old one."""
    await books.add("main")
    error = CredentialError("answered 401: revoked") if answer == "401" else None
    await replace(books, app=with_deps(books.app, http=KeySetMeanwhile(books, error))).poll()
    assert await books.state("main") == state


async def test_a_missing_scope_parks_the_source_alone(books: Books) -> None:
    await books.add("narrow")
    await books.fault("narrow", "403", count=FOREVER, path_contains="/usage/embeddings")
    assert (await books.tick()).dead == 1
    await books.assert_equal(but=["embeddings"])
    assert (await books.stream("narrow", "embeddings"))["parked_reason"]
    assert (await books.state("narrow"), await books.count("dead")) == ("active", 0)
    assert (await books.tick()).dead == 0, "not asked again for a day"
    await heal(books)
    await books.age(timedelta(days=1))
    await books.tick()
    assert (await books.stream("narrow", "embeddings"))["parked_reason"] is None
    await books.assert_equal()


async def test_a_gateway_without_a_report_has_none(books: Books) -> None:
    """404 means that the provider does not offer the source: no failure, and asked again only in a day."""
    added = await books.app.connections.add(
        NewConnection("acme", "bare", "openai", books.sim.url + "/nothing", Secret("sk-admin-bare"), midnight(1))
    )
    books.ids["bare"] = added.id
    first = await books.tick()
    # Names of projects and of people are two requests; that neither can be read is no failure either.
    assert (first.unchanged, first.retried, first.dead, first.requests) == (13, 0, 0, 14)
    assert (await books.tick()).requests == 0
