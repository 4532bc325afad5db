"""Foreign words on their way into a text column."""

from __future__ import annotations

NOTE_BYTES_MAX = 2_000


def storable(text: str) -> str:
    """The text as Postgres takes it: no NUL, no half of a surrogate pair, at most `NOTE_BYTES_MAX` bytes of UTF-8.

    A provider's own words end up in notes and reasons; one bad character in them would refuse the whole batch.
    """
    clean = text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    return clean[:NOTE_BYTES_MAX].decode("utf-8", "ignore")
