"""Examples of question and answer: reading, encoding, and dealing them out to clients.

Every random choice comes from a numpy generator made from the seed in the call. No function here
reads or changes global random state.
"""

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gradcodec.errors import ConfigError
from gradcodec.recipes.corpus import docstring_pairs

__all__ = [
    "IGNORED",
    "UNLABELLED",
    "Choice",
    "Encoded",
    "Example",
    "collate",
    "dirichlet_partition",
    "encode_example",
    "example_of",
    "held_out",
    "load_examples",
    "multiple_choice",
    "rows_of_file",
    "split_d1_d2",
]

IGNORED = -100  # the label that cross-entropy skips
UNLABELLED = "unlabelled"
_PARTITION_ATTEMPTS = 200
_LETTERS = "ABCDEFGHIJ"

Row = Mapping[str, Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn.

    Attributes:
        prompt: Text the model is given; no loss is taken on it.
        answer: Text to produce, with its leading blank where there is one.
        label: Category that makes clients differ (package, topic, subject).
        options: All answers to choose from where the data set lists them, else empty.
    """

    prompt: str
    answer: str
    label: str = UNLABELLED
    options: tuple[str, ...] = ()


class Encoded(NamedTuple):
    """Token ids and labels of one example, both of the same length in tokens."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice question; ``options[correct]`` is the right answer."""

    prompt: str
    options: tuple[str, ...]
    correct: int


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
        ConfigError: The file is missing or not JSON, the columns are unknown, nothing was read,
            or the ``datasets`` package is needed and not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if source == "stdlib":
        examples = [Example(pair.prompt, pair.answer, pair.package) for pair in docstring_pairs()]
        return examples[:limit]
    if not source:
        raise ConfigError("expected 'stdlib', a file or the name of a data set, got ''")
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


def encode_example(tokenizer: Any, example: Example, max_length: int) -> Encoded:
    """Return the tokens of prompt, answer and end of text, with the prompt's labels ignored.

    An example that is too long first loses the start of its prompt, down to half of `max_length`,
    then the end of its answer. So there is always an answer to learn from, and the end-of-text
    token is taught only where the answer really ends.

    Args:
        tokenizer: A `transformers` tokenizer with an end-of-text token.
        example: What to encode.
        max_length: Most tokens to return, at least 2.

    Raises:
        ConfigError: `max_length` is below 2 or the tokenizer has no end-of-text token.
    """
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 (prompt and answer), got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token (eos_token_id is None)")
    prompt: list[int] = list(tokenizer(example.prompt)["input_ids"])
    answer: list[int] = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    answer.append(tokenizer.eos_token_id)
    room = max(max_length - len(answer), max_length // 2)
    if len(prompt) > room:
        # A model that expects a start token expects it first, whatever was cut behind it.
        starts = room > 1 and prompt[0] == tokenizer.bos_token_id
        prompt = [prompt[0], *prompt[1 - room :]] if starts else prompt[-room:]
    answer = answer[: max_length - len(prompt)]
    return Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)


def collate(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right to its longest member.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on padding) and ``labels`` (`IGNORED`
        on padding), each int64 of shape ``(batch, longest)``.

    Raises:
        ConfigError: The batch is empty.
    """
    if not batch:
        raise ConfigError("cannot collate an empty batch")
    shape = (len(batch), max(len(ids) for ids, _ in batch))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (ids, targets) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.tensor(targets, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def dirichlet_partition(
    labels: Sequence[str], clients: int, alpha: float, seed: int, min_size: int = 1
) -> list[Indices]:
    r"""Deal the indices of `labels` to clients, each label in Dirichlet(alpha) proportions.

    As in FedIT/Shepherd: with :math:`p \sim \mathrm{Dir}(\alpha 1_K)` drawn afresh for each
    label, a client that already holds :math:`N/K` or more gets :math:`p_k = 0`, and the rest is
    renormalised. The whole partition is redrawn until no client is below `min_size`.

    Args:
        labels: Category of each of the N examples.
        clients: Number K of clients.
        alpha: Concentration; small values give clients that see few labels.
        seed: Seed of the draw.
        min_size: Fewest examples of a client.

    Returns:
        K sorted index arrays; together they hold each of ``0..N-1`` once.

    Raises:
        ConfigError: A setting is out of range, or no draw met `min_size`.
    """
    total = len(labels)
    if clients < 1:
        raise ConfigError(f"clients must be at least 1, got {clients}")
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ConfigError(f"alpha must be positive and finite, got {alpha}")
    if min_size < 0 or min_size * clients > total:
        raise ConfigError(
            f"{clients} clients with at least {min_size} examples each need "
            f"{min_size * clients} examples, there are {total}"
        )
    rng = np.random.default_rng(seed)
    _, codes = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    by_label = [np.flatnonzero(codes == code) for code in range(codes.max(initial=-1) + 1)]
    best: list[int] = []
    for _ in range(_PARTITION_ATTEMPTS):
        parts = _draw_partition(by_label, clients, alpha, rng)
        sizes = sorted(len(part) for part in parts)
        if sizes[0] >= min_size:
            return parts
        best = max(best, sizes)
    raise ConfigError(
        f"no Dirichlet draw out of {_PARTITION_ATTEMPTS} gave each of {clients} clients "
        f"{min_size} examples; the best one reached sizes {best}. "
        "Use a larger alpha (--dirichlet), fewer clients or a smaller min_size (--min-client)"
    )


def split_d1_d2(
    indices: npt.ArrayLike, fraction: float = 0.3, seed: int = 0
) -> tuple[Indices, Indices]:
    """Split one client's examples at random into D1 (`fraction` of them) and D2 (the rest).

    D2 is never empty; D1 is empty only for a single example or a `fraction` of zero.

    Returns:
        Two sorted arrays, disjoint, together all of `indices`.

    Raises:
        ConfigError: There are no indices, or `fraction` is outside [0, 1).
    """
    given = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(given) == 0:
        raise ConfigError("cannot split a client without examples")
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"fraction must be in [0, 1), got {fraction}")
    count = round(fraction * len(given)) if fraction else 0
    if fraction and count == 0:
        count = 1
    count = min(count, len(given) - 1)
    shuffled = np.random.default_rng(seed).permutation(given)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def held_out(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out `count` examples, of each label in proportion to its size (largest remainder).

    Returns:
        ``(kept, held)``, both in the order of `examples`.

    Raises:
        ConfigError: `count` is not in ``0..len(examples) - 1``.
    """
    if not 0 <= count < max(len(examples), 1):
        raise ConfigError(f"cannot hold out {count} of {len(examples)} examples")
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    names = sorted(by_label)
    exact = np.array([count * len(by_label[name]) / max(len(examples), 1) for name in names])
    quota = np.floor(exact).astype(np.int64)
    # Equal remainders are common (many small labels): break ties at random, not by name.
    order = np.lexsort((rng.random(len(names)), quota - exact))
    quota[order[: count - int(quota.sum())]] += 1
    held: set[int] = set()
    for name, size in zip(names, quota, strict=True):
        held.update(rng.permutation(by_label[name])[:size].tolist())
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [example for index, example in enumerate(examples) if index in held],
    )


