"""Identity: where a number belongs, never the number (law 1).

A row's key names its connection, source, grain, bucket and dimensions. Its content hash covers what the provider says
there. Both carry a version: code of an older version leaves buckets of a newer one alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from hashlib import sha256

import msgspec

from daemon.domain.connection import ConnectionId
from daemon.domain.record import EXACT, HASH_VERSION, Dims, Grain, GrainId, Row
from daemon.domain.window import to_epoch

_DIGEST_BYTES = 16
_encode = msgspec.json.Encoder().encode


def grain_id(grain: Grain) -> GrainId:
    """A short name for a grain, equal for equal cuts only."""
    text = _encode([HASH_VERSION, grain.api, grain.width.value, sorted(grain.group_by)])
    return GrainId(sha256(text).hexdigest()[:_DIGEST_BYTES])


class Keyer:
    """Makes the row keys of one stream in one grain.

    The parts are joined as JSON, never by a separator: a line item may hold any character. Null stays apart from "".
    """

    __slots__ = ("_prefix",)

    def __init__(self, connection_id: ConnectionId, source: str, grain: Grain) -> None:
        self._prefix = sha256(
            _encode([connection_id, source, grain.api, grain_id(grain), grain.width.value]),
        )

    def row_key(self, bucket_start: datetime, dims: Dims) -> bytes:
        """The key of the row of `dims` (sorted by name) in the bucket: a version byte and 19 bytes of SHA-256."""
        digest = self._prefix.copy()
        digest.update(_encode((to_epoch(bucket_start), dims)))
        return bytes((HASH_VERSION,)) + digest.digest()[:19]


def content_hash(row: Row) -> bytes:
    """16 bytes over everything the provider says in a row; a local price is ours and stays out of it.

    `0.1` and `0.10` are the same content; null and 0 are not.
    """
    values = _encode(
        (
            row.input_tokens,
            row.cache_read_tokens,
            row.cache_write_tokens,
            row.output_tokens,
            row.requests,
            _plain(row.quantity),
            row.unit,
            _plain(row.amount),
            row.currency,
        ),
    )
    return sha256(values + row.detail).digest()[:_DIGEST_BYTES]


def bucket_digest(rows: Iterable[tuple[bytes, bytes]]) -> bytes:
    """16 bytes over a bucket's (row key, content hash) pairs, whatever their order; b"" for no rows."""
    parts = sorted(rows)
    if not parts:
        return b""
    return sha256(b"".join(key + content for key, content in parts)).digest()[:_DIGEST_BYTES]


def _plain(number: Decimal | None) -> str | None:
    """One spelling for equal numbers."""
    if number is None:
        return None
    return format(EXACT.normalize(number), "f") if number else "0"
