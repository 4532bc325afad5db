"""What an organisation calls its workspaces, keys and people: the lists of the Admin API.

Source: the Admin API pages of platform.claude.com, read 2026-09-25.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from decimal import Decimal

import msgspec

from daemon.domain.collection import Collected
from daemon.domain.connection import Target
from daemon.domain.errors import SchemaDriftError
from daemon.domain.ports import Caller
from daemon.pollers._anthropic_rows import headers
from daemon.pollers._names import Listing, Unread, decode_list, follow, names_of
from daemon.pollers.chain import Fields

LIMIT = 100


class _List(msgspec.Struct):
    data: list[Fields]
    has_more: bool
    last_id: str | None = None


_decoder = msgspec.json.Decoder(_List, float_hook=Decimal)


async def read(target: Target, call: Caller) -> AsyncIterator[Collected]:
    """Workspaces, archived ones too, then keys, which are listed whatever their state, then people."""
    unread = Unread()
    with unread.of("workspace"):
        every = (("include_archived", "true"),)
        async for items in _listed(target, "/v1/organizations/workspaces", every, call):
            yield Collected(names_of("workspace", items, "id", "name"))
    with unread.of("api_key"):
        async for items in _listed(target, "/v1/organizations/api_keys", (), call):
            yield Collected(names_of("api_key", items, "id", "name", "partial_key_hint"))
    with unread.of("user"):
        async for items in _listed(target, "/v1/organizations/users", (), call):
            yield Collected(names_of("user", items, "id", "name", "email"))
    for part in unread.ending():
        yield part


def _listed(
    target: Target, path: str, query: Sequence[tuple[str, str]], call: Caller
) -> AsyncIterator[Sequence[Fields]]:
    async def ask(cursor: str | None) -> Listing:
        after = () if cursor is None else (("after_id", cursor),)
        answer = await call.get(path, (*query, ("limit", str(LIMIT)), *after), headers(target))
        page = decode_list(_decoder, answer, path)
        if page.has_more and page.data and not page.last_id:
            raise SchemaDriftError(f"{path}: the page says that there are more, and gives no cursor")
        return Listing(page.data, page.last_id if page.has_more else None)

    return follow(ask, path)
