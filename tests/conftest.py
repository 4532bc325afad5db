"""What every test may use; above all a real PostgreSQL: one server and one migrated template per test session, a fresh database per test.

`TALLYD_TEST_DATABASE_URL` names a server on which databases can be made; without it the embedded one is started.
"""

import asyncio
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
import structlog
from hypothesis import settings

from daemon.db.embedded import Cluster
from daemon.db.migrate import migrate
from daemon.db.pool import Database

FAST = {
    "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum_naptime": "5s",
    "max_wal_size": "256MB",
}  # fmt: skip
MEMORY = Path("/dev/shm")
MEMORY_BYTES_MIN = 4 << 30

# Hundreds of processes start here: where no bytecode may be kept, each of them compiles all it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


settings.register_profile("untimed", deadline=None)  # how fast an example runs says more about the machine
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A test that sets up logging writes to a stream of its own, which is closed when the next one logs."""
    root = logging.getLogger()
    config, handlers, level = structlog.get_config(), root.handlers[:], root.level
    yield
    structlog.configure(**config)
    root.handlers[:] = handlers
    root.setLevel(level)


def in_database(url: str, name: str) -> str:
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def run_sql(url: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


def roomy_memory() -> Path | None:
    """A file system in memory, where there is one with room: hundreds of databases are made and dropped there."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES_MIN else None


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    if url := os.environ.get("TALLYD_TEST_DATABASE_URL"):
        yield url
        return
    folder = Path(tempfile.mkdtemp(prefix="tallyd-tests-", dir=roomy_memory()))
    folder.chmod(0o755)  # as root the server runs as another user
    cluster = Cluster(folder)
    try:
        cluster.create(sync=False)
        cluster.start(FAST)
        yield cluster.url()
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def template(server_url: str) -> Iterator[str]:
    name = f"tallyd_template_{secrets.token_hex(6)}"
    run_sql(server_url, f"create database {name}")

    async def fill() -> None:
        db = await Database.open(in_database(server_url, name))
        await migrate(db)
        await db.close()

    try:
        asyncio.run(fill())
        yield name
    finally:
        run_sql(server_url, f"drop database {name} with (force)")


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """A database without any schema."""
    name = f"tallyd_test_{secrets.token_hex(6)}"
    run_sql(server_url, f"create database {name}")
    yield in_database(server_url, name)
    run_sql(server_url, f"drop database {name} with (force)")


@pytest.fixture
def database_url(server_url: str, template: str) -> Iterator[str]:
    """A migrated database of this test's own."""
    name = f"tallyd_test_{secrets.token_hex(6)}"
    # Copying files is the quick way where nothing has to reach a disk.
    run_sql(server_url, f"create database {name} template {template} strategy file_copy")
    yield in_database(server_url, name)
    run_sql(server_url, f"drop database {name} with (force)")


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    database = await Database.open(database_url, pool_max=10)
    yield database
    await database.close()
