"""Anthropic's usage and cost reports, in both generations of its API.

`settings.api` chooses: `reports` (the Admin API, the default while the other is beta) or `analytics`. The rows of the
two carry different dimensions (the default workspace is null in one and an id in the other), so the choice is part of
the grain.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from daemon.domain.collection import Collected
from daemon.domain.connection import Identity, Target
from daemon.domain.errors import BadRequestError, ForbiddenError, SchemaDriftError, UsageError
from daemon.domain.ports import Caller, Ladder, Probe, SourceSpec, collection
from daemon.domain.record import Grain, Snapshot, Totals, totals_of
from daemon.domain.window import Width, Window
from daemon.pollers import _anthropic_analytics as analytics
from daemon.pollers import _anthropic_names
from daemon.pollers import _anthropic_reports as reports
from daemon.pollers._anthropic_rows import headers
from daemon.pollers.chain import check_group_by, check_key_kind, check_known, decode

USAGE_LADDER = Ladder(young=timedelta(hours=3), hourly=timedelta(hours=48), daily=timedelta(days=7))
COST_LADDER = Ladder(young=timedelta(days=1), hourly=timedelta(days=3), daily=timedelta(days=35))
APIS = ("reports", "analytics")


class _Organization(msgspec.Struct):
    id: str | None = None
    name: str | None = None


_organization_decoder = msgspec.json.Decoder(_Organization)


class AnthropicPoller:
    """Anthropic, for organisations of the Console and, by analytics, of Claude Enterprise.

    Args:
        now: the wall clock, for leaving the end out of a question about the present, and for the reach of the reports.
    """

    provider = "anthropic"
    default_base_url = "https://api.anthropic.com"
    sources: Mapping[str, SourceSpec] = {
        "messages": SourceSpec("messages", "usage", "tick", USAGE_LADDER, reports.LIMITS["messages"], can_probe=True),
        "cost": SourceSpec("cost", "cost", "hourly", COST_LADDER, reports.LIMITS["cost"]),
        "names": collection("names", "names", "daily"),
    }

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now

    def check_settings(self, settings: Mapping[str, object]) -> None:
        check_known(settings, ("api", "group_by"))
        api = settings.get("api", "reports")
        if api not in APIS:
            raise UsageError("settings.api", f"{api!r} is no API of Anthropic", f"use {' or '.join(APIS)}")
        if "group_by" not in settings:
            return
        group_by = settings["group_by"]
        usage, cost = reports.USAGE_DIMS, reports.COST_DIMS
        if api == "analytics":
            usage, cost = analytics.USAGE_DIMS, analytics.USAGE_DIMS | analytics.FREE_DIMS
        for source, names in check_group_by(group_by, {"messages": usage, "cost": cost}, analytics.REFUSED).items():
            if api == "analytics" and len(set(names) - analytics.FREE_DIMS) > analytics.DIMS_MAX:
                raise UsageError(f"settings.group_by.{source}", f"more than {analytics.DIMS_MAX} dimensions")

    def check_credential(self, credential: str) -> None:
        check_key_kind(credential, "sk-ant-admin", "an Anthropic Admin key (sk-ant-admin...), made by an admin")

    def grain(self, source: str, settings: Mapping[str, Any]) -> Grain:
        api = settings.get("api", "reports")
        defaults = analytics.DEFAULTS if api == "analytics" else reports.DEFAULTS
        group_by = settings.get("group_by", {}).get(source, defaults.get(source, ()))
        return Grain(api, Width.DAY if source == "cost" else Width.HOUR, tuple(sorted(group_by)))

    async def identify(self, target: Target, call: Caller) -> Identity:
        try:
            answer = await call.get("/v1/organizations/me", (), headers(target))
            organization = decode(_organization_decoder, answer, "organization")
        except (BadRequestError, ForbiddenError, SchemaDriftError):
            # A gateway may serve the reports alone, and a key may be for nothing else: what counts is that it reads them.
            hour = Width.HOUR.floor(self._now())
            grain = self.grain("messages", target.settings)
            await self.probe(target, "messages", grain, Window(hour - Width.HOUR.delta, hour), call)
            return Identity(None)
        return Identity(organization.id, organization.name)

    async def probe(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Probe:
        if grain.api == "analytics":
            digest = await analytics.probe(target, source, grain, window, call)
            if digest is not None:
                return Probe(digest=digest)
        return Probe(totals=await self.totals(target, source, grain, window, call))

    async def fetch(self, target: Target, source: str, grain: Grain, window: Window, call: Caller) -> Snapshot:
        if grain.api == "analytics":
            return await analytics.read(target, source, grain, window, call, now=self._now())
        buckets, pages = await reports.read(target, source, grain, window, call, now=self._now())
        return Snapshot(grain, window, buckets, pages)

    async def totals(
        self, target: Target, source: str, grain: Grain, window: Window, call: Caller
    ) -> Mapping[datetime, Totals]:
        snapshot = await self.fetch(target, source, Grain(grain.api, grain.width, ()), window, call)
        return {bucket.start: totals_of(bucket.rows) for bucket in snapshot.buckets if bucket.rows}

    def collect(
        self,
        target: Target,
        source: str,  # noqa: ARG002 - there is one
        known: bytes | None,  # noqa: ARG002 - no list has a version
        call: Caller,
    ) -> AsyncIterator[Collected]:
        return _anthropic_names.read(target, call)
