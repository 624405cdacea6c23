"""Laws of what a person sees: the table has every figure, plots are drawn whatever happened."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from gradcodec.recipes.report import plot, plot_training, size, table


def scheme(name: str, **changes: Any) -> dict[str, Any]:
    row = {
        "name": name,
        "title": f"the {name} scheme",
        "start_loss": 4.0,
        "final_loss": 3.125,
        "losses": [3.5, 3.125],
        "gain_kept": 0.875,
        "accuracy": 0.25,
        "uplink_bytes": 12_340,
        "downlink_bytes": 45_600,
        "codec_bytes": 0,
        "participants": 4,
        "uplink_ratio": 123.4,
        "total_ratio": 45.6,
        "total_ratio_with_codec": 7.8,
        "snr_db": [3.0, 4.0],
        "mean_snr_db": [9.0, 11.0],
        "cumulative_bytes": [28_970, 57_940],
        "rejected": 0,
        "rounds": 2,
        "encode_s": 0.25,
        "decode_s": 0.5,
        "seconds": 3.0,
        "seed": 0,
    }
    return {**row, **changes}


def none(name: str, **changes: Any) -> dict[str, Any]:
    """A row of a scheme that finished no round."""
    empty: dict[str, Any] = {
        "final_loss": 4.0,
        "losses": [],
        "gain_kept": 0.0,
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "uplink_ratio": None,
        "total_ratio": None,
        "total_ratio_with_codec": None,
        "snr_db": [],
        "mean_snr_db": [],
        "cumulative_bytes": [],
        "rounds": 0,
    }
    return scheme(name, **{**empty, **changes})


def summary(*schemes: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "config": {"rounds": 2, "clients": 40},
        "versions": {},
        "tgap": {"uplink_bytes": 1_000_000, "downlink_bytes": 500_000},
        "schemes": list(schemes),
    }


FP32 = scheme("fp32", gain_kept=1.0, mean_snr_db=[None, None], snr_db=[None, None])
CODED = scheme("subspace-32", codec_bytes=98_765)
CENTRAL = none("centralised", losses=[3.4, 3.0], final_loss=3.0, gain_kept=1.1, rounds=2)
BASE = none("base")
STOPPED = scheme(
    "paper-literal", losses=[9.0], final_loss=9.0, rounds=1, gain_kept=-5.7, cumulative_bytes=[9]
)
NEVER = none("paper-working")
DIVERGED = scheme("topk", losses=[None, None], final_loss=None, gain_kept=None)
#: As written before figures that are not finite became null.
OLD = scheme("sign", losses=[3.9, math.nan], final_loss=math.nan, mean_snr_db=[math.inf, 3.0])

ALL = summary(FP32, CODED, CENTRAL, BASE, STOPPED, NEVER, DIVERGED, OLD)


def cells(text: str, title: str) -> list[str]:
    (line,) = (row for row in text.splitlines() if row.startswith(title))
    return re.split(r" {2,}", line.strip())


def test_a_row_holds_every_figure() -> None:
    assert cells(table(ALL), "the subspace-32 scheme") == [
        "the subspace-32 scheme",
        "3.125",
        "87.5%",
        "25%",
        "12.3 kB",
        "123x",
        "46x",
        "8x",
        "98.8 kB",
        "10.0",
        "0.75",
    ]


def test_rows_without_messages_have_no_byte_figures() -> None:
    for name in ("base", "centralised"):
        row = cells(table(ALL), f"the {name} scheme")
        assert row[0] == f"the {name} scheme"
        assert row[4:] == ["-"] * 7


def test_a_scheme_that_stopped_says_so() -> None:
    text = table(ALL)
    assert "the paper-literal scheme (stopped after round 1)" in text
    assert "the paper-working scheme (stopped after round 0)" in text
    assert text.count("stopped") == 2


def test_a_diverged_scheme_has_a_row() -> None:
    text = table(ALL)
    assert cells(text, "the topk scheme")[1] == "diverged"
    assert cells(text, "the sign scheme")[1] == "diverged"


def test_the_table_is_aligned_and_says_what_it_refers_to() -> None:
    lines = table(ALL).splitlines()
    grid = lines[: len(ALL["schemes"]) + 2]
    assert len({len(line) for line in grid}) == 1
    assert set(grid[1]) == {"-"}
    rest = "\n".join(lines[len(grid) :])
    assert "4.000" in rest
    assert "2 rounds, 40 clients" in rest
    assert "1.5 MB" in rest


def test_a_run_without_trained_codecs_needs_no_tgap_line() -> None:
    assert "TGAP" not in table({**summary(FP32), "tgap": None})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (4096, "4.1 kB"),
        (123_456_789, "123 MB"),
        (5_000_000_000, "5 GB"),
        (7_000_000_000_000, "7e+03 GB"),
    ],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


def assert_png(path: Path) -> None:
    head = path.read_bytes()
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(head) > 5000
    width, height = (int.from_bytes(head[i : i + 4], "big") for i in (16, 20))
    assert width > 600
    assert height > 400


@pytest.mark.parametrize(
    "schemes",
    [
        ALL["schemes"],
        [FP32],
        [FP32, BASE],
        [none("fp32"), NEVER],
        [scheme("fp32", losses=[None], rounds=1, cumulative_bytes=[9])],
        [scheme("fp32", losses=[4.0, 4.0], gain_kept=None)],
        [scheme("fp32", losses=[5.0, 6.0])],
    ],
    ids=["all", "reference", "base", "nothing", "diverged", "flat", "rising"],
)
def test_plots_are_drawn_whatever_happened(schemes: list[dict[str, Any]], tmp_path: Path) -> None:
    files = plot(summary(*schemes), tmp_path)
    assert [f.name for f in files] == ["loss_rounds.png", "loss_bytes.png", "snr.png"]
    for file in files:
        assert_png(file)
    assert table(summary(*schemes))


def test_plots_can_be_drawn_again_from_the_file(tmp_path: Path) -> None:
    written = json.loads(json.dumps(ALL))
    assert table(written) == table(ALL)
    assert plot(written, tmp_path)


def test_training_curves_are_drawn(tmp_path: Path) -> None:
    histories = {
        n: [{"step": s, "train_mse": 1.0, "val_rse": 1.0 / (s + 1)} for s in range(5)]
        for n in ("resnet3-literal", "resnet3-working")
    }
    assert_png(plot_training(histories, tmp_path / "autoencoders.png"))
