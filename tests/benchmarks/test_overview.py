"""docs/report.md is what the committed rows say, and key figures compare by row and column."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import overview, run
from benchmarks.overview import Headline
from benchmarks.report import Page
from benchmarks.run import CASES, RESULTS, ROOT, Case
from gradcodec.errors import ConfigError

HEADLINE = Headline("toys", "Toys", "How large?", "Sizes", (0, 2))


def toys(*rows: tuple[str, str, str]) -> Page:
    page = Page("Toys", "make toys")
    page.table("Sizes of toys", [("toy", "colour", "size"), *rows])
    return page


def test_the_committed_report_is_what_the_rows_say() -> None:
    assert overview.document() == overview.DOCS.read_text()


def test_every_page_has_a_headline() -> None:
    stems = {stem for case in CASES.values() for stem in case.pages()}
    assert {headline.stem for headline in overview.HEADLINES} == stems


def test_a_headline_shows_its_columns_and_rows() -> None:
    page = toys(("ball", "red", "7"), ("kite", "blue", "9"))
    assert HEADLINE.shown(page) == [("toy", "size"), ("ball", "7"), ("kite", "9")]
    only = Headline("toys", "Toys", "How large?", "Sizes", (0, 2), ("kite",))
    assert only.shown(page) == [("toy", "size"), ("kite", "9")]


def test_a_row_or_a_table_that_is_not_there_is_named() -> None:
    absent = Headline("toys", "Toys", "How large?", "Sizes", (0, 2), ("doll",))
    with pytest.raises(ConfigError, match="no rows \\['doll'\\]"):
        absent.shown(toys(("ball", "red", "7")))
    with pytest.raises(ConfigError, match="no table 'Prices'"):
        Headline("toys", "Toys", "How dear?", "Prices", (0,)).figures(toys())


def test_what_differs_is_told_by_row_and_column() -> None:
    before = toys(("ball", "red", "7"), ("kite", "blue", "9"), ("doll", "pink", "3"))
    after = toys(("ball", "grey", "8"), ("kite", "blue", "9"), ("drum", "red", "2"))
    lines = list(overview.differences(before, after, HEADLINE))
    assert lines == ["ball: size: 7 -> 8", "drum: new", "doll: gone"]


def test_rows_of_one_name_are_compared_in_order() -> None:
    before = toys(("ball", "red", "7"), ("ball", "blue", "7"))
    after = toys(("ball", "red", "7"), ("ball", "blue", "6"))
    assert list(overview.differences(before, after, HEADLINE)) == ["ball (2): size: 7 -> 6"]


def test_a_page_without_rows_before_is_new() -> None:
    assert list(overview.differences(None, toys(), HEADLINE)) == ["all of it is new"]


def test_an_unknown_revision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a git revision"):
        overview.compared("no-such-revision", tmp_path)


@pytest.mark.slow
def test_the_rows_of_the_last_commit_compare() -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("runs in a clone")
    assert "Data-parallel training" in overview.compared("HEAD", RESULTS)


def test_all_is_every_case_that_needs_nothing_and_says_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[Path, bool]] = []

    def measure(options: run.Options) -> list[str]:
        ran.append((options.out, options.quick))
        if len(ran) == 1:
            raise ConfigError("a package is missing")
        return []

    monkeypatch.setattr(run, "_imported", lambda place: measure)
    monkeypatch.setattr(run, "red", lambda case: None)
    assert run.main(["all", "--quick"]) == 1
    assert set(ran) == {(ROOT / "runs" / "bench-quick", True)}
    assert len(ran) == len(CASES) - 3
    out, err = capsys.readouterr()
    assert re.findall(r"^([\w-]+) is left out", out, re.M) == ["llama", "tune", "local-tune"]
    assert "federated: a package is missing" in err
    assert run.main(["all", "--quick", "--model", "m"]) == 0
    assert len(ran) == 2 * len(CASES) - 5


def test_every_case_that_times_something_has_tests() -> None:
    timed = {"speed", "codecs", "growth", "link_swap", "flower"}
    timed |= {"ddp", "ddp_auto", "ddp_buckets", "fsdp2", "local"}
    # `kernels` runs those of each kernel by itself.
    assert {name for name, case in CASES.items() if case.tests} == timed
    for case in CASES.values():
        assert all((ROOT / path).exists() for path in case.tests)


def test_nothing_is_measured_of_a_case_whose_tests_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test_it.py"
    function = f"{__name__}:never"
    monkeypatch.setitem(CASES, "speed", Case("speed", "", function, tests=(str(test),)))
    monkeypatch.setattr(run, "_imported", lambda place: lambda options: ["it was measured"])
    test.write_text("def test_it(): assert 0")
    assert run.main(["speed", "--out", str(tmp_path)]) == 1
    assert "its tests are not green, nothing was measured" in capfd.readouterr().err
    test.write_text("def test_it(): pass")
    assert run.main(["speed", "--out", str(tmp_path)]) == 1
    assert "it was measured" in capfd.readouterr().err
