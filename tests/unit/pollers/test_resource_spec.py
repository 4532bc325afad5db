"""The file that declares a collection: what it may say, what is told of what it may not, and the schema in the docs."""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.errors import PermanentError, UsageError
from daemon.pollers._resource_spec import parse_document, parse_settings, schema
from daemon.pollers.http_resource import exits_of

DOCS = Path(__file__).parents[3] / "docs"
PUBLISHED = json.loads((DOCS / "reference/resources.schema.json").read_text("utf-8"))
PAGES = [DOCS / "how-to/sync-resources.md", DOCS / "reference/resources.md"]
EXAMPLES = [
    block
    for page in PAGES
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
]

HEAD = 'name = "orders"\nbase_url = "https://api.example.com/v1"\n'
LIST = '[list]\npath = "/orders"\n'
DETAIL = '[detail]\npath = "/orders/{id}"\n'
WHOLE = HEAD + LIST + DETAIL


def is_valid(text: str) -> bool:
    return jsonschema.Draft202012Validator(schema()).is_valid(tomllib.loads(text))


# ── What is accepted ────────────────────────────────────────────────────────────────────────────


def test_published_schema_is_that_of_the_parser() -> None:
    assert json.loads(json.dumps(schema())) == PUBLISHED, "write docs/reference/resources.schema.json anew"
    jsonschema.Draft202012Validator.check_schema(PUBLISHED)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_of_the_docs_are_accepted_by_parser_and_schema(text: str) -> None:
    assert parse_document(text).settings()
    assert is_valid(text)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


ACCEPTED = [
    WHOLE,
    HEAD + 'ids = ["a", 7]\n' + DETAIL,
    HEAD + 'ids_file = "ids.txt"\n' + DETAIL,
    WHOLE + '[check]\nversion = "digest"\npath = "/orders/{id}"\n',
    WHOLE + '[check]\nversion = "last_modified"\nconditional = true\n',
    WHOLE + '[check]\nversion = "field"\nfield = "a.b.0"\npath = "/many"\nids_param = "ids"\n',
    WHOLE + '[auth]\nkind = "header"\nheader = "X-Api-Key"\nprefix = "Key "\n',
    WHOLE + "[rate]\nper_second = 2\nin_all = 40\n",
    WHOLE + '[proxy]\nexits = ["http://a:1", "https://b:2/"]\ntotal = 5\n',
    HEAD + LIST + 'version = "v"\nsince = { param = "since" }\npaging = { kind = "page", param = "p", first = 0 }\n' + DETAIL,
    HEAD + LIST + 'version = "v"\nsince = { header = "If-Modified-Since", http_date = true }\n' + DETAIL,
]  # fmt: skip


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_the_parser_accepts_the_schema_accepts(text: str) -> None:
    document = parse_document(text)
    assert is_valid(text)
    kept = json.loads(json.dumps(document.settings(["from-file"] if document.ids_file else [])))
    assert parse_settings(kept).detail == document.detail
    assert "name" not in kept
    assert kept["every_s"] == 3_600


def test_a_setting_that_every_connection_may_have_is_left_alone() -> None:
    assert parse_settings({**parse_document(WHOLE).settings(), "overlap": "add"})


# ── What is refused ─────────────────────────────────────────────────────────────────────────────

