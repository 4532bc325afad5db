"""What every poller's names must be: whole or an error, with ids exactly as the reports have them, whatever they say."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from daemon.domain.collection import Name
from daemon.domain.connection import Secret, Target
from daemon.domain.errors import (
    BadRequestError,
    CredentialError,
    ForbiddenError,
    RateLimitedError,
    SchemaDriftError,
    UpstreamUnavailableError,
)
from daemon.domain.ports import Poller
from daemon.pollers._names import NAME_CHARS_MAX
from daemon.pollers.anthropic import AnthropicPoller
from daemon.pollers.litellm import LiteLLMPoller
from daemon.pollers.openai import OpenAIPoller
from daemon.pollers.openrouter import OpenRouterPoller
from daemon.testing.poller_cases import Script

pytestmark = pytest.mark.anyio
Items = list[dict[str, Any]]
Page = Callable[[Items, httpx.Request, bool], dict[str, Any]]


@dataclass(frozen=True)
class Listed:
    """One list of one provider.

    Attributes:
        path: where it is. kind: of its names. dims: the reports' dimensions whose values its ids are.
        item: an item as the provider sends it, by its id and its name.
        fallback: the field that names it when it has no name; None if nothing does.
    """

    path: str
    kind: str
    dims: Mapping[str, str]
    item: Callable[[str, str | None], dict[str, Any]]
    fallback: str | None


@dataclass(frozen=True)
class Provider:
    poller: Poller
    lists: tuple[Listed, ...]
    page: Page
    size: int
    """How many items the fake provider puts on a page."""

    def __str__(self) -> str:
        return self.poller.provider


def _plain(name_field: str, id_field: str = "id", **more: Any) -> Callable[[str, str | None], dict[str, Any]]:
    return lambda id_, name: {id_field: id_, name_field: name, **more}


def _by_last_id(items: Items, _request: httpx.Request, has_more: bool) -> dict[str, Any]:
    return {"object": "list", "data": items, "has_more": has_more, "last_id": items[-1]["id"] if items else None}


def _by_offset(items: Items, _request: httpx.Request, _has_more: bool) -> dict[str, Any]:
    return {"data": items}


def _by_number(items: Items, request: httpx.Request, has_more: bool) -> dict[str, Any]:
    field = {"/key/list": "keys", "/user/list": "users", "/v2/team/list": "teams"}[request.url.path]
    page = int(request.url.params.get("page", 1))
    number = "current_page" if field == "keys" else "page"
    return {field: items, number: page, "total_pages": page + int(has_more)}


PROVIDERS = (
    Provider(
        OpenAIPoller(),
        (
            Listed("/organization/projects", "project", {"completions": "project_id"}, _plain("name"), None),
            Listed(
                "/organization/users", "user", {"completions": "user_id"}, _plain("name", email="ada@x.test"), "email"
            ),
            Listed(
                "/organization/projects/p0/api_keys",
                "api_key",
                {"completions": "api_key_id", "costs": "api_key_id"},
                _plain("name", redacted_value="sk-...9fA"),
                "redacted_value",
            ),
        ),
        _by_last_id,
        2,
    ),
    Provider(
        AnthropicPoller(),
        (
            Listed(
                "/v1/organizations/workspaces",
                "workspace",
                {"messages": "workspace_id", "cost": "workspace_id"},
                _plain("name"),
                None,
            ),
            Listed(
                "/v1/organizations/api_keys",
                "api_key",
                {"messages": "api_key_id"},
                _plain("name", partial_key_hint="sk-ant-...AA"),
                "partial_key_hint",
            ),
            Listed("/v1/organizations/users", "user", {}, _plain("name", email="ada@x.test"), "email"),
        ),
        _by_last_id,
        2,
    ),
    Provider(
        OpenRouterPoller(),
        (
            Listed("/workspaces", "workspace", {}, _plain("name", slug="team-a"), "slug"),
            Listed("/keys", "api_key", {}, _plain("name", "hash", label="sk-or-v1-0e6...1c9"), "label"),
        ),
        _by_offset,
        2,
    ),
    Provider(
        LiteLLMPoller(),
        (
            Listed(
                "/key/list",
                "api_key",
                {"logs": "api_key_id", "activity": "api_key_id"},
                _plain("key_alias", "token", key_name="sk-...1234"),
                "key_name",
            ),
            Listed(
                "/user/list",
                "user",
                {"logs": "user_id"},
                _plain("user_alias", "user_id", user_email="ada@x.test"),
                "user_email",
            ),
            Listed("/v2/team/list", "team", {"logs": "team_id"}, _plain("team_alias", "team_id"), None),
        ),
        _by_number,
        2,
    ),
)
LISTS = [(provider, listed) for provider in PROVIDERS for listed in provider.lists]


def name_list(value):
    return value.path if isinstance(value, Listed) else str(value)


class Lists:
    """The provider's lists, in pages. `broken` answers in place of one of them."""

    def __init__(self, provider: Provider, items: Mapping[str, Items], broken: Mapping[str, Any] | None = None) -> None:
        self.provider = provider
        self.items = items
        self.broken = broken or {}
        self.paths: list[str] = []

    def __call__(self, request: httpx.Request) -> Any:
        path = request.url.path
        self.paths.append(path)
        if path in self.broken:
            answer = self.broken[path]
            if callable(answer):
                return answer(request)
            return httpx.Response(answer) if isinstance(answer, int) else answer
        params = request.url.params
        if params.get("status") == "deleted":
            return self.provider.page([], request, False)
        items = self.items.get(path, [])
        if params.get("workspace_id", "w0") != "w0":
            items = []
        at = self._start(items, params)
        some = items[at : at + self.provider.size]
        return self.provider.page(some, request, at + len(some) < len(items))

    def _start(self, items: Items, params: httpx.QueryParams) -> int:
        after = params.get("after") or params.get("after_id")
        if after is not None:
            return next(n for n, item in enumerate(items) if item["id"] == after) + 1
        if "offset" in params:
            return int(params["offset"])
        return (int(params.get("page", 1)) - 1) * self.provider.size


