"""Every figure of the README and the tour is in the results that its paragraph links to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from claims import RESULTS, ROOT, Figure, blocks, figures, is_in, sources

from benchmarks import rows
from benchmarks.federated.figures import gain

PAGES = (ROOT / "README.md", ROOT / "docs" / "tour.md")


def tgap_costs() -> str:
    found = rows.read(RESULTS / "gpu-tgap.jsonl")
    longer = [100 * (r["recorded_step_ms"] / r["step_ms"] - 1) for r in found]
    fit = [r["fit_s"] for r in found]
    (peak,) = {round(r["peak_gb"]) for r in found}
    return (
        f"recording makes a training step {min(longer):.0f} to {max(longer):.0f} % longer, the fit "
        f"takes {min(fit):.1f} to {max(fit):.1f} s, all of it {peak} GB"
    )


def all_of_gsm8k() -> str:
    ended = rows.runs(RESULTS / "llama-gsm8k-all-tune.jsonl").values()
    best: dict[str, float] = {}
    for run in filter(rows.finished, ended):
        best[run[0]["scheme"]] = max(gain(run), best.get(run[0]["scheme"], 0.0))
    fixed, bit = (best[name] / best["fp32"] for name in ("sub-8", "eden-1"))
    return f"{fixed:.1%} at 1/8 after 20 rounds on all of GSM8K, where EDEN's bit keeps {bit:.1%}"


def minutes_of_the_demo() -> str:
    summary = json.loads((RESULTS / "demo-llama" / "summary.json").read_text())
    seconds = sum(scheme["seconds"] for scheme in summary["schemes"])
    return f"Six rounds of each took {seconds / 60:.0f} minutes together"


#: What pages say that is computed from several rows.
COMPUTED: dict[str, Callable[[], str]] = {
    "tgap_costs": tgap_costs,
    "all_of_gsm8k": all_of_gsm8k,
    "minutes_of_the_demo": minutes_of_the_demo,
}

#: Figures that nobody measured.
STATED = (
    "Our goals of 98 % at 500x and 96 % at 1,000x",
    "plain DDP's loss (to 1 %)",
    "need Python 3.11 or newer",
)

#: The first cells of rows that list versions.
VERSIONS = ("Python", "torch", "NVFLARE", "Flower", "`gradcodec eval`")


def claimed() -> list[tuple[str, list[Path]]]:
    """Blocks with figures that no function above computes, and the results that they link to.

    Rows of a table may leave the link to the paragraph before it.
    """
    out: list[tuple[str, list[Path]]] = []
    before: list[Path] = []
    for page in PAGES:
        for block in blocks(page):
            if block.startswith(tuple(f"| {name} |" for name in VERSIONS)):
                continue
            row = block.startswith("|")
            found = sources(page, block) or (before if row else [])
            before = before if row else found
            left = block
            for text in (*STATED, *(make() for make in COMPUTED.values())):
                left = left.replace(text, "").replace(text.replace("%", " %"), "")
            if figures(left):
                out.append((left, found))
    return out


@pytest.mark.parametrize(("block", "found"), claimed())
def test_a_figure_is_in_the_results_that_its_paragraph_links_to(
    block: str, found: list[Path]
) -> None:
    assert found, f"no results are named for {[str(f) for f in figures(block)]}"
    assert [str(f) for f in figures(block) if not any(is_in(f, s) for s in found)] == []


@pytest.mark.parametrize("claim", COMPUTED)
def test_a_computed_claim_is_what_the_rows_give(claim: str) -> None:
    text = " ".join(" ".join(page.read_text().split()) for page in PAGES).replace(" %", "%")
    assert COMPUTED[claim]().replace(" %", "%") in text


@pytest.mark.parametrize("text", STATED)
def test_what_is_stated_is_still_there(text: str) -> None:
    assert any(text in " ".join(page.read_text().split()) for page in PAGES)


def test_a_figure_that_the_results_do_not_have_is_found() -> None:
    assert figures("`int4` 4.0x, 8 bits, 1/8, 98.9 %, gpt-3.5") == [
        Figure("4.0", "x"),
        Figure("98.9", "%"),
    ]
    page = RESULTS / "llama-gsm8k.md"
    assert is_in(Figure("240", "x"), page)
    assert not is_in(Figure("241", "x"), page)
