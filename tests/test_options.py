"""Options as data: what annotations say, and which values and texts each type takes."""

import dataclasses
import functools
from typing import Annotated, Any

import pytest

from diffjax.errors import UserError
from diffjax.options import (
    REQUIRED,
    Leaf,
    Option,
    above,
    at_least,
    between,
    check,
    convert,
    fraction,
    one_of,
    options,
    parse,
    type_in_words,
)

WORD, NUMBER = Leaf("a word"), Leaf("a number")


def option(kind: Any, valid: Any = None) -> Option:
    return Option("leaf", kind, REQUIRED, Leaf("of a test", valid=valid))


def same(found: Any, expected: Any) -> None:
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "kind, text, value",
    [
        (int, "3", 3),
        (int, " -3 ", -3),
        (float, "2e-4", 2e-4),
        (float, "3", 3.0),
        (bool, "true", True),
        (bool, "False", False),
        (str, "word", "word"),
        (str, "", ""),
        (str, "none", "none"),
        (str, "3", "3"),
        (float | None, "none", None),
        (float | None, "None", None),
        (float | None, "", None),
        (float | None, "0.5", 0.5),
        (str | None, "none", None),
        (str | None, "word", "word"),
        (int | float, "3", 3),
        (int | float, "3.5", 3.5),
        (tuple[int, ...], "1,2,3", (1, 2, 3)),
        (tuple[int, ...], "(1, 2, 3)", (1, 2, 3)),
        (tuple[int, ...], "[1,2]", (1, 2)),
        (tuple[int, ...], "7", (7,)),
        (tuple[int, ...], "(7,)", (7,)),
        (tuple[int, ...], "", ()),
        (tuple[int, ...], "()", ()),
        (tuple[float, ...], "0.05,0.1", (0.05, 0.1)),
        (tuple[float, ...], "1", (1.0,)),
        (tuple[str, ...], "a,b", ("a", "b")),
        (tuple[str, ...], "('a', \"b\")", ("a", "b")),
    ],
)
def test_texts_of_a_command_line(kind, text, value):
    same(parse("--config.leaf", option(kind), text), value)


@pytest.mark.parametrize(
    "kind, text, valid",
    [
        (int, "3.5", "a whole number"),
        (int, "none", "a whole number"),
        (int, "", "a whole number"),
        (float, "word", "a number"),
        (float | None, "word", "a number or none"),
        (bool, "1", "true or false"),
        (bool, "", "true or false"),
        (tuple[int, ...], "1,2.5", "whole numbers, such as 1,2"),
        (tuple[int, ...], "1;2", "whole numbers, such as 1,2"),
        (tuple[float, ...], "0.1,x", "numbers, such as 0.1,0.2"),
    ],
)
def test_texts_that_are_not_of_the_type(kind, text, valid):
    with pytest.raises(UserError) as raised:
        parse("--config.leaf", option(kind), text)
    assert str(raised.value) == f"--config.leaf={text}: valid: {valid}"


@pytest.mark.parametrize(
    "kind, given, value",
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 3.5, 3.5),
        (bool, True, True),
        (str, "word", "word"),
        (float | None, None, None),
        (float | None, 3, 3.0),
        (str | None, "none", "none"),
        (int | float, 3, 3),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, ...], (), ()),
        (tuple[float, ...], (1, 2.5), (1.0, 2.5)),
        (tuple[str, ...], ["a"], ("a",)),
    ],
)
def test_values_of_recipes_and_files(kind, given, value):
    same(convert(given, kind), value)
    same(check("leaf", option(kind), given), value)


@pytest.mark.parametrize(
    "kind, given, valid",
    [
        (int, 3.0, "a whole number"),
        (int, True, "a whole number"),
        (int, "3", "a whole number"),
        (int, None, "a whole number"),
        (float, True, "a number"),
        (float, "3", "a number"),
        (float, float("nan"), "a finite number"),
        (float, float("inf"), "a finite number"),
        (float | None, float("-inf"), "a finite number or none"),
        (bool, 1, "true or false"),
        (str, 3, "a word"),
        (str | None, 3, "a word or none"),
        (tuple[int, ...], 3, "whole numbers, such as 1,2"),
        (tuple[int, ...], (1, 2.5), "whole numbers, such as 1,2"),
        (tuple[int, ...], (1, True), "whole numbers, such as 1,2"),
        (tuple[float, ...], (0.1, None), "numbers, such as 0.1,0.2"),
        (tuple[str, ...], "ab", "words, such as a,b"),
        (tuple[str, ...], ("a", 1), "words, such as a,b"),
    ],
)
def test_values_of_another_type(kind, given, valid):
    assert convert(given, kind) is REQUIRED
    with pytest.raises(UserError) as raised:
        check("section.leaf", option(kind), given)
    assert str(raised.value) == f"section.leaf = {given!r}: valid: {valid}"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_numbers_of_a_command_line_are_finite(text):
    with pytest.raises(UserError, match=r"^--config\.leaf = \S+: valid: a finite number$"):
        parse("--config.leaf", option(float, above(0)), text)


