"""Traces: what a unit of work did, and where its time went, sent to an OpenTelemetry collector. Off unless asked for.

Nothing of OpenTelemetry is imported before `configure`: it is an extra (`tallyd[otel]`), and slow to import. Until then
`span` hands out one shared object that does nothing.

    with traces.span("job", parent=job.traceparent, tallyd__job__id=job.id) as span:
        ...
        span.set(tallyd__job__outcome="completed")

An attribute's name is written as a keyword, `__` for the dot: `tallyd__job__id` is sent as `tallyd.job.id`. The tracer
belongs to this module; OpenTelemetry's global one is left alone, so that other libraries' spans stay out.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Literal, Self, cast

import structlog

from daemon.domain.errors import ConfigError
from daemon.telemetry.logs import MASK, redact_text, redact_value

if TYPE_CHECKING:
    from contextvars import Token

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import Tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Kind = Literal["internal", "server", "client", "producer", "consumer"]

SERVICE_NAME = "tallyd"
FLUSH_S_MAX = 3.0
"""How long the end of the process may wait for the collector."""
TEXT_CHARS_MAX = 1_000
SHORT_CHARS_MAX = 64
REASON_CHARS_MAX = 300
_INT64_MAX = 2**63 - 1
_NOT_INSTALLED = "traces: OpenTelemetry is not installed; run `pip install 'tallyd[otel]'` or set it to off"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Everything between the scheme and the host: some services take a key in the place of the user's name.
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.\-]*://)[^\s/?#@\"']+@")

log = structlog.get_logger()


class Span:
    """A piece of work, timed from `with` to its end. This one is not recorded: tracing is off."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def set(self, **attributes: object) -> None:
        """Add attributes, or replace them. None leaves one out; what holds a secret is masked."""

    @property
    def traceparent(self) -> str | None:
        """W3C Trace Context's header, to hand the trace on with a message. None while tracing is off."""
        return None


_NO_SPAN = Span()


@dataclass(frozen=True, slots=True)
class _Otel:
    """OpenTelemetry, imported and set up."""

    context: ModuleType
    trace: ModuleType
    provider: TracerProvider
    tracer: Tracer
    exporter: _WatchedExporter
    propagator: TraceContextTextMapPropagator


_otel: _Otel | None = None


def configure(*, service_version: str, role: str) -> None:
    """Switch tracing on: spans go by OTLP over HTTP to where OpenTelemetry's own variables (`OTEL_*`) say.

    Args:
        service_version: of tallyd.
        role: what this process does, sent as `tallyd.role`.

    Raises:
        ConfigError: the extra is not installed, or a variable cannot work.
    """
    for name in _ENDPOINTS:
        if (url := os.environ.get(name)) and not url.lower().startswith(("http://", "https://")):
            raise ConfigError([f"traces: {name} is not an http or https URL; give one, such as http://localhost:4318"])
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra, and slow
            OTLPSpanExporter,
        )

        exporter = OTLPSpanExporter()
    except ImportError as error:
        raise ConfigError([_NOT_INSTALLED]) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError([_refused(error)]) from error
    _start(exporter, service_version=service_version, role=role)


def _refused(error: Exception) -> str:
    return f"traces: OpenTelemetry refuses its environment: {_text(str(error))}; correct the OTEL_* variables"


def _start(exporter: SpanExporter, *, service_version: str, role: str) -> None:
    """The same with any exporter."""
    global _otel  # noqa: PLW0603 - one tracer per process, as there is one log
    shutdown()
    try:
        from opentelemetry import context, trace  # noqa: PLC0415
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError([_NOT_INSTALLED]) from error
    watched = _WatchedExporter(exporter)
    ours = Resource.create(
        {
            "service.name": SERVICE_NAME,
            "service.version": service_version,
            "service.instance.id": str(uuid.uuid4()),
            "tallyd.role": role,
        }
    )
    try:
        # What is given to `create` would win over the environment. Without `shutdown_on_exit=False` the end of the
        # interpreter waits half a minute for a collector that is away.
        provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        # Not a subclass, which could not be written down without importing its base.
        provider.add_span_processor(BatchSpanProcessor(cast("SpanExporter", watched)))
    except ValueError as error:
        raise ConfigError([_refused(error)]) from error
    # Up to here OpenTelemetry may complain about its variables; from here on `_WatchedExporter` speaks for it.
    theirs = logging.getLogger("opentelemetry")
    theirs.propagate = False
    if _complaints not in theirs.handlers:
        theirs.addHandler(_complaints)
    tracer = provider.get_tracer(SERVICE_NAME, service_version)
    _otel = _Otel(context, trace, provider, tracer, watched, TraceContextTextMapPropagator())


def shutdown(*, flush_s: float = FLUSH_S_MAX) -> None:
    """Switch tracing off and send what is left, within `flush_s` seconds; what then is not sent is lost. Never raises.

    Blocks: call it from a thread, or after the event loop.
    """
    global _otel
    otel, _otel = _otel, None
    if otel is None:
        return
    # The provider's own shutdown has no time-out that can be given, and waits for half a minute.
    flush = threading.Thread(target=otel.provider.shutdown, name="traces-flush", daemon=True)
    try:
        flush.start()
    except RuntimeError:
        return  # the system has no thread left, or the interpreter is ending
    flush.join(flush_s)
    if flush.is_alive():
        otel.exporter.give_up()


