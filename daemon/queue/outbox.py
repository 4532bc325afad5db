"""Events for the outside, as messages of an account of tallyd's own: committed with what they tell of, signed, retried,
in order for each lane, and dead letters in the end, like any other message.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.db.accounts import AccountStore
from daemon.db.pool import Session
from daemon.domain.account import Limits
from daemon.queue.message import Publication, Spec
from daemon.queue.messages import Messages

ACCOUNT = "events"
"""Its signing keys prove to a receiver that an event is ours: `tallyd keys show events`."""
CONTENT_TYPE = "application/cloudevents-batch+json"
RETRIES = 10
_LIMITS = Limits(queues=1_000_000)
"""A lane for each source."""


class Outbox:
    def __init__(self, messages: Messages, accounts: AccountStore) -> None:
        self._messages = messages
        self._accounts = accounts

    async def post(self, tx: Session, url: str, lane: str, bodies: Sequence[bytes]) -> None:
        """Deliver these to `url`, one after the other of the same lane, at least once each."""
        account = await self._accounts.ensure_in(tx, ACCOUNT)
        spec = Spec(header={"Content-Type": [CONTENT_TYPE]}, retries=RETRIES)
        publications = [Publication(account, url, spec, body, queue=lane) for body in bodies]
        await self._messages.publish_in(tx, [(_LIMITS, publications)])
