"""Limits: how many run at once, how often, and in which order. Counted where the messages arrive, or in the database."""

from dataclasses import replace

import anyio
import pytest

from daemon.domain.errors import QuotaError, StorageUnavailableError
from daemon.queue.gates import Gate, Gates
from daemon.queue.maintenance import QueueMaintenance
from daemon.queue.message import Callback, Published
from daemon.queue.pending import Pending
from daemon.queue.postgres import PostgresQueue
from daemon.worker.push import Pusher
from tests.books_kit import until
from tests.push_kit import Arrived, Endpoint, Pushing, Reply

pytestmark = pytest.mark.anyio

HOUR_S = 3_600


class Turnstile:
    """An endpoint that lets requests go one by one, when the test says so."""

    def __init__(self, endpoint: Endpoint, status: int = 200) -> None:
        self._turns = anyio.Semaphore(0)
        self.status = status
        endpoint.judge = self._judge

    async def _judge(self, _one: Arrived) -> Reply:
        await self._turns.acquire()
        return Reply(self.status)

    def let(self, count: int) -> None:
        for _ in range(count):
            self._turns.release()


async def counts(pushing: Pushing) -> tuple[int, int]:
    """(ready, held)."""
    row = await pushing.db.fetchrow("select (select count(*) from ready) r, (select count(*) from held) h")
    return row["r"], row["h"]


async def gate(pushing: Pushing, name: str, kind="flow") -> Gate:
    found = await pushing.queue.gates.show(pushing.account, kind, name)
    assert found is not None
    return found


async def turn_window(pushing: Pushing, seconds: float = HOUR_S) -> None:
    """Let the windows of all gates end."""
    await pushing.db.execute("update gate set rate_start = rate_start - make_interval(secs => $1)", seconds)


# ── Flow control ────────────────────────────────────────────────────────────────────────────────


async def test_no_more_run_at_once_than_a_key_allows_on_three_replicas(pushing: Pushing, endpoint: Endpoint) -> None:
    loops = [pushing.worker() for _ in range(3)]
    flow, turnstile = ("key", 3, None, 1), Turnstile(endpoint)
    async with pushing.working(*loops):
        for _ in range(4):
            await pushing.publish(*[pushing.publication(f"{endpoint.url}/", flow=flow) for _ in range(10)])
        await endpoint.has(3)
        turnstile.let(40)
        await endpoint.has(40)
        await pushing.is_quiet()
    assert endpoint.running_most == 3


