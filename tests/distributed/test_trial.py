"""``codec="auto"`` without other processes: which codecs it tries, and what it makes of times."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.distributed import trial
from gradcodec.distributed.trial import RUNGS, Trial, ladder
from gradcodec.errors import ConfigError
from gradcodec.registry import make_codec


class Clock:
    """Steps of given lengths; one rank alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(trial.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)

    def play(self, auto: Trial, seconds: Sequence[float], steps: int = 10_000) -> list[int]:
        """The rungs of all steps until it decides; a step of rung ``r`` takes ``seconds[r]``."""
        rungs = []
        for _ in range(steps):
            rungs.append(auto.rung)
            self.now += seconds[auto.rung]
            if auto.step_done(None, torch.device("cpu")):  # type: ignore[arg-type]
                break
        return rungs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


NAMES = ("int4", "int2-rotated", "sign-rotated")


@pytest.mark.parametrize(
    ("seconds", "decision"),
    [
        ([1.0, 1.1, 1.2, 1.3], 0),
        ([1.0, 0.98, 0.99, 1.0], 0),  # too little to tell from noise
        ([1.0, 1.1, 0.8, 0.7], 3),  # a rung that does not help is no end
        ([1.0, 0.5, 0.5, 0.6], 1),
        ([1.0, 0.5, 0.49, 0.4], 3),
        ([1.0, 0.5, 0.3, 0.4], 2),
    ],
)
def test_it_takes_the_fastest_way(clock: Clock, seconds: list[float], decision: int) -> None:
    auto = Trial(NAMES)
    rungs = clock.play(auto, seconds)
    assert auto.decision == decision
    assert rungs[: trial.WARM + trial.ROUNDS] == [0] * (trial.WARM + trial.ROUNDS)
    assert len(rungs) == trial.WARM + trial.ROUNDS + len(NAMES) * (trial.ROUNDS + 1)
    assert sorted(rungs) == rungs
    assert auto.times == {r: pytest.approx(s) for r, s in enumerate(seconds)}


@given(st.lists(st.floats(1e-4, 10), min_size=4, max_size=4))
def test_its_choice_is_within_3_percent_a_rung_of_the_best(seconds: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        auto = Trial(NAMES)
        Clock(patch).play(auto, seconds)
    assert auto.decision is not None
    assert seconds[auto.decision] <= seconds[0]
    assert seconds[auto.decision] <= min(seconds) / trial.GAIN * (1 + 1e-6)


def test_a_slow_step_among_fast_ones_does_not_count(clock: Clock) -> None:
    auto = Trial(("int4",))
    lengths = iter([1.0] * 5 + [5.0] + [7.0, 0.5, 9.0])
    while True:
        clock.now += next(lengths)
        if auto.step_done(None, torch.device("cpu")):  # type: ignore[arg-type]
            break
    assert auto.decision == 1


def test_what_a_change_of_the_link_is_worth_is_seen_at_the_next_look(clock: Clock) -> None:
    auto = Trial(NAMES)
    for seconds, decision in (
        ([1.0, 0.5, 0.3, 0.2], 3),
        ([0.1, 0.15, 0.2, 0.25], 0),
        ([1.0, 0.5, 0.3, 0.4], 2),
    ):
        rungs = clock.play(auto, seconds)
        assert auto.decision == decision
        assert set(rungs) == {0, 1, 2, 3}


def test_a_second_look_leaves_out_what_took_far_longer(clock: Clock) -> None:
    auto = Trial(NAMES)
    clock.play(auto, [30.0, 4.0, 2.0, 1.0])
    rungs = clock.play(auto, [30.0, 4.0, 2.0, 1.0])
    assert rungs[: trial.RECHECK] == [3] * trial.RECHECK
    assert set(rungs) == {1, 2, 3}
    assert auto.decision == 3


def test_what_it_says_names_times_and_the_gain(clock: Clock) -> None:
    auto = Trial(NAMES)
    assert auto.describe() == "auto: still measuring"
    clock.play(auto, [1.0, 0.5, 0.25, 0.25])
    assert auto.describe() == (
        "auto: compressing by int2-rotated, 4.00x as fast as dense; a step took 1.0000 s dense, "
        "0.5000 s int4, 0.2500 s int2-rotated, 0.2500 s sign-rotated"
    )
    declined = Trial(NAMES[:1])
    clock.play(declined, [1.0, 1.5])
    assert declined.describe() == (
        "auto: not compressing: it would lose time; a step took 1.0000 s dense, 1.5000 s int4"
    )


@pytest.mark.parametrize(
    ("codec", "quality", "names"),
    [
        ("auto", None, ("int4",)),
        ("auto", trial.QUALITY, ("int4",)),
        ("auto", 1e-3, ("int8",)),
        ("auto", 0.15, ("int4", "int2-rotated")),
        ("auto", 1.0, ("int4", "int2-rotated", "sign-rotated")),
        ("auto:int8", None, ("int8",)),
        ("auto:int8,sign-rotated", None, ("int8", "sign-rotated")),
    ],
)
def test_quality_bounds_the_ladder(
    codec: str, quality: float | None, names: tuple[str, ...]
) -> None:
    assert ladder(codec, quality) == names


@pytest.mark.parametrize(
    ("codec", "quality", "what"),
    [
        ("auto", 1e-6, "at least 5e-05"),
        ("auto:int8", 0.4, "decides nothing"),
        ("auto", 0, "quality"),
        ("auto", float("nan"), "quality"),
        ("auto:", None, "different names"),
        ("auto:int4,int4", None, "different names"),
        ("auto:int4,fp32", None, "dense steps"),
        ("auto:int4,lowrank", None, "alone"),
    ],
)
def test_ladders_that_make_no_sense_are_refused(
    codec: str, quality: float | None, what: str
) -> None:
    with pytest.raises(ConfigError, match=what):
        ladder(codec, quality)


@pytest.mark.parametrize("name", RUNGS)
def test_the_errors_of_the_rungs_are_what_they_say(name: str) -> None:
    packer = make_codec(name).packer
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    error = (packer.unpack(packer.pack(x), x.numel()) - x).square().sum() / x.square().sum()
    assert 0.9 * RUNGS[name] < error < 1.01 * RUNGS[name]
