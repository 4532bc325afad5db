"""`tallyd resources` from the file to the rows, against an API in a process of its own."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_kit import Tallyd
from tests.resource_stand_in import SECRET

FILE = """
name = "orders"
base_url = "{url}"

[list]
path = "/orders"
params = {{ fields = "id,updated_at", limit = 500 }}
items = "data"
version = "updated_at"
paging = {{ kind = "cursor", param = "cursor", next = "meta.next" }}

[detail]
path = "/orders/{{id}}"
fields = ["id", "total"]
"""


@pytest.fixture
def tallyd(tallyd: Tallyd, monkeypatch: pytest.MonkeyPatch) -> Tallyd:
    """With a key in the environment; what is no other group is one of `resources`."""
    monkeypatch.setenv("ORDERS_KEY", SECRET)
    groups = ("tenants", "dlq", "connections")
    return lambda *arguments: tallyd(*(arguments if arguments[0] in groups else ("resources", *arguments)))


@pytest.fixture
def api() -> Iterator[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.resource_stand_in"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def control(api: str, query: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{api}/_control?{query}", timeout=10) as answer:
        counts: dict[str, int] = json.loads(answer.read())
        return counts


@pytest.fixture
def file(tmp_path: Path, api: str) -> str:
    control(api, "count=120")
    (tmp_path / "orders.toml").write_text(FILE.format(url=api))
    return "orders.toml"


def test_from_check_to_add_to_sync_to_list(tallyd: Tallyd, file: str, api: str) -> None:
    tried = tallyd("check", file, "--credential-env", "ORDERS_KEY", "--limit", "2", "--json")
    assert tried.code == 0
    found = tried.json
    assert (found["page_items"], found["versions"], found["calls"]) == (120, 120, 3)
    assert (found["unchanged_calls"], found["changed_calls"]) == (0, 100)
    assert found["tried"][0] == {
        "id": "r0", "version": "1790000001", "kept_bytes": 26, "fields": ["id", "total"], "is_stable": True,
    }  # fmt: skip
    assert tallyd("tenants", "add", "acme").code == 0
    added = tallyd("add", file, "--tenant", "acme", "--credential-env", "ORDERS_KEY", "--json")
    assert (added.code, added.json["every_s"]) == (0, 3_600)
    assert added.json.keys() == {"id", "tenant", "name", "base_url", "every_s"}
    synced = tallyd("sync", "--tenant", "acme", "--name", "orders", "--json")
    assert synced.code == 0
    assert synced.json | {"duration_s": 0} == {
        "resources": 120, "changed": 120, "unchanged": 0, "failed": 0, "gone": 0, "calls": 121, "calls_saved": 119,
        "batches": 2, "left": 0, "duration_s": 0,
    }  # fmt: skip
    control(api, "changed=1")
    again = tallyd("sync", "--json").json
    assert (again["changed"], again["unchanged"], again["calls"]) == (2, 118, 3)
    (line,) = tallyd("list", "--json").json
    assert (line["name"], line["stored"], line["batches_done"], line["state"]) == ("orders", 120, 1, "active")
    assert "orders" in tallyd("list").out
    assert "changed" in tallyd("sync").out
    shown = tallyd("connections", "list", "--json")
    assert SECRET not in shown.out + tallyd("list", "--json").out


def test_check_needs_no_database_and_writes_nothing(tallyd: Tallyd, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYD_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    found = tallyd("check", file, "--credential-env", "ORDERS_KEY")
    assert found.code == 0
    assert "orders: 120 ids on the first page" in found.out
    assert "of a hundred resources, beside the list, 0 where nothing changed and 100 where all did" in found.out


def test_check_tells_what_each_way_would_cost(tallyd: Tallyd, file: str, tmp_path: Path) -> None:
    text = (tmp_path / file).read_text().replace('version = "updated_at"\n', "")
    text += '\n[check]\npath = "/orders"\nversion = "digest"\nids_param = "ids"\nitems = "data"\n'
    (tmp_path / "many.toml").write_text(text)
    found = tallyd("check", "many.toml", "--credential-env", "ORDERS_KEY", "--json")
    assert (found.code, found.json["unchanged_calls"], found.json["changed_calls"]) == (0, 1, 101)


def test_check_fails_for_a_version_that_never_stays(tallyd: Tallyd, file: str, tmp_path: Path) -> None:
    text = (tmp_path / file).read_text().replace('version = "updated_at"\n', "")
    text += '\n[check]\npath = "/orders/{id}"\nparams = { fields = "served" }\nversion = "digest"\n'
    (tmp_path / "restless.toml").write_text(text)
    found = tallyd("check", "restless.toml", "--credential-env", "ORDERS_KEY", "--json")
    assert found.code == 1
    assert [tried["is_stable"] for tried in found.json["tried"]] == [False] * 3
    assert "it would be read again each time" in found.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[detail]", "[details]"), "error: details: no such key; use one of "),
        (('"/orders/{id}"', '"/orders"'), "error: detail.path: names no resource; put {id} where the id belongs"),
        (("http://127.0.0.1", "http://api.example.com"), "error: base_url: http://api.example.com"),
        (('"/orders/{id}"', "3"), "error: detail.path: expected `str`, got `int`; give the path, with {id} in it"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_sent(
    tallyd: Tallyd, file: str, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(*change))
    for command in (("check",), ("add", "--tenant", "acme")):
        found = tallyd(*command, file, "--credential-env", "ORDERS_KEY")
        assert (found.code, found.out) == (2, "")
        assert found.err.startswith(message)


def test_a_key_that_the_api_refuses_is_told_and_not_shown(
    tallyd: Tallyd, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WRONG_KEY", "very-wrong-key")
    tallyd("tenants", "add", "acme")
    for command in (("check",), ("add", "--tenant", "acme")):
        found = tallyd(*command, file, "--credential-env", "WRONG_KEY")
        assert found.code == 1
        assert "401" in found.err
        assert "very-wrong-key" not in found.err


def test_ids_of_a_file_are_read_where_there_is_no_list(tallyd: Tallyd, api: str, tmp_path: Path) -> None:
    control(api, "count=120")
    (tmp_path / "ids.txt").write_text("\n".join(f"r{n}" for n in range(110)) + "\n\n")
    text = (
        f'name = "some"\nbase_url = "{api}"\nids = ["r119"]\nids_file = "ids.txt"\n[detail]\npath = "/orders/{{id}}"\n'
    )
    (tmp_path / "some.toml").write_text(text)
    tallyd("tenants", "add", "acme")
    assert tallyd("add", "some.toml", "--tenant", "acme", "--credential-env", "ORDERS_KEY").code == 0
    found = tallyd("sync", "--json").json
    assert (found["resources"], found["changed"], found["calls"]) == (111, 111, 111)
    (tmp_path / "some.toml").write_text(text.replace("ids.txt", "none.txt"))
    missing = tallyd("check", "some.toml", "--credential-env", "ORDERS_KEY")
    assert (missing.code, missing.err.startswith("error: ids_file: cannot read ")) == (2, True)


def test_what_failed_makes_the_command_fail_and_is_listed(tallyd: Tallyd, file: str, api: str) -> None:
    control(api, "bad=r5")
    tallyd("tenants", "add", "acme")
    tallyd("add", file, "--tenant", "acme", "--credential-env", "ORDERS_KEY")
    found = tallyd("sync", "--json")
    assert (found.code, found.json["failed"], found.json["changed"]) == (1, 1, 119)
    nothing = tallyd("sync", "--tenant", "nobody")
    assert (nothing.code, nothing.err) == (
        2, "error: scope: there is no active collection; see `tallyd resources list`\n",
    )  # fmt: skip