def some_items(provider: Provider, count: int = 5) -> dict[str, Items]:
    short = {"project": "p", "workspace": "w", "user": "u", "api_key": "k", "team": "t"}
    return {
        listed.path: [listed.item(f"{short[listed.kind]}{n}", f"{listed.kind} {n}") for n in range(count)]
        for listed in provider.lists
    }


async def collect(provider: Provider, lists: Any) -> tuple[list[Name], frozenset[str]]:
    script = Script(lists)
    target = Target(provider.poller.provider, "https://provider.test", Secret("key-of-the-test"), {})
    names: list[Name] = []
    unread: frozenset[str] = frozenset()
    async for part in provider.poller.collect(target, "names", None, script):
        names += part.items
        unread |= part.unread
    return names, unread


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
async def test_every_page_of_every_list_is_read(provider):
    items = some_items(provider)
    names, unread = await collect(provider, Lists(provider, items))
    wanted = [
        Name(listed.kind, item_id, f"{listed.kind} {n}")
        for listed in provider.lists
        for n, item_id in enumerate(_ids(listed, items[listed.path]))
    ]
    assert sorted(names) == sorted(wanted)
    assert unread == frozenset()


def _ids(listed: Listed, items: Items) -> list[str]:
    (id_field,) = {"id", "hash", "token", "user_id", "team_id"} & set(listed.item("x", "y"))
    return [item[id_field] for item in items]


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
async def test_names_are_a_collection_beside_the_reports(provider):
    spec = provider.poller.sources["names"]
    assert (spec.kind, spec.cadence, spec.is_report) == ("names", "daily", False)
    provider.poller.grain("names", {})  # every source of a connection has one


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_ids_are_values_of_a_dimension_that_reports_are_cut_by(provider, listed):
    for source, dim in listed.dims.items():
        assert dim == f"{listed.kind}_id"
        assert dim in provider.poller.grain(source, {}).group_by


HOSTILE = ["Ünïcødé 名", "a, b: c|d", '"quoted" \\ ', "line\nbreak", "'; drop table name; --", "<script>", "{}", "null"]


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_any_text_is_an_id_and_a_name(provider, listed):
    if listed.kind == "project":
        items = {listed.path: [listed.item(f"p/{n}?a=b&c", text) for n, text in enumerate(HOSTILE)]}
    else:
        items = some_items(provider, 1) | {listed.path: [listed.item(text, text) for text in HOSTILE]}
    names, _ = await collect(provider, Lists(provider, items))
    got = {name.id: name.name for name in names if name.kind == listed.kind}
    assert list(got) == _ids(listed, items[listed.path])
    assert list(got.values()) == [text.strip() for text in HOSTILE]


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_name_that_no_table_takes_is_made_one_that_it_takes(provider, listed):
    texts = ["zero\0byte", "n" * 10_000]
    items = some_items(provider, 1) | {listed.path: [listed.item(f"p{n}", text) for n, text in enumerate(texts)]}
    names, _ = await collect(provider, Lists(provider, items))
    assert [name.name for name in names if name.kind == listed.kind] == ["zerobyte", "n" * NAME_CHARS_MAX]


