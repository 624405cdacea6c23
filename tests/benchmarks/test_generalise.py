"""The generalisation benchmark: what its sources are, and what its table says of rows."""

import json
from pathlib import Path

import pytest

from benchmarks.federated import generalise, generalise_page
from gradcodec.recipes import corpus, data


def test_shuffled_answers_are_the_same_answers_to_other_questions() -> None:
    own, shuffled = data.load_examples("stdlib"), generalise.shuffled_answers()
    assert [e.prompt for e in shuffled] == [e.prompt for e in own]
    assert sorted(e.answer for e in shuffled) == sorted(e.answer for e in own)
    moved = sum(a.answer != b.answer for a, b in zip(own, shuffled, strict=True))
    assert moved > 0.99 * len(own)


def test_another_package_is_read_by_the_same_rules(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text(
        'def add(a, b):\n    """Return the sum of both numbers given."""\n'
        'def _hidden():\n    """Return nothing that anybody may see."""\n'
    )
    pairs = corpus.docstring_pairs_in(tmp_path, "toy")
    assert [(p.package, p.prompt) for p in pairs] == [("toy", "Q: What does toy.add(a, b) do?\nA:")]


def row(scheme: str, seed: int, number: int, loss: float) -> dict[str, object]:
    return {
        "run": f"{scheme}-{seed}",
        "scheme": scheme,
        "seed": seed,
        "round": number,
        "start_loss": 5.0,
        "loss": loss,
        "diverged": False,
        "config": {"rounds": 2, "lr": 1e-2},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    finals = {"fp32": 4.0, "own": 4.1, "random": 4.5, "fp32-r4": 4.2, "own-r4": 4.4}
    lines = [
        json.dumps(row(scheme, seed, number, loss if number == 2 else 4.8))
        for scheme, loss in finals.items()
        for seed in (0, 1)
        for number in (1, 2)
    ]
    out = tmp_path / "generalise.jsonl"
    out.write_text("\n".join(lines) + "\n")
    return out


def test_table_gives_the_share_of_the_gain_by_source_and_by_rank(path: Path) -> None:
    page = generalise_page.page(path, {"own": "own data", "random": "random bases"})
    assert "own data" in page.write(path)
    table = path.with_suffix(".md").read_text()
    assert "| own data | 90.0% [90.0% .. 90.0%] |" in table
    assert "| random bases | 50.0% [50.0% .. 50.0%] |" in table
    assert "| 4 | 75.0% [75.0% .. 75.0%] |" in table
    assert path.with_suffix(".png").stat().st_size > 1000


def test_every_scheme_has_its_rank() -> None:
    assert generalise._rank("own-r16") == 16
    assert generalise._rank("own") is None
    assert {generalise._rank(n) for n in generalise.schemes()} == {None, *generalise.RANKS}
