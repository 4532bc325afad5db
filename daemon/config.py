# ruff: noqa: RUF009 -- every default is made by `_setting`, which returns a dataclass field
"""Settings: read once, checked whole, frozen.

Order: flag, environment (`TALLYD_...`), TOML file, default. QStash's own variables keep QStash's names. A secret may also
stand in a file that `..._FILE` names, or be a systemd credential of the setting's name. Parsed by hand: pydantic-settings takes 0.35 s to import, more
than a whole `tallyd --help`, and knows neither origins nor fixes.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from daemon.domain.account import Limits
from daemon.domain.address import Address, is_private, parse_address
from daemon.domain.connection import Secret
from daemon.domain.errors import ConfigError

PREFIX = "TALLYD_"
TOML_PATHS = (Path("tallyd.toml"), Path("/etc/tallyd/tallyd.toml"))
NOT_SETTINGS = ("CONFIG",)
FOREIGN_PREFIXES = ("TEST_", "BENCH_", "EXIT_")  # ours too: the test suite's, the benchmarks', credentials of exits
_LIMITS = Limits()
REGIONS = ("eu_central_1", "us_east_1")
"""QStash's regions, each with a pair of signing keys of its own."""

Parse = Callable[[object], object]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is empty; unset it, or give a text" if isinstance(value, str) else "is no text; give a text")
    if "\0" in value:
        raise ValueError("holds a NUL character; remove it")
    return value.strip()


def _keys(value: object) -> Secret:
    from daemon.db.secrets import parse_keys  # noqa: PLC0415 -- cryptography is slow to import

    text = _text(value)
    parse_keys(text)
    return Secret(text)


def _database_url(value: object) -> Secret:
    text = _text(value)
    if not text.startswith(("postgres://", "postgresql://")):
        raise ValueError("is no Postgres URL; write it as postgresql://user:password@host:5432/name")
    return Secret(text)


def _proxy(value: object) -> Secret:
    text = _text(value)
    if not text.startswith(("http://", "https://")):
        raise ValueError("is no proxy URL; write it as http://host:3128")
    return Secret(text)


def _path(value: object) -> Path:
    return Path(_text(value)).expanduser().absolute()


def _existing_file(value: object) -> Path:
    path = _path(value)
    if not path.is_file():
        raise ValueError(f"names no file ({path}); give the path of one")
    return path


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    text = str(value).strip().lower()
    if text not in known:
        raise ValueError(f"is {text!r}; write true or false")
    return known[text]


def _whole(low: int, high: int) -> Parse:
    def parse(value: object) -> int:
        text = str(value).strip()
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            raise ValueError(f"is {value!r}; give a whole number from {low} to {high}")
        return int(text)

    return parse


def _seconds(low: float, high: float) -> Parse:
    def parse(value: object) -> float:
        try:
            number = float("nan") if isinstance(value, bool) else float(str(value).strip())
        except ValueError:
            number = float("nan")
        if not low <= number <= high:  # nan fails this too
            raise ValueError(f"is {value!r}; give seconds from {low:g} to {high:g}")
        return number

    return parse


def _days(value: object) -> int | None:
    if isinstance(value, str) and value.strip().lower() == "none":
        return None
    try:
        return cast("int", _whole(1, 36_500)(value))
    except ValueError:
        raise ValueError(f"is {value!r}; give days from 1 to 36500, or none to keep everything") from None


def _one_of(*choices: str) -> Parse:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError(f"is {value!r}; choose one of {', '.join(choices)}")
        return str(value)

    return parse


def _ratio(value: object) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(str(value).strip())
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise ValueError(f"is {value!r}; give a ratio from 0 to 1")
    return number


def _address(value: object) -> Address | None:
    text = _text(value)
    if text.lower() == "none":
        return None
    try:
        return parse_address(text)
    except ValueError:
        raise ValueError(f"is {text!r}; write HOST:PORT such as 127.0.0.1:8080 or [::1]:8080, or none") from None


def _url(value: object) -> str:
    text = _text(value)
    parts = urlsplit(text)
    try:
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is none
        is_good = False
    if not is_good or parts.query or parts.fragment or parts.username or not re.fullmatch(r"[!-~]+", text):
        raise ValueError(f"is {text!r}; write it as https://tallyd.example, without query or user")
    return text.rstrip("/")


