"""The documentation names what the code has: settings, commands, events, errors, tables, tests. Links resolve."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from daemon import config
from daemon.cli.main import app
from daemon.domain import errors
from daemon.queue.qstash import CALLBACK_PATH, FAILURE_PATH, WORKER_PATH
from daemon.simulator.faults import KINDS
from daemon.telemetry.metrics import REGISTRY
from daemon.triggers.qstash import ORCHESTRATE_PATH, QUOTA_PATH, QUOTA_PATH_ALIAS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md")))
LEVELS = {"debug", "info", "warning", "error", "exception"}
EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def group(command: object) -> dict[str, object]:
    """The subcommands of a click command: typer may carry a click of its own, so the type is told by what it has."""
    found: dict[str, object] = getattr(command, "commands", {})
    return found


def leaves(command: object, path: tuple[str, ...] = ("tallyd",)) -> Iterator[tuple[tuple[str, ...], object]]:
    if not group(command):
        yield path, command
    for name, child in group(command).items():
        yield from leaves(child, (*path, name))


def options(command: object) -> set[str]:
    return {opt for param in command.params for opt in (*param.opts, *param.secondary_opts) if opt.startswith("--")}


TREE = typer.main.get_command(app)
COMMANDS = dict(leaves(TREE))


# ── Settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "default", "meaning"), list(config.described()), ids=lambda value: str(value)[:30])
def test_setting_is_in_the_reference_with_its_default_and_meaning(name, default, meaning) -> None:
    shown = "unset" if default is None else str(default).lower() if isinstance(default, bool) else default
    if name == "data_dir":
        shown = "the user's data folder"
    assert f"| `{name}` | {shown} | {meaning} |" in page("reference/config.md")


def test_reference_names_no_setting_that_is_gone() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", page("reference/config.md"), re.MULTILINE)
    assert listed == [name for name, _, _ in config.described()]


# ── Commands ────────────────────────────────────────────────────────────────────────────────────


def sections() -> dict[str, str]:
    parts = re.split(r"^### `(tallyd [^`]+)`\n", page("reference/cli.md"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_command_is_in_the_reference_with_every_option(path) -> None:
    text = sections().get(" ".join(path), "")
    assert text, f"docs/reference/cli.md lacks: ### `{' '.join(path)}`"
    missing = {option for option in options(COMMANDS[path]) - {"--help"} if f"`{option}" not in text}
    assert not missing


def test_reference_names_no_command_that_is_gone() -> None:
    assert set(sections()) == {" ".join(path) for path in COMMANDS}


def shell_lines() -> Iterator[tuple[str, str]]:
    """Every line of a shell block, and of a transcript what follows its prompt."""
    for path in PAGES:
        for kind, body in FENCE.findall(path.read_text("utf-8")):
            for line in body.replace("\\\n", " ").splitlines():
                if kind == "sh":
                    yield str(path.relative_to(ROOT)), line
                elif line.startswith("$ "):
                    yield str(path.relative_to(ROOT)), line[2:]


CALLS = [
    (where, words[words.index("tallyd") + 1 :])
    for where, line in shell_lines()
    if "tallyd" in (words := shlex.split(line, comments=True)) and all("=" in w for w in words[: words.index("tallyd")])
]


@pytest.mark.parametrize(("where", "words"), CALLS, ids=lambda value: " ".join(value) if type(value) is list else value)
def test_command_in_the_docs_exists_with_its_options(where, words) -> None:
    command, known = TREE, options(TREE)
    rest = iter(words)
    for word in rest:
        if word in group(command):
            command = group(command)[word]
            known |= options(command)
        elif word.startswith("--"):
            assert word.partition("=")[0] in known, where
        elif word in ("|", "<", ">", "&", "&&", ";"):
            break
        else:
            assert not group(command) or command is TREE, f"{where}: no command {word}"
            if command is TREE:  # the value of a global option
                assert words[words.index(word) - 1].startswith("--"), f"{where}: no command {word}"


def test_make_targets_in_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {line.split()[1] for _, line in shell_lines() if line.startswith("make ")}
    assert {"demo", "test"} <= named <= targets


# ── Events ──────────────────────────────────────────────────────────────────────────────────────


def logged() -> Iterator[tuple[str, str, set[str]]]:
    """(event, level, fields) of each log call in the code; the level is "level" where it is chosen at run time."""
    for path in (ROOT / "daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            level = getattr(node.func, "attr", getattr(node.func, "id", ""))
            event = node.args[0].value
            is_log = level in LEVELS or level == "level"
            if is_log and isinstance(event, str) and EVENT.fullmatch(event):
                yield event, level, {keyword.arg for keyword in node.keywords if keyword.arg}


def listed_events() -> dict[str, tuple[str, str]]:
    rows = re.findall(
        r"^\| `([a-z_]+\.[a-z_]+)` \| ([a-z, ]+) \| (.*?) \| .*\|$", page("reference/events.md"), re.MULTILINE
    )
    rows += re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| ([a-z, ]+) \| (\|)", page("reference/events.md"), re.MULTILINE)
    return {event: (level, fields) for event, level, fields in rows}


def test_event_is_in_the_reference_with_level_and_fields() -> None:
    listed = listed_events()
    found = list(logged())
    assert len(found) > 20, "the walk finds no log calls any more"
    for event, level, fields in found:
        assert event in listed, f"docs/reference/events.md lacks {event}"
        levels, named = listed[event]
        assert level in (*levels.split(", "), "level"), event
        assert {field for field in fields if f"`{field}`" not in named} == set(), event


def test_reference_names_no_event_that_is_gone() -> None:
    ours = {event for event in listed_events() if not event.startswith("stamina.")}
    assert ours == {event for event, _, _ in logged()}


# ── Errors, schema, simulator ───────────────────────────────────────────────────────────────────


def test_every_error_is_in_the_reference() -> None:
    names = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.DaemonError) and kind is not errors.DaemonError
    }
    assert {name for name in names if f"| `{name}` |" not in page("reference/errors.md")} == set()


def test_metrics_and_their_labels_are_in_the_reference_and_no_others() -> None:
    counters = {
        f"{metric.name}_total" if metric.type == "counter" else metric.name: set(labels)
        for collector, names in REGISTRY._collector_to_names.items()
        if (labels := getattr(collector, "_labelnames", None)) is not None
        for metric in collector.collect()
    }
    source = "".join((ROOT / path).read_text("utf-8") for path in ("daemon/db/figures.py", "daemon/service.py"))
    gauges = set(re.findall(r'"(tallyd_\w+)"', source))
    rows = re.findall(r"^\| (`tallyd_.*?) \| (.*?) \|", page("reference/metrics.md"), re.MULTILINE)
    told = {
        name: set(re.findall(r"`(\w+)`", labels)) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert told.keys() == counters.keys() | gauges
    assert {name: told[name] for name in counters} == counters


def test_routes_are_in_the_reference_and_no_others() -> None:
    signed = {ORCHESTRATE_PATH, WORKER_PATH, CALLBACK_PATH, FAILURE_PATH, QUOTA_PATH, QUOTA_PATH_ALIAS}
    paths = signed | {"/healthz", "/readyz", "/metrics"}
    text = page("reference/http.md")
    assert set(re.findall(r"^\| `(?:GET )?(/[\w/-]+)`", text, re.MULTILINE)) == paths


def test_every_table_is_in_the_reference() -> None:
    schema = (ROOT / "daemon/db/schema.sql").read_text("utf-8")
    tables = set(re.findall(r"create (?:table|view) (\w+)", schema))
    assert len(tables) > 10
    assert {table for table in tables if f"`{table}`" not in page("reference/schema.md")} == set()


def test_every_fault_of_the_simulator_is_in_the_reference() -> None:
    assert {kind for kind in KINDS if f"`{kind}`" not in page("reference/simulator.md")} == set()


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    names = re.findall(r'"([a-z-]+)', block[1])
    assert {name for name in names if f"`{name}`" not in page("explanation/dependencies.md")} == set()


# ── Links and names ─────────────────────────────────────────────────────────────────────────────


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(path) -> None:
    text = FENCE.sub("", path.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there.read_text("utf-8")), target


def test_named_tests_exist() -> None:
    """A page that says which test forbids a schedule must not outlive that test."""
    for path in PAGES:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text("utf-8")):
            source = (ROOT / file).read_text("utf-8")
            assert not name or f"def {name}(" in source, f"{path.name}: {file}::{name}"


def test_every_page_is_reached_from_the_readme() -> None:
    """A page that nobody links to is not read."""
    text = (ROOT / "README.md").read_text("utf-8")
    lonely = [p.relative_to(ROOT) for p in PAGES[1:] if p.parent.name != "adr" and str(p.relative_to(ROOT)) not in text]
    assert lonely == []