def multiple_choice(
    examples: Sequence[Example],
    pool: Sequence[Example],
    count: int,
    options: int = 4,
    seed: int = 0,
) -> list[Choice]:
    """Turn `count` examples into multiple-choice questions.

    An example that lists its own options keeps them. For any other, the wrong options are distinct
    answers drawn at random from `pool`, and the right one is put at a random place.

    Raises:
        ConfigError: There are fewer than `count` examples, or the pool has too few answers.
    """
    if not 0 <= count <= len(examples):
        raise ConfigError(f"cannot ask {count} questions from {len(examples)} examples")
    if options < 2:
        raise ConfigError(f"a question needs at least 2 options, got {options}")
    rng = np.random.default_rng(seed)
    answers = sorted({example.answer for example in pool})
    choices: list[Choice] = []
    for index in rng.permutation(len(examples))[:count]:
        example = examples[index]
        if example.options:
            right = example.options.index(example.answer)
            choices.append(Choice(example.prompt, example.options, right))
            continue
        # One draw more than needed, in case the right answer itself comes up.
        if len(answers) < options:
            raise ConfigError(
                f"{options} options need {options} distinct answers in the pool, "
                f"there are {len(answers)}"
            )
        drawn = [answers[i] for i in rng.choice(len(answers), size=options, replace=False)]
        wrong = [answer for answer in drawn if answer != example.answer][: options - 1]
        place = int(rng.integers(options))
        wrong.insert(place, example.answer)
        choices.append(Choice(example.prompt, tuple(wrong), place))
    return choices


def _draw_partition(
    by_label: list[npt.NDArray[np.intp]], clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    total = sum(len(members) for members in by_label)
    parts: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, dtype=np.int64)
    for members in by_label:
        still_open = sizes < total / clients  # never all closed while a label is left to deal
        weights = rng.dirichlet(np.full(clients, alpha)) * still_open
        if not weights.sum() > 0:  # a tiny alpha put everything on a closed client
            weights = still_open.astype(np.float64)
        cuts = (np.cumsum(weights / weights.sum())[:-1] * len(members)).astype(np.int64)
        for client, part in enumerate(np.split(rng.permutation(members), cuts)):
            parts[client].append(part)
            sizes[client] += len(part)
    empty = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *part]).astype(np.int64)) for part in parts]


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


