"""What several of these tests use beside a database: an endpoint for messages, workers that deliver to it, commands."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cli_kit import Tallyd, commands
from tests.push_kit import Endpoint, Pushing, open_endpoint, open_pushing


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with open_endpoint() as opened:
        yield opened


@pytest.fixture
async def pushing(database_url: str) -> AsyncIterator[Pushing]:
    async with open_pushing(database_url) as opened:
        yield opened


@pytest.fixture
def tallyd(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Tallyd]:
    with commands(database_url, tmp_path, monkeypatch, capsys) as run:
        yield run
