"""The root command, its global options, and what an error becomes: one line on stderr and an exit code.

0 done, 1 failed, 2 misused or misconfigured, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from daemon import __version__
from daemon.cli import (
    config,
    connections,
    database,
    dev,
    dlq,
    groups,
    health,
    keys,
    names,
    qstash,
    queue,
    quota,
    reports,
    resources,
    schedules,
    service,
    tenants,
    tokens,
    work,
)
from daemon.cli.printing import print_error
from daemon.cli.session import CONFIG_FILE, FLAGS
from daemon.domain.errors import ConfigError, DaemonError, ImportRefusedError, UsageError

# typer carries its own copy of click, or not, depending on its version: the class is found by its name.
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="tallyd",
    help="Tracks what many tenants spend on AI APIs, and books every change in Postgres exactly once.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"tallyd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    config_file: Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")] = None,
    database_url: Annotated[str | None, typer.Option(help="Postgres to use (postgresql://...).")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder of the embedded database.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, console or json.")] = None,
    _is_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    CONFIG_FILE.set(config_file)
    FLAGS.set({"database_url": database_url, "data_dir": data_dir, "log_level": log_level, "log_format": log_format})


for group, name in (
    (tenants.app, "tenants"),
    (connections.app, "connections"),
    (database.app, "db"),
    (tokens.app, "tokens"),
    (keys.app, "keys"),
    (names.app, "names"),
    (queue.app, "queue"),
    (quota.app, "quota"),
    (resources.app, "resources"),
    (schedules.app, "schedules"),
    (groups.app, "groups"),
    (dlq.app, "dlq"),
    (qstash.app, "qstash"),
    (config.app, "config"),
):
    app.add_typer(group, name=name)
for module in (reports, work, health, service, dev):
    module.register(app)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        code = app(args=list(arguments), prog_name="tallyd", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (ConfigError, ImportRefusedError) as error:
        for problem in error.problems:
            print_error(problem)
        return 2
    except UsageError as error:
        print_error(str(error))
        return 2
    except DaemonError as error:
        print_error(str(error))
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tallyd"
        message = getattr(error, "format_message", error.__str__)().rstrip(".")
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the whole help
            print(message, file=sys.stderr)
        else:
            print_error(f"{message}; see `{command} --help`")
        return 2
    except ExceptionGroup as group:
        # A task group wraps what its tasks raise. A fault of our own among them keeps its traceback.
        expected, rest = group.split(DaemonError)
        if rest is not None or expected is None:
            raise
        for line in _leaves(expected):
            print_error(line)
        return 1


def _leaves(group: BaseExceptionGroup[DaemonError]) -> list[str]:
    lines: list[str] = []
    for error in group.exceptions:
        lines.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [str(error)])
    return lines
