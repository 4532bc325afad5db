"""Clients for what listens on this machine."""

from __future__ import annotations

from typing import Any

import httpx


def local_client(**options: Any) -> httpx.AsyncClient:
    """One that neither reads the trusted roots, which takes longer than most tests, nor minds a proxy."""
    return httpx.AsyncClient(verify=False, trust_env=False, **options)
