"""Laws of the standard-library corpus."""

import ast

import pytest

from gradcodec.recipes.corpus import (
    Pair,
    docstring_pairs,
    source_text,
    strip_docstrings,
    words,
)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return docstring_pairs()


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return dict(source_text())


def test_there_are_thousands_of_pairs_in_many_packages(pairs: list[Pair]) -> None:
    assert len(pairs) > 2000
    assert len({pair.package for pair in pairs}) > 50


def test_no_two_pairs_share_an_answer(pairs: list[Pair]) -> None:
    assert len({pair.answer for pair in pairs}) == len(pairs)


def test_pairs_are_sorted_by_package_and_prompt(pairs: list[Pair]) -> None:
    keys = [(pair.package, pair.prompt) for pair in pairs]
    assert keys == sorted(keys)


def test_an_answer_is_one_line_of_20_to_240_characters_behind_a_blank(pairs: list[Pair]) -> None:
    for pair in pairs:
        text = pair.answer.removeprefix(" ")
        assert pair.answer == " " + " ".join(text.split())
        assert 20 <= len(text) <= 240


def test_a_known_function_is_asked_for_by_name_and_arguments(pairs: list[Pair]) -> None:
    pair = next(pair for pair in pairs if (pair.package, pair.name) == ("textwrap", "shorten"))
    assert pair.prompt == "Q: What does textwrap.shorten(text, width, **kwargs) do?\nA:"
    assert pair.answer == " Collapse and truncate the given text to fit in the given width."


def test_the_caller_may_change_the_returned_list(pairs: list[Pair]) -> None:
    docstring_pairs().clear()
    assert docstring_pairs() == pairs


def test_no_answer_is_in_the_pretraining_text(pairs: list[Pair], modules: dict[str, str]) -> None:
    sample = [text for name, text in modules.items() if name[0] in "acdpt"]
    haystack = f" {' '.join(words(' '.join(sample)))} "
    assert len(haystack) > 1_000_000
    leaked = [pair for pair in pairs[::7] if f" {' '.join(words(pair.answer))} " in haystack]
    assert leaked == []


def test_code_and_comments_stay_in_the_pretraining_text(
    modules: dict[str, str],
) -> None:
    assert "# Hardcode the recognized whitespace characters" in modules["textwrap"]
    assert "def shorten(" in modules["textwrap"]


def test_the_build_settings_of_this_machine_are_left_out(modules: dict[str, str]) -> None:
    assert not [name for name in modules if name.startswith("_sysconfigdata")]


def test_tests_and_third_party_packages_are_left_out(modules: dict[str, str]) -> None:
    unwanted = {"test", "tests", "idle_test", "site-packages"}
    assert not [
        name
        for name in modules
        if not name.startswith("pydoc_data.topics.") and unwanted & set(name.split("."))
    ]


def test_stripped_source_has_no_string_statement_and_still_parses() -> None:
    source = '''"""Module."""
class A:  # kept
    "One-liner."
    x: int = 1
    """Attribute."""

async def f(): "é"; return "kept"

def g():
    """Only this."""
'''
    stripped = strip_docstrings(source)
    tree = ast.parse(stripped)
    alone = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    assert alone == []
    assert "# kept" in stripped
    assert 'return "kept"' in stripped
