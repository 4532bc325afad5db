"""What this process has done, as Prometheus counters; and the writing of an answer to a scrape.

Names are `tallyd_<noun>_<unit>`, labels come from closed sets (a provider, an outcome, a route), never from names of
people, keys or tenants. What the database knows (spend, queue, connections) is no counter of ours: `daemon.db.figures`
reads it when somebody scrapes, and `exposition` writes both.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from daemon.domain.gauge import Gauge

# A second series for each counter, which nothing here asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves it untyped

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
_JOB_S = (0.01, 0.05, 0.25, 1, 5, 15, 60, 240)
_DELIVERY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5, 10)

TICKS = Counter("tallyd_ticks", "Ticks that this replica made.", ["via"], registry=REGISTRY)
TICKS_INCOMPLETE = Counter(
    "tallyd_ticks_incomplete", "Ticks found with too few batches done by their deadline.", registry=REGISTRY
)
JOBS = Counter("tallyd_jobs", "Attempts that ended here.", ["kind", "outcome"], registry=REGISTRY)
JOB_SECONDS = Histogram(
    "tallyd_job_duration_seconds", "How long attempts took.", ["kind"], buckets=_JOB_S, registry=REGISTRY
)
ROWS = Counter(
    "tallyd_usage_rows_written", "Rows read, by what booking them changed.", ["provider", "outcome"], registry=REGISTRY
)
PROVIDER_REQUESTS = Counter(
    "tallyd_provider_requests", "Requests to providers.", ["provider", "code"], registry=REGISTRY
)
PROVIDER_SECONDS = Histogram(
    "tallyd_provider_request_duration_seconds", "How long providers took.", ["provider"], buckets=_REQUEST_S,
    registry=REGISTRY,
)  # fmt: skip
DELIVERIES = Counter("tallyd_deliveries", "Signed deliveries that were answered.", ["route", "code"], registry=REGISTRY)
DELIVERY_SECONDS = Histogram(
    "tallyd_delivery_duration_seconds", "From a delivery's head to its answer.", ["route"], buckets=_DELIVERY_S,
    registry=REGISTRY,
)  # fmt: skip
PUBLISHED = Counter(
    "tallyd_qstash_messages", "Batches offered to QStash, by what became of them.", ["outcome"], registry=REGISTRY
)

PUSHES = Counter(
    "tallyd_pushes", "Attempts to deliver a message to its URL, by how they ended.", ["outcome"], registry=REGISTRY
)
PUSH_SECONDS = Histogram(
    "tallyd_push_duration_seconds", "How long endpoints took.", buckets=_REQUEST_S, registry=REGISTRY
)
API_REQUESTS = Counter(
    "tallyd_api_requests", "Requests to /v2 that were answered.", ["resource", "code"], registry=REGISTRY
)
API_SECONDS = Histogram(
    "tallyd_api_request_duration_seconds", "From the head of a request to /v2 to its answer.", ["resource"],
    buckets=_DELIVERY_S, registry=REGISTRY,
)  # fmt: skip


def exposition(gauges: Iterable[Gauge]) -> bytes:
    """The answer to a scrape: this process's counters, and the gauges given."""
    once = CollectorRegistry()
    once.register(_Once(gauges))
    return generate_latest(REGISTRY) + generate_latest(once)


class _Once(Collector):
    def __init__(self, gauges: Iterable[Gauge]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for gauge in self._gauges:
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
            for labels, value in gauge.values:
                if value is not None:
                    family.add_metric(labels, value)
            yield family
