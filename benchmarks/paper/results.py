"""Rows of ``paper.jsonl`` as the page reads them, and how figures are written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import rows
from benchmarks.paper.coders import CODERS
from benchmarks.paper.fits import VARIANTS
from benchmarks.rows import Row
from gradcodec.transforms.autoencoder.config import RATIOS

SETUP = ("model", "played", "tgap_rounds", "steps", "rate")


class Results:
    """The last row of each analysis and seed, of the setup that the file's last row has."""

    def __init__(self, path: Path) -> None:
        found = rows.read(path)
        self.setup = {n: found[-1]["config"][n] for n in SETUP} if found else {}
        last = {
            row["run"]: row for row in found if {n: row["config"][n] for n in SETUP} == self.setup
        }
        self.seeds = sorted({row["seed"] for row in last.values()})
        self._rows: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in last.values():
            config = row["config"]
            self._rows[config["kind"], config["of"], row["scheme"]].append(row)

    def __call__(self, kind: str, scheme: str, of: str = "update") -> list[Row]:
        """The rows of an analysis, one a seed; none if it was not run."""
        return self._rows.get((kind, of, scheme), [])

    def schemes(self, kind: str, of: str = "update") -> list[str]:
        """What has rows of a kind, in its own order."""
        there = [scheme for k, o, scheme in self._rows if (k, o) == (kind, of)]
        order = [*CODERS, *VARIANTS, *RATIOS]
        return sorted(there, key=order.index)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean; ``None``, infinity, if one of them is infinite or there is none."""
    known = list(values)
    finite = [v for v in known if v is not None]
    return sum(finite) / len(finite) if finite and len(finite) == len(known) else None


def metric(found: Sequence[Row], whose: str, factor: str, name: str) -> float | None:
    """Mean of a metric over seeds and rounds; decibels are those of the mean relative error."""
    if name == "snr_db":
        error = metric(found, whose, factor, "rse")
        return -10 * math.log10(error) if error else None
    return mean(r[whose][factor][name] for row in found for r in row["rounds"])


def number(value: float | None, digits: int = 3) -> str:
    """A figure of three digits; ``inf`` for ``None``."""
    if value is None:
        return "inf"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{places}f}"
    return f"{value:.{digits - 1}e}"


def shown(name: str, value: float | None) -> str:
    """A metric's figure: cosines and decibels have places, errors have digits."""
    if value is None or name not in ("cosine", "snr_db"):
        return number(value)
    text = f"{value:.{3 if name == 'cosine' else 2}f}"
    return text.removeprefix("-") if not float(text) else text


def title(scheme: str) -> str:
    """What a reader sees; controls are in italics."""
    coder = CODERS[scheme]
    return f"*{coder.title}*" if coder.kind == "control" else coder.title
