"""Every figure of docs/paper.md that we measured is in the results that the page is about."""

from __future__ import annotations

import pytest
from claims import RESULTS, ROOT, blocks, figures, is_in

PAGE = ROOT / "docs" / "paper.md"
SOURCES = [
    RESULTS / name
    for name in (
        "paper.md",
        "paper-smollm2.md",
        "generalise.md",
        "autoencoder_curves.jsonl",
        "llama-mmlu-cpu.md",
        "eval-smollm2-mmlu.md",
        "demo-relay/summary.json",
    )
]

#: What the paper says.
PAPER = (
    "14.29",
    "383 times the gradient's RMS",
    "27 to 31 % of the energy",
    "26 % with four options",
)

#: What is computed from two figures of the page, rounded, or in another unit there.
DERIVED = (
    "47 minutes of one core",
    "5.5 times the adapter",
    "keeps 86 % (A) and 93 % (B)",
    "keeps 86 % of A's entropy and 93 % of B's",
    "down to 80 % of it",
    "60 % of it",
    "costs 19 to 20 % of the cosine",
    "66 to 72 %",
    "costs 40 %",
    "about 0.0006 (A) and 0.0008 (B)",
)

#: Shares that the pages print as fractions with an exponent.
TINY = (
    "| 0.0005 % | 0.003 % |",
    "| 0.05 % | 1.00 | 0.002 % |",
    "| 0.04 % | 1.00 | 0.001 % |",
    "| 0.00002 % | 1.00 | 0.0005 % |",
    "| 0.3 % | 1.00 | 0.003 % |",
    "| 0.00005 % | 1.00 | 0.00004 % |",
    "| 0.001 % | 1.00 | 0.001 % |",
    "| 0.02 % |",
)

STATED = (*PAPER, *DERIVED, *TINY)


def measured() -> list[str]:
    """The blocks with figures that are in none of ``STATED``."""
    out = []
    for block in blocks(PAGE):
        left = block
        for text in STATED:
            left = left.replace(text, "")
        if figures(left):
            out.append(left)
    return out


@pytest.mark.parametrize("block", measured())
def test_a_figure_is_in_the_results(block: str) -> None:
    assert [str(f) for f in figures(block) if not any(is_in(f, s) for s in SOURCES)] == []


@pytest.mark.parametrize("text", STATED)
def test_what_is_stated_is_still_there(text: str) -> None:
    assert text in " ".join(PAGE.read_text().split())
