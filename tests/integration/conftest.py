"""What several of these tests use beside a database: an endpoint for messages, and workers that deliver to it."""

from collections.abc import AsyncIterator

import pytest

from tests.push_kit import Endpoint, Pushing, open_endpoint, open_pushing


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with open_endpoint() as opened:
        yield opened


@pytest.fixture
async def pushing(database_url: str) -> AsyncIterator[Pushing]:
    async with open_pushing(database_url) as opened:
        yield opened
