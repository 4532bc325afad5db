"""The command line's edges: exit codes, one clear line per error, no traceback for what is expected."""

import subprocess
import sys

import pytest

from daemon import __version__
from daemon.cli.main import main


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALLYD_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["usage", "--sinc", "x"], "error: No such option: --sinc"),
        (["frobnicate"], "error: No such command 'frobnicate'"),
        (["tenants", "add"], "error: Missing argument 'name'; see `tallyd tenants add --help`"),
        (
            ["usage", "--since", "2026-11-22T10:00:00"],
            "error: --since: '2026-11-22T10:00:00' has no time zone; write it",
        ),
        (["usage", "--as-of", "now"], "error: --as-of: 'now' is no time"),
        (["spend", "--since", "2026-02-01", "--until", "2026-01-01"], "error: --until: 2026-01-01 is before"),
        (["tick", "--slot", "2026-11-22T10:00"], "error: --slot: "),
        (["poll"], "error: scope: is to be given in exactly one way; pass one of --all, --tenant or --connection"),
        (["poll", "--all", "--tenant", "x"], "error: scope: "),
        (["backfill", "--from", "2026-02-01", "--to", "2026-01-01"], "error: --to: 2026-01-01 is not after --from"),
        (["connections", "pause", "main"], "error: TENANT/NAME: 'main' is no connection; write it as TENANT/NAME"),
        (["connections", "set", "a/b", "api"], "error: KEY=VALUE: 'api' is no setting"),
        (
            ["connections", "add", "--tenant", "a", "--provider", "openai", "--name", "b"],
            "error: credential: is to be given in exactly one way",
        ),
        (["dlq", "replay"], "error: ID: is to be given, or --all"),
        (["dlq", "drop", "7", "--all"], "error: ID: "),
        (["dlq", "show", "x"], "error: ID: 'x' is no id of a dead letter; see `tallyd dlq list`"),
        (["tokens", "add", "x", "--limit", "retries"], "error: --limit: 'retries' "),
        (["queue", "cancel", "x"], "error: MSG_ID: 'x' is no id of a message; write it as msg_"),
        (["queue", "messages", "--state", "x"], "error: Invalid value for '--state'"),
        (["groups", "audit", "--timeout", "0"], "error: Invalid value for '--timeout'"),
        (["dev", "--port", "65536"], "error: Invalid value for '--port'"),
        (["--log-level", "loud", "config", "check"], "error: log_level: is 'loud'; choose one of"),
        (["--config", "/nowhere.toml", "status"], "error: config: cannot read /nowhere.toml"),
        (["--database-url", "mysql://x", "status"], "error: database_url: is no Postgres URL"),
        (["simulate", "--now", "soon"], "error: --now: "),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(error)


def test_every_problem_of_the_settings_has_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYD_TICK_SECOND", "1")
    monkeypatch.setenv("TALLYD_DRAIN_S", "x")
    assert main(["config", "check"]) == 2
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [" TALLYD_TICK_SECOND", " drain_s"]


def test_unreachable_database_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYD_DATABASE_URL", "postgresql://x:hidden@127.0.0.1:1/x")
    monkeypatch.setenv("TALLYD_SECRET_KEY", "a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=")
    assert main(["tenants", "list"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: database")
    assert len(captured.err.splitlines()) == 1
    assert "hidden" not in captured.err
    assert main(["doctor", "--json"]) == 1
    assert '"ok": false' in capsys.readouterr().out


def test_interrupt_is_130_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("daemon.app.new_key", interrupted)
    assert main(["config", "new-key"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_error_text_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["connections", "pause", "\x1b[2Jx"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_both_ways_to_start_and_nothing_heavy_for_help() -> None:
    code = (
        "import sys; from daemon.cli.main import main; main(['--help']); "
        "print(sorted({'asyncpg', 'httpx', 'aiohttp', 'genai_prices', 'rich', 'pydantic', 'structlog'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")
    version = subprocess.run([sys.executable, "-m", "daemon", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"tallyd {__version__}\n"


def test_every_command_has_a_help_sentence_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    groups = {
        "tenants": ["add", "list", "remove"],
        "connections": ["add", "list", "test", "pause", "resume", "set-credential", "remove", "import", "set"],
        "dlq": ["list", "show", "replay", "drop"],
        "db": ["start", "stop", "status", "migrate", "rotate-key"],
        "queue": ["stats", "messages", "list", "cancel"],
        "tokens": ["add", "list", "revoke"],
        "keys": ["show", "rotate"],
        "schedules": ["list", "show", "pause", "resume", "delete"],
        "groups": ["list", "show", "audit"],
        "config": ["show", "check", "new-key"],
    }
    commands = [[group, verb] for group, verbs in groups.items() for verb in verbs]
    commands += [
        [verb] for verb in ("tick", "poll", "usage", "spend", "gaps", "backfill", "status", "doctor", "demo", "dev")
    ]
    for command in commands:
        assert main([*command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out, command
