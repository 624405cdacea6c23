"""The plain collectives in real processes of 1 to 4 ranks: laws in ``collective_cases``."""

import functools
import inspect

import pytest
from distributed import collective_cases
from distributed.world import check, run_world

CASES = [
    name
    for name, function in vars(collective_cases).items()
    if inspect.isfunction(function)
    and list(inspect.signature(function).parameters) == ["rank", "world"]
]

#: Laws about more than one rank.
NOT_ALONE = (
    "sub_groups_work_alone",
    "residuals_of_other_codecs_are_refused",
    "reduce_scatter_feeds_errors_back",
    "bytes_on_the_wire_are_the_codecs_bytes",
)


@functools.cache
def run(world: int) -> dict[str, list[str]]:
    cases = [c for c in CASES if world > 1 or c not in NOT_ALONE]
    return run_world(collective_cases.__name__, cases, world)


@pytest.mark.parametrize("world", [3])
@pytest.mark.parametrize("case", CASES)
def test_ranks(world: int, case: str) -> None:
    check(run(world)[case])


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_other_worlds(world: int, case: str) -> None:
    if world > 1 or case not in NOT_ALONE:
        check(run(world)[case])
