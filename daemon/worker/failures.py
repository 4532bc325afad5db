"""Failures of a task group, told as what they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def as_one_error() -> AsyncIterator[None]:
    """Around a task group: when but one of its tasks failed, raise that failure itself, not a group with it."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise only(group) from group


def only(error: BaseException) -> BaseException:
    """The one exception inside nested groups, if there is but one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
