"""``compress_hook`` in real processes: the laws are the functions of ``hook_cases``.

Each world size is one set of processes that runs all its cases.
"""

import functools
import inspect
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import hook_cases, train_cases
from distributed.world import check, run_world

#: In a world of two ranks everything, in one of three what the number of ranks can change.
OTHERS = (
    "replicas_are_equal_to_the_bit",
    "mean_not_sum",
    "identity_is_plain_ddp",
    "buckets_and_skew_do_not_break_the_order",
    "results_do_not_depend_on_buckets",
    "resume_is_exact_with_other_buckets",
    "nan_in_one_rank_reaches_all_and_spares_residuals",
    "a_rank_that_has_joined_keeps_its_residual",
    "sparse_gradients_are_averaged_as_they_are",
    "bytes_are_counted_as_they_are",
    "linear_learned_codecs_average_their_codes",
    "nothing_is_lost_only_late",
    "a_switch_of_codecs_loses_nothing",
)

#: In a world of four, which splits evenly what three cannot, the laws that the others rest on.
FOUR = (
    "replicas_are_equal_to_the_bit",
    "mean_not_sum",
    "buckets_and_skew_do_not_break_the_order",
    "bytes_are_counted_as_they_are",
)

LAST = "destroying_the_group_ends_the_thread"

ALONE = "a_world_of_one_changes_nothing"


def every_case() -> list[str]:
    """All laws, in the order of the file but for the last, which destroys the group."""
    found = [
        name
        for name, function in vars(hook_cases).items()
        if inspect.isfunction(function)
        and list(inspect.signature(function).parameters) == ["rank", "world"]
        and function.__module__ == hook_cases.__name__
        and name != ALONE
    ]
    return sorted(found, key=LAST.__eq__)


WORLDS = {2: every_case(), 3: list(OTHERS), 4: list(FOUR)}

AT_A_TIME = {2: 20, 3: 7, 4: 4}
"""Cases in one set of processes, so that each is done well within a test's time."""


@functools.cache
def run(world: int, chunk: int) -> dict[str, list[str]]:
    few = AT_A_TIME[world]
    cases = WORLDS[world][chunk * few : (chunk + 1) * few]
    return run_world(hook_cases.__name__, cases, world)


def named(*worlds: int) -> list[tuple[int, int, str]]:
    """World, chunk and case of every test."""
    return [(w, i // AT_A_TIME[w], case) for w in worlds for i, case in enumerate(WORLDS[w])]


@pytest.mark.parametrize(("world", "chunk", "case"), named(2))
def test_ranks(world: int, chunk: int, case: str) -> None:
    check(run(world, chunk)[case])


def test_a_world_of_one_changes_nothing(tmp_path: Path) -> None:
    """In this process: nobody else is needed for it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        hook_cases.a_world_of_one_changes_nothing(0, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "chunk", "case"), named(3, 4))
def test_more_ranks(world: int, chunk: int, case: str) -> None:
    check(run(world, chunk)[case])


@pytest.mark.slow
def test_compressed_training_reaches_the_dense_loss() -> None:
    case = "compressed_training_reaches_the_dense_loss"
    check(run_world(train_cases.__name__, [case], 2)[case])


def test_every_law_is_run() -> None:
    assert {*FOUR} <= {*OTHERS} <= {*every_case()}
    assert len(every_case()) > 25