# Text, field at fault, a part of the fix; and whether the schema says so as well.
REFUSED = [
    ("name = [", "FILE", "mend that line", False),
    (WHOLE.replace('name = "orders"\n', ""), "name", "give the connection's name", True),
    (WHOLE.replace('"orders"', '"or ders"'), "name", "give the connection's name", True),
    (WHOLE + "speed = 3\n", "detail.speed", "use one of fields, item, params, path, version", True),
    (WHOLE + "[lists]\n", "lists", "use one of auth", True),
    (WHOLE.replace('path = "/orders"', ""), "list.path", "give a path below base_url", True),
    (WHOLE.replace('"/orders"', '"orders"'), "list.path", "give a path below base_url", True),
    (WHOLE.replace('"/orders"', '"/orders?x=1"'), "list.path", "give a path below base_url", True),
    (WHOLE.replace("/orders/{id}", "/orders"), "detail.path", "put {id} where", False),
    (WHOLE + "[rate]\nconcurrency = 0\n", "rate.concurrency", "give requests in flight", True),
    (WHOLE + '[rate]\nconcurrency = "10"\n', "rate.concurrency", "give requests in flight", True),
    (WHOLE + "[rate]\nper_second = 0\n", "rate.per_second", "give requests a second", True),
    (WHOLE + "[limits]\nbody_bytes = 1e9\n", "limits.body_bytes", "give bytes of one answer", True),
    (WHOLE + "[list.paging]\n", "list.paging.kind", "one of cursor, page, offset, link", True),
    (HEAD + LIST + 'paging = { kind = "pages" }\n' + DETAIL, "list.paging.kind", "one of cursor, page, offset, link", True),
    (HEAD + LIST + 'paging = { param = "p" }\n' + DETAIL, "list.paging.kind", "one of cursor, page, offset, link", True),
    (HEAD + LIST + 'paging = { kind = "cursor", param = "c" }\n' + DETAIL, "list.paging.next", "give a dotted path", True),
    (HEAD + LIST + 'since = { param = "s" }\n' + DETAIL, "list.since", "say in list.version", False),
    (HEAD + LIST + 'version = "v"\nsince = {}\n' + DETAIL, "list.since.param", "say which one takes the version", False),
    (HEAD + LIST + 'version = "v"\nsince = { param = "s", header = "If-Modified-Since" }\n' + DETAIL, "list.since.param", "which one takes the version", False),
    (HEAD + LIST + 'version = "v"\nsince = { header = "Host" }\n' + DETAIL, "list.since.header", "in place of param", True),
    (HEAD + LIST + 'version = "v"\nsince = { param = "s", full_every = "1 day" }\n' + DETAIL, "list.since.full_every", "such as 1h", False),
    (HEAD + LIST + "params = { a = [1] }\n" + DETAIL, "list.params", "parameters of the query", True),
    (HEAD + DETAIL, "list", "or give ids", False),
    (HEAD + 'every = "5s"\n' + LIST + DETAIL, "every", "at least 60s", False),
    (HEAD + 'every = "often"\n' + LIST + DETAIL, "every", "such as 1h", False),
    (WHOLE + '[check]\npath = "/x/{id}"\n', "check.version", "give what is compared", True),
    (WHOLE + '[check]\nversion = "field"\npath = "/x/{id}"\n', "check.field", "say where", False),
    (WHOLE + '[check]\nversion = "etag"\nfield = "x"\npath = "/x/{id}"\n', "check.field", "say where", False),
    (WHOLE + '[check]\nversion = "digest"\nconditional = true\n', "check.conditional", "use etag or last_modified", False),
    (WHOLE + '[check]\nversion = "etag"\n', "check.path", "set conditional", False),
    (WHOLE + '[check]\nversion = "etag"\npath = "/x"\n', "check.path", "put {id} where", False),
    (WHOLE + '[check]\nversion = "etag"\npath = "/x"\nids_param = "i"\n', "check.version", "use field or digest", False),
    (WHOLE + '[check]\nversion = "digest"\npath = "/x/{id}"\nids_param = "i"\n', "check.path", "without {id}", False),
    (WHOLE + '[auth]\nkind = "oauth"\n', "auth.kind", "give bearer", True),
    (WHOLE + '[auth]\ntoken = "secret"\n', "auth.token", "use one of header, kind, prefix", True),
    (WHOLE + "[proxy]\nexits = []\n", "proxy.exits", "URLs of HTTP proxies", True),
    (WHOLE + '[proxy]\nexits = ["http://u:secret@h:1"]\n', "proxy.exits", "name a variable", False),
    (WHOLE + '[proxy]\nexits = ["socks5://h:1"]\n', "proxy.exits", "http://host:port", False),
    (WHOLE + '[proxy]\nexits = ["http://h:99999"]\n', "proxy.exits", "http://host:port", False),
    (WHOLE + '[proxy]\nexits = ["http://h:1", "http://h:1"]\n', "proxy.exits", "name each once", False),
    (WHOLE + '[proxy]\nexits = ["http://h:1"]\ncredential_env = "TALLYD_SECRET_KEY"\n', "proxy.credential_env", "TALLYD_EXIT_", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "field", "fix", "is_in_schema"), REFUSED)
