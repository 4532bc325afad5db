"""A poller of another package, from outside: both as wheels in an environment where no checkout can be imported.

The environment is a fresh one. It borrows the libraries of this one through a path file, which Python does not follow
further: what is installed here as an editable checkout is not there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from aiohttp import web

from daemon.db.pool import Database
from daemon.domain.window import rfc3339
from tests.books_kit import midnight
from tests.cli_kit import Result
from tests.e2e.conftest import Tallyd
from tests.ledger_kit import assert_laws

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "acme-poller"
KEY = "acme-admin-0123456789"
HISTORY_DAYS = 3
PAGE_DAYS = 2
"""Fewer than are asked for, so that a window has pages."""


class Outside(NamedTuple):
    python: Path
    example: Path

    async def run(self, *arguments: str) -> Result:
        """A process that knows of no checkout, in the folder of the example's tests."""
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "TALLYD"))}
        done = await anyio.run_process([str(self.python), *arguments], cwd=self.example, env=kept, check=False)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    async def tests(self, *arguments: str) -> Result:
        """The example's own tests, without the plug-ins that only the borrowed libraries bring along."""
        return await self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments)


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def libraries(python: Path) -> Path:
    return only(python.parent.parent / "lib", "python*/site-packages")


def build(source: Path, to: Path) -> Path:
    # The builder that pyproject.toml names, without an environment that would have to be fetched for it.
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", to], cwd=source, check=True)
    return only(to, "*.whl")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """tallyd's, and the example's, built as its author would: from a folder that knows nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheels")
    shutil.copytree(EXAMPLE, folder / "acme-poller")
    return build(ROOT, folder / "tallyd"), build(folder / "acme-poller", folder / "acme")


@pytest.fixture
def outside(wheels: tuple[Path, Path], tmp_path: Path) -> Outside:
    folder = tmp_path / "outside"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (libraries(python) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    uv = shutil.which("uv") or str(Path(sys.executable).parent / "uv")
    # By copy, since a linked file is the cache's, and one test writes into what is installed.
    options = ["--quiet", "--offline", "--no-deps", "--link-mode", "copy"]
    subprocess.run([uv, "pip", "install", *options, "--python", python, *wheels], check=True)
    example = tmp_path / "acme-poller"
    shutil.copytree(EXAMPLE / "tests", example / "tests")
    shutil.copy(EXAMPLE / "pyproject.toml", example)
    return Outside(python, example)


@pytest.fixture
def foreign(outside: Outside, tallyd: Tallyd) -> Tallyd:
    """The command line of that environment."""
    tallyd.command = (str(outside.python), "-m", "daemon")
    for name in [name for name in tallyd.environment if name.startswith("PYTHON")]:
        del tallyd.environment[name]
    return tallyd


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    opened = await Database.open(database_url, pool_max=4)
    yield opened
    await opened.close()


# ── A stand-in for the provider ─────────────────────────────────────────────────────────────────


class Acme:
    """What Acme AI's admin API is said to do, over a table of facts."""

    def __init__(self) -> None:
        self.today = midnight().date()
        self.facts: dict[str, dict[date, list[dict[str, Any]]]] = {"tokens": {}, "costs": {}}
        self.asked: list[str] = []
        self.url = ""
        for n in range(HISTORY_DAYS + 1):
            when = self.today - timedelta(days=n)
            self.facts["tokens"][when] = [
                {"model": model, "project_id": project, "tokens_in": 1000 + n, "tokens_in_cached": 400, "tokens_out": 7 + n,
                 "calls": 3, "region": "eu"}
                for model in ("acme-large", "acme-small") for project in ("alpha", None)
            ]  # fmt: skip
            self.facts["costs"][when] = [
                {"line_item": f"{project}, input", "project_id": project, "amount": f"0.{n}00000000000000000001", "currency": "USD"}
                for project in ("alpha", "beta")
            ]  # fmt: skip
        self.facts["tokens"][self.today - timedelta(days=2)] = []

    async def report(self, request: web.Request) -> web.Response:
        source = {"usage": "tokens", "costs": "costs"}[request.match_info["report"]]
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"code": "bad_key", "message": "no such key"}}, status=401)
        asked = request.query
        first, end = (date.fromisoformat(asked[name]) for name in ("from", "to"))
        first = date.fromisoformat(asked.get("cursor", first.isoformat()))
        self.asked.append(request.path_qs)
        end = min(end, self.today + timedelta(days=1))
        stop = min(end, first + timedelta(days=min(PAGE_DAYS, int(asked["limit"]))))
        days = [first + timedelta(days=n) for n in range((stop - first).days)]
        by = asked.getall("by", [])
        return web.json_response(
            {
                "days": [{"date": f"{when}", "rows": self.cut(source, when, by)} for when in days],
                "next_cursor": stop.isoformat() if stop < end else None,
            }
        )

    def cut(self, source: str, when: date, by: list[str]) -> list[dict[str, Any]]:
        groups: dict[tuple[str | None, ...], list[dict[str, Any]]] = defaultdict(list)
        for fact in self.facts[source].get(when, []):
            groups[tuple(fact[name] for name in by)].append(fact)
        rows = []
        for values, facts in groups.items():
            row: dict[str, Any] = dict(zip(by, values, strict=True))
            if source == "costs":
                row |= {"amount": str(sum(Decimal(fact["amount"]) for fact in facts)), "currency": "USD"}
            else:
                counts = ("tokens_in", "tokens_in_cached", "tokens_out", "calls")
                row |= {name: sum(fact[name] for fact in facts) for name in counts} | {"region": "eu"}
            rows.append(row)
        return rows

    def truth(self) -> tuple[int, int, int, int, Decimal]:
        tokens = [fact for facts in self.facts["tokens"].values() for fact in facts]
        costs = [fact for facts in self.facts["costs"].values() for fact in facts]
        read, cached, wrote, calls = (
            sum(fact[name] for fact in tokens) for name in ("tokens_in", "tokens_in_cached", "tokens_out", "calls")
        )
        return read, cached, wrote, calls, sum((Decimal(fact["amount"]) for fact in costs), Decimal(0))


