"""Brings a database to the schema of this code: `migrations/NNNN_*.sql` in order, each once, each in a transaction.

Any number of processes may start at once: every step takes an advisory lock and looks again at what has been applied.
Code meets a schema that is one step newer during a rolling upgrade, and must live with it; two steps are refused.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio
import asyncpg
import structlog

from daemon.db.pool import Database, Executor
from daemon.domain.errors import ConfigError, DeadlockError, StorageUnavailableError

_FOLDER = Path(__file__).with_name("migrations")
_FILE_NAME = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_LOCK = 0x7461_6C6C_7964  # "tallyd"
_STATEMENT_TIMEOUT_MS = 30 * 60_000
_LOCK_TIMEOUT_MS = 2_000

log = structlog.get_logger()

_TABLE = """
create table if not exists schema_migration (
  version    int primary key,
  name       text not null,
  sha256     text not null,
  applied_at timestamptz not null default now()
)
"""


@dataclass(frozen=True, slots=True)
class Migration:
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def label(self) -> str:
        return f"{self.version:04}_{self.name}"


@dataclass(frozen=True, slots=True)
class Applied:
    version: int
    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Status:
    """Where a database stands: `version` is 0 before the first migration, `target` what this code brings it to."""

    version: int
    target: int
    pending: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        return not self.pending


def load(folder: Path = _FOLDER) -> tuple[Migration, ...]:
    """The migrations of a folder, oldest first, numbered from 1 without a gap."""
    found = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path.name} is not named like 0001_what_it_does.sql")
        found.append(Migration(int(match[1]), match[2], path.read_text("utf-8")))
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"migrations are not numbered 1 to {len(found)}: {', '.join(m.label for m in found)}")
    return tuple(found)


async def migrate(db: Database, migrations: Sequence[Migration] | None = None) -> Status:
    """Apply what is missing, and return the state reached.

    Raises:
        ConfigError: the database is too new for this code, or a migration was changed after it had been applied.
    """
    wanted = load() if migrations is None else migrations
    is_waiting = False
    while True:
        try:
            if await _step(db, wanted):
                return await status(db, wanted)
        except (StorageUnavailableError, DeadlockError) as error:
            # Behind a dump or a report: whoever waits for such a lock blocks everybody who comes after, so not long. Or
            # across the replicas of the version before, which take the same tables in another order.
            if not isinstance(error.__cause__, asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError):
                raise
            if not is_waiting:
                log.warning("migration.waiting", reason=str(error))
            is_waiting = True
            await anyio.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - spreads those who wait, guards nothing


async def _step(db: Database, wanted: Sequence[Migration]) -> bool:
    """Apply the first that is missing, in a transaction. True when none is."""
    async with db.transaction(lock_timeout_ms=_LOCK_TIMEOUT_MS, statement_timeout_ms=_STATEMENT_TIMEOUT_MS) as tx:
        await tx.execute("select pg_advisory_xact_lock($1)", _LOCK)
        await tx.execute(_TABLE)
        pending = _pending(wanted, await _applied(tx))
        if pending:
            step = pending[0]
            await tx.execute(step.sql)
            await tx.execute(
                "insert into schema_migration (version, name, sha256) values ($1, $2, $3)",
                step.version,
                step.name,
                step.sha256,
            )
        return not pending


async def status(db: Executor, migrations: Sequence[Migration] | None = None) -> Status:
    """What has been applied and what is missing; raises ConfigError as `migrate` does, and changes nothing."""
    wanted = load() if migrations is None else migrations
    applied = await _applied(db)
    pending = _pending(wanted, applied)
    return Status(max(applied, default=0), len(wanted), tuple(m.label for m in pending))


async def _applied(db: Executor) -> dict[int, Applied]:
    if await db.fetchval("select to_regclass('schema_migration') is null"):
        return {}
    rows = await db.fetch("select version, name, sha256 from schema_migration order by version")
    return {row["version"]: Applied(row["version"], row["name"], row["sha256"]) for row in rows}


def _pending(wanted: Sequence[Migration], applied: Mapping[int, Applied]) -> list[Migration]:
    target = len(wanted)
    newest = max(applied, default=0)
    problems = [
        f"database: migration {m.label} was changed after it had been applied; restore the file, and put the change "
        f"into a new migration"
        for m in wanted
        if m.version in applied and applied[m.version].sha256 != m.sha256
    ]
    if newest > target + 1:
        problems.append(
            f"database: its schema is version {newest}, this tallyd knows version {target} and works with at most "
            f"{target + 1}; upgrade tallyd, or restore a backup that was taken before the upgrade"
        )
    pending = [m for m in wanted if m.version not in applied]
    if pending and pending[0].version < newest:
        problems.append(
            f"database: migration {pending[0].label} is missing though a later one was applied; restore a backup, or "
            f"install the tallyd that made this schema"
        )
    if problems:
        raise ConfigError(problems)
    return pending


async def dump_schema(db: Executor) -> str:
    """The schema `public` as SQL that builds it again, in an order that depends on nothing but the names.

    Partitions are left out: which exist depends on the date. Kinds of objects that it cannot write (enums, triggers,
    foreign tables) make it fail, so that the snapshot is never silently short.

    Source: https://www.postgresql.org/docs/18/catalogs.html, read 2026-11-22.
    """
    unknown = await db.fetch(_UNKNOWN_OBJECTS)
    if unknown:
        raise ValueError(f"dump_schema cannot write: {', '.join(row['object'] for row in unknown)}")
    sections = (_SEQUENCES, _TABLES, _CONSTRAINTS, _INDEXES, _VIEWS, _FUNCTIONS)
    parts = [row["ddl"] for sql in sections for row in await db.fetch(sql)]
    return (
        "\n\n".join(
            [
                "-- Generated from the migrations by tests/integration/test_migrate.py; do not edit. Partitions are left out.",
                *parts,
            ]
        )
        + "\n"
    )


_UNKNOWN_OBJECTS = """
select relname::text as object from pg_class
  where relnamespace = 'public'::regnamespace and relkind not in ('r', 'p', 'i', 'I', 'S', 'v', 't')
