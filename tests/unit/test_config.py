"""Settings: where a value comes from, and that every problem is told at once."""

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config import Settings, load
from daemon.domain.connection import Secret
from daemon.domain.errors import ConfigError

KEY = base64.b64encode(b"k" * 32).decode()
URL = "postgresql://me:pass@db.example/tallyd"


def problems_of(**given_: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**given_)  # type: ignore[arg-type]
    return caught.value.problems


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Away from a tallyd.toml that someone may have."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_stand_without_anything() -> None:
    settings = load({}, {})
    assert (settings.database_url, settings.tick_seconds, settings.batch_size) == (None, 300, 100)
    assert settings.data_dir.name == "tallyd"
    assert {origin for _, _, origin in settings.shown()} == {"default"}


def test_flag_beats_environment_beats_file_beats_default(elsewhere: Path) -> None:
    (elsewhere / "tallyd.toml").write_text("concurrency = 7\nbatch_size = 50\ntick_seconds = 60\n")
    env = {"TALLYD_CONCURRENCY": "8", "TALLYD_BATCH_SIZE": "60"}
    settings = load({"concurrency": "9", "data_dir": None}, env)
    assert (settings.concurrency, settings.batch_size, settings.tick_seconds, settings.drain_s) == (9, 60, 60, 30.0)
    origins = {name: origin for name, _, origin in settings.shown()}
    assert origins["concurrency"] == "flag --concurrency"
    assert origins["batch_size"] == "env TALLYD_BATCH_SIZE"
    assert origins["tick_seconds"] == "file tallyd.toml"
    assert origins["drain_s"] == "default"


def test_every_problem_of_every_source_is_told_at_once(elsewhere: Path) -> None:
    file = elsewhere / "mine.toml"
    file.write_text('batch_sice = 5\ndrain_s = "soon"\nretention_dead_days = -1\n')
    env = {
        "TALLYD_TICK_SECOND": "1",
        "TALLYD_TRIGGER": "cron",
        "TALLYD_CONCURRENCY": "0",
        "TALLYD_DATABASE_URL": "mysql://x",
        "TALLYD_SECRET_KEY": "short",
        "TALLYD_CONFIG": str(file),
    }
    problems = problems_of(flags={"log_level": "loud"}, env=env)
    expected = (
        "TALLYD_TICK_SECOND: unknown variable; did you mean TALLYD_TICK_SECONDS?",
        "batch_sice: unknown key in",
        "database_url: is no Postgres URL; write it as postgresql://",
        "secret_key: key 1 is no base64; make one with `tallyd config new-key`",
        "trigger: is 'cron'; choose one of internal, qstash, both",
        "concurrency: is '0'; give a whole number from 1 to 256",
        "drain_s: is 'soon'; give seconds from 0 to 3600",
        "retention_dead_days: is -1; give days",
        "log_level: is 'loud'; choose one of debug, info, warning, error",
    )
    assert len(problems) == len(expected)
    for start, problem in zip(expected, problems, strict=False):
        assert problem.startswith(start)


def test_database_of_ones_own_needs_a_key_and_the_error_says_how_to_make_one() -> None:
    (problem,) = problems_of(env={"TALLYD_DATABASE_URL": URL})
    assert problem.startswith("secret_key: not set")
    assert "tallyd config new-key" in problem
    assert load(env={"TALLYD_DATABASE_URL": URL, "TALLYD_SECRET_KEY": KEY}).database_url == Secret(URL)


@pytest.mark.parametrize(
    "key", ["", KEY[:-4], KEY + ",", f"{KEY},{KEY}", f"{KEY},!!!", base64.b64encode(b"x" * 31).decode()]
)
def test_bad_key_is_refused_without_being_quoted(key: str) -> None:
    (problem,) = problems_of(env={"TALLYD_SECRET_KEY": key})
    assert problem.startswith("secret_key: ")
    assert KEY[:20] not in problem


def test_secret_may_stand_in_a_file(elsewhere: Path) -> None:
    (elsewhere / "key").write_text(KEY + "\n")
    settings = load(env={"TALLYD_SECRET_KEY_FILE": str(elsewhere / "key")})
    assert settings.secret_key == Secret(KEY)
    assert settings.origins["secret_key"] == "env TALLYD_SECRET_KEY_FILE"
    (problem,) = problems_of(env={"TALLYD_SECRET_KEY_FILE": "/nowhere"})
    assert problem.startswith("secret_key: cannot read /nowhere")
    (problem,) = problems_of(env={"TALLYD_SECRET_KEY_FILE": str(elsewhere / "key"), "TALLYD_SECRET_KEY": KEY})
    assert "both set" in problem
    assert problems_of(env={"TALLYD_DRAIN_S_FILE": "x"})[0].startswith("TALLYD_DRAIN_S_FILE: unknown variable")


