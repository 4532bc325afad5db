"""Answers that break: queued for a request that matches, or at random from a seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate

import msgspec

from daemon.simulator.catalogue import HOUR, Provider
from daemon.simulator.wire import Breakage, Page, RefusedError, Reply, Request, Service

ALL_TRANSIENT = ("429", "500", "502", "503", "timeout", "truncated_body", "slow_drip", "reset_after_headers")
_STATUSES = {
    "401": ("authentication_error", "invalid_api_key", "The key was revoked."),
    "403": ("permission_error", "missing_scope", "You have insufficient permissions for this operation."),
    "408": ("timeout_error", None, "Request timed out."),
    "429": ("rate_limit_error", "rate_limit_exceeded", "Rate limit reached."),
    "500": ("api_error", "server_error", "The server had an error while processing your request."),
    "503": ("api_error", "service_unavailable", "The service is temporarily unavailable."),
    "529": ("overloaded_error", "overloaded", "Overloaded"),
}


class Fault(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One kind of fault for the next `count` answers that match, after `skip` of them went unharmed.

    Attributes:
        retry_after: how a 429, 503 or 529 says when to come back: "seconds", "date", "ms" or "none".
        hold_s: of "timeout".  drip_s: of "slow_drip".  skew_s: of "skewed_date".
        rows: of "drop_rows": how many rows the answer lacks, newest bucket first; 0 empties that bucket.
        requests: of "grow_between_pages".
    """

    kind: str
    count: int = 1
    skip: int = 0
    provider: Provider | None = None
    key: str | None = None
    path_contains: str = ""
    query_contains: str = ""
    retry_after: str = "seconds"
    retry_after_s: float = 1
    hold_s: float = 30
    drip_s: float = 0.02
    skew_s: int = 86400
    rows: int = 0
    requests: int = 10