async def test_attempts_of_a_window_are_counted_retries_too(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(500 if one.retried == 0 else 200)
    flow = ("key", None, 5, HOUR_S)
    publications = [pushing.publication(f"{endpoint.url}/", flow=flow, retry_delay="0") for _ in range(7)]
    async with pushing.working():
        await pushing.publish(*publications)
        await endpoint.has(5)

        async def waits() -> bool:
            return (await gate(pushing, "key")).waiting == 7  # five to try again, two that were never tried

        await until(waits, "all wait for the next window")
        assert (await gate(pushing, "key")).rate_count == 5
        await turn_window(pushing)
        await endpoint.has(10)
        await turn_window(pushing)
        await endpoint.has(14)
        await pushing.is_quiet()


async def test_an_attempt_that_waits_to_be_tried_again_holds_no_place(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(500 if one.target == "/bad" else 200)
    flow = ("key", 1, None, 1)
    async with pushing.working():
        bad, good = await pushing.publish(
            pushing.publication(f"{endpoint.url}/bad", flow=flow, retry_delay="3600000"),
            pushing.publication(f"{endpoint.url}/good", flow=flow),
        )
        await pushing.logs(good, "DELIVERED")
        assert (await pushing.states(bad))[-1] == "RETRY"


async def test_the_newest_message_says_how_its_key_flows_unless_it_is_pinned(pushing: Pushing) -> None:
    gates, url = pushing.queue.gates, "http://127.0.0.1:1/"
    await pushing.publish(pushing.publication(url, flow=("key", 2, 7, 60)))
    await pushing.publish(pushing.publication(url, flow=("key", 5, None, 1)))
    assert ((await gate(pushing, "key")).parallelism, (await gate(pushing, "key")).rate) == (5, None)
    await gates.pin(pushing.account, "key", 1, None, None)
    await pushing.publish(pushing.publication(url, flow=("key", 9, 3, 30)))
    found = await gate(pushing, "key")
    assert (found.parallelism, found.rate, found.period_s, found.pins_parallelism, found.pins_rate) == (
        1, 3, 30, True, False,
    )  # fmt: skip
    await gates.unpin(pushing.account, "key", parallelism=True, rate=False)
    await pushing.publish(pushing.publication(url, flow=("key", 9, 3, 30)))
    assert (await gate(pushing, "key")).parallelism == 9


async def test_a_paused_key_holds_and_a_resumed_one_lets_go_at_once(pushing: Pushing) -> None:
    gates = pushing.queue.gates
    await gates.pause_flow(pushing.account, "key")
    await pushing.publish(*[pushing.publication("http://127.0.0.1:1/", flow=("key", None, 9, 60))] * 3)
    assert await counts(pushing) == (0, 3)
    assert (await gates.admit_waiting())[0] == 0
    assert await gates.pause(pushing.account, "flow", "key", is_paused=False)
    assert await counts(pushing) == (3, 0)


async def test_a_delayed_message_meets_its_gate_when_it_is_due(pushing: Pushing) -> None:
    flow = ("key", None, 1, HOUR_S)
    await pushing.publish(*[pushing.publication("http://127.0.0.1:1/", flow=flow, delay_s=60)] * 2)
    assert await counts(pushing) == (0, 0)
    await pushing.db.execute("update due set run_at = now()")
    await pushing.queue.promote()
    assert await counts(pushing) == (1, 1)


async def test_racing_replicas_never_let_too_many_pass(pushing: Pushing) -> None:
    """Publishing, admitting and settling at once, many times; the slots are counted at each step."""
    flow, most, seen = ("key", 3, None, 1), 3, []
    queues = [PostgresQueue(pushing.db) for _ in range(4)]
    worker = await pushing.queue.register_worker("t")

    async def churn(queue: PostgresQueue) -> None:
        for _ in range(15):
            await pushing.publish(*[pushing.publication("http://127.0.0.1:1/", flow=flow)] * 2)
            await queue.gates.admit_waiting()
            seen.append(await pushing.db.fetchval("select count(*) from slot"))
            claimed = await queue.claim(worker, 2)
            await queue.cancel([job.id for job in claimed.jobs])

    async with anyio.create_task_group() as group:
        for queue in queues:
            group.start_soon(churn, queue)
    assert max(seen) == most
    while await pushing.db.fetchval("select count(*) from held"):
        await pushing.queue.gates.admit_waiting()
        claimed = await pushing.queue.claim(worker, 10)
        await pushing.queue.cancel([job.id for job in claimed.jobs])
    assert await pushing.db.fetchval("select count(*) from slot") <= most


async def test_thousands_of_shut_gates_do_not_hide_an_open_one(pushing: Pushing) -> None:
    shut = [pushing.publication("http://127.0.0.1:1/", flow=(f"shut{n:04}", None, 1, HOUR_S)) for n in range(1_200)]
    for at in range(0, len(shut), 200):
        await pushing.publish(*shut[at : at + 200])
    await pushing.db.execute("delete from slot")
    for at in range(0, len(shut), 200):
        await pushing.publish(*shut[at : at + 200])
    await pushing.publish(pushing.publication("http://127.0.0.1:1/", flow=("zz", 1, None, 1)))
    await pushing.publish(pushing.publication("http://127.0.0.1:1/", flow=("zz", 1, None, 1)))
    assert (await counts(pushing))[1] == 1_201
    await pushing.db.execute("delete from slot")
    assert (await Gates(pushing.db).admit_waiting())[0] == 1


async def test_a_key_whose_window_is_over_does_not_keep_the_promotion_awake(pushing: Pushing) -> None:
    """What holds up the second one is the first one, for hours perhaps, and no window that opens."""
    flow = ("k", 1, 1, 1)
    await pushing.publish(*[pushing.publication("http://127.0.0.1:1/", flow=flow) for _ in range(2)])
    await pushing.db.execute("update gate set rate_start = now() - interval '1 minute'")
    assert await counts(pushing) == (1, 1)
    assert (await pushing.queue.promote()).next_s is None


async def test_what_is_published_stays_so_where_letting_pass_does_not_go(
    pushing: Pushing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica may hold the gate's row for longer than we wait: to answer an error would make a second message."""

    async def admit(_gates: object) -> int:
        raise StorageUnavailableError("the gate's row is locked")

    with monkeypatch.context() as patch:
        patch.setattr(pushing.queue.gates, "admit", admit)
        await pushing.publish(pushing.publication("http://127.0.0.1:1/", queue="line"))
    assert await counts(pushing) == (0, 1)
    assert (await pushing.queue.promote()).moved == 1


# ── FIFO queues ─────────────────────────────────────────────────────────────────────────────────


async def test_a_queue_delivers_in_order_and_waits_for_retries_and_callbacks(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    def judge(one: Arrived) -> Reply:
        if one.target == "/0":
            return Reply(500 if one.retried < 2 else 200)
        return Reply(500 if one.target == "/cb0" and one.retried == 0 else 200)

    endpoint.judge = judge
    async with pushing.working(pushing.worker(), pushing.worker()):
        await pushing.publish(
            *[
                pushing.publication(
                    f"{endpoint.url}/{n}",
                    queue="line",
                    retry_delay="0",
                    callback=Callback(f"{endpoint.url}/cb{n}"),
                )
                for n in range(4)
            ]
        )
        await endpoint.has(1, "/cb3")
        await pushing.is_quiet()
    order = [one.target for one in endpoint.arrived if not one.target.startswith("/cb")]
    assert order == ["/0", "/0", "/0", "/1", "/2", "/3"]
    at = {one.target: index for index, one in enumerate(endpoint.arrived)}  # where each was seen last
    assert all(at[f"/cb{n}"] < at[f"/{n + 1}"] for n in range(3))


async def test_the_end_of_a_callback_lets_the_next_one_pass_at_once(pushing: Pushing, endpoint: Endpoint) -> None:
    worker = await pushing.queue.register_worker()

    async def deliver() -> None:
        (job,) = (await pushing.queue.claim(worker, 10)).jobs
        await Pusher(pushing.messages, pushing.accounts, pushing.client).run(job)

    callback = Callback(f"{endpoint.url}/cb")
    await pushing.publish(
        *[pushing.publication(f"{endpoint.url}/{n}", queue="line", callback=callback) for n in range(2)]
    )
    for _ in range(3):  # without a round of promotion
        await deliver()
    assert [one.target for one in endpoint.arrived] == ["/0", "/cb", "/1"]


async def test_a_letter_replayed_after_its_queue_is_gone_is_not_held_for_ever(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    endpoint.judge = lambda _one: Reply(500 if len(endpoint.arrived) <= 3 else 200)
    async with pushing.working():
        (made,) = await pushing.publish(
            pushing.publication(f"{endpoint.url}/", queue="line", retries=1, retry_delay="0")
        )
        await pushing.logs(made, "FAILED")
        await Pending(pushing.db, pushing.queue).delete_queue(pushing.account, "line")
        await QueueMaintenance(pushing.db, pushing.queue.waker).dead_replay([made.id.job])
        await pushing.logs(made, "DELIVERED")
        await pushing.is_quiet()
    assert len(endpoint.arrived) == 4


async def test_a_letter_that_an_older_version_left_in_its_place_can_be_replayed(
    pushing: Pushing, endpoint: Endpoint
) -> None:
    """It ends jobs without giving back their places."""
    (made,) = await pushing.publish(pushing.publication(f"{endpoint.url}/", queue="line"))
    await pushing.db.execute(
        "with x as (delete from ready returning id) insert into dead select id, now(), 1, 1, '' from x"
    )
    await QueueMaintenance(pushing.db).dead_replay([made.id.job])
    assert (await pushing.queue.promote()).moved == 1


async def test_a_queue_has_as_many_lanes_as_it_is_given(pushing: Pushing, endpoint: Endpoint) -> None:
    turnstile = Turnstile(endpoint)
    await pushing.queue.gates.set_queue(pushing.account, "line", 2, None, 100)
    async with pushing.working():
        await pushing.publish(*[pushing.publication(f"{endpoint.url}/{n}", queue="line") for n in range(6)])
        await endpoint.has(2)
        assert (await gate(pushing, "line", "queue")).running == 2
        turnstile.let(6)
        await endpoint.has(6)
        await pushing.is_quiet()
    assert endpoint.running_most == 2
    assert (await gate(pushing, "line", "queue")).parallelism == 2  # publishing does not reset it


async def test_a_dead_message_frees_its_lane(pushing: Pushing, endpoint: Endpoint) -> None:
    endpoint.judge = lambda one: Reply(500 if one.target == "/bad" else 200)
    async with pushing.working():
        _, good = await pushing.publish(
            pushing.publication(f"{endpoint.url}/bad", queue="line", retries=0),
            pushing.publication(f"{endpoint.url}/good", queue="line"),
        )
        await pushing.logs(good, "DELIVERED")


async def test_a_queue_and_a_key_both_count(pushing: Pushing, endpoint: Endpoint) -> None:
    turnstile = Turnstile(endpoint)
    await pushing.queue.gates.set_queue(pushing.account, "line", 3, None, 100)

    def message(**fields) -> Published:
        return pushing.publication(f"{endpoint.url}/", flow=("key", 2, None, 1), **fields)

    async with pushing.working():
        await pushing.publish(*[message(queue="line") for _ in range(5)], *[message() for _ in range(5)])
        await endpoint.has(2)
        line, key = await gate(pushing, "line", "queue"), await gate(pushing, "key")
        assert (line.running, line.waiting, key.running) == (3, 2, 2)
        turnstile.let(10)
        await endpoint.has(10)
        await pushing.is_quiet()
    assert endpoint.running_most == 2


async def test_an_account_as_a_whole_can_be_limited(pushing: Pushing, endpoint: Endpoint) -> None:
    pushing.limits = replace(pushing.limits, parallelism=2)
    turnstile = Turnstile(endpoint)
    async with pushing.working():
        await pushing.publish(*[pushing.publication(f"{endpoint.url}/{n}") for n in range(20)])
        await endpoint.has(2)
        turnstile.let(20)
        await endpoint.has(20)
        await pushing.is_quiet()
    assert endpoint.running_most == 2


async def test_one_queue_too_many_is_refused_and_nothing_stored(pushing: Pushing) -> None:
    pushing.limits = replace(pushing.limits, queues=2)
    for name in ("a", "b"):
        await pushing.publish(pushing.publication("http://127.0.0.1:1/", queue=name))
    with pytest.raises(QuotaError, match="maxQueues"):
        await pushing.publish(
            pushing.publication("http://127.0.0.1:1/"), pushing.publication("http://127.0.0.1:1/", queue="c")
        )
    assert await pushing.db.fetchval("select count(*) from job") == 2
    await pushing.publish(pushing.publication("http://127.0.0.1:1/", queue="a"))
