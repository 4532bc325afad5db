"""What `tallyd dev` refuses to start with: its tokens are public, so it stays on this machine and by its own database."""

import pytest

from daemon.cli import dev
from daemon.cli.main import main
from daemon.config import Settings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TALLYD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("QSTASH_DEV_PORT", raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings with which the daemon would have run."""
    made: list[Settings] = []

    def run(settings: Settings, **_: object) -> int:
        made.append(settings)
        return 0

    monkeypatch.setattr("daemon.service.run", run)
    return made


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        (
            "TALLYD_DATABASE_URL", "postgresql://x:hidden@db/x",
            "error: database_url: is set (from env TALLYD_DATABASE_URL), and `tallyd dev` lets public tokens in",
        ),
        ("TALLYD_LISTEN", "0.0.0.0:8080", "error: listen: 0.0.0.0:8080 (from env TALLYD_LISTEN) is open to others"),
        ("TALLYD_LISTEN", "tallyd.example:80", "error: listen: tallyd.example:80 (from env TALLYD_LISTEN) is open"),
        ("QSTASH_DEV_PORT", "x", "error: Invalid value for '--port'"),
        ("TALLYD_PORT", "1", "error: TALLYD_PORT: unknown variable"),
    ],
)  # fmt: skip
def test_what_would_let_it_out_is_refused(
    name: str,
    value: str,
    error: str,
    served: list[Settings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["dev"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(error)
    assert "hidden" not in captured.err
    assert len(captured.err.splitlines()) == 1
    assert served == []


def test_every_road_to_a_database_of_value_is_refused(
    tmp_path, served: list[Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tallyd.toml").write_text('database_url = "postgresql://x@db/x"\n')
    assert main(["dev"]) == 2
    assert main(["--database-url", "postgresql://x@db/x", "dev"]) == 2
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == ["error: database_url: is set"] * 2
    assert served == []


def test_settings_of_production_do_not_reach_it(
    tmp_path, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "TALLYD_ROLE": "worker",
        "TALLYD_LISTEN_PRIVATE": "0.0.0.0:9090",
        "TALLYD_PUBLIC_URL": "https://tallyd.example",
        "TALLYD_TRIGGER": "both",
        "TALLYD_SECRET_KEY": "no key",
        "QSTASH_TOKEN": "token",
        "QSTASH_URL": "http://127.0.0.1:8080",
        "QSTASH_NEXT_SIGNING_KEY": "sig_x",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["dev"]) == 0
    [settings] = served
    assert (settings.role, settings.trigger, str(settings.listen)) == ("all", "internal", "127.0.0.1:8080")
    assert settings.listen_private is None
    assert settings.public_url is None
    assert settings.qstash_token is None
    assert settings.secret_key is None
    assert settings.signing_keys == {}
    assert settings.push_allow_private
    assert settings.drain_s == dev.DRAIN_S
    assert settings.data_dir == tmp_path / "data" / "dev"


def test_port_is_the_flag_then_qstash_own_variable_then_the_listener(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYD_LISTEN", "localhost:1")
    main(["dev"])
    monkeypatch.setenv("QSTASH_DEV_PORT", "2")
    main(["dev"])
    main(["dev", "-port", "3"])
    main(["dev", "--port", "4"])
    assert [str(settings.listen) for settings in served] == [f"127.0.0.1:{port}" for port in (1, 2, 3, 4)]
