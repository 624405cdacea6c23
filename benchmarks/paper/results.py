"""Rows of ``paper.jsonl`` as the page reads them, and how figures are written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks import rows
from benchmarks.paper.coders import CODERS
from benchmarks.paper.fits import VARIANTS
from benchmarks.paper.trained import TRAININGS
from benchmarks.rows import Row
from gradcodec.transforms.autoencoder.config import RATIOS

T = TypeVar("T")


class Form(NamedTuple):
    """What a run depends on, besides its seed; longer forms are greater.

    Attributes:
        played, tgap_rounds: rounds on D2 and on D1.
        steps, rate: of an autoencoder's training.
        model: as of ``Setup``.
    """

    played: int
    tgap_rounds: int
    steps: int
    rate: float
    model: str

    @classmethod
    def of(cls, row: Row) -> Form:
        """The form of a row."""
        return cls(**{name: row["config"][name] for name in cls._fields})

    def __str__(self) -> str:
        return (
            f"{self.played} rounds, codecs fitted on {self.tgap_rounds}, autoencoders for "
            f"{self.steps} steps at {self.rate:g}"
        )


class Results:
    """The last row of each analysis and seed, in the longest form that its kind was run in.

    Attributes:
        model: that all rows are of; none if there are no rows.
        forms: those that are shown, the longest first.
    """

    def __init__(self, path: Path) -> None:
        last = {row["run"]: row for row in rows.read(path)}.values()
        self._form: dict[str, Form] = {}
        for row in last:
            kind = row["config"]["kind"]
            self._form[kind] = max(Form.of(row), self._form.get(kind, Form.of(row)))
        self._rows: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in last:
            config = row["config"]
            if Form.of(row) == self._form[config["kind"]]:
                self._rows[config["kind"], config["of"], row["scheme"]].append(row)
        self.forms = sorted(set(self._form.values()), reverse=True)
        self.model = self.forms[0].model if self.forms else ""

    @property
    def seconds(self) -> float | None:
        """How long the rows that are shown took; ``None`` if one of them does not say."""
        took = [row.get("seconds") for rows in self._rows.values() for row in rows]
        return None if None in took else sum(took)

    def source(self, kind: str, of: str = "update") -> str:
        """Which form and seeds the rows of an analysis are of."""
        found = [rows for (k, o, _), rows in self._rows.items() if (k, o) == (kind, of)]
        seeds = sorted({row["seed"] for rows in found for row in rows})
        return f"{self._form[kind]}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    def __call__(self, kind: str, scheme: str, of: str = "update") -> list[Row]:
        """The rows of an analysis, one a seed; none if it was not run."""
        return self._rows.get((kind, of, scheme), [])

    def has(self, kind: str, scheme: str) -> bool:
        """Whether an analysis was run on a scheme, of any object or source."""
        return any((k, s) == (kind, scheme) for k, _, s in self._rows)

    def schemes(self, kind: str, of: str = "update") -> list[str]:
        """What has rows of a kind, in its own order."""
        there = [scheme for k, o, scheme in self._rows if (k, o) == (kind, of)]
        order = [*CODERS, *VARIANTS, *RATIOS, *TRAININGS]
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


def over_rounds(
    found: Sequence[Row], whose: str, name: str
) -> tuple[list[int], list[float | None]]:
    """The numbers of the rounds, and a metric of both factors in each, the mean over seeds."""
    numbers = [r["number"] for r in found[0]["rounds"]]
    apart = [[{"rounds": [row["rounds"][at]]} for row in found] for at in range(len(numbers))]
    return numbers, [metric(one, whose, "all", name) for one in apart]


def some(rounds: Sequence[T]) -> list[T]:
    """All rounds if they are few, else the first, about twice as many each time, and the last."""
    if len(rounds) <= 8:
        return list(rounds)
    at = [2**i - 1 for i in range(len(rounds).bit_length()) if 2**i < len(rounds)]
    return [rounds[i] for i in (*at, len(rounds) - 1)]


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


def percent(value: float | None) -> str:
    """A share; small ones keep two digits, none is ``0``."""
    if value is None:
        return "inf"
    if value < 1e-9:
        return "0"
    return f"{value:.1%}" if value >= 1e-3 else f"{value:.0e}"
