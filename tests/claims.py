"""Figures in pages, and whether the results that a page links to have them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_FENCED = re.compile(r"^ *(```|~~~).*?^ *\1[`~]*$|^<!-- (\w+) -->$.*?^<!-- /\2 -->$", re.M | re.S)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_UNIT = r"x\b|%|kB\b|MB\b|GB\b|ms\b|s\b|minutes\b|times\b"
_NUMBER = re.compile(rf"(?<![\w./-])([+-]?\d[\d,]*(?:\.\d+)?)(?: ?({_UNIT}))?(?![\w/])")
_SCALES = {"GB": 1e-9, "MB": 1e-6, "kB": 1e-3, "%": 100.0, "minutes": 1 / 60}


@dataclass(frozen=True)
class Figure:
    """A number in a text, with its unit if it has one: ``("98.9", "%")``."""

    number: str
    unit: str

    @property
    def decimals(self) -> int:
        """Digits after the point."""
        return len(self.number.partition(".")[2])

    def __str__(self) -> str:
        return f"{self.number} {self.unit}".strip()


def figures(text: str) -> list[Figure]:
    """The figures of a text: numbers with a unit or with decimals. Code is left out."""
    found = _NUMBER.findall(re.sub(r"`[^`]*`", "", text.replace("&nbsp;", " ")))
    return [Figure(number, unit) for number, unit in found if unit or "." in number]


def blocks(page: Path) -> list[str]:
    """Paragraphs, items of lists and rows of tables, each on one line; fences are left out."""
    text = _FENCED.sub("", page.read_text())
    parts = re.split(r"\n{2,}|\n(?=\||- |#+ |\d\. )", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def sources(page: Path, block: str) -> list[Path]:
    """The files of results that a block links to or names."""
    named = re.findall(r"`(?:benchmarks/)?results/([\w.-]+)`", block)
    links = ((page.parent / link.partition("#")[0]).resolve() for link in _LINK.findall(block))
    found = [*links, *(RESULTS / name for name in named)]
    return [f for f in found if f.is_relative_to(ROOT / "benchmarks") or f.parent.name == "kernels"]


def is_in(figure: Figure, source: Path) -> bool:
    """Whether a file has this figure, or one that is rounded to it."""
    text = source.read_text()
    if source.suffix == ".md":
        return any(_same(figure, other) for other in figures(text))
    lines = text.splitlines() if source.suffix == ".jsonl" else [text]
    scale = _SCALES.get(figure.unit, 1.0)
    numbers = (leaf * scale for line in lines for leaf in leaves(json.loads(line)))
    return any(_rounded(n, figure) == figure.number for n in numbers)


def leaves(value: Any) -> list[float]:
    """Every number in a row."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for item in inner for leaf in leaves(item)]
    return [float(value)] if isinstance(value, int | float) else []


def _same(figure: Figure, other: Figure) -> bool:
    units = {figure.unit, other.unit}
    if len(units) > 1 and units != {"x", "times"}:
        return False
    exact, asked = (float(f.number.replace(",", "")) for f in (other, figure))
    finer = other.decimals >= figure.decimals
    return exact == asked or (finer and _rounded(exact, figure) == figure.number)


def _rounded(value: float, figure: Figure) -> str:
    sign = "+" if figure.number.startswith("+") else ""
    comma = "," if "," in figure.number else ""
    return f"{value:{sign}{comma}.{figure.decimals}f}"