def _dolly(row: Row) -> Example:
    prompt = _instruction(row["instruction"], row.get("context"))
    return Example(prompt, str(row["response"]), str(row.get("category") or UNLABELLED))


def _alpaca(row: Row) -> Example:
    prompt = _instruction(row["instruction"], row.get("input"))
    return Example(prompt, str(row["output"]))


def _mmlu(row: Row) -> Example:
    right = row["answer"]
    letter = right.strip().upper() if isinstance(right, str) else _LETTERS[int(right)]
    return _lettered(row, row["choices"], letter)


def _ceval(row: Row) -> Example:
    return _lettered(row, [row[letter] for letter in "ABCD"], str(row["answer"]).strip().upper())


def _gsm8k(row: Row) -> Example:
    question = str(row["question"])
    # Calculator marks, as in "<<48/2=24>>", are notes to a tool that is not there.
    answer = re.sub(r"<<[^>]*>>", "", str(row["answer"]))
    return Example(f"Question: {question}\nAnswer:", f" {answer}", _topic(question))


def _topic(question: str) -> str:
    """What a word problem is about, by the words that it has most of; GSM8K has no labels."""
    words = Counter(re.findall(r"[a-z]+", question.lower()))
    counts = {topic: sum(words[w] for w in its) for topic, its in _TOPICS.items()}
    best = max(counts, key=lambda topic: counts[topic])
    return best if counts[best] else "other"


_TOPICS: dict[str, tuple[str, ...]] = {
    "money": (
        "cost",
        "costs",
        "price",
        "dollars",
        "pay",
        "paid",
        "sells",
        "sold",
        "buys",
        "bought",
    ),
    "time": (
        "hours",
        "hour",
        "minutes",
        "minute",
        "days",
        "day",
        "week",
        "weeks",
        "month",
        "months",
    ),
    "distance": ("miles", "mile", "feet", "meters", "kilometers", "speed", "inches", "distance"),
    "food": ("apples", "cookies", "eggs", "pizza", "cake", "cups", "fruit", "candy", "eat", "food"),
    "people": ("people", "children", "students", "friends", "boys", "girls", "class", "school"),
    "age": ("old", "older", "age", "years", "year", "younger", "twice"),
    "animals": ("dogs", "cats", "chickens", "cows", "animals", "birds", "fish", "horses", "dog"),
    "things": ("books", "pages", "cars", "toys", "trees", "flowers", "balls", "boxes", "cards"),
}


def _plain(row: Row) -> Example:
    label = row.get("label")
    return Example(
        str(row["prompt"]), str(row["answer"]), UNLABELLED if label is None else str(label)
    )


# The columns that tell the kinds of row apart, and how to read each kind.
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Example]]] = {
    "Dolly": (("instruction", "response"), _dolly),
    "Alpaca": (("instruction", "output"), _alpaca),
    "MMLU": (("question", "choices", "answer"), _mmlu),
    "C-Eval": (("question", "A", "B", "C", "D", "answer"), _ceval),
    "GSM8K": (("question", "answer"), _gsm8k),
    "plain": (("prompt", "answer"), _plain),
}


def example_of(row: object, where: str) -> Example:
    """Return the example that a row of any known data set holds.

    Raises:
        ConfigError: The row has no known columns or no valid answer; it begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for columns, read in _FORMATS.values():
        if all(column in row for column in columns):
            try:
                return read(row)
            except (IndexError, TypeError, ValueError) as error:
                raise ConfigError(f"{where}: {error}") from error
    expected = "; ".join(f"{name}: {', '.join(cols)}" for name, (cols, _) in _FORMATS.items())
    found = ", ".join(map(str, row)) or "none"
    raise ConfigError(f"{where}: unknown columns. Expected one of [{expected}]; found: {found}")


def _instruction(instruction: object, context: object) -> str:
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _lettered(row: Row, choices: Sequence[object], letter: str) -> Example:
    letters = _LETTERS[: len(choices)]
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"answer {letter!r} is none of {', '.join(letters)}")
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(letters, choices, strict=True))
    return Example(
        prompt=f"{row['question']}\n{listed}\nAnswer:",
        answer=f" {letter}",
        label=str(row.get("subject") or UNLABELLED),
        options=tuple(f" {name}" for name in letters),
    )
