"""Signatures, as the official receiver and PyJWT see them."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qstash import Receiver
from qstash.errors import SignatureError

from daemon.worker.signature import LIFETIME_S, sign

# 32 characters, as QStash's own: PyJWT warns about shorter ones, and a warning fails a test.
KEY, NEXT = "sig_7kYjw48mhY7kAjqNGcy6cr29RJ6r", "sig_5ZB6DVzB1wjE8S6rZ7eenA8Pdnhs"
URL = "https://example.com/api/hook?a=1&b=%20#x"
NOW = 1_790_000_000


def now() -> int:
    return int(time.time())


def claims(token: str, key: str = KEY) -> dict[str, Any]:
    unchecked = {"verify_exp": False, "verify_iat": False}
    return jwt.decode(token, key, algorithms=["HS256"], issuer="Upstash", options=unchecked)


def part(token: str, index: int) -> bytes:
    text = token.split(".")[index]
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("body", ["", "{}", '{"a": "\u00e4\u20ac\U0001f600"}', "x" * 100_000])
def test_the_official_receiver_takes_it(body: str) -> None:
    token = sign(KEY, url=URL, body=body.encode(), now=now())
    Receiver(KEY, NEXT).verify(signature=token, body=body, url=URL)
    Receiver(NEXT, KEY).verify(signature=token, body=body, url=URL)
    Receiver(KEY, NEXT).verify(signature=token, body=body)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"body": "other"}, "Invalid body hash"),
        ({"url": URL + "/"}, "Invalid subject"),
        ({"key": "sig_another_key_of_32_characters"}, "Signature verification failed"),
        ({"issuer": "Upstart"}, "Invalid issuer"),
        ({"age_s": LIFETIME_S + 60}, "expired"),
    ],
)
def test_the_official_receiver_refuses_what_differs(wrong: dict[str, Any], says: str) -> None:
    token = sign(
        wrong.get("key", KEY),
        url=URL,
        body=b"hello",
        now=now() - wrong.get("age_s", 0),
        issuer=wrong.get("issuer", "Upstash"),
    )
    with pytest.raises(SignatureError, match=says):
        # The reason that it gives is the one under its second key.
        Receiver(NEXT, KEY).verify(signature=token, body=wrong.get("body", "hello"), url=wrong.get("url", URL))


def test_the_claims_are_those_of_the_protocol() -> None:
    body = b'{"a":1}'
    token = sign(KEY, url=URL, body=body, now=NOW)
    assert part(token, 0) == b'{"alg":"HS256","typ":"JWT"}'
    found = claims(token)
    assert list(found) == ["iss", "sub", "exp", "nbf", "iat", "jti", "body"]
    assert found["jti"].startswith("jwt_")
    del found["jti"]
    assert found == {
        "iss": "Upstash",
        "sub": URL,
        "exp": NOW + 300,
        "nbf": 0,
        "iat": NOW,
        "body": base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode(),
    }
    assert all(type(found[name]) is int for name in ("exp", "nbf", "iat"))


def test_the_token_is_compact() -> None:
    token = sign(KEY, url=URL, body=b"", now=NOW)
    assert token.count(".") == 2
    assert "=" not in token, "a JWT has no padding, though its body claim has"
    raw = part(token, 1).decode()
    assert raw == json.dumps(json.loads(raw), separators=(",", ":"))
    assert claims(token)["body"] == "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU=", "the hash of nothing"


def test_no_two_attempts_share_an_id() -> None:
    tokens = [sign(KEY, url=URL, body=b"same", now=NOW) for _ in range(200)]
    ids = {claims(token)["jti"] for token in tokens}
    assert len(ids) == 200
    assert all(len(bytes.fromhex(jti.removeprefix("jwt_"))) == 16 for jti in ids)


@given(st.binary(max_size=300), st.text(st.characters(), max_size=60), st.integers(0, 1 << 40))
def test_any_body_and_url_are_signed_as_they_are(body: bytes, url: str, at: int) -> None:
    """Bodies need not be text. A URL that looks like JSON must not become a claim."""
    found = claims(sign(KEY, url=url, body=body, now=at))
    assert found["sub"] == url
    assert (found["iat"], found["exp"]) == (at, at + LIFETIME_S)
    assert base64.urlsafe_b64decode(found["body"]) == hashlib.sha256(body).digest()


@pytest.mark.parametrize("url", ['","sub":"x', 'a"b\\c', "https://\u00e4.example/\u20ac", "\ud800", "\u2028\0"])
def test_a_url_cannot_break_out_of_its_claim(url: str) -> None:
    token = sign(KEY, url=url, body=b"", now=NOW)
    found = claims(token)
    assert found["sub"] == url
    assert len(found) == 7
    assert part(token, 1).isascii()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_changed_token_is_no_token(index: int) -> None:
    parts = sign(KEY, url=URL, body=b"", now=NOW).split(".")
    middle = len(parts[index]) // 2
    parts[index] = parts[index][:middle] + ("A" if parts[index][middle] != "A" else "B") + parts[index][middle + 1 :]
    with pytest.raises(jwt.InvalidTokenError):
        claims(".".join(parts))
