"""What the poller suite needs to know about one source: how its rows look on the wire, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Literal, TypeVar

import httpx

from daemon.domain.connection import Secret, Target
from daemon.domain.ports import Answer, Poller
from daemon.domain.record import Grain, Row
from daemon.domain.window import Window
from daemon.http_client import HttpClient

NOW = datetime(2026, 11, 22, 10, 20, tzinfo=UTC)
"""When the suite plays. A poller with a clock takes this one: `AcmePoller(now=lambda: NOW)`."""

BASE_URL = "https://provider.test"
Wire = dict[str, Any]
Bucket = tuple[datetime, datetime, list[Wire]]
"""Start, end, and rows as they are on the wire."""

Paging = Literal["flagged", "cursor", "whole"]
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One source of one poller.

    Attributes:
        id: names the source in the test report, such as "acme-ai-tokens".
        row: a row as the provider sends it, by number; rows of different numbers differ in a dimension. Its dimensions
            stand in it under their names, or under those of `wire`.
        means: what that row must be read as, but for detail and rating.
        page: the envelope around buckets. Arguments: the buckets, whether more follow, and the next page's cursor.
        error: the body of a refusal with a code, where tallyd reads a code in it.
        settings: the connection's.
        wire: how the provider writes a dimension in a row, by our name of it, where that is another.
        required: a field without which a row is no row; optional: one that may be missing, and is None then.
        set_amount: a row of the same dimensions with another amount, as JSON text; None if the source has no money.
        amount_scale: what one unit on the wire is worth in whole units of the currency.
        currency: how `row` writes its currency; None where the rows do not say it.
        envelope: the fields without which a page is no page.
        paging: "flagged" when a page says whether more follow, and gives a cursor; "cursor" when the cursor alone says
            so; "whole" when there is one answer to a question.
        cursor_param: the query parameter that carries the cursor.
        cursor_sent: what it carries for the nth cursor, where that is not the cursor itself: pages that go by number
            have `lambda n, _cursor: str(n + 2)`.
        probe: what a probe is answered, where that is another thing than a page.
        group_param: what the query parameters of the grouping begin with.
        has_empty_buckets: the provider sends buckets without rows, so that a hole is a lost page.
        is_dated: a bucket is named by its date alone, so that it cannot be off the grid.
        is_flat: each row says its own time, and the rows may come in any order.
        is_row_paged: a page may end inside a bucket.
    """

    id: str
    poller: Poller
    source: str
    row: Callable[[int], Wire]
    means: Callable[[int], Row]
    page: Callable[[Sequence[Bucket], bool, str | None], Wire]
    error: Callable[[str], Wire] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    wire: Mapping[str, str] = field(default_factory=dict)
    required: str = ""
    optional: str | None = None
    set_amount: Callable[[Wire, Any], Wire] | None = None
    amount_scale: Decimal = Decimal(1)
    currency: str | None = "usd"
    envelope: tuple[str, ...] = ("data", "has_more")
    paging: Paging = "flagged"
    cursor_param: str = "page"
    cursor_sent: Callable[[int, str], str] = lambda _n, cursor: cursor
    probe: Wire | None = None
    group_param: str = "group_by"
    has_empty_buckets: bool = False
    is_dated: bool = False
    is_flat: bool = False
    is_row_paged: bool = False

    @property
    def grain(self) -> Grain:
        return self.poller.grain(self.source, self.settings)

    @property
    def target(self) -> Target:
        return Target(self.poller.provider, BASE_URL, Secret("key-of-the-test"), self.settings)

    def starts(self, count: int) -> list[datetime]:
        """The youngest closed buckets, oldest first."""
        width = self.grain.width
        last = width.floor(NOW)
        return [last - (count - n) * width.delta for n in range(count)]

    def bucket(self, start: datetime, rows: list[Wire]) -> Bucket:
        return start, start + self.grain.width.delta, rows

    def window(self, count: int) -> Window:
        return Window(self.starts(count)[0], self.grain.width.floor(NOW))

    def shown(self, row: Wire) -> list[tuple[str, str]]:
        """The dimensions that a row has a value for: our name of each, and the one on the wire."""
        names = [(name, self.wire.get(name, name)) for name in self.grain.group_by]
        return [(ours, theirs) for ours, theirs in names if row.get(theirs) is not None]

    def priced(self, row: Wire, amount: Any) -> Wire:
        """`row` with another amount; only for a source with money."""
        assert self.set_amount is not None
        return self.set_amount(row, amount)


class Script:
    """A provider that gives its answers in turn, through tallyd's own HTTP client, and keeps what it was asked.

    An answer is a `httpx.Response`, a body in bytes, something to send as JSON, or a function of the request that
    returns one of them. The last one is repeated.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self._client = HttpClient(transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, httpx.Response):
            return answer
        content = answer if isinstance(answer, bytes) else json.dumps(answer, default=str).encode()
        return httpx.Response(200, content=content, headers={"content-type": "application/json"})

    async def get(
        self, path: str, params: Sequence[tuple[str, str]] = (), headers: Mapping[str, str] | None = None
    ) -> Answer:
        return await self._client.get(BASE_URL, path, params, headers)

    async def post(
        self, path: str, body: bytes, headers: Mapping[str, str] | None = None, *, base_url: str | None = None
    ) -> Answer:
        return await self._client.post(base_url or BASE_URL, path, body, headers)

    async def run(self, send: Callable[[], Awaitable[T]]) -> T:
        return await send()

    def query(self, n: int) -> list[tuple[str, str]]:
        """The parameters of the nth request."""
        return list(self.requests[n].url.params.multi_items())


__all__ = ["BASE_URL", "NOW", "Bucket", "Case", "Paging", "Script", "Wire"]