def test_secret_may_be_a_systemd_credential(elsewhere: Path) -> None:
    (elsewhere / "secret_key").write_text(KEY)
    env = {"CREDENTIALS_DIRECTORY": str(elsewhere)}
    assert load(env=env).origins["secret_key"] == "systemd credential secret_key"
    other = base64.b64encode(b"o" * 32).decode()
    assert load(env={**env, "TALLYD_SECRET_KEY": other}).secret_key == Secret(other)


def test_secrets_are_never_shown() -> None:
    env = {"TALLYD_DATABASE_URL": URL, "TALLYD_SECRET_KEY": KEY, "TALLYD_HTTP_PROXY": "http://u:hidden@proxy:3128"}
    settings = load(env=env)
    text = repr(settings) + str(list(settings.shown()))
    for secret in (KEY, "pass", "hidden"):
        assert secret not in text
    shown = {name: value for name, value, _ in settings.shown()}
    assert (shown["database_url"], shown["secret_key"], shown["http_proxy"]) == ("***", "***", "***")


@pytest.mark.parametrize(
    ("content", "start"),
    [("a = = 1", "config: "), ("\xff", "config: "), ("[tick]\nseconds = 3", "tick: unknown key")],
)
def test_file_that_is_no_settings_is_named(elsewhere: Path, content: str, start: str) -> None:
    file = elsewhere / "x.toml"
    file.write_bytes(content.encode("latin-1"))
    (problem,) = problems_of(env={}, toml_path=file)
    assert problem.startswith(start)
    assert "x.toml" in problem


def test_missing_file_that_was_asked_for_is_an_error() -> None:
    assert problems_of(env={}, toml_path=Path("/nowhere.toml"))[0].startswith("config: cannot read /nowhere.toml")
    assert problems_of(env={"TALLYD_CONFIG": "/nowhere.toml"})[0].startswith("config: cannot read /nowhere.toml")


def test_values_that_contradict_each_other() -> None:
    assert "does not divide a day" in problems_of(env={"TALLYD_TICK_SECONDS": "7"})[0]
    contradiction = {"TALLYD_DATABASE_POOL_MIN": "9", "TALLYD_DATABASE_POOL_MAX": "3"}
    assert problems_of(env=contradiction)[0].startswith("database_pool_min: 9 is above")


def test_none_means_for_ever_and_ssl_cert_file_counts(elsewhere: Path) -> None:
    (elsewhere / "ca.pem").write_text("x")
    settings = load(env={"TALLYD_RETENTION_TICKS_DAYS": "none", "SSL_CERT_FILE": str(elsewhere / "ca.pem")})
    assert settings.retention_ticks_days is None
    assert settings.http_ca_bundle == elsewhere / "ca.pem"


def test_variables_of_the_tests_and_of_others_are_left_alone() -> None:
    assert isinstance(
        load(env={"TALLYD_TEST_DATABASE_URL": "x", "TALLYD_EXIT_EU": "u:p", "PATH": "y", "_TALLYD_X": "z"}), Settings
    )


@given(
    st.sampled_from(["TALLYD_DRAIN_S", "TALLYD_CONCURRENCY", "TALLYD_ALLOW_INSECURE", "TALLYD_LOG_FORMAT"]), st.text()
)
def test_any_text_is_taken_or_refused_by_name(variable: str, text: str) -> None:
    name = variable.removeprefix("TALLYD_").lower()
    try:
        value = getattr(load({}, {variable: text}), name)
    except ConfigError as error:
        named = [problem.startswith(f"{name}: ") for problem in error.problems]
    else:
        named = [value is not None]
    assert named
    assert all(named)


# ── Listener and QStash ─────────────────────────────────────────────────────────────────────────

KEYS = {"QSTASH_CURRENT_SIGNING_KEY": "sig_a", "QSTASH_NEXT_SIGNING_KEY": "sig_b"}
PUBLIC = {"TALLYD_PUBLIC_URL": "https://tallyd.example.com"}


def test_a_whole_qstash_configuration_is_taken() -> None:
    env = {"TALLYD_TRIGGER": "both", "QSTASH_TOKEN": "hidden-token", **KEYS, **PUBLIC}
    chosen = load(env=env)
    assert chosen.signing_keys == {"": (Secret("sig_a"), Secret("sig_b"))}
    assert chosen.qstash_token is not None
    assert "hidden-token" not in repr(list(chosen.shown()))
    assert {name: origin for name, _, origin in chosen.shown()}["qstash_token"] == "env QSTASH_TOKEN"