class RandomFaults(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A share of all answers breaks. `kinds` is a list, or "all-transient"."""

    rate: float
    kinds: list[str] | str = "all-transient"
    seed: int = 7
    retry_after: str = "seconds"
    retry_after_s: float = 1
    hold_s: float = 1
    drip_s: float = 0.02


class Faults:
    """The faults to come, and a count of those served."""

    def __init__(self) -> None:
        self.queued: list[Fault] = []
        self.served: Counter[str] = Counter()
        self._random: RandomFaults | None = None
        self._rng = random.Random(0)  # noqa: S311  # seeded on purpose

    def queue(self, fault: Fault) -> None:
        if fault.kind not in KINDS:
            raise ValueError(f"no such fault: {fault.kind}; there are {', '.join(sorted(KINDS))}")
        self.queued.append(fault)

    def set_random(self, faults: RandomFaults) -> None:
        kinds = list(ALL_TRANSIENT) if faults.kinds == "all-transient" else faults.kinds
        if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
            raise ValueError(f'kinds: "all-transient" or a list of {", ".join(sorted(KINDS))}')
        faults.kinds = kinds
        self._random = faults
        self._rng = random.Random(faults.seed)  # noqa: S311  # seeded on purpose

    def clear(self) -> None:
        self.queued.clear()
        self._random = None

    def harm(self, service: Service, key: str, request: Request, reply: Reply, now: int) -> None:
        """Break `reply` when its turn has come. Only good answers are broken."""
        if reply.status != 200:
            return
        fault = self._next(service, key, request, reply)
        if fault is not None:
            self.served[fault.kind] += 1
            KINDS[fault.kind](_Hit(fault, service, reply, now))

    def _next(self, service: Service, key: str, request: Request, reply: Reply) -> Fault | None:
        for fault in self.queued:
            if (
                fault.provider in {None, service.vendor.provider}
                and (fault.key is None or fault.key == key)
                and fault.path_contains in request.path
                and fault.query_contains in request.query
                and _applies(fault, reply)
            ):
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.count -= 1
                if fault.count <= 0:
                    self.queued.remove(fault)
                return fault
        chance = self._random
        if chance is None or self._rng.random() >= chance.rate:
            return None
        kinds = [kind for kind in chance.kinds if kind != "529" or service.vendor.says_529]
        fault = Fault(
            kind=kinds[int(self._rng.random() * len(kinds))],
            retry_after=chance.retry_after,
            retry_after_s=chance.retry_after_s,
            hold_s=chance.hold_s,
            drip_s=chance.drip_s,
        )
        return fault if _applies(fault, reply) else None


@dataclass(frozen=True, slots=True)
class _Hit:
    """A fault that has found its answer."""

    fault: Fault
    service: Service
    reply: Reply
    now: int

    @property
    def page(self) -> Page:
        assert self.reply.page is not None
        return self.reply.page

    def cursor(self, position: int) -> str:
        assert self.page.cursor is not None
        return self.page.cursor(position)


_Harm = Callable[[_Hit], None]


def _applies(fault: Fault, reply: Reply) -> bool:
    """A fault of paging waits for a page that it can bend."""
    page = reply.page
    match fault.kind:
        case "truncated_chain" | "grow_between_pages":
            return page is not None and page.has_more
        case "empty_past_end":
            return page is not None and page.cursor is not None and not page.has_more
        case "repeat_cursor" | "has_more_without_cursor":
            return page is not None and page.cursor is not None
        case "result_field":
            return page is not None and any("results" in bucket for bucket in page.body["data"])
        case "drop_rows":
            return page is not None and any(bucket.get("results", True) for bucket in page.body["data"])
        case _:
            return True


def _refuse(hit: _Hit) -> None:
    fault, reply = hit.fault, hit.reply
    kind, code, message = _STATUSES[fault.kind]
    status = int(fault.kind)
    reply.body = hit.service.error_body(RefusedError(status, kind, message, code=code), reply)
    reply.status, reply.page = status, None
    if status in {429, 503, 529}:
        match fault.retry_after:
            case "seconds":
                reply.headers.append(("retry-after", format(fault.retry_after_s, "g")))
            case "date":
                reply.headers.append(("retry-after", formatdate(hit.now + fault.retry_after_s, usegmt=True)))
            case "ms":
                reply.headers.append(("retry-after-ms", str(int(fault.retry_after_s * 1000))))
            case _:
                pass


def _html(hit: _Hit) -> None:
    hit.reply.status, hit.reply.page, hit.reply.content_type = 502, None, "text/html"
    hit.reply.body = b"<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"


def _not_json(hit: _Hit) -> None:
    hit.reply.page, hit.reply.content_type = None, "text/html"
    hit.reply.body = b"<!doctype html><title>Maintenance</title>"


def _break(hit: _Hit) -> None:
    kind, fault = hit.fault.kind, hit.fault
    hit.reply.breakage = Breakage(
        hold_s=fault.hold_s if kind == "timeout" else 0,
        cut=kind == "truncated_body",
        reset=kind == "reset_after_headers",
        drip_s=fault.drip_s if kind == "slow_drip" else 0,
        skew_s=fault.skew_s if kind == "skewed_date" else 0,
    )


def _repeat_cursor(hit: _Hit) -> None:
    hit.page.body |= {"has_more": True, "next_page": hit.cursor(hit.page.position)}


def _without_cursor(hit: _Hit) -> None:
    hit.page.body |= {"has_more": True, "next_page": None}


def _empty_past_end(hit: _Hit) -> None:
    """The last page names a next one, and so does each empty page after it."""
    hit.page.body |= {"has_more": True, "next_page": hit.cursor(hit.page.end + HOUR)}


def _truncated_chain(hit: _Hit) -> None:
    hit.page.end_here()


def _grow(hit: _Hit) -> None:
    hit.page.org.grow(hit.fault.requests, hit.now - hit.now % HOUR, hit.now + 1)


def _drop_rows(hit: _Hit) -> None:
    data, rows = hit.page.body["data"], hit.fault.rows
    if data and "results" not in data[0]:
        del data[max(0, len(data) - rows) if rows else 0 :]
        return
    bucket = next(bucket for bucket in reversed(data) if bucket["results"])
    bucket["results"] = bucket["results"][:-rows] if rows else []


def _result_field(hit: _Hit) -> None:
    for bucket in hit.page.body["data"]:
        bucket["result"] = bucket.pop("results")


KINDS: dict[str, _Harm] = {
    **dict.fromkeys(_STATUSES, _refuse),
    **dict.fromkeys(("timeout", "truncated_body", "reset_after_headers", "slow_drip", "skewed_date"), _break),
    "502": _html,
    "not_json": _not_json,
    "repeat_cursor": _repeat_cursor,
    "has_more_without_cursor": _without_cursor,
    "empty_past_end": _empty_past_end,
    "truncated_chain": _truncated_chain,
    "grow_between_pages": _grow,
    "drop_rows": _drop_rows,
    "result_field": _result_field,
}
