"""Spans nest across awaits, tasks and messages, carry no secret, and cost nothing while tracing is off."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import NoReturn

import anyio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from daemon.domain.errors import ConfigError
from daemon.telemetry import traces

SECRET = "aVerySecretValue1234"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

Finished = Callable[[], dict[str, ReadableSpan]]


@pytest.fixture(autouse=True)
def no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    yield
    traces.shutdown()


@pytest.fixture
def finished() -> Finished:
    """Tracing is on; calling this ends it and returns the spans by name."""
    exporter = InMemorySpanExporter()
    traces._start(exporter, service_version="1.2.3", role="worker")

    def end() -> dict[str, ReadableSpan]:
        traces.shutdown()
        spans = exporter.get_finished_spans()
        by_name = {span.name: span for span in spans}
        assert len(by_name) == len(spans)
        return by_name

    return end


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent else None


# ── Off ─────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_opentelemetry_is_imported_while_off() -> None:
    """It takes as long to import as all the rest, and may not be installed."""
    code = """
import sys
from daemon.telemetry import traces
with traces.span("job", parent=sys.argv[1], tallyd__job__id=1) as span:
    span.set(note="x")
    assert span.traceparent is None
    assert traces.traceparent() is None
traces.shutdown()
print([name for name in sys.modules if name.partition(".")[0] in ("opentelemetry", "requests", "google")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, f"00-{TRACE}-{PARENT}-01"], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_span_is_one_shared_object_while_off() -> None:
    assert traces.span("job", tallyd__job__id=1) is traces.span("tick")


def test_exception_passes_a_span_that_is_off() -> None:
    with pytest.raises(LookupError), traces.span("job"):
        raise LookupError


def test_span_after_shutdown_is_off(finished: Finished) -> None:
    late = traces.span("late")
    assert finished() == {}
    with late, traces.span("job") as span:
        assert span.traceparent is None
    traces.shutdown()


# ── Nesting ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.anyio
async def test_spans_nest_across_awaits_and_task_groups(finished: Finished) -> None:
    """Two tasks that take turns keep their spans apart, and both belong to the span around the group."""
    first_is_in, second_is_in = anyio.Event(), anyio.Event()

    async def first() -> None:
        with traces.span("first"):
            first_is_in.set()
            await second_is_in.wait()
            with traces.span("in first"):
                await anyio.lowlevel.checkpoint()

    async def second() -> None:
        await first_is_in.wait()
        with traces.span("second"):
            second_is_in.set()
            await anyio.lowlevel.checkpoint()
            with traces.span("in second"):
                await anyio.lowlevel.checkpoint()

    with traces.span("job"):
        async with anyio.create_task_group() as group:
            group.start_soon(first)
            group.start_soon(second)
        with traces.span("after"):
            pass
    with traces.span("another"):
        pass
    spans = finished()
    ids = {span.context.span_id: name for name, span in spans.items()}
    parents = {name: ids.get(parent_of(span)) for name, span in spans.items()}
    assert parents == {
        "job": None,
        "first": "job",
        "in first": "first",
        "second": "job",
        "in second": "second",
        "after": "job",
        "another": None,
    }
    assert spans["another"].context.trace_id != spans["job"].context.trace_id


def test_parent_comes_from_a_traceparent(finished: Finished) -> None:
    with traces.span("around"), traces.span("job", parent=f"00-{TRACE}-{PARENT}-01") as span:
        assert span.traceparent == traces.traceparent()
        with traces.span("child"):
            pass
    spans = finished()
    job = spans["job"]
    assert job.parent.is_remote
    assert (f"{job.context.trace_id:032x}", f"{parent_of(job):016x}") == (TRACE, PARENT)
    assert parent_of(spans["child"]) == job.context.span_id


def test_traceparent_hands_the_trace_on(finished: Finished) -> None:
    with traces.span("tick") as tick:
        message = traces.traceparent()
        assert message == tick.traceparent
    assert traces.traceparent() is None
    with traces.span("job", parent=message):
        pass
    spans = finished()
    assert parent_of(spans["job"]) == spans["tick"].context.span_id
    assert spans["job"].context.trace_id == spans["tick"].context.trace_id


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "00",
        f"00-{TRACE}-{PARENT}",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-zz",
        f"00-{TRACE}-{PARENT}-01" + "-" * 100_000,
        "\x00\udcff" * 20,
    ],
    ids=lambda text: repr(text[:60]),
)
def test_bad_traceparent_is_ignored(text: str, finished: Finished) -> None:
    """A header comes from outside: what is wrong with it must not fail the work, nor cut the trace that it is in."""
    with traces.span("around"), traces.span("job", parent=text):
        pass
    spans = finished()
    assert parent_of(spans["job"]) == spans["around"].context.span_id


