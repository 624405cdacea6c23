"""The mutants of ``make mutants`` fit the library; whether tests notice them is asked there."""

import pytest

from tests import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_changes_one_place_of_the_library(mutant: mutants.Mutant) -> None:
    text = mutants.place(mutant).read_text()
    assert mutants.changed(mutant, text) != text
    assert mutants.files_for(mutant)


def test_text_that_is_gone_or_stands_twice_is_an_error() -> None:
    gone = mutants.Mutant("gone", "", "no such text anywhere", "", ())
    twice = mutants.Mutant("twice", "", "from __future__ import annotations", "", ())
    for mutant in (gone, twice):
        with pytest.raises(LookupError, match=f"{mutant.name!r}: expected in one place"):
            mutants.place(mutant)


def test_a_mutant_without_tests_is_an_error() -> None:
    with pytest.raises(LookupError, match="no tests"):
        mutants.files_for(mutants.Mutant("lonely", "", "", "", ("test_nothing_at_all.py",)))
