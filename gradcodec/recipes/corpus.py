"""A text corpus that needs no download: the standard library of the running interpreter.

Two disjoint views of the same files are offered:

* `source_text` - source code and comments with every docstring cut out, for pretraining;
* `docstring_pairs` - question/answer pairs whose answers are those docstrings, for fine-tuning.

They are disjoint on purpose: a model pretrained on the first has not seen the answers of the
second, so the loss it reaches on held-out docstrings measures learning and not recall.
"""

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = [
    "Pair",
    "docstring_pairs",
    "docstring_pairs_in",
    "source_text",
    "strip_docstrings",
    "words",
]

_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",  # character tables, not language
        "idle_test",
        "lib-dynload",
        "pydoc_data",  # read as prose, not as the source of a dictionary
        "site-packages",
        "test",
        "tests",
    }
)
# Written at install time: holds the paths of one machine.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

_ANSWER_CHARS = (20, 240)
_MIN_WORDS = 3
_MAX_ARGUMENTS = 8

_WORD = re.compile(r"\w+")
_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Pair:
    """One documented function, class or method.

    Attributes:
        package: Top-level module or package, the label that makes clients non-IID.
        name: Qualified name inside the module, such as ``TextWrapper.fill``.
        prompt: ``Q: What does ... do?`` and ``A:`` on the next line.
        answer: One space and the first paragraph of the docstring on a single line.
    """

    package: str
    name: str
    prompt: str
    answer: str


def source_text() -> Iterator[tuple[str, str]]:
    """Yield ``(module name, text)`` for pretraining, sorted by file, prose last.

    Docstrings are removed by their position in the syntax tree. A comment or a string literal
    may repeat one word for word, so lines that spell out an answer of `docstring_pairs` are
    dropped as well; the comparison ignores case and punctuation (see `words`).
    """
    pairs, stripped = _library()
    leaks = _Phrases(pair.answer for pair in pairs)
    for module, text in stripped:
        yield module, leaks.drop_lines(text)
    for topic, prose in _prose():
        yield f"pydoc_data.topics.{topic}", leaks.drop_lines(prose)


@lru_cache(maxsize=1)
def _library() -> tuple[tuple[Pair, ...], tuple[tuple[str, str], ...]]:
    """Return all pairs and all ``(module, stripped source)``; parsing is slow, so do it once."""
    seen: set[str] = set()
    pairs: list[Pair] = []
    stripped: list[tuple[str, str]] = []
    for module, source, tree in _parsed_modules():
        stripped.append((module, strip_docstrings(source, tree)))
        for pair in _module_pairs(module, tree):
            if pair.answer not in seen:
                seen.add(pair.answer)
                pairs.append(pair)
    return tuple(sorted(pairs, key=lambda pair: (pair.package, pair.prompt))), tuple(stripped)


def docstring_pairs() -> list[Pair]:
    """Return every question/answer pair, sorted by package and prompt.

    A public function, class or method counts when the first paragraph of its docstring has
    20 to 240 characters and at least three words. If several have the same answer, only the
    first is kept, so a held-out answer is never a training answer.
    """
    return list(_library()[0])


def docstring_pairs_in(root: Path, package: str) -> list[Pair]:
    """Return the pairs of another package's sources, by the rules of `docstring_pairs`.

    Args:
        root: Folder of the package.
        package: Name of the package, which all module names start with.
    """
    found: dict[str, Pair] = {}
    for module, _, tree in _parsed_modules(root):
        for pair in _module_pairs(f"{package}.{module}".rstrip("."), tree):
            found.setdefault(pair.answer, pair)
    return sorted(found.values(), key=lambda pair: pair.prompt)


def strip_docstrings(source: str, tree: ast.Module | None = None) -> str:
    """Return `source` without its docstrings and other strings that stand alone as statements.

    Comments stay. A body left empty gets ``pass``.

    Args:
        source: Python source text.
        tree: Its syntax tree where the caller has it already.

    Raises:
        SyntaxError: `source` does not parse.
    """
    lines = [line.encode("utf-8") for line in source.split("\n")]
    spans: list[tuple[ast.Expr, bool]] = []  # the flag: is its body nothing but strings?
    for node in ast.walk(tree if tree is not None else ast.parse(source)):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                strings = [child for child in body if _is_string(child)]
                spans += [(child, len(body) == len(strings)) for child in strings]
    # From the end, so that earlier positions stay valid.
    for node, alone in sorted(spans, key=lambda span: -span[0].lineno):
        _cut(lines, node, alone)
    return b"\n".join(lines).decode("utf-8")


