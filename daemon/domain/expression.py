"""The expression of `Upstash-Retry-Delay`: how many milliseconds to wait before the next attempt.

Plain arithmetic over `retried`, in floating point: `+ - * /`, parentheses, and the functions of `FUNCTIONS`.
A text is parsed once into steps for a stack machine, whose time is bounded by their number alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

DELAY_MS_MAX = 86_400_000.0
TEXT_LENGTH_MAX = 500
DEPTH_MAX = 32
STEPS_MAX = 200

_SHOWN_MAX = 40
_TOKEN = re.compile(
    r"[ \t\r\n]*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)|(?P<sign>\*\*|[^ \t\r\n])|(?P<end>\Z))"
)
_INSTEAD = {
    "%": "write a - b * floor(a / b) for the rest of a division",
    "^": "write pow(a, b) for a power",
    "**": "write pow(a, b) for a power",
}


@dataclass(frozen=True, slots=True)
class DelayExpression:
    """A checked expression. Two are equal when their texts are.

    Attributes:
        text: as it was sent.
    """

    text: str
    _steps: tuple[_Step, ...] = field(repr=False, compare=False)

    def milliseconds(self, retried: int) -> float:
        """The wait after a failure, 0 to `DELAY_MS_MAX`; `retried` is 0 before the first retry. Never raises.

        What has no value (a division by zero, the root of a negative number) and what is negative counts as 0.
        What grows beyond a float is infinite, and so a whole day: who backs off that far does not want to hurry.
        """
        variable = float(max(0, min(retried, 1 << 53)))
        stack: list[float] = []
        for step in self._steps:
            if step is None:
                stack.append(variable)
            elif isinstance(step, float):
                stack.append(step)
            else:
                arguments = stack[-step.operands :]
                del stack[-step.operands :]
                stack.append(_apply(step.function, arguments))
        value = stack.pop()
        return min(value, DELAY_MS_MAX) if value > 0 else 0.0  # what is not a number is not above 0 either


def parse_delay(text: str) -> DelayExpression:
    """Check an expression such as `1000 * pow(2, retried)`.

    Raises:
        ValueError: reads on from the header's name; says what is wrong at which character (from 1), and the fix.
    """
    if len(text) > TEXT_LENGTH_MAX:
        raise ValueError(f"has {len(text)} characters; write at most {TEXT_LENGTH_MAX}")
    return DelayExpression(text, _Parser(text).parse())


class _Call(NamedTuple):
    function: Callable[..., float]
    operands: int


_Step = float | _Call | None
"""A number, a function or operator over the topmost values, or (None) the variable."""


class _Token(NamedTuple):
    kind: str
    text: str
    position: int

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= _SHOWN_MAX else self.text[:_SHOWN_MAX] + "..."
        return f"{shown!r} at position {self.position}"


class _Parser:
    """Precedence climbing. Each method reads from the current token on and emits steps; operands come before operators."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._steps: list[_Step] = []
        self._token = self._read(0)

    def parse(self) -> tuple[_Step, ...]:
        if self._token.kind == "end":
            raise ValueError("is empty; write milliseconds such as 1000 * pow(2, retried)")
        self._expression(0, DEPTH_MAX + 1)
        if self._token.kind != "end":
            self._refuse("after a complete expression", "join values with + - * / or remove it")
        return tuple(self._steps)

    def _expression(self, above: int, depth: int) -> None:
        """Values joined by operators that bind more tightly than `above`."""
        self._operand(depth)
        while (operator := _OPERATORS.get(self._token.text)) and operator.power > above:
            self._advance()
            self._expression(operator.power, depth)
            self._emit(_Call(operator.function, 2))

    def _operand(self, depth: int) -> None:
        if not depth:
            self._refuse("too deep", f"nest at most {DEPTH_MAX} parentheses, functions and signs")
        token = self._token
        match token.kind, token.text:
            case "number", digits:
                value = float(digits)
                if math.isinf(value):
                    self._refuse("too large a number", f"a wait is at most {DELAY_MS_MAX:.0f} ms")
                self._advance()
                self._emit(value)
            case "name", "retried":
                self._advance()
                self._emit(None)
            case "name", name:
                if name not in FUNCTIONS:
                    self._refuse("unknown", f"use retried, or {', '.join(FUNCTIONS)} with arguments in parentheses")
                self._advance()
                self._call(token, depth - 1)
            case "sign", "(":
                self._advance()
                self._expression(0, depth - 1)
                self._close(token)
            case "sign", ("+" | "-") as sign:
                self._advance()
                self._operand(depth - 1)
                if sign == "-":
                    self._emit(_Call(_negate, 1))
            case _:
                self._refuse("where a value should be", "write a number, retried, a function or ( there")

    def _call(self, name: _Token, depth: int) -> None:
        function, wanted = FUNCTIONS[name.text]
        opening = self._token
        if opening.text != "(":
            self._refuse(f"after {name}", f"write the arguments in parentheses: {name.text}(...)")
        self._advance()
        self._expression(0, depth)
        count = 1
        while self._token.text == ",":
            self._advance()
            self._expression(0, depth)
            count += 1
        self._close(opening)
        if wanted is not None and count != wanted:
            raise ValueError(f"has {name} with {count} argument(s); {name.text} takes {wanted}")
        self._emit(_Call(function, count))

    def _close(self, opening: _Token) -> None:
        if self._token.text != ")":
            self._refuse(f"before {opening} is closed", "add the missing )")
        self._advance()

    def _emit(self, step: _Step) -> None:
        if len(self._steps) == STEPS_MAX:
            raise ValueError(f"has more than {STEPS_MAX} numbers, operators and functions; write a shorter one")
        self._steps.append(step)

    def _advance(self) -> None:
        self._token = self._read(self._token.position - 1 + len(self._token.text))

    def _read(self, start: int) -> _Token:
        match = _TOKEN.match(self._text, start)
        assert match is not None, "one of the token's kinds takes any character"
        assert match.lastgroup is not None
        return _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1)

    def _refuse(self, what: str, fix: str) -> NoReturn:
        """Refuse the current token. An operator that we do not have is the reason wherever it stands."""
        if self._token.kind == "end":
            raise ValueError(f"ends {what}; {fix}")
        if instead := _INSTEAD.get(self._token.text):
            raise ValueError(f"has {self._token}: an unknown operator; {instead}")
        raise ValueError(f"has {self._token}: {what}; {fix}")


