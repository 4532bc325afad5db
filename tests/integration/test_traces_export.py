"""Spans reach a collector over a real socket, and a collector that is away costs neither time nor log."""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from structlog.testing import capture_logs

from daemon.telemetry import traces

SECRET = "aVerySecretValue1234"
WAIT_S = 10


class Post(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes


class Collector:
    """Takes OTLP over HTTP; `statuses` are its first answers, after them it says 200."""

    def __init__(self, *statuses: int) -> None:
        posts: queue.Queue[Post] = queue.Queue()
        answers = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.send_response(answers.pop(0) if answers else 200)
                self.send_header("content-length", "0")
                self.end_headers()
                posts.put(Post(self.path, {key.lower(): value for key, value in self.headers.items()}, body))

            def log_message(self, *_: object) -> None:
                pass

        self.posts = posts
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture(autouse=True)
def only_these_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("OTEL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    yield
    traces.shutdown()
    for thread in threading.enumerate():
        if thread.name == "traces-flush":
            thread.join(WAIT_S)


@pytest.fixture
def others() -> list[logging.LogRecord]:
    """What libraries log. Not caplog: it also listens where nothing is passed on to the daemon's own handler."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    records: list[logging.LogRecord] = []
    logging.getLogger().addHandler(Keep(logging.WARNING))
    return records


def configure(monkeypatch: pytest.MonkeyPatch, url: str, **more: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    for name, value in more.items():
        monkeypatch.setenv(name, value)
    traces.configure(service_version="1.2.3", role="worker")


@pytest.fixture
def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_spans_arrive_with_their_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    with collector.serving():
        configure(monkeypatch, collector.url, OTEL_EXPORTER_OTLP_HEADERS="x-tenant=acme")
        with traces.span("delivery", kind="server"), traces.span("tick"):
            message = traces.traceparent()
        with (
            pytest.raises(LookupError),
            traces.span("job", parent=message, tallyd__job__id=7),
            traces.span("http.request", kind="client", url__full=f"https://me:{SECRET}@x.example/?token={SECRET}"),
        ):
            raise LookupError(f"Bearer {SECRET} refused")
        traces.shutdown()
        post = collector.posts.get(timeout=WAIT_S)
    assert collector.posts.empty()
    assert post.path == "/v1/traces"
    assert post.headers["content-type"] == "application/x-protobuf"
    assert post.headers["x-tenant"] == "acme"
    assert SECRET.encode() not in post.body

    (resource_spans,) = ExportTraceServiceRequest.FromString(post.body).resource_spans
    resource = {pair.key: pair.value.string_value for pair in resource_spans.resource.attributes}
    assert resource["service.name"] == "tallyd"
    assert resource["service.version"] == "1.2.3"
    (scope_spans,) = resource_spans.scope_spans
    spans = {span.name: span for span in scope_spans.spans}
    names = {span.span_id: name for name, span in spans.items()}
    assert {name: names.get(span.parent_span_id) for name, span in spans.items()} == {
        "delivery": None,
        "tick": "delivery",
        "job": "tick",
        "http.request": "job",
    }
    assert len({span.trace_id for span in spans.values()}) == 1
    assert [(pair.key, pair.value.int_value) for pair in spans["job"].attributes] == [("tallyd.job.id", 7)]
    assert spans["job"].status.message == "Bearer *** refused"


def test_failing_collector_is_told_once_and_its_return_too(
    monkeypatch: pytest.MonkeyPatch, others: list[logging.LogRecord]
) -> None:
    """OpenTelemetry would log an error for each batch, every five seconds for as long as the collector is down."""
    collector = Collector(400, 401, 400)
    with collector.serving(), capture_logs() as logs:
        configure(monkeypatch, collector.url, OTEL_BSP_SCHEDULE_DELAY="1")
        for _ in range(5):
            with traces.span("job"):
                pass
            collector.posts.get(timeout=WAIT_S)
        traces.shutdown()
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("traces.export_failed", "warning"),
        ("traces.export_resumed", "info"),
    ]
    assert "400" in logs[0]["reason"]
    assert others == []


def test_collector_that_is_away_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, others: list[logging.LogRecord], free_url: str
) -> None:
    with capture_logs() as logs:
        configure(monkeypatch, free_url.replace("//", f"//me:{SECRET}@"), OTEL_BSP_MAX_QUEUE_SIZE="600")
        for _ in range(2_000):
            with traces.span("job"):
                pass
        began = time.monotonic()
        traces.shutdown(flush_s=1.0)
        assert time.monotonic() - began < 5  # an export may take 10 s, and OpenTelemetry's own shutdown 30 s
    assert [(line["event"], line["log_level"]) for line in logs] == [("traces.export_failed", "warning")]
    assert "refused" in logs[0]["reason"]
    assert SECRET not in logs[0]["reason"]
    assert others == []


def test_collector_that_never_answers_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, others: list[logging.LogRecord]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, capture_logs() as logs:
        configure(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with traces.span("job"):
            pass
        began = time.monotonic()
        traces.shutdown(flush_s=0.2)
        assert time.monotonic() - began < 5  # an export may take 10 s, and OpenTelemetry's own shutdown 30 s
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("traces.export_failed", "the collector did not answer in time")
    ]
    assert others == []


def test_flush_is_bounded_by_default() -> None:
    assert 0 < traces.FLUSH_S_MAX <= 5
