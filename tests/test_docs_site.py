"""The site of the documentation: its nav, its links and anchors, its list of public names."""

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from claims import ROOT, figures, is_in

NAV = re.findall(r"^ +- (?:[^#\n]*: )?([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FOLDERS = ("benchmarks", "examples", "kernels")
ELSEWHERE = ("README.md", "WIRE.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [
    *DOCS,
    *(ROOT / name for name in ELSEWHERE),
    *(ROOT / folder / "README.md" for folder in FOLDERS),
    *sorted((ROOT / "benchmarks" / "results").glob("*.md")),
]

FENCED = re.compile(r"^ *(```|~~~).*?^ *\1[`~]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")

# Packages whose public names the API pages list.
PUBLIC = {
    "gradcodec": ROOT / "gradcodec" / "_public.py",
    **{
        f"gradcodec.{name.replace('/', '.')}": ROOT / "gradcodec" / name / "__init__.py"
        for name in ("distributed", "federated", "hub", "privacy", "tgap")
    },
    **{
        f"gradcodec.integrations.{name}": ROOT / "gradcodec/integrations" / name / "__init__.py"
        for name in ("flower", "nvflare")
    },
}


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as repository pages make them (and mkdocs.yml says)."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere."""
    out = []
    for link in LINK.findall(FENCED.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not (path.is_file() and path.is_relative_to(ROOT)):
            out.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(path.read_text()) and not named(anchor, path):
            out.append(f"{link}: no such heading")
    return out


def named(anchor: str, page: Path) -> bool:
    """Whether an API page has this name."""
    return re.search(rf"^::: {re.escape(anchor)}$", page.read_text(), re.MULTILINE) is not None


def exported(path: Path) -> set[str]:
    """``__all__`` of a module, without an import: adapters need their frameworks."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value)) - {"__version__"}
    raise AssertionError(f"{path}: no __all__")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_anchors_resolve(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "architecture.md"
    assert "floors" in anchors(page.read_text())
    assert anchors('# `codec="auto"`, or (not)\n# A\n# A\n') == {"codecauto-or-not", "a", "a-1"}
    bad = tmp_path / "page.md"
    bad.write_text("[a](nowhere.md) [b](#nothing)\n```\n[c](shown.md)\n```\n[d](https://a.b/c)\n")
    assert len(broken(bad)) == 2


def test_nav_lists_every_page_once() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in DOCS}
    assert pages <= set(NAV), f"not in the nav: {pages - set(NAV)}"
    assert len(NAV) == len(set(NAV))


def test_nav_lists_pages_that_exist() -> None:
    missing = {p for p in NAV if not ((ROOT / "docs" / p).is_file() or (ROOT / p).is_file())}
    assert not missing


def test_nav_lists_every_page_of_results() -> None:
    results = {p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks/results").glob("*.md")}
    assert results <= set(NAV), f"not in the nav: {results - set(NAV)}"


def test_api_pages_list_every_public_name() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    names = {name.rpartition(".")[2] for name in listed}
    for package, path in PUBLIC.items():
        missing = exported(path) - names
        assert not missing, f"{package}: {missing}"


def test_api_pages_list_names_that_exist() -> None:
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            module, last = name.rsplit(".", 1)
            folder = ROOT / module.replace(".", "/")
            source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            source = PUBLIC.get(module, source)
            assert source.is_file(), name
            assert re.search(rf"\b{last}\b", source.read_text()), name


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("mkdocs", reason="runs where the extra `docs` is installed")
    spec = importlib.util.spec_from_file_location("hook", ROOT / ".ci" / "repository_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_to_files_outside_docs_lead_to_their_copies(hook: ModuleType) -> None:
    text = "[a](../benchmarks/results/ddp.md#goals) [b](../README.md) [c](federated.md#lost-rounds)"
    expected = "[a](benchmarks/results/ddp.md#goals) [b](readme.md) [c](federated.md#lost-rounds)"
    assert hook.rewritten("docs/page.md", text) == expected
    assert hook.rewritten("README.md", "[a](docs/flower.md)") == "[a](flower.md)"
    assert hook.rewritten("docs/page.md", f"```\n{text}\n```\n") == f"```\n{text}\n```\n"


def test_a_notebook_is_a_page_with_what_it_printed_and_drew(hook: ModuleType) -> None:
    page = hook.content("examples/notebook.ipynb")
    assert page.startswith("# ")
    assert "````py\nimport email" in page
    assert "times less" in page.partition("````text\n")[2]
    assert "](data:image/png;base64,iVBOR" in page
    assert hook.rewritten("docs/tour.md", "[n](../examples/notebook.ipynb)") == (
        "[n](examples/notebook.ipynb.md)"
    )


def test_a_plot_leads_to_itself(hook: ModuleType) -> None:
    plot = '<img alt="loss" src="ddp-loss.png" />'
    assert hook.on_page_content(f"<p>{plot}</p>") == (
        f'<p><a class="plot" href="ddp-loss.png">{plot}</a></p>'
    )


def test_a_page_that_loads_from_another_host_is_refused(hook: ModuleType) -> None:
    assert hook.FETCHED.search('<script src="https://cdn.example/x.js"></script>')
    assert hook.FETCHED.search('<link rel="stylesheet" href="//fonts.example/x">')
    assert not hook.FETCHED.search('<a href="https://arxiv.org/abs/2405.13746">paper</a>')
    assert not hook.FETCHED.search('<script src="assets/x.js"></script>')


def rows_of_choosing() -> list[tuple[str, Path]]:
    """Rows of docs/choosing.md that link to results: the cells with figures, and these results."""
    page = ROOT / "docs" / "choosing.md"
    out = []
    for line in page.read_text().splitlines():
        link = re.search(r"\]\((\.\./benchmarks/results/[\w.-]+)[^)]*\) \|$", line)
        if link:
            cells = re.sub(r"`[^`]*`|\d+/\d+ bit", "", " | ".join(line.split(" | ")[2:-1]))
            cells = re.sub(r"[\d.]+ [MG]bit/s", "", cells)
            out.append((cells, (page.parent / link[1]).resolve()))
    return out


@pytest.mark.parametrize(("cells", "results"), rows_of_choosing())
def test_figures_of_choosing_are_in_the_results(cells: str, results: Path) -> None:
    assert [str(f) for f in figures(cells) if not is_in(f, results)] == []
