"""``LocalSteps`` in real processes: the laws are the functions of ``local_cases``."""

from __future__ import annotations

import functools
import inspect

import pytest
from distributed import local_cases
from distributed.world import check, run_world
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.distributed.fragments import Schedule, fragments_of
from gradcodec.errors import ConfigError

SHARDED = "sharded_modules_take_local_steps"
"""Needs four ranks."""

OTHERS = (
    "anchors_are_equal_to_the_bit",
    "a_padded_residual_that_is_gathered_resumes_exactly",
    "ranks_leave_and_come_back",
    "resume_is_exact",
)

CASES = [
    name
    for name, function in vars(local_cases).items()
    if inspect.isfunction(function)
    and list(inspect.signature(function).parameters) == ["rank", "world"]
    and name != SHARDED
]

WORLDS = {2: CASES, 3: list(OTHERS), 4: [SHARDED]}


@functools.cache
def run(world: int) -> dict[str, list[str]]:
    return run_world(local_cases.__name__, WORLDS[world], world, limit=150)


@pytest.mark.parametrize(
    ("world", "case"),
    [
        pytest.param(world, case, marks=[pytest.mark.slow] if world > 2 else [])
        for world, cases in WORLDS.items()
        for case in cases
    ],
)
def test_ranks(world: int, case: str) -> None:
    check(run(world)[case])


SCHEDULES = st.builds(
    lambda apart, fragments, share: Schedule(
        apart * fragments, fragments, int(share * apart * fragments)
    ),
    st.integers(1, 6),
    st.integers(1, 5),
    st.floats(0, 0.99),
)


@given(SCHEDULES, st.integers(1, 100))
def test_every_fragment_is_sent_once_in_h_steps(schedule: Schedule, start: int) -> None:
    window = [schedule.sent(t) for t in range(start, start + schedule.every)]
    assert sorted(p for p in window if p is not None) == list(range(schedule.fragments))


@given(SCHEDULES, st.integers(0, 100))
def test_in_flight_is_what_was_sent_and_not_merged(schedule: Schedule, step: int) -> None:
    flying: list[int] = []
    for t in range(1, step + 1):
        if schedule.overlap and (arrived := schedule.merged(t)) is not None:
            assert flying.pop(0) == arrived
        if (due := schedule.sent(t)) is not None and schedule.overlap:
            assert due not in flying
            flying.append(due)
    assert schedule.in_flight(step) == flying


@given(st.dictionaries(st.text(max_size=4), st.integers(0, 1000), min_size=5), st.integers(1, 5))
def test_fragments_cover_each_parameter_once(numels: dict[str, int], count: int) -> None:
    found = fragments_of(numels, count)
    assert len(found) == count
    assert all(found)
    assert sorted(name for names in found for name in names) == sorted(numels)
    sizes = [sum(numels[n] for n in names) for names in found]
    # Greedy: the largest fragment is over the smallest by at most its last parameter.
    assert max(sizes) - min(sizes) <= max(numels.values()) + len(numels)


def test_more_fragments_than_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most one fragment"):
        fragments_of({"a": 3}, 2)