union all
select typname::text from pg_type t
  where typnamespace = 'public'::regnamespace and typtype <> 'b' and typtype <> 'c'
union all
select tgname::text from pg_trigger t join pg_class c on c.oid = t.tgrelid
  where c.relnamespace = 'public'::regnamespace and not tgisinternal
"""

_SEQUENCES = """
select format('create sequence %I as %s start %s increment %s;', c.relname, format_type(s.seqtypid, null),
              s.seqstart, s.seqincrement) as ddl
from pg_sequence s join pg_class c on c.oid = s.seqrelid
where c.relnamespace = 'public'::regnamespace
  and not exists (select from pg_depend d where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype = 'i')
order by c.relname
"""

_TABLES = """
select format(e'create table %I (\\n%s\\n)%s%s;', c.relname,
    (select string_agg(format('  %I %s', a.attname, format_type(a.atttypid, a.atttypmod))
        || case a.attidentity when 'a' then ' generated always as identity'
                              when 'd' then ' generated by default as identity' else '' end
        || case when a.attgenerated = 's' then format(' generated always as (%s) stored', pg_get_expr(f.adbin, f.adrelid))
                when f.adbin is not null then ' default ' || pg_get_expr(f.adbin, f.adrelid) else '' end
        || case when a.attnotnull then ' not null' else '' end, e',\\n' order by a.attnum)
      from pg_attribute a left join pg_attrdef f on f.adrelid = a.attrelid and f.adnum = a.attnum
      where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
    case when c.relkind = 'p' then ' partition by ' || pg_get_partkeydef(c.oid) else '' end,
    case when c.reloptions is not null then ' with (' || array_to_string(c.reloptions, ', ') || ')' else '' end) as ddl
from pg_class c
where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition
order by c.relname
"""

# Foreign keys last: they need the others' primary keys. Not-null constraints are constraints of their own since
# Postgres 18; the columns carry them here.
_CONSTRAINTS = """
select format('alter table %I add constraint %I %s;', c.relname, n.conname, pg_get_constraintdef(n.oid)) as ddl
from pg_constraint n join pg_class c on c.oid = n.conrelid
where c.relnamespace = 'public'::regnamespace and not c.relispartition and n.contype <> 'n'
order by n.contype = 'f', c.relname, n.conname
"""

_INDEXES = """
select replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ') || ';' as ddl
from pg_index i join pg_class x on x.oid = i.indexrelid join pg_class c on c.oid = i.indrelid
where c.relnamespace = 'public'::regnamespace and not c.relispartition
  and not exists (select from pg_constraint n where n.conindid = i.indexrelid)
order by x.relname
"""

_VIEWS = """
select format(e'create view %I as\\n%s', c.relname, pg_get_viewdef(c.oid, true)) as ddl
from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind = 'v' order by c.relname
"""

_FUNCTIONS = """
select pg_get_functiondef(p.oid) || ';' as ddl
from pg_proc p where p.pronamespace = 'public'::regnamespace and p.prokind in ('f', 'p')
  and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')
order by p.proname, p.oid::regprocedure::text
"""
