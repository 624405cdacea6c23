"""Figures of the federated report, on rows whose answers can be read off."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.federated import figures
from benchmarks.federated import page as report
from benchmarks.federated.scheme import Scheme

START = 5.0
FP32 = [4.5, 4.2, 4.0]  # a gain of 1.0


def run(
    losses: list[float | None],
    scheme: str = "fp32",
    *,
    seed: int = 0,
    lr: float = 0.01,
    up: int = 100,
    down: int = 100,
    codec: int = 0,
    rounds: int = 3,
) -> list[rows.Row]:
    """Rows of one run; each of 5 clients sends ``up`` and is sent ``down`` bytes in each round."""
    stamp = {
        "run": f"{scheme}-{seed}-{lr}-{rounds}",
        "scheme": scheme,
        "seed": seed,
        "config": {"lr": lr, "rounds": rounds, "clients": 40, "per_round": 5},
        "versions": {"torch": "2"},
        "machine": "here",
    }
    return [
        {
            **stamp,
            "round": r,
            "start_loss": START,
            "loss": loss,
            "diverged": loss is None,
            "uplink_bytes": 5 * up * r,
            "uplink_payload_bytes": 5 * (up - 10) * r,
            "downlink_bytes": 5 * down * r,
            "codec_bytes": codec,
            "participations": 5 * r,
            "clients_seen": 3 * r,
        }
        for r, loss in enumerate(losses, 1)
    ]


def scheme(name: str, kind: str = "peer") -> Scheme:
    def make(world: Any) -> Any:
        raise AssertionError("a report runs nothing")

    return Scheme(name, name, kind, make)


def written(path: Path, *runs: list[rows.Row]) -> Path:
    for row in itertools.chain(*runs):
        rows.append(path, row)
    return path


def cells(table: list[tuple[str, ...]], name: str) -> dict[str, str]:
    return dict(zip(table[0], next(row for row in table if row[0] == name), strict=True))


def test_gain_kept_is_the_share_of_the_decrease_of_fp32_with_the_same_seed() -> None:
    runs = {
        "fp32": {0: run(FP32), 1: run([4.5, 4.4, 3.0], seed=1)},
        "other": {0: run([4.6, 4.4, 4.1], "other"), 1: run([4.6, 4.4, 3.4], "other", seed=1)},
    }
    table = report.summary_rows(runs, [scheme("fp32", "reference"), scheme("other")])
    # 0.9 of 1.0 and 1.6 of 2.0
    assert cells(table, "other")["gain kept"] == "85.0% [80.0%..90.0%]"
    assert cells(table, "other")["loss"] == "3.750 ± 0.495"
    assert cells(table, "fp32")["gain kept"] == "100.0% [100.0%..100.0%]"


def test_a_run_that_diverged_keeps_nothing() -> None:
    runs = {"fp32": {0: run(FP32)}, "other": {0: run([4.6, None], "other")}}
    table = report.summary_rows(runs, [scheme("fp32", "reference"), scheme("other")])
    assert cells(table, "other")["loss"] == "diverged (1 of 1)"
    assert cells(table, "other")["gain kept"] == "-"


@pytest.mark.parametrize(
    ("share", "number"), [(0.80, 2), (0.95, 3), (1.00, 3), (0.50, 1), (0.51, 2)]
)
def test_a_target_is_reached_in_the_first_whole_round_that_is_there(
    share: float, number: int
) -> None:
    row = figures.reached(run(FP32), run(FP32), share)
    assert row is not None
    assert row["round"] == number


def test_a_target_that_was_left_again_was_still_reached() -> None:
    row = figures.reached(run([4.5, 3.9, 4.3]), run(FP32), 1.0)
    assert row is not None
    assert row["round"] == 2


def test_a_target_out_of_reach_costs_nothing_to_name() -> None:
    assert figures.reached(run([4.5, 4.4, 4.01], "other"), run(FP32), 1.0) is None
    assert figures.reached(run([4.5, None], "other"), run(FP32), 0.8) is None


def test_cost_to_target_is_cumulative_and_needs_every_seed() -> None:
    reference = {0: run(FP32), 1: run(FP32, seed=1)}
    good = {s: run([4.5, 4.1, 4.1], "other", seed=s, up=10, down=40) for s in (0, 1)}
    assert figures.cost(good, reference, 0.9, "uplink") == [100, 100]
    assert figures.cost(good, reference, 0.9, "both") == [500, 500]
    coded = {0: run([4.5, 4.1, 4.1], "other", up=10, down=40, codec=7)}
    assert figures.cost(coded, reference, 0.9, "codec") == [500 + 6 * 7]
    half = {0: good[0], 1: run([4.5, 4.4, 4.4], "other", seed=1)}
    assert figures.cost(half, reference, 0.9, "uplink") is None
    runs = {"fp32": reference, "half": half, "good": good}
    names = [scheme("fp32", "reference"), scheme("half"), scheme("good")]
    table = report.target_rows(runs, names, "uplink")
    assert cells(table, "half")["90%"] == "- (1 of 2 seeds)"
    assert cells(table, "half")["100%"] == "-"
    # fp32 is there after round 3 only: 1,500 bytes against 100.
    assert cells(table, "good")["90%"] == "100 B (15x)"


def test_ratios_with_the_codec_count_its_download_once() -> None:
    fp32 = figures.Costs.of([run(FP32, up=1000, down=1000)])
    ours = figures.Costs.of([run(FP32, "ours", up=10, down=90, codec=1900)])
    assert ours.ratio(fp32) == pytest.approx(20)
    assert ours.ratio(fp32, 1) == pytest.approx(1.0)
    assert ours.ratio(fp32, 5) == pytest.approx(10_000 / 2400)
    assert ours.payload == 0


def test_payback_is_the_first_whole_participation_that_pays() -> None:
    fp32 = figures.Costs(up=1000, down=1000, payload=None, codec=0)
    for codec, wanted in ((0, 0), (1, 1), (1900, 1), (1901, 2), (19_000, 10)):
        assert figures.Costs(10, 90, None, codec).payback(fp32) == wanted
    assert figures.Costs(1000, 1000, None, 1).payback(fp32) is None


def test_trials_and_broken_off_runs_do_not_count(tmp_path: Path) -> None:
    path = written(
        tmp_path / "federated.jsonl",
        run([4.5], rounds=1),
        run(FP32),
        run([4.5, 4.4], "broken"),
        run([4.6, None], "diverged"),
        run(FP32, "twice", lr=0.01),
        run(FP32, "twice", lr=0.02),
    )
    runs = figures.load(path)
    assert set(runs) == {"fp32", "diverged", "twice"}
    assert len(runs["fp32"][0]) == 3
    assert runs["twice"][0][0]["config"]["lr"] == 0.02


@pytest.mark.slow
def test_page_and_plots_are_written_beside_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = written(
        tmp_path / "federated.jsonl",
        *(run(FP32, seed=s) for s in (0, 1)),
        *(run([4.5, 4.3, 4.05], "ours", seed=s, up=1, codec=50) for s in (0, 1)),
        run([4.6, None], "lost"),
    )
    names = [scheme("fp32", "reference"), scheme("ours", "ours"), scheme("lost")]
    made = report.page(path, names)
    assert made is not None
    text = made.write(path)
    assert "ours" in text
    made = {p.name for p in tmp_path.iterdir()}
    assert made == {
        "federated.jsonl",
        "federated.md",
        "federated-uplink.png",
        "federated-both.png",
        "federated-codec.png",
        "federated-targets.png",
    }
    assert "| ours |" in (tmp_path / "federated.md").read_text()


def test_without_fp32_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    path = written(tmp_path / "federated.jsonl", run(FP32, "ours"))
    assert report.page(path, [scheme("ours", "ours")]) is None