def _secret(value: object) -> Secret:
    return Secret(_text(value))


def _networks(value: object) -> str:
    from daemon.domain.network import parse_allow  # noqa: PLC0415 -- needed where messages are delivered

    text = _text(value)
    parse_allow(text)
    return text


def _cron(value: object) -> str:
    from daemon.queue.cron import check_cron  # noqa: PLC0415 -- pulls in the time zones

    return check_cron(_text(value))


def _setting(default: object, parse: Parse, doc: str, *, is_secret: bool = False, env: str | None = None) -> Any:
    metadata = {"parse": parse, "doc": doc, "is_secret": is_secret, "env": env}
    return field(default=cast("Any", default), metadata=metadata)


def _signing_key(env: str, doc: str) -> Any:
    return _setting(None, _secret, doc, is_secret=True, env=env)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of tallyd with its effective value; `origins` tells where each came from."""

    database_url: Secret | None = _setting(
        None, _database_url, "Postgres to use; unset means the embedded one under data_dir", is_secret=True
    )
    data_dir: Path = _setting(Path(), _path, "folder of the embedded database and the generated key")
    secret_key: Secret | None = _setting(
        None,
        _keys,
        "32 bytes in base64 that seal the credentials; several by comma, the first encrypts",
        is_secret=True,
    )
    database_pool_min: int = _setting(1, _whole(0, 100), "connections to Postgres kept open")
    database_pool_max: int = _setting(10, _whole(2, 500), "connections to Postgres at most")
    statement_cache_size: int = _setting(
        100, _whole(0, 10_000), "prepared statements per connection; 0 behind PgBouncer in transaction mode"
    )

    role: Literal["all", "worker", "listener"] = _setting(
        "all", _one_of("all", "worker", "listener"), "what this process does: everything, all but /api, or only HTTP"
    )
    listen: Address | None = _setting(Address("127.0.0.1", 8080), _address, "HOST:PORT of the HTTP listener, or none")
    listen_private: Address | None = _setting(
        None, _address, "a second HOST:PORT that alone has /healthz, /readyz and /metrics"
    )
    public_url: str | None = _setting(None, _url, "where the listener is reached from outside; what QStash signs")
    metrics_token: Secret | None = _setting(
        None, _secret, "bearer token of /metrics; needed where the listener is not on loopback", is_secret=True
    )
    metrics_by_tenant: bool = _setting(False, _flag, "label spend, tokens and polls in /metrics with the tenant")

    trigger: Literal["internal", "qstash", "both"] = _setting(
        "internal", _one_of("internal", "qstash", "both"), "what starts ticks: internal, qstash or both"
    )
    tick_seconds: int = _setting(300, _whole(1, 86_400), "seconds from one tick to the next; divides a day")
    tick_complete_s: float = _setting(300.0, _seconds(1, 86_400), "seconds after which a tick's batches should be done")
    tick_complete_ratio: float = _setting(0.95, _ratio, "share of them below which the tick counts as incomplete")
    fallback_grace_s: float = _setting(
        30.0, _seconds(0, 3_600), "seconds that trigger both waits for QStash before it makes a slot's tick itself"
    )
    qstash_url: str | None = _setting(None, _url, "QStash's API; unset means its EU region", env="QSTASH_URL")
    qstash_token: Secret | None = _setting(
        None, _secret, "lets ticks of QStash hand their batches over to it", is_secret=True, env="QSTASH_TOKEN"
    )
    qstash_current_signing_key: Secret | None = _signing_key(
        "QSTASH_CURRENT_SIGNING_KEY", "verifies deliveries; with the next one"
    )
    qstash_next_signing_key: Secret | None = _signing_key(
        "QSTASH_NEXT_SIGNING_KEY", "verifies deliveries after a rotation"
    )
    eu_central_1_qstash_current_signing_key: Secret | None = _signing_key(
        "EU_CENTRAL_1_QSTASH_CURRENT_SIGNING_KEY", "the same, for deliveries from QStash's EU region alone"
    )
    eu_central_1_qstash_next_signing_key: Secret | None = _signing_key(
        "EU_CENTRAL_1_QSTASH_NEXT_SIGNING_KEY", "the same, after a rotation there"
    )
    us_east_1_qstash_current_signing_key: Secret | None = _signing_key(
        "US_EAST_1_QSTASH_CURRENT_SIGNING_KEY", "the same, for deliveries from QStash's US region alone"
    )
    us_east_1_qstash_next_signing_key: Secret | None = _signing_key(
        "US_EAST_1_QSTASH_NEXT_SIGNING_KEY", "the same, after a rotation there"
    )
    qstash_cron: str | None = _setting(None, _cron, "cron of the schedule in QStash; unset follows tick_seconds")
    qstash_retries: int = _setting(3, _whole(0, 20), "tries of QStash after the first one fails")
    qstash_handover_s: float = _setting(
        30.0, _seconds(1, 3_600), "seconds that a batch handed over to QStash waits before it runs without"
    )
    batch_size: int = _setting(100, _whole(1, 1_000), "connections in one poll batch")
    concurrency: int = _setting(4, _whole(1, 256), "jobs that one process runs at once")
    batch_budget_s: float = _setting(240.0, _seconds(1, 3_600), "seconds after which a batch hands on its rest")
    subjob_budget_s: float = _setting(20.0, _seconds(1, 600), "seconds for one source of one connection")
    subjob_tries: int = _setting(3, _whole(1, 10), "tries of a request inside the sub-job")
    drain_s: float = _setting(30.0, _seconds(0, 3_600), "seconds that running jobs get after SIGTERM")

    poll_concurrency: int = _setting(64, _whole(1, 2_000), "requests to providers in flight, whole process")
    poll_concurrency_per_host: int = _setting(32, _whole(1, 2_000), "requests in flight to one host")

    http_connect_timeout_s: float = _setting(5.0, _seconds(0.1, 120), "seconds to open a connection")
    http_read_timeout_s: float = _setting(15.0, _seconds(0.1, 600), "seconds between two pieces of an answer")
    http_body_bytes_max: int = _setting(32 << 20, _whole(1 << 10, 1 << 30), "bytes of one answer, decompressed")
    http_proxy: Secret | None = _setting(None, _proxy, "proxy for all requests to providers", is_secret=True)
    http_ca_bundle: Path | None = _setting(
        None, _existing_file, "CA certificates (PEM) instead of the system's; SSL_CERT_FILE is honoured too"
    )
    allow_insecure: bool = _setting(False, _flag, "allow http:// base URLs beyond this machine")

    push_concurrency: int = _setting(256, _whole(1, 10_000), "messages that one process delivers at once")
    push_concurrency_per_host: int = _setting(64, _whole(1, 10_000), "of them to one host, for one account")
    push_connect_timeout_s: float = _setting(5.0, _seconds(0.1, 120), "seconds to reach the host of a message")
    push_response_bytes_max: int = _setting(1 << 20, _whole(0, 64 << 20), "bytes kept of an endpoint's response")
    push_bytes_max: int = _setting(128 << 20, _whole(1 << 20, 1 << 40), "bytes of large bodies in delivery at once")
    push_allow: str | None = _setting(
        None, _networks, "networks that messages may go to although they are private, such as 10.0.0.0/8,127.0.0.1"
    )
    push_allow_private: bool = _setting(
        False, _flag, "let messages go to loopback and private addresses; metadata addresses stay closed"
    )

    v2_bytes_max: int = _setting(256 << 20, _whole(1 << 20, 1 << 40), "bytes of bodies that /v2 takes in at once")
    v2_message_bytes_max: int = _setting(_LIMITS.message_bytes, _whole(1, 256 << 20), "bytes of one message")
    v2_batch_bytes_max: int = _setting(_LIMITS.batch_bytes, _whole(1, 1 << 30), "bytes of one batch")
    v2_delay_s_max: int = _setting(_LIMITS.delay_s, _whole(0, 3_660 * 86_400), "seconds that a message may be delayed")
    v2_timeout_s_max: int = _setting(_LIMITS.timeout_s, _whole(1, 86_400), "seconds that an endpoint may take")
    v2_retries_max: int = _setting(_LIMITS.retries, _whole(0, 1_000), "tries of a message after the first one fails")
    v2_schedules_max: int = _setting(_LIMITS.schedules, _whole(0, 1_000_000), "schedules of an account")
    v2_queues_max: int = _setting(_LIMITS.queues, _whole(0, 1_000_000), "FIFO queues of an account")
    v2_groups_max: int = _setting(_LIMITS.groups, _whole(0, 1_000_000), "URL groups of an account")
    v2_endpoints_max: int = _setting(_LIMITS.endpoints, _whole(1, 10_000), "endpoints of a URL group")
    v2_parallelism_max: int = _setting(
        _LIMITS.parallelism_max, _whole(1, 100_000), "parallelism of a queue or a flow-control key"
    )
    v2_dedup_s: int = _setting(_LIMITS.dedup_s, _whole(1, 7_776_000), "seconds in which a deduplication id counts")

    traces: Literal["off", "otlp"] = _setting(
        "off", _one_of("off", "otlp"), "OpenTelemetry traces (extra otel); OTEL_EXPORTER_OTLP_ENDPOINT says where to"
    )
    retention_attempts_days: int | None = _setting(30, _days, "days to keep the attempts log, or none")
    retention_ticks_days: int | None = _setting(90, _days, "days to keep ticks, or none")
    retention_summaries_days: int | None = _setting(400, _days, "days to keep batch summaries, or none")
    retention_dead_days: int | None = _setting(None, _days, "days to keep dead letters, or none")
    retention_messages_days: int | None = _setting(7, _days, "days to keep messages that have ended, and their log")
    retention_letters_days: int | None = _setting(7, _days, "days to keep messages that were given up")
    retention_quota_days: int | None = _setting(400, _days, "days to keep the history of quota counters, or none")
    retention_ledger_days: int | None = _setting(None, _days, "days to keep the ledger, or none (for ever)")

    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "least level that is logged"
    )
    log_format: Literal["auto", "console", "json"] = _setting(
        "auto", _one_of("auto", "console", "json"), "auto: console on a terminal, JSON otherwise"
    )

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def signing_keys(self) -> dict[str, tuple[Secret, Secret]]:
        """(current, next) by region; "" for deliveries of any."""
        found: dict[str, tuple[Secret, Secret]] = {}
        for region in ("", *REGIONS):
            prefix = f"{region}_" if region else ""
            pair = [getattr(self, f"{prefix}qstash_{which}_signing_key") for which in ("current", "next")]
            if None not in pair:
                found[region] = (pair[0], pair[1])
        return found

    @property
    def key_file(self) -> Path:
        """Where the generated key of an embedded installation is kept."""
        return self.data_dir / "secret.key"

    def shown(self) -> Iterator[tuple[str, object, str]]:
        """(name, value as JSON with secrets masked, origin) of each setting."""
        for spec in _specs().values():
            value = getattr(self, spec.name)
            shown = "***" if isinstance(value, Secret) else str(value) if isinstance(value, Path | Address) else value
            yield spec.name, shown, self.origins.get(spec.name, "default")


def _specs() -> dict[str, dataclasses.Field[Any]]:
    return {spec.name: spec for spec in dataclasses.fields(Settings) if "parse" in spec.metadata}


def described() -> Iterator[tuple[str, object, str]]:
    """(name, default, meaning) of each setting, for the reference documentation."""
    for spec in _specs().values():
        yield spec.name, spec.default, spec.metadata["doc"]


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return str(_specs()[name].metadata["env"] or PREFIX + name.upper())


@dataclass(slots=True)
class _Found:
    """Raw values by setting, the strongest source first; and everything that is wrong so far."""

    raw: dict[str, tuple[object, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def offer(self, name: str, value: object, origin: str) -> None:
        self.raw.setdefault(name, (value, origin))


def load(
    flags: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None, toml_path: Path | None = None
) -> Settings:
    """Read, check and freeze the settings.

    Args:
        flags: by setting name; None as a value means that the flag was not given.
        env: instead of the process's environment.
        toml_path: a file that must exist, instead of `TALLYD_CONFIG`, ./tallyd.toml or /etc/tallyd/tallyd.toml.

    Raises:
        ConfigError: holds every problem of every source at once.
    """
    env = os.environ if env is None else env
    found = _Found()
    for name, value in (flags or {}).items():
        if value is not None:
            found.offer(name, value, "flag --" + name.replace("_", "-"))
    _read_env(env, found)
    _read_toml(toml_path, env, found)

    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, spec in _specs().items():
        if name in found.raw:
            raw, origin = found.raw[name]
            try:
                values[name] = spec.metadata["parse"](raw)
            except ValueError as error:
                # The parsers of secrets put no value into their message.
                found.problems.append(f"{name}: {error} (from {origin})")
            origins[name] = origin
    if "data_dir" not in found.raw:
        import platformdirs  # noqa: PLC0415 -- only needed for the default

        try:
            values["data_dir"] = Path(platformdirs.user_data_path("tallyd"))
        except RuntimeError:  # a user without a home, as in bare containers: only the embedded database needs one
            values["data_dir"] = Path("/var/lib/tallyd")
    _check_together(values, found)
    if found.problems:
        raise ConfigError(found.problems)
    return Settings(**values, origins=origins)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; see `tallyd config show` for the names"


def _read_env(env: Mapping[str, str], found: _Found) -> None:
    specs = _specs()
    variables = {variable_of(name): name for name in specs}
    for variable, name in variables.items():
        is_foreign = not variable.startswith(PREFIX)
        # Others' variables may be there for others, and empty for nobody.
        if variable in env and (env[variable] or not is_foreign):
            found.offer(name, env[variable], f"env {variable}")
        if specs[name].metadata["is_secret"] and (secret_path := env.get(f"{variable}_FILE")):
            if env.get(variable):
                found.problems.append(f"{name}: {variable}_FILE and {variable} are both set; keep one")
            else:
                _read_secret_file(name, Path(secret_path), f"env {variable}_FILE", found)
    for variable in sorted(env):
        rest = variable.removeprefix(PREFIX)
        of_file = variables.get(variable.removesuffix("_FILE"), "")
        is_known = variable in variables or (of_file and specs[of_file].metadata["is_secret"])
        if not variable.startswith(PREFIX) or is_known or rest in NOT_SETTINGS or rest.startswith(FOREIGN_PREFIXES):
            continue
        hint = f"; its name is {rest}" if rest in variables else _nearest(variable, list(variables))
        found.problems.append(f"{variable}: unknown variable{hint}")
    if env.get("CREDENTIALS_DIRECTORY"):
        for name, spec in specs.items():
            path = Path(env["CREDENTIALS_DIRECTORY"]) / name
            if spec.metadata["is_secret"] and name not in found.raw and path.is_file():
                _read_secret_file(name, path, f"systemd credential {name}", found)
    if env.get("SSL_CERT_FILE"):
        found.offer("http_ca_bundle", env["SSL_CERT_FILE"], "env SSL_CERT_FILE")


def _read_secret_file(name: str, path: Path, origin: str, found: _Found) -> None:
    try:
        found.offer(name, path.read_text(encoding="utf-8").strip(), origin)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        found.problems.append(f"{name}: cannot read {path} (from {origin}): {reason}; give a readable file")


def _read_toml(path: Path | None, env: Mapping[str, str], found: _Found) -> None:
    if path is None and env.get(PREFIX + "CONFIG"):
        path = Path(env[PREFIX + "CONFIG"])
    if path is None:
        path = next((candidate for candidate in TOML_PATHS if candidate.is_file()), None)
    if path is None:
        return
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        found.problems.append(f"config: cannot read {path}: {error.strerror}; correct --config or TALLYD_CONFIG")
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        found.problems.append(f"config: {path} is no TOML: {error}; correct the file")
        return
    specs = _specs()
    for name, value in document.items():
        if name in specs:
            found.offer(name, value, f"file {path}")
        else:
            found.problems.append(f"{name}: unknown key in {path}{_nearest(name, list(specs))}")


def _check_together(values: Mapping[str, Any], found: _Found) -> None:
    """What only several settings together can get wrong."""
    tick_s = values.get("tick_seconds", 300)
    if 86_400 % tick_s:
        found.problems.append(f"tick_seconds: {tick_s} does not divide a day; use a divisor of 86400, such as 300")
    pool_min, pool_max = values.get("database_pool_min", 1), values.get("database_pool_max", 10)
    if pool_min > pool_max:
        found.problems.append(f"database_pool_min: {pool_min} is above database_pool_max {pool_max}; lower it")
    _check_service(values, found)
    dedup_s, kept = values.get("v2_dedup_s", _LIMITS.dedup_s), values.get("retention_messages_days", 7)
    if kept is not None and dedup_s > kept * 86_400:
        found.problems.append(
            f"v2_dedup_s: {dedup_s} is longer than messages are kept; raise retention_messages_days to "
            f"{-(-dedup_s // 86_400)}, or lower it"
        )
    if "database_url" in values and "secret_key" not in found.raw:
        found.problems.append(
            "secret_key: not set, and a database of your own needs one; "
            "make one with `tallyd config new-key` and set TALLYD_SECRET_KEY or TALLYD_SECRET_KEY_FILE"
        )


def _check_service(values: Mapping[str, Any], found: _Found) -> None:
    """Listener and QStash: half a configuration is worse than none, since it fails where nobody looks."""

    def has(name: str) -> bool:
        return name in found.raw

    problems = found.problems
    pairs = 0
    for prefix in ("", *(f"{region}_" for region in REGIONS)):
        names = [f"{prefix}qstash_{which}_signing_key" for which in ("current", "next")]
        given = [name for name in names if has(name)]
        pairs += len(given) == len(names)
        if len(given) == 1:
            missing = next(name for name in names if name not in given)
            problems.append(f"{missing}: not set, but {variable_of(given[0])} is; set {variable_of(missing)} too")
    trigger = values.get("trigger", "internal")
    public_url, url = values.get("public_url"), values.get("qstash_url")
    takes_deliveries = values.get("role", "all") != "worker"
    host = urlsplit(url or "").hostname or ""
    is_cloud = url is None or host.endswith(".upstash.io")
    if url and url.startswith("http:") and not is_private(host) and not values.get("allow_insecure", False):
        problems.append(f"qstash_url: {url} would show the token to everybody on the way; use https, or allow_insecure")
    if trigger != "internal" and (takes_deliveries or has("qstash_token")):
        region = "us_east_1" if "us-east-1" in host else "eu_central_1"
        others = {found for found in ("", *REGIONS) if has(f"{found}_qstash_current_signing_key".lstrip("_"))}
        if takes_deliveries and pairs and is_cloud and not others & {"", region}:
            problems.append(
                f"{region}_qstash_current_signing_key: not set, but QSTASH_URL is of that region; set its keys, or the "
                "general ones"
            )
        if takes_deliveries and not pairs:
            problems.append(
                f"qstash_current_signing_key: not set, and trigger {trigger} needs it to verify deliveries; "
                "set QSTASH_CURRENT_SIGNING_KEY and QSTASH_NEXT_SIGNING_KEY"
            )
        if not has("public_url"):
            problems.append(
                f"public_url: not set, and trigger {trigger} needs it, since QStash signs it; "
                "set TALLYD_PUBLIC_URL to where QStash reaches this service, such as https://tallyd.example"
            )
        elif public_url and is_cloud:
            parts = urlsplit(public_url)
            if parts.scheme != "https" or is_private(parts.hostname or ""):
                problems.append(
                    f"public_url: {public_url} cannot be reached by QStash's cloud, which delivers to public https:// "
                    "addresses only; give one, or set QSTASH_URL to a local server"
                )
        if has("listen") and "listen" in values and values["listen"] is None and takes_deliveries:
            problems.append(f"listen: none, but trigger {trigger} needs a listener; set HOST:PORT, or role worker")
    grace_s, tick_s = values.get("fallback_grace_s", 30.0), values.get("tick_seconds", 300)
    if trigger == "both" and grace_s > tick_s / 2:
        problems.append(
            f"fallback_grace_s: {grace_s:g} is more than half a tick of {tick_s} s, so that the fallback might come too "
            "late; lower it"
        )
    listen, private = values.get("listen", Address("127.0.0.1", 8080)), values.get("listen_private")
    if listen is not None and private == listen and listen.port:
        problems.append(f"listen_private: is {private}, as listen is; give it a port of its own, or leave it out")
    if values.get("role") == "listener" and listen is None:
        problems.append("listen: none, but role listener does nothing else; set HOST:PORT")
