"""The expression of `Upstash-Retry-Delay`: what it is worth, what is refused, and that nothing it holds can hurt."""

from __future__ import annotations

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.domain.expression import DELAY_MS_MAX, DEPTH_MAX, FUNCTIONS, STEPS_MAX, TEXT_LENGTH_MAX, parse_delay


@pytest.mark.parametrize(
    ("text", "retried", "ms"),
    [
        ("1000", 0, 1000),
        (" 1000\t", 3, 1000),
        ("1.5", 0, 1.5),
        (".5 + 2.", 0, 2.5),
        ("1e3 + 2.5E-1 + 1e+2", 0, 1100.25),
        ("retried", 7, 7),
        ("1000 * (1 + retried)", 2, 3000),
        ("pow(2, retried) * 1000", 3, 8000),
        ("min(86400000, 1000*pow(2,retried))", 40, 86_400_000),
        ("2 + 3 * 4", 0, 14),
        ("(2 + 3) * 4", 0, 20),
        ("20 - 5 - 3", 0, 12),
        ("20 - (5 - 3)", 0, 18),
        ("100 / 5 / 2", 0, 10),
        ("100 / 5 * 2", 0, 40),
        ("2 * 3 + 4 * 5 - 6 / 2", 0, 23),
        ("10 - -3", 0, 13),
        ("+-+-5", 0, 5),
        ("-2 * -3", 0, 6),
        ("5 + -2 * 2", 0, 1),
        ("sqrt(16)", 0, 4),
        ("abs(-5) + abs(5)", 0, 10),
        ("exp(0)", 0, 1),
        ("floor(2.7) + 10 * ceil(2.1) + 10 + floor(-2.1)", 0, 39),
        ("round(0.5) + 10 * round(2.5) + 100 * round(0.49999999999999994)", 0, 31),
        ("10 + round(-0.5)", 0, 9),
        ("min(4)", 0, 4),
        ("max(4)", 0, 4),
        ("min(5, 4, 3, 9)", 0, 3),
        ("max(5, 4, 3, retried)", 8, 8),
        ("max(1000, min(60000, floor(exp(2.5 * (retried + 1)) * 1000)))", 0, 12182),
    ],
)
def test_it_is_worth_what_arithmetic_says(text: str, retried: int, ms: float) -> None:
    assert parse_delay(text).milliseconds(retried) == ms


@pytest.mark.parametrize(
    "text",
    [
        "-1", "0", "-0.0", "5 - 10", "1 / 0", "-1 / 0", "0 / 0", "1000 / retried", "1 / (retried * -1)", "sqrt(-1)",
        "pow(-8, 1/3)", "pow(0, -1)", "max(0, 1 / 0)", "min(1, 0 / 0)", "max(5, sqrt(-1))", "1 + 0 * sqrt(-1)",
        "pow(9, 999) - pow(9, 999)", "0 * pow(9, 999)", "-pow(9, 999)", "pow(-9, 999)", "round(sqrt(-1))",
        "floor(sqrt(-1)) + ceil(1 / 0)", "1e-999", "exp(-999)",
    ],
)  # fmt: skip
def test_what_is_negative_or_has_no_value_is_no_wait(text: str) -> None:
    assert math.copysign(1, parse_delay(text).milliseconds(0)) == 1
    assert parse_delay(text).milliseconds(0) == 0


@pytest.mark.parametrize(
    "text",
    [
        "86400001", "1e308", "1e308 * 10", "pow(pow(9, 9), 9)", "pow(pow(pow(9, 9), 99), 99)", "pow(9, 999)",
        "pow(-9, 998)", "exp(1000)", "1 / 1e-320", "exp(exp(exp(exp(9))))", "floor(exp(999))", "ceil(exp(999))",
        "round(exp(999))", "abs(-exp(999))", "sqrt(exp(999))", "max(1, exp(999))",
    ],
)  # fmt: skip
def test_what_is_too_large_is_a_day(text: str) -> None:
    assert parse_delay(text).milliseconds(0) == DELAY_MS_MAX == 24 * 60 * 60 * 1000