def test_unsampled_trace_goes_on_unsampled(finished: Finished) -> None:
    with traces.span("job", parent=f"00-{TRACE}-{PARENT}-00", tallyd__job__id=1) as span:
        span.set(note="x")
        assert span.traceparent is not None
        assert span.traceparent.startswith(f"00-{TRACE}-")
        assert int(span.traceparent[-2:], 16) & 1 == 0
    assert finished() == {}


# ── Failures ────────────────────────────────────────────────────────────────────────────────────


def test_exception_is_recorded_without_its_secrets(finished: Finished) -> None:
    with pytest.raises(LookupError), traces.span("job"):
        raise LookupError(f"GET https://x.example/a?token={SECRET} of https://{SECRET}@y.example/ failed \udcff")
    span = finished()["job"]
    (event,) = span.events
    assert event.name == "exception"
    message = "GET https://x.example/a?token=*** of https://***@y.example/ failed ?"
    assert dict(event.attributes) == {"exception.type": "LookupError", "exception.message": message}
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, message)


def test_long_message_is_cut(finished: Finished) -> None:
    with pytest.raises(ValueError), traces.span("job"):
        raise ValueError("x" * 100_000)
    assert len(finished()["job"].status.description) == traces.TEXT_CHARS_MAX


def test_exporter_that_raises_is_told_once() -> None:
    """Versions of OpenTelemetry differ in what they catch themselves."""

    class Broken(InMemorySpanExporter):
        def export(self, spans: object) -> NoReturn:
            tries.append(spans)
            raise OSError(f"cannot reach https://me:{SECRET}@x.example/")

    tries: list[object] = []
    with capture_logs() as logs:
        traces._start(Broken(), service_version="1", role="worker")
        for _ in range(1_200):  # more than two batches
            with traces.span("job"):
                pass
        traces.shutdown()
    assert len(tries) >= 3
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("traces.export_failed", "OSError: cannot reach https://***@x.example/")
    ]


@pytest.mark.anyio
async def test_cancellation_is_marked_and_is_no_error(finished: Finished) -> None:
    with anyio.CancelScope() as scope, traces.span("job"):
        scope.cancel()
        await anyio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    span = finished()["job"]
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    assert dict(span.attributes) == {"tallyd.cancelled": True}


def test_closed_generator_is_no_failure(finished: Finished) -> None:
    def pages() -> Iterator[int]:
        with traces.span("pages"):
            yield 1

    opened = pages()
    next(opened)
    opened.close()
    assert finished()["pages"].status.status_code is StatusCode.UNSET


# ── Attributes ──────────────────────────────────────────────────────────────────────────────────


def test_attributes_have_dotted_names_and_plain_values(finished: Finished) -> None:
    with traces.span("job", kind="client", tallyd__job__id=7, server__address="api.example", nothing=None) as span:
        span.set(http__response__status_code=200, cost_usd=Decimal("1.20"), is_late=False, duration_s=0.5, rows=10**30)
    span = finished()["job"]
    assert span.kind is SpanKind.CLIENT
    assert dict(span.attributes) == {
        "tallyd.job.id": 7,
        "server.address": "api.example",
        "http.response.status_code": 200,
        "cost_usd": "1.20",
        "is_late": False,
        "duration_s": 0.5,
        "rows": str(10**30),
    }