def words(text: str) -> list[str]:
    """Return the lower-case words of `text`, the form in which leaks are looked for."""
    return _WORD.findall(text.lower())


def _is_string(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _cut(lines: list[bytes], node: ast.Expr, alone: bool) -> None:
    """Cut `node` out of `lines` in place, putting `pass` if needed; columns count UTF-8 bytes."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = lines[first][: node.col_offset]
    after = lines[last][node.end_col_offset or 0 :]
    needed = alone or after.lstrip().startswith(b";")
    kept = before + (b"pass" if needed else b"") + after
    lines[first : last + 1] = [kept] if kept.strip() else []


class _Phrases:
    """The answers to keep out of a text, found by their first words."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._by_start: dict[tuple[str, ...], list[list[str]]] = {}
        for phrase in phrases:
            sequence = words(phrase)
            self._by_start.setdefault(tuple(sequence[:_MIN_WORDS]), []).append(sequence)

    def drop_lines(self, text: str) -> str:
        """Return `text` without the lines that any of the phrases touches."""
        lines = text.splitlines(keepends=True)
        # Dropping lines joins their neighbours, which may spell a phrase anew: repeat.
        while dropped := self._matched_lines(lines):
            lines = [line for number, line in enumerate(lines) if number not in dropped]
        return "".join(lines)

    def _matched_lines(self, lines: list[str]) -> set[int]:
        sequence: list[str] = []
        line_of: list[int] = []
        for number, line in enumerate(lines):
            found = words(line)
            sequence += found
            line_of += [number] * len(found)
        dropped: set[int] = set()
        for start in range(len(sequence) - _MIN_WORDS + 1):
            for phrase in self._by_start.get(tuple(sequence[start : start + _MIN_WORDS]), ()):
                end = start + len(phrase)
                if sequence[start:end] == phrase:
                    dropped.update(line_of[start:end])
        return dropped


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(_SKIPPED_PREFIXES):
            yield ".".join(part for part in parts if part != "__init__"), path


def _parsed_modules(root: Path | None = None) -> Iterator[tuple[str, str, ast.Module]]:
    """Module name, source and syntax tree of every file, by default of the standard library."""
    for module, path in _python_files(root or Path(sysconfig.get_paths()["stdlib"])):
        try:
            # Old modules separate their sections by form feeds: noise to a language model.
            source = path.read_text(encoding="utf-8").replace("\f", " ")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):
            continue
        yield module, source, tree


def _prose() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it separately
        return
    yield from sorted(topics.items())


def _module_pairs(module: str, tree: ast.Module) -> Iterator[Pair]:
    package = module.partition(".")[0]
    if any(part.startswith("_") for part in module.split(".")):
        return
    stack: list[tuple[str, ast.stmt]] = [("", node) for node in reversed(tree.body)]
    while stack:
        prefix, node = stack.pop()
        if not isinstance(node, _FunctionNode | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = prefix + node.name
        if isinstance(node, ast.ClassDef):
            stack += [(f"{name}.", child) for child in reversed(node.body)]
        answer = _first_paragraph(ast.get_docstring(node))
        if answer is not None:
            prompt = f"Q: What does {module}.{name}({_arguments(node)}) do?\nA:"
            yield Pair(package=package, name=name, prompt=prompt, answer=f" {answer}")


def _first_paragraph(docstring: str | None) -> str | None:
    if docstring is None:
        return None
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    low, high = _ANSWER_CHARS
    if low <= len(paragraph) <= high and len(words(paragraph)) >= _MIN_WORDS:
        return paragraph
    return None


def _arguments(node: _FunctionNode | ast.ClassDef) -> str:
    """Return the argument names (for a class: those of its ``__init__``), without ``self``."""
    if isinstance(node, ast.ClassDef):
        inits = [child for child in node.body if getattr(child, "name", "") == "__init__"]
        if not inits or not isinstance(inits[0], _FunctionNode):
            return ""
        return _arguments(inits[0])
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    names = [name for name in names if name not in ("self", "cls")]
    return ", ".join(names[:_MAX_ARGUMENTS])