@pytest.fixture
async def acme() -> AsyncIterator[Acme]:
    made = Acme()

    async def organization(_request: web.Request) -> web.Response:
        return web.json_response({"id": "org-7", "name": "Acme Users Ltd"})

    app = web.Application()
    app.router.add_get("/v1/organization", organization)
    app.router.add_get("/v1/{report}/daily", made.report)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield made
    await runner.cleanup()


async def booked(db: Database) -> tuple[int, int, int, int, Decimal]:
    row = await db.fetchrow(
        "select sum(input_tokens)::bigint, sum(cache_read_tokens)::bigint, sum(output_tokens)::bigint,"
        " sum(requests)::bigint, sum(amount) from ledger"
    )
    assert row is not None
    return tuple(row)


# ── Tests ───────────────────────────────────────────────────────────────────────────────────────


async def test_example_proves_itself_outside_of_a_checkout(outside: Outside) -> None:
    """What the example's author would run: its own tests, with the suite that the wheel of tallyd brings along."""
    where = await outside.run("-c", "import daemon, acme_tallyd; print(daemon.__file__, acme_tallyd.__file__)")
    assert [Path(path).is_relative_to(libraries(outside.python)) for path in where.out.split()] == [True, True]
    done = await outside.tests()
    assert done.code == 0, done.out + done.err
    passed = re.search(r"(\d+) passed", done.out)
    assert passed is not None
    assert int(passed[1]) > 100, done.out


MISTAKES = {
    "test_missing_optional_field_is_none_not_zero": ('"tokens_in_cached")', '"tokens_in_cached") or 0'),
    "test_complete_chain_is_the_whole_truth": ("page.next_cursor)", "None)"),
    "test_money_is_exact_in_either_form": ("float_hook=Decimal", "float_hook=float"),
    "test_unknown_field_is_kept_and_harms_nothing": ("detail=encode_detail(row)", 'detail=b"{}"'),
}


