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
    )
]

#: What the paper says, what is computed from two figures of the page, and what is arithmetic.
STATED: tuple[str, ...] = ()


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
