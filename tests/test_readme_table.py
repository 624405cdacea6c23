"""What the README claims is what the committed results say."""

import re
from pathlib import Path

from benchmarks.llama import readme_table
from gradcodec.registry import UNTRAINED


def test_readme_table_is_made_from_the_committed_results() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_table.filled(page) == page


def test_readme_has_a_place_for_the_table() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_table.PLACE.search(page)


def test_the_tour_names_every_codec() -> None:
    page = (Path(__file__).parents[1] / "docs" / "tour.md").read_text()
    table = page.partition("## Codecs")[2].partition("## What works where")[0]
    classes = {"Subspace", "Autoencoder", "Chain(a, b)"}
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == set(UNTRAINED) | classes
