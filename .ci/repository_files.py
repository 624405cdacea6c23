"""Hook of mkdocs: files outside docs/ that a page links to become part of the site.

Pages link to them by paths that work on the repository's own pages, such as
``../benchmarks/results/ddp.md``. The site gets these files, and the files that they link to:
Markdown as pages, Python as pages with the source, notebooks as pages with their outputs, anything
else as it is.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# Where in the site a file of the repository is, if not under its own path. In a site, README.md
# would be the front page.
MOVED = {"README.md": "readme.md"}

FENCE = re.compile(r"^ *(```|~~~)")
TARGET = re.compile(r"(\]\()([^()\s]+)(\))")


def site_path(path: str) -> str:
    """Path of a page's source within the site, for a path within the repository."""
    path = MOVED.get(path, path.removeprefix("docs/"))
    return f"{path}.md" if path.endswith((".py", ".ipynb")) else path


def resolved(page: str, link: str) -> tuple[str, str] | None:
    """Path within the repository that ``link`` on ``page`` means, and its anchor.

    ``None`` for what is not a file of the repository.
    """
    if re.match(r"[a-z]+:|[#/]", link):
        return None
    target, _, anchor = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return (path, f"#{anchor}" if anchor else "") if (ROOT / path).is_file() else None


def rewritten(page: str, text: str, see: Any = lambda path: None) -> str:
    """The text of a page with its links as the site needs them; ``see`` is told of each file."""

    def replace(match: re.Match[str]) -> str:
        found = resolved(page, match[2])
        if found is None:
            return match[0]
        see(found[0])
        here = posixpath.dirname(site_path(page)) or "."
        return match[1] + posixpath.relpath(site_path(found[0]), here) + found[1] + match[3]

    lines, fenced = [], False
    for line in text.splitlines(keepends=True):
        fenced ^= bool(FENCE.match(line))
        lines.append(line if fenced else TARGET.sub(replace, line))
    return "".join(lines)


def content(path: str) -> str:
    """A page for a text file of the repository."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return rewritten(path, text)
    if path.endswith(".ipynb"):
        return rewritten(path, notebook(text))
    return f"# {path}\n\n````py\n{text}````\n"


def notebook(text: str) -> str:
    """A notebook as Markdown: prose, programs, and what they printed and drew when it was saved."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"````py\n{source}\n````")
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                png = "".join(output["data"]["image/png"].split())
                parts.append(f"![what the program above draws](data:image/png;base64,{png})")
            elif "text" in output:
                parts.append(f"````text\n{''.join(output['text'])}````")
    return "\n\n".join(parts) + "\n"


def leaves(nav: Any) -> list[str]:
    """Paths of a nav, as mkdocs.yml writes it."""
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [path for item in items for path in leaves(item)]


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += [path for path in leaves(config.nav) if (ROOT / path).is_file()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        if not page.startswith("docs/"):
            uri = site_path(page)
            if uri.endswith(".md"):
                files.append(File.generated(config, uri, content=content(page)))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            found: set[str] = set()
            rewritten(page, (ROOT / page).read_text(), found.add)
            waiting += found - seen
            seen |= found
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/; the others have theirs already."""
    if page.parent is None and page.file.src_uri in leaves(config.nav):
        page.meta.setdefault("hide", ["navigation"])  # a column with this page alone in it
    if page.file.generated_by:
        return markdown
    return rewritten(f"docs/{page.file.src_uri}", markdown)


PLOT = re.compile(r'(<img [^>]*?src="([^"]+\.png)"[^>]*>)')


def on_page_content(html: str, **_: Any) -> str:
    """A plot is a link to itself: a phone shows it alone, in whatever size its reader wants."""
    return PLOT.sub(r'<a class="plot" href="\2">\1</a>', html)


# What browsers fetch by themselves: sources, style sheets, fonts, but not links to follow.
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"(?:https?:)?//[^\"]+\"")


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that loads something from another host."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output