@pytest.mark.parametrize(
    "valid, good, bad, words",
    [
        (one_of(("a", "")), ["a", ""], ["b"], "a, ''"),
        (one_of((1, 2)), [1, 2], [3], "1, 2"),
        (at_least(0), [0, 7.5], [-1], "0 or more"),
        (at_least(0, "never"), [0, 7.5], [-1], "0 (never) or more"),
        (at_least(1, "never"), [1], [0], "1 or more"),
        (above(0), [1e-9], [0, -1], "above 0"),
        (between(0, 1), [0, 1], [-0.1, 1.1], "0 to 1"),
        (between(0, 1, "off"), [0, 1], [-0.1, 1.1], "0 (off) to 1"),
        (fraction(), [0, 0.99], [1, -0.1], "0 to below 1"),
        (fraction("off"), [0, 0.99], [1, -0.1], "0 (off) to below 1"),
    ],
)
def test_what_is_valid_in_words_and_as_a_test(valid, good, bad, words):
    kind = type(good[0])
    for value in good:
        assert valid.test(value)
    for value in bad:
        assert not valid.test(value)
    if kind is str:
        bad_text = bad[0]
        with pytest.raises(UserError) as raised:
            parse("--config.leaf", option(str, valid), bad_text)
        assert str(raised.value) == f"--config.leaf = {bad_text!r}: valid: {words}"
    assert valid.words == words


def test_none_is_valid_where_the_type_has_it():
    assert check("leaf", option(float | None, above(0)), None) is None
    with pytest.raises(UserError, match=r"^leaf = 0: valid: above 0$"):
        check("leaf", option(float | None, above(0)), 0)


def test_a_table_may_still_grow():
    table = {"a": 1}
    valid = one_of(table)
    with pytest.raises(UserError, match="leaf = 'b': valid: a$"):
        check("leaf", option(str, valid), "b")
    table["b"] = 2
    assert check("leaf", option(str, valid), "b") == "b"
    with pytest.raises(UserError, match="leaf = 'c': valid: a, b$"):
        check("leaf", option(str, valid), "c")


def component(
    process: int,
    steps: int = 3,
    *,
    eta: Annotated[float, NUMBER] = 0.5,
    mode: Annotated[str | None, WORD],
    plain: int = 1,
) -> None:
    """Options are the annotated keyword-only parameters, no others."""


@dataclasses.dataclass(frozen=True)
class Section:
    name: Annotated[str, WORD]
    rates: Annotated[tuple[float, ...], NUMBER] = (0.1,)
    other: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Record:
    options: dict


def test_options_of_a_function():
    assert options(component) == {
        "eta": Option("eta", float, 0.5, NUMBER),
        "mode": Option("mode", str | None, REQUIRED, WORD),
    }
    assert list(options(component)) == ["eta", "mode"]


def test_options_of_a_partial_have_its_defaults():
    assert options(functools.partial(component, 1)) == options(component)
    assert options(functools.partial(component, 1, eta=0.7))["eta"].default == 0.7


def test_options_of_a_dataclass():
    assert options(Section) == {
        "name": Option("name", str, REQUIRED, WORD),
        "rates": Option("rates", tuple[float, ...], (0.1,), NUMBER),
    }
    assert options(Section("a")) == options(Section)


def test_options_of_a_record_are_what_it_says():
    own = {"eta": Option("eta", float, 0.5, NUMBER)}
    assert options(Record(own)) == own


def test_options_of_what_has_none():
    assert options(lambda x, *, y=1: None) == {}


@pytest.mark.parametrize(
    "kind, words",
    [
        (bool, "true or false"),
        (int | None, "a whole number or none"),
        (int | str, "a whole number or a word"),
        (tuple[str, ...], "words, such as a,b"),
    ],
)
def test_types_in_words(kind, words):
    assert type_in_words(kind) == words
