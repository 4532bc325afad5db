"""The contract of the command line, on a real database and against the simulator's wire formats."""

import base64
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from daemon.db.pool import Database
from daemon.domain.job import NewJob
from daemon.queue.burial import bury
from tests.cli_kit import KEY, Result, Tallyd

NEXT = base64.b64encode(b"n" * 32).decode()
ADMIN = "sk-admin-0123456789abcdef"


@pytest.fixture
def tallyd(tallyd: Tallyd, monkeypatch: pytest.MonkeyPatch) -> Tallyd:
    """With a key in the environment."""
    monkeypatch.setenv("ADMIN_KEY", ADMIN + "\n")
    return tallyd


@pytest.fixture
def simulator() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-m", "daemon.simulator"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()


def add(tallyd: Tallyd, *more: str, name: str = "main") -> Result:
    return tallyd(
        "connections", "add", "--tenant", "acme", "--provider", "openai", "--name", name,
        "--credential-env", "ADMIN_KEY", "--json", *more,
    )  # fmt: skip


def test_dead_letter_says_which_connections_it_is_about(tallyd: Tallyd, database_url: str) -> None:
    tallyd("tenants", "add", "acme")
    first = add(tallyd, "--no-check").json["id"]
    second = add(tallyd, "--no-check", "--allow-duplicate", name="other").json["id"]
    gone = 10**12
    bodies = (
        {"connections": [first], "source": "costs"},
        {"connection": second, "ids": ["r1"]},
        {"connections": [second, first, gone]},
        {"connections": "all"},
        [],
    )

    async def fill() -> None:
        db = await Database.open(database_url)
        async with db.transaction() as tx:
            await bury(tx, [(NewJob("poll_one", json.dumps(body).encode()), "no") for body in bodies])
            await bury(tx, [(NewJob("poll_one", b"\xff"), "no"), (NewJob("push", b'{"connection": 1}'), "no")])
        await db.close()

    anyio.run(fill)
    letters = tallyd("dlq", "list", "--json").json
    named = ["acme/main"], ["acme/other"], ["acme/other", "acme/main"], [], [], [], []
    assert [letter["connections"] for letter in letters] == list(named)
    table = tallyd("dlq", "list").out
    assert "acme/main " in table
    assert "acme/other and 1 more" in table
    shown = tallyd("dlq", "show", str(letters[2]["id"]), "--json").json
    assert shown["connections"] == ["acme/other", "acme/main"]
    assert [attempt["outcome"] for attempt in shown["attempts_log"]] == ["dead"]
    assert "acme/other, acme/main" in tallyd("dlq", "show", str(letters[2]["id"])).out
    assert tallyd("dlq", "show", str(letters[5]["id"])).code == 0


def test_tenants(tallyd: Tallyd) -> None:
    assert tallyd("tenants", "add", "acme", "--json").json["name"] == "acme"
    again = tallyd("tenants", "add", "acme")
    assert (again.code, again.out, again.err) == (
        1,
        "",
        "error: NAME: tenant acme exists already; choose another name\n",
    )
    assert [t["name"] for t in tallyd("tenants", "list", "--json").json] == ["acme"]
    assert tallyd("tenants", "remove", "acme").code == 0
    assert tallyd("tenants", "remove", "acme").code == 2
    assert tallyd("tenants", "list", "--json").json == []


def test_connection_from_adding_to_reports(tallyd: Tallyd, simulator: str) -> None:
    tallyd("tenants", "add", "acme")
    url = f"{simulator}/openai/v1"
    made = add(tallyd, "--base-url", url)
    assert (made.code, made.json["revived"], made.json["base_url"]) == (0, False, url)
    assert tallyd("connections", "test", "acme/main").code == 0
    listed = tallyd("connections", "list", "--json")
    assert [(c["name"], c["state"]) for c in listed.json] == [("main", "active")]
    assert ADMIN not in listed.out

    polled = tallyd("poll", "--all", "--json")
    assert polled.code == 0, polled.err
    assert set(polled.json) == {
        "connections", "unchanged", "stored", "restated", "retried", "dead", "requests", "requests_saved", "rows",
        "items", "duration_s",
    }  # fmt: skip
    assert polled.json["connections"] == 1
    assert polled.json["rows"] > 0

    usage = tallyd("usage", "--group-by", "tenant,connection,model,day", "--json").json
    assert usage
    for line in usage:
        assert list(line) == ["tenant", "connection", "model", "day", "metrics"]
        assert set(line["metrics"]) == {
            "input_tokens", "cache_read_tokens", "cache_write_tokens", "output_tokens", "requests",
        }  # fmt: skip
    now = tallyd("usage", "--group-by", "tenant,connection,model,day", "--as-of", "2100-01-01", "--json")
    assert now.json == usage
    assert "answered as of" in now.err
    spend = tallyd("spend", "--group-by", "tenant", "--json").json
    assert {(line["tenant"], line["currency"]) for line in spend} == {("acme", "USD")}
    assert "provider" in {line["basis"] for line in spend}
    assert all(isinstance(line["amount"], str) and "E" not in line["amount"] for line in spend)
    assert tallyd("spend").code == 0
    doctor = tallyd("doctor", "--reach", "--json")
    assert [check for check in doctor.json if not check["ok"]] == []
    assert doctor.code == 0


def test_settings_change_by_name(tallyd: Tallyd) -> None:
    tallyd("tenants", "add", "acme")
    add(tallyd, "--no-check")
    changed = tallyd("connections", "set", "acme/main", 'group_by.completions=["model"]', "--json")
    assert changed.json["settings"] == {"group_by": {"completions": ["model"]}}
    assert tallyd("connections", "list", "--json").json[0]["settings"] == changed.json["settings"]
    assert tallyd("connections", "set", "acme/main", "group_by=null", "--json").json["settings"] == {}
    refused = tallyd("connections", "set", "acme/main", "colour=blue")
    assert (refused.code, refused.out) == (2, "")
    assert "colour" in refused.err