def test_refusal_names_the_field_and_the_fix_and_the_schema_agrees(
    text: str, field: str, fix: str, is_in_schema: bool
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_document(text)
    assert caught.value.field == field
    assert fix in caught.value.fix
    assert "secret" not in str(caught.value).replace("TALLYD_SECRET", "")
    if field != "FILE":
        assert is_valid(text) is not is_in_schema


def test_settings_that_are_none_name_the_setting() -> None:
    with pytest.raises(UsageError, match=r"^settings\.detail: is missing; give "):
        parse_settings({"every_s": 60})
    with pytest.raises(UsageError, match=r"^settings\.every_s: "):
        parse_settings({**parse_document(WHOLE).settings(), "every_s": 1})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["list", "detail", "path", "check", "version", "paging", "kind", "params", "ids", "x.y"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_settings_whatever_end_in_another_error(data: object) -> None:
    with pytest.raises(UsageError) as caught:  # none of these has a second call
        parse_settings(data if isinstance(data, dict) else {"list": data})
    assert caught.value.field.startswith("settings.")
    assert caught.value.fix


# ── Shares ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", (None, 10, None, None)),
        ("[rate]\nin_all = 40\n", (4, 10, None, None)),
        ("[rate]\nin_all = 4\n", (1, 4, None, None)),
        ("[rate]\nper_second = 5\n", (1, 10, None, 5.0)),
        ("[rate]\nper_second = 5\nin_all = 20\n", (2, 10, None, 2.5)),
        ('[proxy]\nexits = ["http://a:1"]\ntotal = 30\n', (3, 10, None, None)),
        ('[proxy]\nexits = ["http://a:1", "http://b:1"]\nper_exit = 3\n', (1, 6, 3, None)),
        ('[proxy]\nexits = ["http://a:1", "http://b:1"]\nper_exit = 10\n', (2, 10, 5, None)),
    ],
)
def test_limits_over_all_replicas_become_batches_and_their_shares(text: str, share: tuple[object, ...]) -> None:
    assert parse_settings(parse_document(WHOLE + text).settings()).share == share


@given(
    concurrency=st.integers(1, 100),
    in_all=st.none() | st.integers(1, 300),
    total=st.none() | st.integers(1, 300),
    per_exit=st.none() | st.integers(1, 60),
    exits=st.integers(1, 20),
    per_second=st.none() | st.floats(0.1, 100),
)
def test_batches_together_never_exceed_what_was_declared(
    concurrency: int, in_all: int | None, total: int | None, per_exit: int | None, exits: int, per_second: float | None
) -> None:
    rate = {"concurrency": concurrency, "in_all": in_all, "per_second": per_second}
    proxy = {"exits": [f"http://e{n}:1" for n in range(exits)], "total": total, "per_exit": per_exit}
    settings = parse_document(WHOLE).settings() | {"rate": rate, "proxy": proxy}
    share = parse_settings(settings).share
    assert 1 <= share.concurrency <= concurrency
    if share.batches is None:
        assert in_all is total is per_exit is per_second is None
        return
    assert share.batches >= 1
    for bound in (in_all, total):
        assert bound is None or share.batches * share.concurrency <= bound
    if per_exit is not None:
        assert share.per_exit is not None
        assert 1 <= share.batches * share.per_exit <= per_exit
    if per_second is not None:
        assert share.per_second is not None
        assert share.batches * share.per_second <= per_second * 1.000001


def test_an_exit_gets_its_credential_from_the_environment_alone() -> None:
    text = WHOLE + '[proxy]\nexits = ["http://h:1"]\ncredential_env = "TALLYD_EXIT_A"\n'
    spec = parse_settings(parse_document(text).settings())
    found = exits_of(spec, {"TALLYD_EXIT_A": "us/er:pa:ss@word"})
    assert found is not None
    assert list(found) == ["http://us%2Fer:pa%3Ass%40word@h:1"]
    with pytest.raises(PermanentError, match="TALLYD_EXIT_A is not set"):
        exits_of(spec, {})


@pytest.mark.parametrize("path", ["/../{id}", "/orders/../../{id}", "/./{id}", "/orders//{id}/..", "orders/{id}"])
def test_a_path_never_leads_above_the_base_url(path: str) -> None:
    with pytest.raises(UsageError, match="path"):
        parse_document(HEAD + LIST + f'[detail]\npath = "{path}"\n')
