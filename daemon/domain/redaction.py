"""Redaction: what of a message no answer of the API may show. Delivery uses the original."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

TEXT_LENGTH_MAX = 4_096

# In brackets a token of RFC 9110. Without ASCII, ignoring case would also take the long s and the Kelvin sign.
_FIELD = re.compile(r"(body)|headers?(?:\[([!#$%&'*+.^_`|~0-9A-Za-z-]+)\])?", re.ASCII | re.IGNORECASE)
_FIX = "write body, header or header[Name], separated by commas"


@dataclass(frozen=True, slots=True)
class Redaction:
    """What is redacted: replaced by `REDACTED:` and the original's SHA-256 in hex, so that equal values stay recognisable.

    Attributes:
        headers: names in lower case; beside `all_headers` they add nothing.
    """

    body: bool
    all_headers: bool
    headers: frozenset[str]

    @property
    def text(self) -> str:
        """The form to store, such as `body,header[x-secret]`: names sorted; `parse_redaction` reads it back as equal."""
        fields = ["body"] * self.body + ["header"] * self.all_headers
        return ",".join([*fields, *(f"header[{name}]" for name in sorted(self.headers))])

    def of_body(self, body: bytes) -> bytes:
        """The body to show. An empty one stays empty: there is nothing to hide, and answers leave it out."""
        return _redacted(body).encode() if self.body and body else body

    def of_headers(self, headers: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The headers to show, each value by itself; names are compared without case and stay as they are."""
        return {
            name: [_redacted(value.encode("utf-8", "surrogatepass")) for value in values]
            if self.all_headers or name.lower() in self.headers
            else list(values)
            for name, values in headers.items()
        }


def parse_redaction(text: str) -> Redaction:
    """Read `Upstash-Redact-Fields`, such as `body, header[Authorization]`; `headers` is another spelling of `header`.

    Raises:
        ValueError: reads on from the header's name.
    """
    if len(text) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(text)} characters; write at most {TEXT_LENGTH_MAX}")
    body, all_headers, headers = False, False, set[str]()
    for part in text.split(","):
        match = _FIELD.fullmatch(part.strip())
        if not match:
            raise ValueError(f"has {part.strip()[:100]!r}, which names no field; {_FIX}")
        if match[1]:
            body = True
        elif match[2]:
            headers.add(match[2].lower())
        else:
            all_headers = True
    return Redaction(body, all_headers, frozenset(headers))


def _redacted(original: bytes) -> str:
    return f"REDACTED:{sha256(original).hexdigest()}"
