"""Logs: structlog to stderr, console on a terminal and JSON otherwise, with every secret taken out.

Events are constants `noun.past_verb`, values are fields; `docs/reference/events.md` lists them.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

from daemon.domain.window import rfc3339

if TYPE_CHECKING:
    from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

MASK = "***"
_DEPTH_MAX = 8

_SECRET_FIELD = re.compile(
    r"(?i)(^|[_-])(authorization|cookie|credentials?|password|passwd|secret|token|api[_-]?key|x-api-key"
    r"|admin[_-]?key|signing[_-]?key|signature|private[_-]?key|secret[_-]?key)$"
)
_PARAMETER = (
    r"(?:[a-z0-9_-]*(?:token|secret|password|passwd|signature|credential|api[_-]?key|access[_-]?key|security[_-]?token)"
    r"|sig|key|auth|code)"
)
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    # Providers' keys: sk-..., sk-ant-..., sk-proj-..., pk-..., and their like.
    (re.compile(r"\b((?:sk|pk|rk|xai|gsk|AIza|ghp|xox[abp]|whsec|sig)[-_])[A-Za-z0-9_\-]{6,}"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=\-]{4,}"), rf"\1\2{MASK}"),
    # JSON web tokens, such as QStash's signatures.
    (re.compile(r"\beyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*"), MASK),
    # Query strings and form bodies, signed URLs (X-Amz-Signature, sig, Signature) among them.
    (re.compile(rf"(?i)([?&;\s\"'](?:x-(?:amz|goog)-)?{_PARAMETER}=)[^&\s\"'<>#]+"), rf"\1{MASK}"),
    # Headers and JSON fields that were printed: 'x-api-key': 'abc', "token": "abc", authorization: abc. A sentence about
    # a field (secret_key: a credential is sealed ...) begins with a word that is no secret, and goes on with another.
    (
        re.compile(
            r"(?i)([\"']?\b(?:authorization|x-api-key|api[_-]?key|cookie|password|secret[_-]?key|secret|token"
            r"|credential|upstash-signature)\b[\"']?\s*[:=]\s*[\"']?)(?!bearer\b|basic\b|\*\*\*"
            r"|(?<=: )(?:(?:an?|the|is|not|no|holds|names|cannot) [a-z]|key \d+ is\b))[^\s\"',;}\]&]+"
        ),
        rf"\1{MASK}",
    ),
    # The password of a URL.
    (re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://[^\s/:@]*:)[^\s/@]+(@)"), rf"\1{MASK}\2"),
)

_MAY_MATCH: tuple[Callable[[str], bool], ...] = (
    lambda text: "-" in text or "_" in text,
    lambda text: " " in text or not text.isprintable(),  # any other white space is not printable
    lambda text: "eyJ" in text,
    lambda text: "=" in text,
    lambda text: ":" in text or "=" in text,
    lambda text: "://" in text,
)
"""Whether a text holds what the rule at that place cannot do without: most hold nothing, and looking costs little."""


def redact_text(text: str) -> str:
    """`text` without keys, tokens, passwords and signatures."""
    for (pattern, replacement), may_match in zip(_RULES, _MAY_MATCH, strict=True):
        if may_match(text):
            text = pattern.sub(replacement, text)
    return text


@lru_cache(maxsize=2_048)
def _field(name: str) -> tuple[str, bool]:
    """A field's name without secrets, and whether the name tells that its value is one."""
    return redact_text(name), bool(_SECRET_FIELD.search(name))


def redact_value(value: Any, depth: int = 0) -> Any:
    """The same for whatever may stand in a log field: nested, bytes, exceptions."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, datetime):
        return rfc3339(value) if value.tzinfo else value.isoformat()
    if isinstance(value, bytes | bytearray):
        return redact_text(bytes(value).decode("utf-8", "replace"))
    if depth >= _DEPTH_MAX:
        return "..."
    if isinstance(value, Mapping):
        return {
            _field(str(key))[0]: MASK if _is_secret_field(key, item) else redact_value(item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        if len(value) == 2 and isinstance(value, tuple) and _is_secret_field(*value):  # a header as a pair
            return [redact_text(str(value[0])), MASK]
        return [redact_value(item, depth + 1) for item in value]
    return redact_text(str(value))


def _is_secret_field(key: object, value: object) -> bool:
    # Counts such as input_tokens are no secrets, and neither is a token of our queue, which is a number.
    return isinstance(key, str) and not isinstance(value, int | float) and _field(key)[1]


def redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The last processor before the renderer: nothing passes it unseen."""
    redacted: EventDict = redact_value(event)
    return redacted


def _exception_text(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Render `exc_info` to text here, so that `redact` sees it, chained causes included."""
    given: Any = event.pop("exc_info", None)
    if not given:
        return event
    info: ExcInfo | tuple[None, None, None]
    if isinstance(given, BaseException):
        info = (type(given), given, given.__traceback__)
    else:
        info = given if isinstance(given, tuple) else sys.exc_info()
    if info[1] is not None:
        event["exception"] = "".join(traceback.format_exception(*info)).rstrip()
    return event


def configure(
    *,
    level: str = "info",
    style: Literal["auto", "console", "json"] = "auto",
    stream: TextIO | None = None,
    is_final: bool = False,
) -> None:
    """Set up structlog, and the standard library's logging through it. Call once, at start.

    Args:
        is_final: it will not be called again, so that loggers may keep what they find at their first use.
    """
    out = sys.stderr if stream is None else stream
    is_console = out.isatty() if style == "auto" else style == "console"
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty()) if is_console else structlog.processors.JSONRenderer()
    )
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        _exception_text,
        redact,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=is_final,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # In an outage it writes a traceback each second of what we tell once, as it begins.
    logging.getLogger("asyncpg.pool").setLevel(logging.CRITICAL)
    # Libraries speak at warning and above, unless someone debugs.
    root.setLevel(threshold if threshold <= logging.DEBUG else max(threshold, logging.WARNING))
