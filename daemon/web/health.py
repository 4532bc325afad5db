"""`/healthz` (the process turns), `/readyz` (it can work: database, migrations, queue) and `/metrics`."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Sequence

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.domain.connection import Secret
from daemon.domain.gauge import Gauge
from daemon.telemetry.health import Health
from daemon.telemetry.metrics import CONTENT_TYPE, exposition
from daemon.web.delivery import Routes, json_response

log = structlog.get_logger()

Figures = Callable[[], Awaitable[Sequence[Gauge]]]


def health_routes(health: Health, figures: Figures, *, token: Secret | None, is_local: bool) -> Routes:
    """The routes about this process itself.

    Args:
        token: asked for by `/metrics`; without one, metrics are for listeners that only this machine reaches.
        is_local: the listener is such a one.
    """

    async def healthz(_request: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(_request: Request) -> Response:
        problems = await health.problems()
        is_ready = not any(problems.values())
        checks = {name: problem or "ok" for name, problem in problems.items()}
        return json_response({"ready": is_ready, "checks": checks}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        if token is None and not is_local:
            problem = "metrics need a token on a listener that others reach; set TALLYD_METRICS_TOKEN"
            return json_response({"error": problem}, 403)
        if token is not None and not _bears(request.headers.get("authorization", ""), token):
            problem = "give the token: Authorization: Bearer ..."
            return json_response({"error": problem}, 401, {"WWW-Authenticate": "Bearer"})
        return Response(exposition(await figures()), media_type=CONTENT_TYPE)

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def _bears(header: str, token: Secret) -> bool:
    scheme, _, given = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.reveal().encode())
