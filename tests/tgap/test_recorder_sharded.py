"""Recording under DDP, FSDP1 and ``fully_shard``, in two real gloo processes."""

import pytest
from distributed.world import check, run_world

CASES = [
    "names_are_plain",
    "gradients_are_whole_and_equal",
    "an_optimiser_that_shards_its_state_is_recorded_once_a_step",
    "updates_and_states_are_whole",
    "one_rank_alone_keeps_the_statistics",
    "frozen_unused_and_clipped",
    "low_precision_and_two_meshes",
    "a_value_that_is_not_finite_stops_every_rank",
    "what_cannot_be_known_is_refused",
    "the_latent_optimizer_takes_whole_parameters_only",
    "parameters_sharded_after_construction_are_noticed",
    "recorders_can_be_copied_with_their_model",
]


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, list[str]]:
    return run_world("tgap.sharded_recorder_cases", CASES, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_in_two_processes(two_ranks: dict[str, list[str]], case: str) -> None:
    check(two_ranks[case])