async def test_example_s_tests_fail_where_the_poller_is_wrong(outside: Outside) -> None:
    """The suite that is taken in by `import *` is one that judges: each of these is a mistake that people make."""
    source = libraries(outside.python) / "acme_tallyd" / "poller.py"
    text = source.read_text()
    for right, wrong in MISTAKES.values():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    source.write_text(text)
    done = await outside.tests("-k", " or ".join([*MISTAKES, "test_nothing_used"]))
    assert done.code == 1, done.out + done.err
    assert set(re.findall(r"^FAILED \S+::(\w+)", done.out, re.MULTILINE)) == set(MISTAKES)


async def test_example_books_exact_sums(foreign: Tallyd, acme: Acme, db: Database) -> None:
    await foreign.here("tenants", "add", "acme")
    added = await foreign(
        "connections", "add", "--tenant", "acme", "--provider", "acme-ai", "--name", "main", "--credential-stdin",
        "--base-url", acme.url, "--since", rfc3339(midnight(HISTORY_DAYS)), stdin=KEY,
    )  # fmt: skip
    assert added.code == 0, added.err
    assert await db.fetchval("select org_id from connection") == "org-7"
    polled = await foreign("poll", "--all", "--json")
    assert polled.code == 0, polled.out + polled.err
    assert await booked(db) == acme.truth(), acme.asked
    assert len([path for path in acme.asked if "cursor" in path]) >= 2, acme.asked
    # The provider corrects a day that is closed, and the present one goes on.
    acme.facts["costs"][acme.today - timedelta(days=1)][0]["amount"] = "7.5"
    acme.facts["tokens"][acme.today][0]["tokens_out"] += 11
    again = await foreign("poll", "--all", "--full", "--json")
    assert again.json["rows"] == 2
    assert await booked(db) == acme.truth()
    assert (await foreign("poll", "--all", "--full", "--json")).json["rows"] == 0
    refused = await foreign(
        "connections", "add", "--tenant", "acme", "--provider", "acme-ai", "--name", "other", "--credential-stdin",
        "--base-url", acme.url, stdin="sk-proj-0123456789",
    )  # fmt: skip
    assert refused.code == 2
    assert "acme-admin-" in refused.err
    await assert_laws(db)


async def test_doctor_lists_the_poller_and_a_broken_one_stops_nothing(
    outside: Outside, foreign: Tallyd, acme: Acme, db: Database
) -> None:
    async def pollers() -> dict[str, Any]:
        found = await foreign("doctor", "--json")
        (check,) = [check for check in found.json if check["check"] == "pollers"]
        return check

    whole = await pollers()
    assert whole["ok"], whole
    assert "acme-ai" in whole["detail"].split(", ")
    site = libraries(outside.python)
    (site / "broken_tallyd.py").write_text("import no_such_library\n")
    information = site / "broken_tallyd-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-tallyd\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[tallyd.pollers]\nbroken = broken_tallyd:Poller\nmisnamed = acme_tallyd.poller:AcmePoller\n"
    )
    broken = await pollers()
    assert not broken["ok"]
    assert "poller broken (broken_tallyd:Poller) does not load" in broken["detail"]
    assert "no_such_library" in broken["detail"]
    assert "misnamed" in broken["detail"]
    assert "it calls itself 'acme-ai'" in broken["detail"]
    await foreign.here("tenants", "add", "acme")
    refused = await foreign(
        "connections", "add", "--tenant", "acme", "--provider", "broken", "--name", "b", "--credential-stdin", stdin=KEY
    )
    assert refused.code == 2
    assert "no_such_library" in refused.err
    added = await foreign(
        "connections", "add", "--tenant", "acme", "--provider", "acme-ai", "--name", "main", "--credential-stdin",
        "--base-url", acme.url, "--since", rfc3339(midnight(HISTORY_DAYS)), stdin=KEY,
    )  # fmt: skip
    assert added.code == 0, added.err
    assert (await foreign("poll", "--all")).code == 0
    assert await booked(db) == acme.truth(), acme.asked
