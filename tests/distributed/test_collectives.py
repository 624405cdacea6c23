"""The plain collectives of 1 to 4 ranks, in real processes if several: ``collective_cases``."""

import functools
import inspect
from pathlib import Path

import pytest
import torch.distributed as dist
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
    return run_world(collective_cases.__name__, CASES, world)


@pytest.mark.parametrize("world", [3])
@pytest.mark.parametrize("case", CASES)
def test_ranks(world: int, case: str) -> None:
    check(run(world)[case])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_other_worlds(world: int, case: str) -> None:
    check(run(world)[case])


@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_ALONE])
def test_a_world_of_one(case: str, tmp_path: Path) -> None:
    """In this process: nobody else is needed for it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        getattr(collective_cases, case)(0, 1)
    finally:
        dist.destroy_process_group()