@pytest.mark.parametrize("empty", [None, "", "  ", "\0", 7, {}], ids=repr)
@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_what_has_no_name_is_called_by_the_next_best_or_not_at_all(provider, listed, empty):
    item = listed.item("p0", empty)
    items = some_items(provider, 1) | {listed.path: [item]}
    names, _ = await collect(provider, Lists(provider, items))
    wanted = [] if listed.fallback is None else [Name(listed.kind, "p0", item[listed.fallback])]
    assert [name for name in names if name.kind == listed.kind] == wanted


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_item_without_an_id_is_drift_that_shows_nobody_s_name(provider, listed):
    for id_ in (None, "", 7):
        items = some_items(provider, 1) | {listed.path: [listed.item(id_, "Ada Lovelace")]}
        with pytest.raises(SchemaDriftError) as caught:
            await collect(provider, Lists(provider, items))
        assert b"Ada" not in caught.value.body
        assert b"ada@" not in caught.value.body


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_page_that_leads_back_is_drift(provider, listed):
    """A provider that forgets the cursor shows its first page for ever."""
    items = some_items(provider)
    first = items[listed.path][:2]

    def forgetful(request):
        page = provider.page(first, request, True)
        return page if "page" not in page and "current_page" not in page else page | _numbered(page)

    def _numbered(page):
        return {name: 1 for name in ("page", "current_page") if name in page} | {"total_pages": 3}

    with pytest.raises(SchemaDriftError):
        await collect(provider, Lists(provider, items, {listed.path: forgetful}))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (401, CredentialError),
        (400, BadRequestError),
        (429, RateLimitedError),
        (500, UpstreamUnavailableError),
        (b"<html>", SchemaDriftError),
        ({}, SchemaDriftError),
        ([], SchemaDriftError),
    ],
    ids=str,
)
@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_list_that_breaks_is_an_error_not_an_end(provider, listed, answer, error):
    with pytest.raises(error):
        await collect(provider, Lists(provider, some_items(provider), {listed.path: answer}))


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_list_that_is_refused_leaves_the_others_and_is_no_empty_list(provider, listed, status):
    items = some_items(provider)
    broken = {listed.path: status} | ({"/team/list": status} if listed.kind == "team" else {})
    names, unread = await collect(provider, Lists(provider, items, broken))
    # Keys are listed under projects or workspaces: without those nobody can say which there are.
    below = {"api_key"} if listed.path in ("/organization/projects", "/workspaces") else set()
    assert unread == {listed.kind} | below
    kinds = {other.kind for other in provider.lists}
    assert {name.kind for name in names} == kinds - {listed.kind} - (below if listed.kind == "project" else set())


@pytest.mark.parametrize(("provider", "listed"), LISTS, ids=name_list)
async def test_list_that_is_refused_half_way_is_not_whole(provider, listed):
    items = some_items(provider)
    calls = []

    def refusing(request):
        calls.append(request)
        if len(calls) > 1:
            return httpx.Response(403)
        return provider.page(items[listed.path][:2], request, True)

    names, unread = await collect(provider, Lists(provider, items, {listed.path: refusing}))
    assert listed.kind in unread
    assert len([name for name in names if name.kind == listed.kind]) == 2


@pytest.mark.parametrize(("status", "error"), [(403, ForbiddenError), (404, BadRequestError)])
@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
async def test_key_that_may_read_no_list_parks_the_source(provider, status, error):
    with pytest.raises(error):
        await collect(
            provider, Lists(provider, {}, {listed.path: status for listed in provider.lists} | {"/team/list": status})
        )


@pytest.mark.parametrize("provider", PROVIDERS, ids=str)
async def test_organisation_without_anything_has_no_names(provider):
    assert await collect(provider, Lists(provider, {})) == ([], frozenset())


async def test_archived_and_disabled_ones_are_asked_for():
    """A key that was switched off still has its name in an old bill."""
    asked = {}
    for provider in PROVIDERS:
        seen = asked[str(provider)] = []

        def note(request, provider=provider, seen=seen):
            seen.append(request.url.path + "?" + str(request.url.params))
            return provider.page([], request, False)

        await collect(provider, note)
    assert any("projects?include_archived=true" in url for url in asked["openai"])
    assert any("workspaces?include_archived=true" in url for url in asked["anthropic"])
    assert any("keys?include_disabled=true&include_expired=true" in url for url in asked["openrouter"])
    assert any("/key/list" in url and "status=deleted" in url for url in asked["litellm"])


async def test_names_of_deleted_keys_come_with_the_others():
    litellm = PROVIDERS[-1]

    def lists(request):
        if request.url.path != "/key/list":
            return litellm.page([], request, False)
        gone = request.url.params.get("status") == "deleted"
        return litellm.page([{"token": "gone" if gone else "live", "key_alias": "a"}], request, False)

    names, unread = await collect(litellm, lists)
    assert (names, unread) == ([Name("api_key", "live", "a"), Name("api_key", "gone", "a")], frozenset())

    def older(request):
        return httpx.Response(400) if request.url.params.get("status") else lists(request)

    names, unread = await collect(litellm, older)
    assert (names, unread) == ([Name("api_key", "live", "a")], frozenset())


async def test_older_proxy_lists_its_teams_at_once():
    litellm = PROVIDERS[-1]

    def lists(request):
        if request.url.path == "/v2/team/list":
            return httpx.Response(404)
        if request.url.path == "/team/list":
            return json.dumps([{"team_id": "t1", "team_alias": "Research", "keys": []}]).encode()
        return litellm.page([], request, False)

    assert await collect(litellm, lists) == ([Name("team", "t1", "Research")], frozenset())


async def test_keys_of_one_project_that_are_refused_leave_those_of_the_others():
    openai = PROVIDERS[0]
    items = some_items(openai, 2) | {"/organization/projects/p1/api_keys": [{"id": "other", "name": "Other"}]}
    names, unread = await collect(openai, Lists(openai, items, {"/organization/projects/p0/api_keys": 404}))
    assert [name for name in names if name.kind == "api_key"] == [Name("api_key", "other", "Other")]
    assert unread == {"api_key"}
