"""The benchmark of local steps: plans, rates, figures whose answers can be read off, a real run."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.ddp.work import Scratch, work_named
from benchmarks.jobs import Job
from benchmarks.local import case, figures
from benchmarks.local.page import page
from benchmarks.local.schemes import REFERENCE, SCHEMES, scheme_named, spelt
from benchmarks.run import Options

STEPS = 64


def row(scheme: str, seed: int, loss: float, sent: float, **more: Any) -> rows.Row:
    """A finished run."""
    asked = case.job(case.CASE, scheme, seed, STEPS, (3e-3, 1.0))
    return {
        **asked.stamp(),
        "round": STEPS,
        "steps": STEPS,
        "loss": loss,
        "sent": sent,
        "diverged": False,
        "replicas_equal": True,
        "compute_s": 0.1,
        "evaluations": [[0, 8.0, 0.0], [32, 6.0, 1.0], [STEPS, loss, 2.0]],
        **more,
    }


def written(path: Path, *some: rows.Row) -> Path:
    for each in some:
        rows.append(path, each)
    return path


# -- plans ------------------------------------------------------------------------------------


def test_every_scheme_that_tunes_has_as_many_points_as_its_kind_allows() -> None:
    sizes = {s.name: len(s.grid) for s in SCHEMES.values() if s.like is None}
    assert sizes.pop(REFERENCE) == 2
    assert sizes.pop("demo") == 2  # it has no outer rate
    assert set(sizes.values()) == {4}


def test_rates_are_taken_from_a_scheme_that_has_its_own() -> None:
    for scheme in SCHEMES.values():
        if scheme.like is not None:
            assert SCHEMES[scheme.like].like is None
            assert SCHEMES[scheme.like].outer == scheme.outer


def test_an_outer_rate_survives_its_spelling() -> None:
    assert spelt("sign-32", None) == "sign-32"
    made = scheme_named(spelt("sign-32", 0.7)).make
    assert made.args == (SCHEMES["sign-32"].make, 0.7)


def test_rates_are_those_of_the_lowest_loss_of_as_many_steps(tmp_path: Path) -> None:
    path = tmp_path / "local-tune.jsonl"
    scheme = SCHEMES["sign-64"]
    assert case.tuned(path, scheme, STEPS) == SCHEMES["sign-32"].grid[0]
    for lr, outer, steps, loss in (
        (3e-3, 1.0, STEPS, 4.2),
        (6e-3, 0.7, STEPS, 4.1),
        (6e-3, 1.0, 2 * STEPS, 3.0),
    ):
        asked = case.job(case.TUNE, "sign-32", case.TUNE_SEED, steps, (lr, outer))
        ended = {"round": steps, "loss": loss, "diverged": False}
        rows.append(path, {**asked.stamp(), **ended})
    assert case.tuned(path, scheme, STEPS) == (6e-3, 0.7)


def test_tuning_goes_breadth_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []

    def keep(jobs: list[Job], *_: Any, **__: Any) -> list[str]:
        seen.extend(jobs)
        return []

    monkeypatch.setattr(case, "execute", keep)
    monkeypatch.setattr(case, "_prepare", lambda seeds: None)
    case.tune(Options(tmp_path, schemes=("sign-32", "sparseloco-16")))
    names = [job.scheme for job in seen]
    assert names[:3] == [REFERENCE, "sparseloco-16", "sign-32"]
    assert names[3:6] == names[:3]
    assert {job.seed for job in seen} == {case.TUNE_SEED}
    assert case.TUNE_SEED not in case.SEEDS


# -- figures ----------------------------------------------------------------------------------


def test_ratio_and_excess_are_means_of_ratios_of_one_seed(tmp_path: Path) -> None:
    path = written(
        tmp_path / "local.jsonl",
        row(REFERENCE, 0, 4.0, 1000.0),
        row(REFERENCE, 1, 5.0, 1000.0),
        row("sign-32", 0, 4.4, 10.0),
        row("sign-32", 1, 5.0, 5.0),
        row("sign-32", 2, 1.0, 1.0),  # no plain DDP of that seed
    )
    found = figures.figures(figures.load(path))["sign-32"]
    assert found.ratio == pytest.approx((100 + 200) / 2)
    assert found.excess == pytest.approx(0.05)
    assert found.losses == (4.4, 5.0)
    assert not found.near


def test_shorter_runs_are_left_out(tmp_path: Path) -> None:
    short = case.job(case.CASE, "sign-32", 0, 32, (3e-3, 1.0)).stamp()
    path = written(
        tmp_path / "local.jsonl",
        row(REFERENCE, 0, 4.0, 1000.0),
        {**row("sign-32", 0, 4.0, 1.0), **short, "round": 32, "steps": 32},
    )
    assert list(figures.load(path)[0]) == [REFERENCE]


def test_goals_take_the_fewest_bytes_among_those_at_the_loss(tmp_path: Path) -> None:
    path = written(
        tmp_path / "local.jsonl",
        row(REFERENCE, 0, 4.0, 10_000.0),
        row("sign-32", 0, 4.03, 8.0),
        row("sign-64", 0, 4.5, 4.0),  # too far away to count
        row("streaming-32", 0, 4.0, 32.0),
        row("sparseloco-16", 0, 4.9, 1.0),
    )
    fewer, ahead = figures.goals(figures.figures(figures.load(path)))
    assert fewer.met
    assert fewer.found == "sign-32: 1,250x at +0.75%"
    assert ahead.met
    assert ahead.found == "sign-32: 4.0x fewer than streaming-32 (312x)"


def test_a_goal_is_missed_where_none_of_ours_has_the_loss(tmp_path: Path) -> None:
    path = written(
        tmp_path / "local.jsonl",
        row(REFERENCE, 0, 4.0, 10_000.0),
        row("sign-32", 0, 4.2, 8.0),
        row("diloco-32", 0, 4.0, 300.0),
    )
    fewer, ahead = figures.goals(figures.figures(figures.load(path)))
    assert fewer.met is False
    assert "+5.00%" in fewer.found
    assert ahead.met is False


def test_seconds_are_steps_coding_and_bytes(tmp_path: Path) -> None:
    run = row("sign-32", 0, 4.0, 1.25e5, encode_s=0.01, decode_s=0.02)
    # 7.0 is half way to the first evaluation; 1.25e5 bytes at 10 Mbit/s take 0.1 s.
    assert figures.seconds_to(run, 7.0, 10, 0.1) == pytest.approx(16 * (0.1 + 0.03 + 0.1))
    assert figures.seconds_to(run, 3.9, 10, 0.1) is None


def test_a_page_needs_plain_ddp(tmp_path: Path) -> None:
    path = written(tmp_path / "local.jsonl", row("sign-32", 0, 4.0, 1.0))
    assert page(path) is None


def test_a_page_names_what_was_missed(tmp_path: Path) -> None:
    path = written(
        tmp_path / "local.jsonl", row(REFERENCE, 0, 4.0, 1000.0), row("sign-32", 0, 4.0, 10.0)
    )
    made = page(path)
    assert made is not None
    assert "**missed**" in made.markdown("local")
    assert "computed, not measured" in made.markdown("local")


# -- real ranks -------------------------------------------------------------------------------


def test_random_weights_are_not_the_trained_ones_and_always_the_same() -> None:
    scratch, llama = work_named("scratch"), work_named("llama")
    first, again, trained = scratch.model(0), scratch.model(1), llama.model(0)
    name, value = next(iter(first.named_parameters()))
    assert value.equal(dict(again.named_parameters())[name])
    assert not value.equal(dict(trained.named_parameters())[name])


@pytest.mark.slow
def test_four_real_ranks_exchange_once_and_end_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(case, "DATA", tmp_path)
    monkeypatch.setattr(Scratch, "held_out", 16)
    (ended,) = case.perform(case.job(case.CASE, "sign-64", 0, 2, (3e-3, 1.0)))
    assert ended["replicas_equal"]
    assert ended["loss"] < ended["evaluations"][0][1]
    # Signs of all values twice over three quarters, sent by ``finish`` alone.
    signs = 2 * 3 / 4 * sum(p.numel() for p in Scratch().model(0).parameters()) / 8
    wire = ended["notes"]["wire_bytes"]
    assert signs < wire < 1.05 * signs
    assert wire <= 2 * ended["sent"] < 1.05 * wire
