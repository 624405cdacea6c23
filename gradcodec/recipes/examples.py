"""Examples of question and answer, and the rows of data sets that they are made of."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError

UNLABELLED = "unlabelled"
_LETTERS = "ABCDEFGHIJ"

Row = Mapping[str, Any]


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


def example_of(row: object, where: str) -> Example:
    """Return the example that a row of any known data set holds.

    Raises:
        ConfigError: The row has no known columns or no valid answer; it begins with `where`.
    """
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: expected an object with columns, got {type(row).__name__}")
    for columns, read in _FORMATS.values():
        if all(column in row for column in columns):
            check_filled(row, columns, where)
            try:
                return read(row)
            except (IndexError, TypeError, ValueError) as error:
                raise ConfigError(f"{where}: {error}") from error
    expected = "; ".join(f"{name}: {', '.join(cols)}" for name, (cols, _) in _FORMATS.items())
    found = ", ".join(map(str, row)) or "none"
    raise ConfigError(f"{where}: unknown columns. Expected one of [{expected}]; found: {found}")


def check_filled(row: Row, columns: Sequence[str], where: str) -> None:
    """Raise ``ConfigError`` for what would become the text "None", "nan" or a list in brackets."""
    for column in columns:
        value = row[column]
        if column == "choices":
            expected, holds = (
                "a list of texts",
                isinstance(value, list) and all(map(_is_text, value)),
            )
        else:
            expected, holds = "text", _is_text(value)
        if not holds:
            raise ConfigError(f"{where}: expected {expected} in {column!r}, got {shown(value)}")


def _is_text(value: object) -> bool:
    """Whether it is text or a number; NaN, which stands for an empty cell, equals nothing."""
    return isinstance(value, str | int | float) and value == value


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


def _instruction(instruction: object, context: object) -> str:
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _lettered(row: Row, choices: Sequence[object], letter: str) -> Example:
    letters = _LETTERS[: len(choices)]
    if len(choices) > len(letters):
        raise ValueError(f"expected at most {len(letters)} choices, got {len(choices)}")
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"answer {letter!r} is none of {', '.join(letters)}")
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(letters, choices, strict=True))
    return Example(
        prompt=f"{row['question']}\n{listed}\nAnswer:",
        answer=f" {letter}",
        label=str(row.get("subject") or UNLABELLED),
        options=tuple(f" {name}" for name in letters),
    )
