"""Which pollers there are: ours, and those that other packages declare in the entry point group `tallyd.pollers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from daemon.domain.errors import UsageError
from daemon.domain.ports import Poller

GROUP = "tallyd.pollers"


class Pollers(Mapping[str, Poller]):
    """Pollers by provider. One that does not load is left out, and `problems` says why; it never stops the daemon.

    Each is imported when it is first looked at, so that `tallyd --help` pays for none.

    Args:
        set_up: done with each once it is made.
    """

    def __init__(
        self, found: Mapping[str, list[EntryPoint]], set_up: Callable[[Poller], None] = lambda _: None
    ) -> None:
        self._found = found
        self._set_up = set_up
        self._loaded: dict[str, Poller | None] = {}
        self.problems: dict[str, str] = {}
        for name, points in found.items():
            if len(points) > 1:
                claims = ", ".join(point.value for point in points)
                self.problems[name] = f"poller {name} is declared more than once, {points[0].value} is used: {claims}"

    def _load(self, name: str) -> Poller | None:
        if name not in self._loaded:
            self._loaded[name] = None
            point = self._found[name][0]
            try:
                poller: Poller = point.load()()
                if poller.provider != name:
                    raise TypeError(f"it calls itself {poller.provider!r}")
                self._set_up(poller)
                self._loaded[name] = poller
            except Exception as error:  # noqa: BLE001 - someone else's module may raise anything at import
                self.problems[name] = f"poller {name} ({point.value}) does not load: {type(error).__name__}: {error}"
        return self._loaded[name]

    def __getitem__(self, name: str) -> Poller:
        poller = self._load(name) if name in self._found else None
        if poller is None:
            raise KeyError(name)
        return poller

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._found if self._load(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def named(self, provider: str) -> Poller:
        """Raises UsageError for a provider that has no poller, naming those that have."""
        if provider in self:
            return self[provider]
        reason = self.problems.get(provider, "no such provider")
        raise UsageError("provider", f"{provider!r}: {reason}", f"use one of {', '.join(sorted(self))}")


def check_settings(poller: Poller, settings: Mapping[str, object]) -> None:
    """Raise UsageError for a setting that neither every connection nor this provider knows."""
    own = dict(settings)
    overlap = own.pop("overlap", "auto")
    if overlap not in ("auto", "add"):
        raise UsageError("settings.overlap", f"{overlap!r} is no way to count", "use auto or add")
    poller.check_settings(own)


def load_pollers(set_up: Callable[[Poller], None] = lambda _: None) -> Pollers:
    """All pollers of this installation; our own come first where two packages claim a name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(
        entry_points(group=GROUP), key=lambda point: (not point.value.startswith("daemon."), point.value)
    ):
        if point not in found.setdefault(point.name, []):
            found[point.name].append(point)
    return Pollers(found, set_up)


__all__ = ["GROUP", "Pollers", "check_settings", "load_pollers"]
