"""Ranks that differ in what must be equal: laws of ``agreement_cases`` in real processes."""

import functools
import inspect

import pytest
from distributed import agreement_cases
from distributed.world import check, run_world

CASES = [
    name
    for name, function in vars(agreement_cases).items()
    if inspect.isfunction(function)
    and list(inspect.signature(function).parameters) == ["rank", "world"]
]


@functools.cache
def run(world: int) -> dict[str, list[str]]:
    return run_world(agreement_cases.__name__, CASES, world, group_timeout=20)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str) -> None:
    check(run(2)[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_ranks(case: str) -> None:
    check(run(3)[case])
