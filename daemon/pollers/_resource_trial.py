"""A collection's declaration, tried on its API: what `tallyd resources check` shows. Nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from daemon.domain.collection import Listed
from daemon.domain.connection import Target
from daemon.domain.ports import Caller
from daemon.pollers._resource_spec import Share, Spec
from daemon.pollers.http_resource import Reader, digest_of, exits_of


@dataclass(frozen=True, slots=True)
class Tried:
    """One resource, looked at as a batch would.

    Attributes:
        version: what would be compared, None where it is gone.
        kept_bytes: of the content that would be stored.
        fields: the content's own, at its first level.
        is_stable: a second look finds it unchanged; False means that it would be read again each time.
    """

    id: str
    version: str | None
    kept_bytes: int
    fields: Sequence[str]
    is_stable: bool


@dataclass(slots=True)
class Trial:
    """What was found.

    Attributes:
        page_items: ids on the first page of the list; of `ids` where there is none.
        has_more: the list has another page.
        versions: of those ids, how many come with a version.
        refused: ids that cannot be asked for.
        unchanged_calls, changed_calls: that a run makes for a hundred resources beside the list.
        calls: that the trial made.
    """

    page_items: int = 0
    has_more: bool = False
    versions: int = 0
    refused: Sequence[str] = ()
    tried: list[Tried] = field(default_factory=list)
    unchanged_calls: int = 0
    changed_calls: int = 0
    share: Share | None = None
    calls: int = 0


async def try_out(spec: Spec, target: Target, call: Caller, limit: int) -> Trial:
    """Read the first page of the list and the beginning of the second, and look at up to `limit` resources."""
    trial = Trial(share=spec.share)
    reader = Reader(spec, target, call, exits_of(spec))
    items: list[Listed] = [Listed(str(id_), None) for id_ in spec.ids]
    if spec.list is not None:
        pages = 0
        async for page in reader.pages():
            pages += 1
            if pages > 1:
                trial.has_more = bool(page.items)
                break
            items, trial.refused = [*page.items], page.refused
    trial.page_items = len(items)
    trial.versions = sum(item.version is not None for item in items)
    check = spec.check
    if items and trial.versions < len(items):
        is_many = check is not None and check.ids_param is not None
        trial.unchanged_calls = -(-100 // check.ids_size) if check is not None and is_many else 100
    # A conditional or a plain second call is the only one that there is.
    has_first = trial.unchanged_calls and check is not None and check.path is not None
    trial.changed_calls = 100 + (trial.unchanged_calls if has_first else 0)
    chosen = items[:limit]
    versions = {item.id: item.version for item in chosen}
    unknown = [id_ for id_, version in versions.items() if version is None]
    if unknown and check is not None and check.ids_param is not None:
        versions |= {id_: version for id_, version in (await reader.check_many(unknown)).items() if id_ in versions}
    for id_ in versions:
        trial.tried.append(await _look(spec, reader, id_, versions[id_]))
    return trial


async def _look(spec: Spec, reader: Reader, id_: str, version: str | None) -> Tried:
    check = spec.check
    goes_first = version is None and check is not None and check.path is not None and check.ids_param is None
    if goes_first:
        look = await reader.check(id_, None)
        if look.is_gone:
            return Tried(id_, None, 0, (), is_stable=True)
        version = look.version
    look = await reader.read(id_)
    if look.content is None:
        return Tried(id_, None, 0, (), is_stable=True)
    told, version = version, look.version or version or digest_of(look.content)
    if goes_first:
        again = await reader.check(id_, version)
        is_stable = again.is_same or again.version == version
    elif told is not None:
        is_stable = version == told  # where the content tells its own, both must be written alike
    else:
        again = await reader.read(id_, version)
        is_stable = again.is_same or again.content == look.content
    return Tried(id_, version, len(look.content), look.fields, is_stable)
