"""Every python block of the documentation runs. A page's blocks share one namespace.

Blocks that begin with the command that runs them are programs: tests/test_examples.py. What finds
and runs the blocks is `.ci/blocks.py`, which also runs README.md's where nothing else is installed.
"""

import importlib.util
import traceback
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def module(name: str) -> ModuleType:
    """A module of `.ci`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


reader = module("blocks")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()  # the reader's own training script, which a page may name
    assert [why for _, why in reader.run(page) if not why.startswith("is a program")] == []


def test_readme_has_a_block() -> None:
    assert reader.blocks((ROOT / "README.md").read_text())


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\n```\n"
    assert reader.blocks(text) == [(3, "x = 1\n"), (9, "y = 2\n")]


def page(folder: Path, *sources: str) -> Path:
    """A page with these blocks; the first begins in line 2."""
    path = folder / "page.md"
    path.write_text("".join(f"```python\n{source}\n```\n" for source in sources))
    return path


def test_blocks_share_a_namespace(tmp_path: Path) -> None:
    assert list(reader.run(page(tmp_path, "x = 1", "assert x == 1"))) == []


def test_programs_are_left_out_by_name(tmp_path: Path) -> None:
    path = page(tmp_path, "# torchrun --nproc-per-node 2 train.py\nraise SystemExit", "x = 1")
    program = "is a program: # torchrun --nproc-per-node 2 train.py"
    assert list(reader.run(path)) == [(2, program)]


def test_a_block_that_needs_an_extra_is_left_out_by_name(tmp_path: Path) -> None:
    path = page(tmp_path, "import no_such_package.part")
    expected = [(2, "needs no_such_package, which only an extra installs")]
    assert list(reader.run(path, {"no_such_package"})) == expected


def test_a_module_that_no_extra_installs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        list(reader.run(page(tmp_path, "import no_such_package"), {"another"}))


def test_an_error_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(reader.run(page(tmp_path, "x = 1", "y = 2\n1 / 0")))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].lineno == 6


def test_extras_are_read_from_what_is_installed() -> None:
    found = reader.extras("gradcodec")
    assert {"flwr", "dp_accounting", "transformers"} <= found
    assert not found & {"gradcodec", "torch", "numpy", "safetensors"}


def test_a_page_of_which_nothing_ran_is_red(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reader.main([str(page(tmp_path, "x = 1"))]) == 0
    assert reader.main([str(page(tmp_path, "# python x.py"))]) == 1
    assert "page.md:2: left out, is a program: # python x.py" in capsys.readouterr().out