@pytest.mark.parametrize(
    ("attributes", "shown"),
    [
        ({"note": f"key sk-ant-admin01-{SECRET} refused"}, "key sk-*** refused"),
        ({"url": f"https://me:{SECRET}@x.example/a"}, "https://***@x.example/a"),
        ({"url": f"https://{SECRET}@x.example/a?b=c@d"}, "https://***@x.example/a?b=c@d"),
        ({"url": f"https://x.example/a?limit=4&access_token={SECRET}"}, "https://x.example/a?limit=4&access_token=***"),
        ({"url": "https://x.example/a@b"}, "https://x.example/a@b"),
        ({"authorization": SECRET}, "***"),
        ({"http__request__header__authorization": SECRET}, "***"),
        ({"api_key": SECRET.encode()}, "***"),
        ({"headers": {"x-api-key": SECRET}}, "{'x-api-key': '***'}"),
        ({"error": RuntimeError(f"Bearer {SECRET}")}, "Bearer ***"),
        ({"input_tokens": 12}, 12),
    ],
    ids=str,
)
def test_secret_in_an_attribute_is_masked(attributes: dict[str, object], shown: object, finished: Finished) -> None:
    with traces.span("at start", **attributes), traces.span("later") as later:
        later.set(**attributes)
    for span in finished().values():
        assert list(span.attributes.values()) == [shown]


# ── Setting up ──────────────────────────────────────────────────────────────────────────────────


def test_resource_names_the_service_and_the_process(finished: Finished) -> None:
    with traces.span("job"):
        pass
    resource = finished()["job"].resource.attributes
    assert resource["service.name"] == "tallyd"
    assert resource["service.version"] == "1.2.3"
    assert len(resource["service.instance.id"]) == 36
    assert resource["tallyd.role"] == "worker"


def test_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "billing")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.instance.id=a")
    exporter = InMemorySpanExporter()
    traces._start(exporter, service_version="1", role="worker")
    with traces.span("job"):
        pass
    traces.shutdown()
    resource = exporter.get_finished_spans()[0].resource.attributes
    assert resource["service.name"] == "billing"
    assert resource["service.instance.id"] == "a"
    assert resource["deployment.environment.name"] == "test"


def test_environment_chooses_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    exporter = InMemorySpanExporter()
    traces._start(exporter, service_version="1", role="worker")
    with traces.span("job"):
        pass
    traces.shutdown()
    assert exporter.get_finished_spans() == ()


def test_sdk_that_is_disabled_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    exporter = InMemorySpanExporter()
    traces._start(exporter, service_version="1", role="worker")
    with traces.span("job", parent=f"00-{TRACE}-{PARENT}-01", note="x"), traces.span("in it"):
        pass
    with traces.span("job") as span:
        assert span.traceparent is None
        assert traces.traceparent() is None
    traces.shutdown()
    assert exporter.get_finished_spans() == ()


def test_global_tracer_is_left_alone(finished: Finished) -> None:
    """Another library's spans must not go where ours go: nobody has looked at what they carry."""
    with trace.get_tracer("other").start_as_current_span("theirs"):
        pass
    assert finished() == {}


@pytest.mark.parametrize(
    "missing", ["opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.sdk.trace"]
)
def test_missing_extra_is_told_with_its_fix(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as caught:
        traces.configure(service_version="1", role="worker")
    (problem,) = caught.value.problems
    assert problem.startswith("traces: ")
    assert "pip install 'tallyd[otel]'" in problem
    assert traces.span("a") is traces.span("b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", f"{SECRET}@localhost:4318"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "unix:/run/x"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER", "nobody"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
    ],
)
def test_variable_that_cannot_work_is_told_at_start(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^traces: ") as caught:
        traces.configure(service_version="1", role="worker")
    assert SECRET not in str(caught.value)
    assert traces.span("a") is traces.span("b")
