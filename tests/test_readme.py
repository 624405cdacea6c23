"""Every python block of the documentation runs. A page's blocks share one namespace.

Blocks that begin with the command that runs them are programs: tests/test_examples.py.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number of the first line and source of each python block."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()  # the reader's own training script, which a page may name
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page.read_text()):
        if source.startswith(("# torchrun", "# python ")):
            continue
        # Leading newlines give tracebacks the page's own line numbers.
        exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)


def test_readme_has_a_block() -> None:
    assert blocks((ROOT / "README.md").read_text())


def test_blocks_are_found_with_their_lines() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\n```\n"
    assert blocks(text) == [(3, "x = 1\n"), (9, "y = 2\n")]
