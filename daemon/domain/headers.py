"""What HTTP asks of header fields (RFC 9110), wherever they come from and wherever they go."""

from __future__ import annotations

import re
from collections.abc import Iterable

TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
"""A name of a field, or of a method."""
NO_VALUE = re.compile("[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
"""What no value can hold: line breaks and other control characters, halves of surrogate pairs."""
OF_CONNECTION = frozenset(
    {"connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade"}
)  # fmt: skip
"""Names, in lower case, of what belongs to a connection and frames its messages: nobody hands it on."""


def joined(headers: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names to their values, in the order of the first of each; names that differ only in case are one."""
    names: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for name, value in headers:
        found.setdefault(names.setdefault(name.lower(), name), []).append(value)
    return found
