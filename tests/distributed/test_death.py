"""A rank that dies, hangs or just ends: the others get an error in time, and nothing hangs."""

import pytest
from distributed import death_cases
from distributed.world import PASSED, run_world


def others_of(case: str, world: int, limit: float) -> list[str]:
    """Outcomes of all ranks but the last, which is the one that dies."""
    outcome = run_world(
        death_cases.__name__, [case], world, limit, group_timeout=death_cases.TIMEOUT
    )[case]
    return outcome[:-1]


def test_a_dead_rank_is_an_error_at_the_others() -> None:
    case = "a_dead_rank_is_an_error_at_the_others"
    outcomes = others_of(case, 3, 80)
    # They leave in the middle of their case, having got the error, without a word but exit code 0.
    assert all("exit code 0" in o for o in outcomes), "\n".join(outcomes)


@pytest.mark.slow
def test_a_rank_that_hangs_is_an_error_within_the_timeout() -> None:
    case = "a_rank_that_hangs_is_an_error_within_the_timeout"
    outcomes = others_of(case, 2, 90)
    assert outcomes == [PASSED], "\n".join(outcomes)


def test_a_rank_that_dies_before_the_handshake_is_an_error() -> None:
    outcomes = others_of("a_rank_that_dies_before_the_handshake_is_an_error", 2, 60)
    assert outcomes == [PASSED], "\n".join(outcomes)


@pytest.mark.slow
def test_messages_of_other_lengths_end_with_the_timeout() -> None:
    outcome = others_of("messages_of_other_lengths_end_with_the_timeout", 2, 60)
    assert outcome == [PASSED], "\n".join(outcome)


@pytest.mark.slow
def test_a_process_may_end_without_closing() -> None:
    case = "a_process_may_end_without_closing"
    outcome = run_world(death_cases.__name__, [case], 2, 80)[case]
    assert outcome == [PASSED, PASSED]
