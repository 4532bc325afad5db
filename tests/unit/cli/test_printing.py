"""What publishers put into URLs is not shown to whoever lists them."""

import pytest

from daemon.cli.printing import masked


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:secret@host/x", "http://user:***@host/x"),
        ("http://user:se@cr:et@host:8080", "http://user:***@host:8080"),
        ("https://sk_live_abc:@host/", "https://***@host/"),
        ("https://sk_live_abc@host/", "https://***@host/"),
        ("https://host/?token=secret&x=1", "https://host/?token=***&x=1"),
        ("https://host/?x=1&api_key=secret;accessKey=secret", "https://host/?x=1&api_key=***;accessKey=***"),
        ("https://host/?X-Amz-Signature=secret&sig=secret", "https://host/?X-Amz-Signature=***&sig=***"),
        ("https://host/?client%5Fsecret=abc&%70assword=abc", "https://host/?client%5Fsecret=***&%70assword=***"),
        ("https://host/#access_token=secret", "https://host/#access_token=***"),
        ("https://host/?key=a=b", "https://host/?key=***"),
        ("answered http://u:secret@host/ and https://host/?token=secret", "answered http://u:***@host/ and https://host/?token=***"),
    ],
)  # fmt: skip
def test_secret_in_a_url_is_masked(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "https://host/x?y=1&page=2",
        "https://host/@me?mail=a@b.example",
        "https://host/?keyword=shoes&design=1&author=me",
        "https://host/?token=&x",
        "group-name",
        "",
    ],
)
def test_rest_of_a_url_stays(url: str) -> None:
    assert masked(url) == url
