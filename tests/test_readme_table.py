"""What the README claims is what the committed results say."""

from pathlib import Path

from benchmarks import readme_table


def test_readme_table_is_made_from_the_committed_results() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_table.filled(page) == page


def test_readme_has_a_place_for_the_table() -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text()
    assert readme_table.PLACE.search(page)
