"""Pages are made of rows alone, and the committed ones of the committed rows."""

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Page
from benchmarks.run import CASES, RESULTS
from gradcodec.errors import ConfigError

#: Name of the rows, and the case that makes them.
REPORTED = [(stem, name) for name, case in CASES.items() for stem in case.pages()]


def _page(name: str, case: str) -> Page:
    made = CASES[case].load_page()(RESULTS / f"{name}.jsonl")
    assert made is not None
    return made


@pytest.mark.parametrize(("name", "case"), REPORTED)
def test_a_committed_page_is_what_its_rows_say(name: str, case: str) -> None:
    assert _page(name, case).markdown(name) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize(("name", "case"), REPORTED)
def test_the_plots_of_a_committed_page_are_there(name: str, case: str) -> None:
    page = _page(name, case)
    assert page._plots
    assert all((RESULTS / f"{name}{end}.png").exists() for end in page._plots)


def test_a_page_and_its_plots_are_called_after_the_rows(tmp_path: Path) -> None:
    page = Page("Toys", "make toys")
    page.table("Sizes", [("toy", "size"), ("ball", "7")])
    page.lines(["measured"], "Notes")
    page.plots({"-all": lambda path: path.write_text("a plot") and None})
    page.sources(["the shop"])
    text = page.write(tmp_path / "toys.jsonl")
    assert (tmp_path / "toys-all.png").read_text() == "a plot"
    assert (tmp_path / "toys.md").read_text() == (
        "# Toys\n\nMade by `make toys`.\n\n## Sizes\n\n| toy | size |\n|---|--:|\n| ball | 7 |\n\n"
        "## Notes\n\n- measured\n\n![toys-all](toys-all.png)\n\n## Sources\n\n- the shop\n"
    )
    assert "ball     7" in text


def test_a_case_without_a_page_says_so() -> None:
    with pytest.raises(ConfigError, match="'link_swap' has rows and no page"):
        CASES["link_swap"].load_page()


def test_lines_of_a_plot_differ_and_the_reference_is_black() -> None:
    styles = report.Styles()
    assert styles.next("reference")["color"] == "black"
    assert len({styles.next("ours")["color"] for _ in range(7)}) == 7
