"""``compress_hook`` in real processes: the laws are the functions of ``hook_cases``.

Each world size is one set of processes that runs all its cases.
"""

import functools
import inspect

import pytest
from distributed import hook_cases, train_cases
from distributed.world import check, run_world

#: In worlds of two ranks everything; in others what the number of ranks can change.
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
)

LAST = "destroying_the_group_ends_the_thread"

ALONE = ("a_world_of_one_changes_nothing", "wrong_uses_are_refused_with_the_reason")


def every_case() -> list[str]:
    """All laws, in the order of the file but for the last, which destroys the group."""
    found = [
        name
        for name, function in vars(hook_cases).items()
        if inspect.isfunction(function)
        and list(inspect.signature(function).parameters) == ["rank", "world"]
        and function.__module__ == hook_cases.__name__
        and name != "a_world_of_one_changes_nothing"
    ]
    return sorted(found, key=LAST.__eq__)


WORLDS = {1: list(ALONE), 2: every_case(), 3: list(OTHERS), 4: list(OTHERS)}

AT_A_TIME = {1: 99, 2: 20, 3: 6, 4: 4}
"""Cases in one set of processes, so that each is done well within a test's time."""


@functools.cache
def run(world: int, chunk: int) -> dict[str, list[str]]:
    few = AT_A_TIME[world]
    cases = WORLDS[world][chunk * few : (chunk + 1) * few]
    return run_world(hook_cases.__name__, cases, world)


def named(*worlds: int) -> list[tuple[int, int, str]]:
    """World, chunk and case of every test."""
    return [(w, i // AT_A_TIME[w], case) for w in worlds for i, case in enumerate(WORLDS[w])]


@pytest.mark.parametrize(("world", "chunk", "case"), named(1, 2))
def test_ranks(world: int, chunk: int, case: str) -> None:
    check(run(world, chunk)[case])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "chunk", "case"), named(3, 4))
def test_more_ranks(world: int, chunk: int, case: str) -> None:
    check(run(world, chunk)[case])


@pytest.mark.slow
def test_compressed_training_reaches_the_dense_loss() -> None:
    case = "compressed_training_reaches_the_dense_loss"
    check(run_world(train_cases.__name__, [case], 2)[case])


def test_every_law_is_run() -> None:
    assert {*ALONE, *OTHERS} <= {*every_case(), *ALONE}
    assert len(every_case()) > 25
