"""Messages on a real queue, for tests: an account, publishing, and attempts that end as the test wants."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from daemon.db.pool import Database
from daemon.domain.account import AccountId, Limits
from daemon.domain.job import Completed, Discarded, Job, Outcome, WorkerId
from daemon.queue.message import Attempted, MessageId, Publication, Published, Spec
from daemon.queue.messages import Ended, Messages
from daemon.queue.postgres import PostgresQueue

URL = "https://example.com/hook"
OK = Attempted(status=200)
BROKEN = Attempted(status=500, header={"X-Why": ["a", "b"]}, body=b"no", error="the endpoint answered 500")


async def add_account(db: Database, name: str = "a") -> AccountId:
    return AccountId(
        await db.fetchval("insert into account (name, key_id, keys) values ($1, 'k', 'x') returning id", name)
    )


@dataclass
class Post:
    """One account's messages, and a worker for them."""

    db: Database
    queue: PostgresQueue
    messages: Messages
    account: AccountId
    worker: WorkerId
    limits: Limits

    @classmethod
    async def open(cls, db: Database, name: str = "a") -> "Post":
        queue = PostgresQueue(db)
        return cls(db, queue, Messages(db, queue), await add_account(db, name), await queue.register_worker(), Limits())

    def publication(self, url: str = URL, spec: Spec | None = None, **fields) -> Publication:
        return Publication(self.account, url, spec or Spec(), **fields)

    async def publish(self, *publications: Publication) -> list[MessageId]:
        [result] = await self.messages.publish([(self.limits, publications)])
        assert not isinstance(result, Exception), result
        return [published.id for published in result]

    async def send(self, url: str = URL, spec: Spec | None = None, **fields) -> MessageId:
        [id_] = await self.publish(self.publication(url, spec, **fields))
        return id_

    async def claim(self) -> list[Job]:
        """All that is ready, in the order of ids."""
        jobs: list[Job] = []
        while (result := await self.queue.claim(self.worker, 100)).jobs:
            jobs += result.jobs
        return sorted(jobs, key=lambda job: job.id)

    async def end(self, jobs: Sequence[Job], outcome: Outcome, attempted: Attempted) -> list[bool]:
        loads = await self.messages.load(jobs)
        ends = [
            Ended(job, load, load.body or b"", outcome, replace(attempted), 5)
            for job, load in zip(jobs, loads, strict=True)
            if load is not None
        ]
        return await self.messages.settle(ends)

    async def deliver(self) -> int:
        """One successful attempt for all that is ready."""
        jobs = await self.claim()
        await self.end(jobs, Completed(), OK)
        return len(jobs)

    async def kill(self) -> int:
        """One attempt for all that is ready, after which they are dead letters."""
        jobs = await self.claim()
        await self.end(jobs, Discarded("the endpoint answered 500"), BROKEN)
        return len(jobs)

    async def live(self) -> list[int]:
        """Jobs that are not dead, by id."""
        rows = await self.db.fetch("select id from job where id not in (select id from dead) order by id")
        return [row["id"] for row in rows]


def jobs_of(published: Sequence[Published]) -> list[int]:
    return [one.id.job for one in published]
