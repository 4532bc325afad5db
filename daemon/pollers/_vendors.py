"""Vendors by our names, where gateways call them otherwise: the same money must bear the same name on both roads."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SEPARATORS = re.compile(r"[^a-z0-9]+")


def slug(text: str) -> str:
    """A name in lower case, its words joined by hyphens: "Amazon Bedrock" is "amazon-bedrock"."""
    return _SEPARATORS.sub("-", text.lower()).strip("-")


def vendor(name: str | None, known: Mapping[str, str]) -> str | None:
    """The vendor's name here; None where the gateway names none.

    Args:
        known: our names by the slug of the gateway's, where the two differ; "" for one that means no vendor.
    """
    if not name:
        return None
    called = slug(name)
    return known.get(called, called or name) or None
