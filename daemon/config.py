# ruff: noqa: RUF009 -- every default is made by `_setting`, which returns a dataclass field
"""Settings: read once, checked whole, frozen.

Order: flag, environment (`TALLYD_...`), TOML file, default. A secret may also stand in a file that `TALLYD_..._FILE`
names, or be a systemd credential of the setting's name. Parsed by hand: pydantic-settings takes 0.35 s to import, more
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

from daemon.domain.connection import Secret
from daemon.domain.errors import ConfigError

PREFIX = "TALLYD_"
TOML_PATHS = (Path("tallyd.toml"), Path("/etc/tallyd/tallyd.toml"))
NOT_SETTINGS = ("CONFIG",)
FOREIGN_PREFIXES = ("TEST_", "BENCH_")  # ours too, but of the test suite and the benchmarks

Parse = Callable[[object], object]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("is empty or no text; give a text")
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


def _trigger(value: object) -> str:
    text = _one_of("internal", "qstash", "both")(value)
    if text != "internal":
        raise ValueError(f"is {text!r}, which this version cannot serve yet; use internal")
    return text


def _setting(default: object, parse: Parse, doc: str, *, is_secret: bool = False) -> Any:
    return field(default=cast("Any", default), metadata={"parse": parse, "doc": doc, "is_secret": is_secret})


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

    trigger: Literal["internal"] = _setting("internal", _trigger, "what starts ticks: internal, qstash or both")
    tick_seconds: int = _setting(300, _whole(1, 86_400), "seconds from one tick to the next; divides a day")
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

    retention_attempts_days: int | None = _setting(30, _days, "days to keep the attempts log, or none")
    retention_ticks_days: int | None = _setting(90, _days, "days to keep ticks, or none")
    retention_summaries_days: int | None = _setting(400, _days, "days to keep batch summaries, or none")
    retention_dead_days: int | None = _setting(None, _days, "days to keep dead letters, or none")
    retention_ledger_days: int | None = _setting(None, _days, "days to keep the ledger, or none (for ever)")

    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "least level that is logged"
    )
    log_format: Literal["auto", "console", "json"] = _setting(
        "auto", _one_of("auto", "console", "json"), "auto: console on a terminal, JSON otherwise"
    )

    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def key_file(self) -> Path:
        """Where the generated key of an embedded installation is kept."""
        return self.data_dir / "secret.key"

    def shown(self) -> Iterator[tuple[str, object, str]]:
        """(name, value as JSON with secrets masked, origin) of each setting."""
        for spec in _specs().values():
            value = getattr(self, spec.name)
            shown = "***" if isinstance(value, Secret) else str(value) if isinstance(value, Path) else value
            yield spec.name, shown, self.origins.get(spec.name, "default")


def _specs() -> dict[str, dataclasses.Field[Any]]:
    return {spec.name: spec for spec in dataclasses.fields(Settings) if "parse" in spec.metadata}


def described() -> Iterator[tuple[str, object, str]]:
    """(name, default, meaning) of each setting, for the reference documentation."""
    for spec in _specs().values():
        yield spec.name, spec.default, spec.metadata["doc"]


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

        values["data_dir"] = Path(platformdirs.user_data_path("tallyd"))
    _check_together(values, found)
    if found.problems:
        raise ConfigError(found.problems)
    return Settings(**values, origins=origins)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; see `tallyd config show` for the names"


def _read_env(env: Mapping[str, str], found: _Found) -> None:
    specs = _specs()
    known = [PREFIX + name.upper() for name in specs]
    for variable in sorted(env):
        if not variable.startswith(PREFIX):
            continue
        rest = variable.removeprefix(PREFIX)
        name = rest.lower()
        of_file = name.removesuffix("_file")
        if name in specs and rest.isupper():
            found.offer(name, env[variable], f"env {variable}")
        elif name.endswith("_file") and of_file in specs and specs[of_file].metadata["is_secret"]:
            if PREFIX + of_file.upper() in env:
                found.problems.append(f"{of_file}: {variable} and {PREFIX}{of_file.upper()} are both set; keep one")
            else:
                _read_secret_file(of_file, Path(env[variable]), f"env {variable}", found)
        elif rest not in NOT_SETTINGS and not rest.startswith(FOREIGN_PREFIXES):
            found.problems.append(f"{variable}: unknown variable{_nearest(variable, known)}")
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
    if "database_url" in values and "secret_key" not in found.raw:
        found.problems.append(
            "secret_key: not set, and a database of your own needs one; "
            "make one with `tallyd config new-key` and set TALLYD_SECRET_KEY or TALLYD_SECRET_KEY_FILE"
        )
