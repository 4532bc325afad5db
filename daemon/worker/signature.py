"""The `Upstash-Signature` of a delivery, as QStash's own receivers verify it."""

from __future__ import annotations

import hmac
import json
import secrets
from base64 import urlsafe_b64encode
from hashlib import sha256

LIFETIME_S = 300

_HEADER = urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=") + b"."


def sign(key: str, *, url: str, body: bytes, now: int, issuer: str = "Upstash") -> str:
    """A fresh compact JWT (HS256) for one attempt.

    Args:
        key: the whole signing key, `sig_` included. PyJWT warns its users about keys of fewer than 32 bytes.
        url: where the attempt goes, exactly as it was published: receivers compare it with the URL that they know.
        body: as sent; the token holds its SHA-256.
        now: Unix seconds. The token is refused from `LIFETIME_S` later on. It has no beginning (`nbf` is 0), but some
            receivers refuse an `iat` ahead of their clock: round down.
    """
    digest = urlsafe_b64encode(sha256(body).digest()).decode()  # padded: some receivers compare it so
    # Written by hand, which takes half of an encoder's time; texts go through one, which escapes all but ASCII.
    claims = (
        f'{{"iss":{json.dumps(issuer)},"sub":{json.dumps(url)},"exp":{now + LIFETIME_S},"nbf":0,"iat":{now},'
        f'"jti":"jwt_{secrets.token_hex(16)}","body":"{digest}"}}'
    )
    signed = _HEADER + urlsafe_b64encode(claims.encode()).rstrip(b"=")
    mark = urlsafe_b64encode(hmac.digest(key.encode(), signed, "sha256")).rstrip(b"=")
    return f"{signed.decode()}.{mark.decode()}"
