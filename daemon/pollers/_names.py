"""What people call the ids in a report: lists of projects, keys and people, read page by page.

A kind of name that a provider does not show to this key, or does not have, is no reason to lose the others. It is told
apart from one that has none left (`Collected.unread`), or its names would be taken for deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from daemon.domain.collection import Collected, Name, NameKind
from daemon.domain.errors import BadRequestError, ForbiddenError, SchemaDriftError
from daemon.domain.ports import Answer
from daemon.pollers.chain import Fields, decode, encode_detail

T = TypeVar("T")
PAGES_MAX = 2_000
"""Of one list: some hundred thousand people."""
NAME_CHARS_MAX = 500
NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of a list, and where the next one begins; None after the last."""

    items: Sequence[Fields]
    next_page: str | None


def decode_list(decoder: msgspec.json.Decoder[T], answer: Answer, what: str) -> T:
    """As `decode`, but the error keeps nothing of the body: it holds people's addresses, and an error ends in a log."""
    try:
        return decode(decoder, answer, what)
    except SchemaDriftError as error:
        raise SchemaDriftError(str(error)) from None


async def follow(ask: Callable[[str | None], Awaitable[Listing]], what: str) -> AsyncIterator[Sequence[Fields]]:
    """The pages of a list, to its end.

    Raises:
        SchemaDriftError: a cursor leads back, or there is no end.
    """
    seen: set[str] = set()
    cursor: str | None = None
    for _ in range(PAGES_MAX):
        page = await ask(cursor)
        if page.items:
            yield page.items
        if page.next_page is None or not page.items:
            return
        cursor = page.next_page
        if cursor in seen:
            raise SchemaDriftError(f"{what}: a page's cursor leads back to a page that was read")
        seen.add(cursor)
    raise SchemaDriftError(f"{what}: the page chain has no end after {PAGES_MAX} pages")


def name_of(kind: NameKind, item: Fields, id_field: str, *name_fields: str) -> Iterator[Name]:
    """What an item is called: the first of the fields that holds a name. Nothing when none does."""
    id_ = item.get(id_field)
    if type(id_) is not str or not id_:
        raise SchemaDriftError(f"{kind}: {id_field} is missing", encode_detail({"fields": sorted(item)}))
    for field in name_fields:
        text = item.get(field)
        if type(text) is str and (name := _clean(text)):
            yield Name(kind, id_, name)
            return


def names_of(kind: NameKind, items: Iterable[Fields], id_field: str, *name_fields: str) -> list[Name]:
    return [name for item in items for name in name_of(kind, item, id_field, *name_fields)]


def _clean(text: str) -> str:
    """For reading by people: Postgres takes no zero byte, and nobody needs a name of a page's length."""
    return text.replace("\0", "").strip()[:NAME_CHARS_MAX]


class Unread:
    """The kinds of names that could not be read as a whole, and the first refusal."""

    def __init__(self) -> None:
        self._kinds: set[NameKind] = set()
        self._refusal: ForbiddenError | BadRequestError | None = None
        self._has_read = False

    @contextmanager
    def of(self, kind: NameKind) -> Iterator[None]:
        """Note a refusal of the list (403), or that there is none (404), and go on. Anything else goes up."""
        try:
            yield
            self._has_read = True
        except ForbiddenError as error:
            self._note(kind, error)
        except BadRequestError as error:
            if error.status != NOT_FOUND:
                raise
            self._note(kind, error)

    def spread(self, kind: NameKind, onto: NameKind) -> None:
        """What is listed under another kind cannot be whole without it."""
        if kind in self._kinds:
            self._kinds.add(onto)

    def ending(self) -> Iterator[Collected]:
        """The last part of the collection, when there is something to say. Raises the refusal if nothing was read."""
        if self._refusal is not None and not self._has_read:
            raise self._refusal
        if self._kinds:
            yield Collected((), unread=frozenset(self._kinds))

    def _note(self, kind: NameKind, refusal: ForbiddenError | BadRequestError) -> None:
        self._kinds.add(kind)
        self._refusal = self._refusal or refusal