def test_regions_have_keys_of_their_own() -> None:
    env = {f"EU_CENTRAL_1_{name}": value for name, value in KEYS.items()} | {"TALLYD_TRIGGER": "qstash"} | PUBLIC
    assert set(load(env=env).signing_keys) == {"eu_central_1"}


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"TALLYD_TRIGGER": "qstash", **PUBLIC}, "qstash_current_signing_key: not set, and trigger qstash needs it"),
        ({"TALLYD_TRIGGER": "both", **KEYS}, "public_url: not set, and trigger both needs it"),
        ({"QSTASH_CURRENT_SIGNING_KEY": "sig_a"}, "set QSTASH_NEXT_SIGNING_KEY too"),
        ({"US_EAST_1_QSTASH_NEXT_SIGNING_KEY": "x"}, "set US_EAST_1_QSTASH_CURRENT_SIGNING_KEY too"),
        (
            {"TALLYD_TRIGGER": "qstash", **KEYS, "TALLYD_PUBLIC_URL": "http://tallyd.example.com"},
            "cannot be reached by",
        ),
        ({"TALLYD_TRIGGER": "qstash", **KEYS, "TALLYD_PUBLIC_URL": "https://10.0.0.1"}, "cannot be reached by"),
        ({"TALLYD_TRIGGER": "qstash", **KEYS, "TALLYD_PUBLIC_URL": "https://localhost:8080"}, "cannot be reached by"),
        ({"TALLYD_TRIGGER": "qstash", **KEYS, **PUBLIC, "TALLYD_LISTEN": "none"}, "listen: none, but trigger qstash"),
        (
            {"TALLYD_TRIGGER": "both", **KEYS, **PUBLIC, "TALLYD_FALLBACK_GRACE_S": "300"},
            "fallback_grace_s: 300 is more than half a tick",
        ),
        ({"TALLYD_ROLE": "listener", "TALLYD_LISTEN": "none"}, "role listener does nothing else"),
        ({"TALLYD_LISTEN_PRIVATE": "127.0.0.1:8080"}, "listen_private: is 127.0.0.1:8080, as listen is"),
        ({"TALLYD_LISTEN": "8080"}, "write HOST:PORT"),
        ({"TALLYD_PUBLIC_URL": "https://me@tallyd.example/?a=1"}, "without query or user"),
        ({"TALLYD_QSTASH_TOKEN": "x"}, "its name is QSTASH_TOKEN"),
        ({"TALLYD_PUBLIC_URL": "https://tallyd.example:99999"}, "write it as https://"),
        ({"TALLYD_PUBLIC_URL": "https://tallyd.example/a b"}, "write it as https://"),
        ({"QSTASH_URL": "http://qstash.example.com"}, "would show the token"),
        (
            {
                "TALLYD_TRIGGER": "qstash",
                **PUBLIC,
                "QSTASH_URL": "https://qstash-us-east-1.upstash.io",
                **{f"EU_CENTRAL_1_{name}": value for name, value in KEYS.items()},
            },
            "us_east_1_qstash_current_signing_key: not set",
        ),
        ({"TALLYD_TICK_COMPLETE_RATIO": "2"}, "give a ratio from 0 to 1"),
        ({"TALLYD_QSTASH_CRON": "* * * *"}, "4 fields"),
        ({"TALLYD_PUSH_ALLOW": ""}, "push_allow: is empty; unset it, or give a text"),
    ],
)
def test_half_a_service_configuration_is_named(env: dict[str, str], says: str) -> None:
    assert any(says in problem for problem in problems_of(env=env)), problems_of(env=env)


def test_a_local_server_in_place_of_the_cloud_may_deliver_anywhere() -> None:
    local = {"TALLYD_PUBLIC_URL": "http://127.0.0.1:8080", "QSTASH_URL": "http://127.0.0.1:9000"}
    assert load(env={"TALLYD_TRIGGER": "qstash", **KEYS, **local}).qstash_url == "http://127.0.0.1:9000"
    cloud = {**local, "QSTASH_URL": "https://qstash-us-east-1.upstash.io"}
    assert "cannot be reached" in problems_of(env={"TALLYD_TRIGGER": "qstash", **KEYS, **cloud})[0]


def test_a_worker_needs_no_keys_that_it_never_uses() -> None:
    assert load(env={"TALLYD_TRIGGER": "qstash", "TALLYD_ROLE": "worker"}).signing_keys == {}
    told = problems_of(env={"TALLYD_TRIGGER": "qstash", "TALLYD_ROLE": "worker", "QSTASH_TOKEN": "t"})
    assert told[0].startswith("public_url: not set")


def test_variables_of_others_may_be_empty(tmp_path: Path) -> None:
    """Compose files and shells pass on what is not set; and a secret may stand in a file under any name."""
    path = tmp_path / "token"
    path.write_text("tok\n")
    chosen = load(
        env={"QSTASH_URL": "", "QSTASH_CURRENT_SIGNING_KEY": "", "QSTASH_TOKEN": "", "QSTASH_TOKEN_FILE": str(path)}
    )
    assert (chosen.qstash_url, chosen.signing_keys) == (None, {})
    assert chosen.qstash_token == Secret("tok")
    both = problems_of(env={"QSTASH_TOKEN": "a", "QSTASH_TOKEN_FILE": str(path)})
    assert "keep one" in both[0]