def span(name: str, /, *, parent: str | None = None, kind: Kind = "internal", **attributes: object) -> Span:
    """A span to be entered with `with`, also in async code: its child tasks and whatever it awaits nest in it.

    An exception that passes is recorded, its message redacted, and goes on; a cancellation is marked as such.

    Args:
        parent: a W3C traceparent from elsewhere (a message, a header), in place of the span around this one. One that is
            not valid is ignored.
    """
    otel = _otel
    if otel is None:
        return _NO_SPAN
    return _RecordedSpan(otel, name, parent, kind, attributes)


def traceparent() -> str | None:
    """The current span's, to hand the trace on; None outside of a span, and while tracing is off."""
    otel = _otel
    if otel is None:
        return None
    return _traceparent(otel.trace.get_current_span())


def _traceparent(span: OtelSpan) -> str | None:
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class _RecordedSpan(Span):
    __slots__ = ("_attributes", "_kind", "_name", "_otel", "_parent", "_span", "_token")

    def __init__(self, otel: _Otel, name: str, parent: str | None, kind: Kind, attributes: dict[str, object]) -> None:
        self._otel = otel
        self._name = name
        self._parent = parent
        self._kind = kind
        self._attributes = attributes
        self._span: OtelSpan | None = None
        self._token: Token[Context] | None = None

    def __enter__(self) -> Self:
        otel = self._otel
        context = otel.context.get_current()
        if self._parent is not None:
            context = otel.propagator.extract({"traceparent": self._parent}, context)
        kind = otel.trace.SpanKind[self._kind.upper()]
        self._span = otel.tracer.start_span(self._name, context, kind)
        self.set(**self._attributes)
        self._token = otel.context.attach(otel.trace.set_span_in_context(self._span, context))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        span, token = self._span, self._token
        if span is None or token is None:
            return
        if error is not None and span.is_recording():
            self._record(span, error)
        self._otel.context.detach(token)
        span.end()

    def _record(self, span: OtelSpan, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            span.set_attribute("tallyd.cancelled", True)
            return
        if not isinstance(error, Exception):
            return  # GeneratorExit and the end of the process are no failures of this work
        message = _text(str(error))
        # Not `record_exception`: it sends the traceback and the message as they are.
        span.add_event("exception", {"exception.type": type(error).__qualname__, "exception.message": message})
        span.set_status(self._otel.trace.StatusCode.ERROR, message)

    def set(self, **attributes: object) -> None:
        span = self._span
        if span is None or not span.is_recording():
            return
        span.set_attributes(
            {_name(keyword): _value(keyword, given) for keyword, given in attributes.items() if given is not None}
        )

    @property
    def traceparent(self) -> str | None:
        return None if self._span is None else _traceparent(self._span)


@functools.cache
def _name(keyword: str) -> str:
    return keyword.replace("__", ".")


@functools.cache
def _is_masked(keyword: str) -> bool:
    """Whether the log would mask a text under this name, whatever its shape."""
    masked: dict[str, object] = redact_value({keyword: ""})
    return masked[keyword] != ""


def _value(keyword: str, given: object) -> str | bool | int | float:
    """What may leave the process: no secret, nothing long, nothing that the encoder would refuse."""
    if isinstance(given, bool | float) or (isinstance(given, int) and abs(given) <= _INT64_MAX):
        return given
    if _is_masked(keyword):
        return MASK
    text = given if isinstance(given, str) else str(redact_value(given))
    return _short_text(text) if len(text) <= SHORT_CHARS_MAX else _text(text)


def _text(text: str) -> str:
    redacted = _USERINFO.sub(rf"\1{MASK}@", redact_text(text))[:TEXT_CHARS_MAX]
    # A lone surrogate is not UTF-8, and would cost the whole batch.
    return redacted if redacted.isascii() else redacted.encode("utf-8", "replace").decode("utf-8")


# Most texts are one of a few, such as a provider's name, and looking for secrets takes longer than all else in a span.
_short_text = functools.lru_cache(maxsize=512)(_text)


class _Complaints(logging.Handler):
    """Keeps the first thing that the exporter says of a batch. Nothing that OpenTelemetry says is logged as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._first: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        # The queue complains too, for each span while it is full.
        if self._first is None and record.name.startswith("opentelemetry.exporter"):
            self._first = record.getMessage()

    def take(self) -> str | None:
        first, self._first = self._first, None
        return first


_complaints = _Complaints()


class _WatchedExporter:
    """An exporter that tells the log as it begins to fail, and as it works again. Runs in a thread of its own."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        _complaints.take()
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            raise  # to the span processor, which goes on
        if result.name == "SUCCESS":
            self._succeed()
        else:
            self._fail(_complaints.take() or "unknown")
        return result

    def _succeed(self) -> None:
        if self._is_failing:
            self._is_failing = False
            log.info("traces.export_resumed")

    def _fail(self, reason: str) -> None:
        if not self._is_failing:
            self._is_failing = True
            log.warning("traces.export_failed", reason=_text(reason)[:REASON_CHARS_MAX])

    def give_up(self) -> None:
        """End the export that is under way, if it waits for its next try."""
        self._fail(_complaints.take() or "the collector did not answer in time")
        self._exporter.shutdown()

    def shutdown(self) -> None:
        self._exporter.shutdown()


__all__ = ["FLUSH_S_MAX", "Kind", "Span", "configure", "shutdown", "span", "traceparent"]
