"""Patterns of keys with named parts, such as `quota:{tenant}:{user}`: a glob for the server, and a proof for us.

A part never holds the characters between which it stands, so that a key is taken apart in one way or not at all, and in
one pass: no key is so odd that matching it takes long.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from daemon.domain.errors import UsageError

CHARS_MAX = 200
PARTS_MAX = 8
OWN = ("user", "tenant", "period")
FIELD = "settings.pattern"
_NAME = re.compile(r"([a-z][a-z0-9_]{0,31})(\*?)")
_GLOB = re.compile(r"([\\*?\[\]^])")


class _Part(NamedTuple):
    name: str
    is_rest: bool


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern.

    Attributes:
        glob: for `SCAN ... MATCH`: what it lets through may still not be of the pattern.
        names: of the parts, in their order; `others` are those that a counter has no place of its own for.
    """

    text: str
    glob: bytes
    names: tuple[str, ...]
    others: tuple[str, ...]
    _regex: re.Pattern[str]

    def take_apart(self, key: str) -> dict[str, str] | None:
        """The named parts of a key; None for a key that is not of the pattern."""
        match = self._regex.fullmatch(key)
        return match.groupdict() if match else None


def compile_pattern(text: str) -> Pattern:
    """`{name}` is a part, `{name*}` one that may hold the characters beside it too; `{{` and `}}` stand for braces.

    Raises:
        UsageError: for `settings.pattern`, saying what is wrong and how to write it.
    """
    if not text or len(text) > CHARS_MAX:
        raise UsageError(FIELD, f"has {len(text)} characters", f"write 1 to {CHARS_MAX}, such as quota:{{user}}")
    if not text.isprintable():
        raise UsageError(
            FIELD, "holds characters that cannot be printed", "write the key as it is, such as quota:{user}"
        )
    pieces = _pieces(text)
    parts = [piece for piece in pieces if isinstance(piece, _Part)]
    _check(pieces, parts)
    glob = "".join("*" if isinstance(piece, _Part) else _GLOB.sub(r"\\\1", piece) for piece in pieces)
    regex = "".join(
        f"(?P<{piece.name}>{_allowed(pieces, place)})" if isinstance(piece, _Part) else re.escape(piece)
        for place, piece in enumerate(pieces)
    )
    names = tuple(part.name for part in parts)
    others = tuple(name for name in names if name not in OWN)
    return Pattern(text, glob.encode(), names, others, re.compile(regex, re.DOTALL))


def _pieces(text: str) -> list[str | _Part]:
    """Literals and parts in turn; two parts without a literal between them have an empty one."""
    pieces: list[str | _Part] = [""]
    place = 0
    while place < len(text):
        character = text[place]
        if text.startswith((character * 2,), place) and character in "{}":
            pieces[-1] = f"{pieces[-1]}{character}"
            place += 2
        elif character == "{":
            end = text.find("}", place)
            name = _NAME.fullmatch(text[place + 1 : end]) if end > 0 else None
            if name is None:
                problem = "has a part without a name of lower-case letters, digits and _"
                raise UsageError(FIELD, problem, "write {user}, or {{ for a brace that belongs to the key")
            pieces += [_Part(name[1], bool(name[2])), ""]
            place = end + 1
        elif character == "}":
            raise UsageError(FIELD, "has a } without its {", "write }} for a brace that belongs to the key")
        else:
            pieces[-1] = f"{pieces[-1]}{character}"
            place += 1
    return pieces


def _check(pieces: list[str | _Part], parts: list[_Part]) -> None:
    if not 1 <= len(parts) <= PARTS_MAX:
        raise UsageError(FIELD, f"has {len(parts)} named parts", f"name 1 to {PARTS_MAX}, such as quota:{{user}}")
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(FIELD, f"names the part {name} twice", "give each a name of its own")
    if sum(part.is_rest for part in parts) > 1:
        raise UsageError(FIELD, "has two parts with a star", "only one can hold the rest")
    for between in pieces[2:-1:2]:
        assert isinstance(between, str)
        if not between or between[0].isalnum() or between[-1].isalnum():
            raise UsageError(
                FIELD,
                f"has {between!r} between two parts" if between else "has two parts with nothing between them",
                "parts are told apart by what begins and ends with neither a letter nor a digit, such as : or :day:",
            )


def _allowed(pieces: list[str | _Part], place: int) -> str:
    """One or more characters; without a star none of the two beside the part, unless they are letters or digits."""
    part, before, after = pieces[place], pieces[place - 1], pieces[place + 1]
    assert isinstance(part, _Part)
    assert isinstance(before, str)
    assert isinstance(after, str)
    beside = {character for character in (before[-1:], after[:1]) if character and not character.isalnum()}
    if part.is_rest or not beside:
        return ".+"
    return f"[^{''.join(re.escape(character) for character in sorted(beside))}]+"


__all__ = ["Pattern", "compile_pattern"]