def test_removed_connection_comes_back_under_its_id(tallyd: Tallyd) -> None:
    tallyd("tenants", "add", "acme")
    first = add(tallyd, "--no-check").json
    assert tallyd("connections", "remove", "acme/main").code == 0
    assert tallyd("connections", "list", "--json").json == []
    second = add(tallyd, "--no-check", name="renamed").json
    assert (second["id"], second["revived"]) == (first["id"], True)
    assert tallyd("connections", "pause", "acme/renamed").out == "connection acme/renamed is paused\n"
    assert tallyd("poll", "--connection", "acme/renamed").err.startswith("error: --connection: acme/renamed is paused")
    assert tallyd("connections", "resume", "acme/renamed").code == 0
    assert tallyd("connections", "pause", "acme/main").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("--base-url", "http://127.0.0.1:1/v1"), 1, "error: --base-url: http://127.0.0.1:1/v1 gives no answer: "),
        (
            ("--base-url", "http://gateway.example/v1"),
            2,
            "error: --base-url: http://gateway.example/v1 would send the key",
        ),
        (("--setting", "colour=blue", "--no-check"), 2, "error: "),
        (("--tenant", "nobody", "--no-check"), 2, "error: --tenant: there is no tenant 'nobody'; `tallyd tenants add"),
        (
            ("--provider", "opnai"),
            2,
            "error: provider: 'opnai': no such provider; use one of anthropic, http_resource,",
        ),
        (("--name", "a b", "--no-check"), 2, "error: name: 'a b' is no name"),
        (("--provider", "anthropic", "--no-check"), 2, "error: credential: "),
    ],
)
def test_connection_that_cannot_be_is_refused_naming_field_and_fix(
    tallyd: Tallyd, arguments: tuple[str, ...], code: int, error: str
) -> None:
    tallyd("tenants", "add", "acme")
    refused = add(tallyd, *arguments)
    assert (refused.code, refused.out) == (code, "")
    assert refused.err.startswith(error)
    assert ADMIN not in refused.err
    assert tallyd("connections", "list", "--json", "--all").json == []


def test_key_that_the_provider_refuses_is_not_stored(tallyd: Tallyd, simulator: str) -> None:
    tallyd("tenants", "add", "acme")
    body = json.dumps({"kind": "401"}).encode()
    faults = urllib.request.Request(f"{simulator}/_sim/faults/next", body, method="POST")
    with urllib.request.urlopen(faults) as answer:
        assert answer.status == 200
    refused = add(tallyd, "--base-url", f"{simulator}/openai/v1")
    assert refused.code == 1
    assert refused.err.startswith("error: credential: refused by ")
    assert tallyd("connections", "list", "--json").json == []


def test_import_is_whole_or_nothing(tallyd: Tallyd, tmp_path: Path) -> None:
    file = tmp_path / "connections.jsonl"
    lines: list[dict[str, object]] = [
        {"tenant": f"t{n % 7}", "provider": "openai", "name": f"c{n}", "credential": f"{ADMIN}{n}"} for n in range(500)
    ]
    file.write_text("\n".join(json.dumps(line) for line in [*lines, {**lines[0], "nmae": 1}, {**lines[1]}]))
    refused = tallyd("connections", "import", str(file))
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: line 501: nmae: unknown key")
    assert tallyd("tenants", "list", "--json").json == []
    file.write_text("\n".join(json.dumps(line) for line in [*lines, lines[1]]))
    assert tallyd("connections", "import", str(file)).err.startswith(
        "error: line 501: name: connection t1/c1 exists already (line 2)"
    )
    assert tallyd("tenants", "list", "--json").json == []
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert tallyd("connections", "import", str(file), "--json").json == {"lines": 500, "added": 500, "revived": 0}
    assert len(tallyd("connections", "list", "--json").json) == 500


def test_key_rotation(tallyd: Tallyd, monkeypatch: pytest.MonkeyPatch) -> None:
    tallyd("tenants", "add", "acme")
    add(tallyd, "--no-check")
    monkeypatch.setenv("TALLYD_SECRET_KEY", NEXT)
    lost = tallyd("doctor", "--json")
    assert lost.code == 1
    assert [check["check"] for check in lost.json if not check["ok"]] == ["credentials open"]
    monkeypatch.setenv("TALLYD_SECRET_KEY", f"{NEXT},{KEY}")
    assert tallyd("db", "rotate-key", "--json").json == {"resealed": 1, "failed": []}
    monkeypatch.setenv("TALLYD_SECRET_KEY", NEXT)
    assert tallyd("doctor").code == 0


def test_what_runs_on_an_empty_installation(tallyd: Tallyd) -> None:
    for command in ("usage", "spend", "gaps", "dlq list"):
        shown = tallyd(*command.split(), "--json")
        assert (shown.code, shown.json) == (0, []), command
    assert tallyd("status", "--json").json["connections"] == {}
    assert tallyd("queue", "stats", "--json").json["available"] == 0
    assert tallyd("db", "status", "--json").json["pending"] == []
    assert tallyd("dlq", "show", "7").code == 2
    assert tallyd("dlq", "replay", "7").code == 2
    assert tallyd("dlq", "drop", "--all", "--dry-run", "--json").json == {"dropped": [], "missing": [], "dry_run": True}
    for command in ("status", "usage", "spend", "gaps", "dlq list", "queue stats", "db status", "tenants list"):
        assert tallyd(*command.split()).code == 0, command
    assert tallyd("db", "start").err.startswith("error: database_url: is set")
