"""The accounts that everybody knows: those of QStash's own development server, printed in its documentation."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

from daemon.domain.account import SigningKeys


@dataclass(frozen=True, slots=True)
class DevAccount:
    """An account whose token and keys are public, so that it is let in on loopback alone."""

    name: str
    token: str
    keys: SigningKeys


def _account(name: str, password: str, current: str, next_: str) -> DevAccount:
    token = json.dumps({"UserID": name, "Password": password}, separators=(",", ":"))
    return DevAccount(name, base64.b64encode(token.encode()).decode(), SigningKeys(current, next_))


DEV_ACCOUNTS = (
    _account("defaultUser", "defaultPassword", "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r", "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs"),
    _account("testUser1", "testPassword", "sig_7GVPjvuwsfqF65iC8fSrs1dfYruM", "sig_5NoELc3EFnZn4DVS5bDs2Nk4b7Ua"),
    _account("testUser2", "testPassword", "sig_6jWGaWRxHsw4vMSPJprXadyvrybF", "sig_7qHbvhmahe5GwfePDiS5Lg3pi6Qx"),
    _account("testUser3", "testPassword", "sig_5T8FcSsynBjn9mMLBsXhpacRovJf", "sig_7GFR4YaDshFcqsxWRZpRB161jguD"),
)