@pytest.mark.parametrize("retried", [-(10**400), -1, 10**15, 10**400])
def test_any_count_is_evaluated(retried: int) -> None:
    assert parse_delay("retried").milliseconds(retried) == (DELAY_MS_MAX if retried > 0 else 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" \t ", "empty"),
        ("1 +", "ends where a value"),
        ("1 + * 2", "'*' at position 5"),
        ("* 2", "'*' at position 1"),
        ("1 2", "'2' at position 3"),
        ("2retried", "'retried' at position 2"),
        ("1_000", "'_000' at position 2"),
        ("1,000", "',' at position 2"),
        ("1.2.3", "'.3' at position 4"),
        ("0x10", "'x10' at position 2"),
        ("1e", "'e' at position 2"),
        (".", "'.' at position 1"),
        ("10 % 3", "'%' at position 4: an unknown operator; write a - b * floor(a / b)"),
        ("2 ^ 3", "'^' at position 3: an unknown operator; write pow(a, b)"),
        ("2 ** 3", "'**' at position 3: an unknown operator; write pow(a, b)"),
        ("2 // 3", "'/' at position 4"),
        ("7 & 3", "'&' at position 3"),
        ("attempts * 2", "'attempts' at position 1: unknown; use retried"),
        ("n", "'n' at position 1: unknown"),
        ("RETRIED", "'RETRIED' at position 1: unknown"),
        ("log(2)", "'log' at position 1: unknown"),
        ("__import__('os')", "'__import__' at position 1: unknown"),
        ("retried.real", "'.' at position 8"),
        ("retried()", "'(' at position 8"),
        ("[1]", "'[' at position 1"),
        ("1 if 1 else 2", "'if' at position 3"),
        ("(1", "before '(' at position 1 is closed; add the missing )"),
        ("pow(1, (2)", "before '(' at position 4 is closed"),
        ("(1 2)", "'2' at position 4: before '(' at position 1 is closed"),
        ("1)", "')' at position 2"),
        ("()", "')' at position 2"),
        ("(1, 2)", "',' at position 3"),
        ("sqrt", "write the arguments in parentheses: sqrt(...)"),
        ("sqrt 4", "'4' at position 6"),
        ("min()", "')' at position 5"),
        ("max(1,)", "')' at position 7"),
        ("max(,1)", "',' at position 5"),
        ("pow(2)", "'pow' at position 1 with 1 argument(s); pow takes 2"),
        ("1 + pow(2, 3, 4)", "'pow' at position 5 with 3 argument(s); pow takes 2"),
        ("sqrt(1, 2)", "sqrt takes 1"),
        ("1e999", "'1e999' at position 1: too large"),
        ("\N{ARABIC-INDIC DIGIT THREE}", "at position 1"),
        ("1\N{NO-BREAK SPACE}+ 1", "at position 2"),
        ("1\0", r"'\x00' at position 2"),
        ("\ud800", r"'\ud800' at position 1"),
        ("x" * 100, f"'{'x' * 40}...' at position 1"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_place_and_the_fix(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        parse_delay(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("start", ["(", "-", "sqrt(", "max(1, "])
def test_nesting_is_bounded(start: str) -> None:
    end = ")" if "(" in start else ""
    parse_delay(start * DEPTH_MAX + "1" + end * DEPTH_MAX)
    with pytest.raises(ValueError, match="too deep"):
        parse_delay(start * (DEPTH_MAX + 1) + "1" + end * (DEPTH_MAX + 1))


def test_side_by_side_is_not_nested() -> None:
    assert parse_delay("+".join(["(1)"] * 2 * DEPTH_MAX)).milliseconds(0) == 2 * DEPTH_MAX


def test_the_number_of_steps_is_bounded() -> None:
    assert parse_delay("+".join("1" * (STEPS_MAX // 2))).milliseconds(0) == STEPS_MAX // 2
    with pytest.raises(ValueError, match=f"more than {STEPS_MAX}"):
        parse_delay("+".join("1" * (STEPS_MAX // 2 + 1)))


def test_the_text_is_bounded() -> None:
    assert parse_delay("1".ljust(TEXT_LENGTH_MAX)).milliseconds(0) == 1
    with pytest.raises(ValueError, match="501 characters"):
        parse_delay("1".ljust(TEXT_LENGTH_MAX + 1))


def test_the_text_is_kept_as_it_was_sent() -> None:
    expression = parse_delay("  1000*( retried+1 ) ")
    assert expression.text == "  1000*( retried+1 ) "
    assert expression == parse_delay(expression.text)
    assert expression != parse_delay("1000 * (retried + 1)")
    assert pickle.loads(pickle.dumps(parse_delay("pow(retried, 2)"))).milliseconds(3) == 9


NUMBERS = st.floats(0, 1e6).map(repr) | st.just("retried")


def _larger(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(parts, st.sampled_from(["+", " - ", "*", " / "]), parts).map("".join),
        parts.map("({})".format),
        parts.map("-{}".format),
        st.tuples(st.sampled_from(["abs", "sqrt", "exp"]), parts).map(lambda pair: f"{pair[0]}({pair[1]})"),
        st.lists(parts, min_size=2, max_size=4).map(lambda some: f"max({', '.join(some)})"),
    )


@given(st.recursive(NUMBERS, _larger, max_leaves=12), st.integers(0, 20))
def test_it_agrees_with_python_where_python_has_an_answer(text: str, retried: int) -> None:
    """Precedence and order of evaluation, held against another parser of the same grammar."""
    names = {"retried": float(retried), "abs": abs, "sqrt": math.sqrt, "exp": math.exp, "max": max}
    try:
        expected = eval(text, {"__builtins__": {}}, names)
        expression = parse_delay(text)
    except (ValueError, ArithmeticError):
        return
    if not math.isnan(expected) and "inf" not in repr(expected):
        assert expression.milliseconds(retried) == min(max(expected, 0), DELAY_MS_MAX)


WORDS = ["retried", *FUNCTIONS, *"+-*/(),%^ .", "0", "1", "9", "1e308", "pow(", "9,9)", "sqrt(", "/0"]


@given(st.lists(st.sampled_from(WORDS), max_size=60).map("".join) | st.text(max_size=60), st.integers())
def test_any_text_is_refused_in_words_or_worth_at_most_a_day(text: str, retried: int) -> None:
    try:
        expression = parse_delay(text)
    except ValueError as error:
        assert str(error).startswith(("has ", "is ", "ends "))  # noqa: PT017  # one test for both ends
        return
    assert 0 <= expression.milliseconds(retried) <= DELAY_MS_MAX
