"""The python blocks of a page of documentation: where they are, and what happens when they run.

    python .ci/blocks.py README.md

runs them with nothing but what is installed, in the folder where it is called. A block that needs
an optional package that is not there is left out and named. The standard library is all this needs,
so it runs in an environment that holds gradcodec and its dependencies alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A block that begins with the command that runs it is a program, most of them of several ranks.
PROGRAM = ("# torchrun", "# python ")


def blocks(text: str) -> list[tuple[int, str]]:
    """Line number of the first line and source of each python block."""
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


def run(page: Path, optional: Collection[str] = ()) -> Iterator[tuple[int, str]]:
    """Run the blocks of a page in one namespace.

    Args:
        page: its file.
        optional: modules that may be missing; a block that imports one is broken off there.

    Yields:
        The line of each block that was left out or broken off, and why.

    Raises:
        Exception: whatever a block raises; its traceback has the page's own line numbers.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page.read_text()):
        if source.startswith(PROGRAM):
            command = source.partition("\n")[0]
            yield line, f"is a program: {command}"
            continue
        code = compile("\n" * (line - 1) + source, str(page), "exec")
        try:
            exec(code, namespace)
        except ModuleNotFoundError as err:
            missing = (err.name or "").partition(".")[0]
            if missing not in optional:
                raise
            yield line, f"needs {missing}, which only an extra installs"


def extras(package: str) -> set[str]:
    """Modules that only extras of an installed package bring, as far as they are called alike."""
    needed, found = {package}, set()
    for text in metadata.requires(package) or ():
        name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
        (found if "extra ==" in text else needed).add(re.sub(r"[-.]", "_", name).lower())
    return found - needed


def main(pages: list[str]) -> int:
    """Run the pages' blocks; 1 if a page has none that ran."""
    optional, empty = extras("gradcodec"), []
    for page in map(Path, pages):
        total = len(blocks(page.read_text()))
        left_out = list(run(page, optional))
        for line, why in left_out:
            print(f"{page.name}:{line}: left out, {why}")
        print(f"{page.name}: {total - len(left_out)} of {total} blocks ran")
        empty += [page.name] if len(left_out) == total else []
    if empty:
        print(f"no block ran of {', '.join(empty)}", file=sys.stderr)
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
