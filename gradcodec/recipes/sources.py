"""Reading examples: from the standard library, from files, from Hugging Face data sets."""

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradcodec.errors import ConfigError
from gradcodec.recipes.corpus import docstring_pairs
from gradcodec.recipes.examples import Example, Row, example_of


def load_examples(source: str, *, limit: int | None = None) -> list[Example]:
    """Read examples in the order of the source.

    Rows may look like those of Dolly, Alpaca, MMLU, C-Eval or GSM8K, or have plain ``prompt`` and
    ``answer`` columns (``label`` optional). Columns beyond the expected ones are not read.

    Args:
        source: ``"stdlib"`` for `gradcodec.recipes.corpus.docstring_pairs`; a file ending in
            ``.jsonl`` (an object per line) or ``.json`` (a list of objects); otherwise a Hugging
            Face data set, ``id``, ``id:configuration`` or ``id:configuration:split`` (split
            ``train`` unless given).
        limit: Keep this many examples from the start; ``None`` keeps all.

    Raises:
        ConfigError: The file is missing, not JSON or of another kind, the columns are unknown, a
            value is missing, nothing was read, or the ``datasets`` package is needed and not
            installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if source == "stdlib":
        examples = [Example(pair.prompt, pair.answer, pair.package) for pair in docstring_pairs()]
        return examples[:limit]
    if not source:
        raise ConfigError("expected 'stdlib', a file or the name of a data set, got ''")
    if Path(source).is_file() and not source.endswith((".jsonl", ".json")):
        raise ConfigError(f"expected a file of examples that ends in .jsonl or .json, got {source}")
    if source.endswith((".jsonl", ".json")):
        rows: Iterable[Row] = rows_of_file(Path(source))
    else:
        rows = _rows_of_dataset(source)
    examples = []
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        examples.append(example_of(row, f"{source}, row {number}"))
    if not examples:
        raise ConfigError(f"{source} holds no rows")
    return examples


def rows_of_file(path: Path) -> list[Any]:
    """Return the values of a ``.jsonl`` file, or of the list in a ``.json`` file.

    Raises:
        ConfigError: The file cannot be read, or is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read examples from {path}: {error}") from error
    if path.suffix == ".jsonl":
        pieces = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1)]
    else:
        pieces = [("the file", text)]
    rows: list[Any] = []
    for where, piece in pieces:
        if not piece.strip():
            continue
        try:
            value = json.loads(piece)
        except (ValueError, RecursionError) as error:  # the latter: nested a thousand deep
            raise ConfigError(f"{path}: {where} is not JSON: {error}") from error
        rows += value if path.suffix == ".json" and isinstance(value, list) else [value]
    return rows


def _rows_of_dataset(source: str) -> Iterable[Row]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"{source!r} is neither 'stdlib' nor a .jsonl or .json file, so it is read as a "
            "Hugging Face data set, which needs: pip install datasets"
        ) from error
    name, _, rest = source.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        rows: Iterable[Row] = datasets.load_dataset(
            name, configuration or None, split=split or "train"
        )
    except Exception as error:  # missing, unreachable, damaged: scripts and formats raise anything
        raise ConfigError(f"cannot load the data set {source!r}: {error}") from error
    return rows
