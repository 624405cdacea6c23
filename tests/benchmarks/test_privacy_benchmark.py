"""What the page of the privacy benchmark says of one seed and of several."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.privacy.case import page
from benchmarks.run import RESULTS

TITLE = "fitted subspace 1/128, 8 bit"


def made(path: Path, seeds: dict[int, dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Lines of the table by title, of the committed first seed and others made from it.

    ``seeds`` maps a seed to what the last rows of its runs of ``TITLE`` say, by scheme.
    """
    for row in rows.read(RESULTS / "privacy.jsonl"):
        if row["seed"] == 0:
            rows.append(path, row)
            for seed, changes in seeds.items():
                change = changes.get(row["scheme"])
                if change is not None:
                    own = {"seed": seed, "run": f"{row['run']}-{seed}"}
                    rows.append(path, {**row, **own, **change})
    return {line[0]: line for line in page(path).tables["Held-out loss"]}


def test_several_seeds_are_a_mean_and_a_range_and_one_that_diverged_is_counted(
    tmp_path: Path,
) -> None:
    names = ("signal-128", "signal-128@8", "signal-128@2", "signal-128@0.25")
    last = ({"loss": 4.0}, {"loss": 5.0}, {"loss": 6.0}, {"diverged": True})
    line = made(tmp_path / "rows.jsonl", {1: dict(zip(names, last, strict=True))})[TITLE]
    assert line[3:5] == ("4.190 (4.000 to 4.380)", "4.826 (4.651 to 5.000)")
    assert line[6:] == ("inf in 1 of 2", "0, 1")


@pytest.mark.parametrize("missing", ["signal-128", "signal-128@2"])
def test_a_seed_that_lacks_a_cell_is_left_out(missing: str, tmp_path: Path) -> None:
    names = {"signal-128", "signal-128@8", "signal-128@2", "signal-128@0.25"} - {missing}
    line = made(tmp_path / "rows.jsonl", {1: {name: {"loss": 1.0} for name in names}})[TITLE]
    assert line[3] == "4.380"
    assert line[-1] == "0"