def _apply(function: Callable[..., float], arguments: list[float]) -> float:
    try:
        return function(*arguments)
    except OverflowError:
        return math.inf
    except (ValueError, ZeroDivisionError):
        return math.nan


def _negate(value: float) -> float:
    return -value


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return -math.inf if base < 0 and exponent % 2 == 1 else math.inf


def _floor(value: float) -> float:
    return float(math.floor(value)) if math.isfinite(value) else value


def _ceil(value: float) -> float:
    return float(math.ceil(value)) if math.isfinite(value) else value


def _round(value: float) -> float:
    """Halves away from zero, not to even as Python's own."""
    if not math.isfinite(value):
        return value
    whole = float(math.trunc(value))
    return whole + math.copysign(1.0, value) if abs(value - whole) >= 0.5 else whole


def _least(*values: float) -> float:
    return math.nan if any(map(math.isnan, values)) else min(values)


def _largest(*values: float) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


class _Operator(NamedTuple):
    power: int
    function: Callable[[float, float], float]


_OPERATORS = {
    "+": _Operator(1, lambda a, b: a + b),
    "-": _Operator(1, lambda a, b: a - b),
    "*": _Operator(2, lambda a, b: a * b),
    "/": _Operator(2, lambda a, b: a / b),
}

FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "pow": (_power, 2),
    "sqrt": (math.sqrt, 1),
    "abs": (math.fabs, 1),
    "exp": (math.exp, 1),
    "floor": (_floor, 1),
    "ceil": (_ceil, 1),
    "round": (_round, 1),
    "min": (_least, None),
    "max": (_largest, None),
}
"""Name to function and its number of arguments; None: one or more."""
