"""What a reading of Redis works with, whoever speaks the protocol: commands, replies, and the servers that hold keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, cast

Command: TypeAlias = tuple[str | bytes | int, ...]
"""A command and its arguments. Its key comes first among them, as in GET, or third, as in EVAL with one key."""

Reply: TypeAlias = "bytes | int | list[Reply] | WrongType | None"


class WrongType:
    """The answer to a command on a key of another type. The rest of its round trip is good."""


WRONG_TYPE = WrongType()


class Node(Protocol):
    """One server that holds keys."""

    run_id: str | None

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        """Send the commands in one round trip.

        Raises:
            CredentialError, ForbiddenError, UpstreamUnavailableError, RateLimitedError, PermanentError: of the
            connection, or of the first command that fails in another way than by the type of its key.
        """
        ...

    def groups(self, keys: Sequence[bytes]) -> list[list[bytes]]:
        """The keys, as one command may name them together."""
        ...


class Store(Protocol):
    """The server or servers of one base URL, for one reading or writing."""

    async def connect(self) -> Sequence[Node]:
        """All that hold keys, connected."""
        ...

    async def ask(self, commands: Sequence[Command]) -> list[Reply]:
        """Send each command to the server that holds its key."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def digest_of(nodes: Sequence[Node]) -> bytes | None:
    """What stands for the servers that run now: another one after a restart, a failover, or a new shard.

    None where a server does not tell, as Upstash.
    """
    run_ids = [node.run_id for node in nodes]
    if None in run_ids:
        return None
    return hashlib.sha256(" ".join(sorted(cast("list[str]", run_ids))).encode()).digest()


__all__ = ["WRONG_TYPE", "Command", "Node", "Reply", "Store", "WrongType", "digest_of"]
