"""Laws of reading, encoding and dealing out examples."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcodec.errors import ConfigError
from gradcodec.recipes.data import (
    IGNORED,
    UNLABELLED,
    Example,
    collate,
    dirichlet_partition,
    encode_example,
    held_out,
    load_examples,
    multiple_choice,
    split_d1_d2,
)


class Letters:
    """A tokenizer with one token per character and a start token, as small as the interface."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens else []
        return {"input_ids": start + [ord(letter) for letter in text]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS: dict[str, tuple[dict[str, Any], Example]] = {
    "dolly": (
        {"instruction": "Do", "context": "C", "response": "R", "category": "qa"},
        Example("### Instruction:\nDo\n\n### Input:\nC\n\n### Response:\n", "R", "qa"),
    ),
    "alpaca": (
        {"instruction": "Do", "input": "", "output": "R", "text": "not read"},
        Example("### Instruction:\nDo\n\n### Response:\n", "R", UNLABELLED),
    ),
    "mmlu": (
        {"question": "Q?", "choices": ["x", "y"], "answer": 1, "subject": "law"},
        Example("Q?\nA. x\nB. y\nAnswer:", " B", "law", (" A", " B")),
    ),
    "c-eval": (
        {"question": "Q?", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"},
        Example("Q?\nA. x\nB. y\nC. z\nD. w\nAnswer:", " C", UNLABELLED, (" A", " B", " C", " D")),
    ),
    "gsm8k": (
        {"question": "How many apples cost $4?", "answer": "4/2 = <<4/2=2>>2\n#### 2"},
        Example("Question: How many apples cost $4?\nAnswer:", " 4/2 = 2\n#### 2", "money"),
    ),
    "gsm8k, no known topic": (
        {"question": "How much is 1 + 1?", "answer": "#### 2"},
        Example("Question: How much is 1 + 1?\nAnswer:", " #### 2", "other"),
    ),
    "plain": ({"prompt": "P", "answer": " A", "label": 3}, Example("P", " A", "3")),
}


@pytest.mark.parametrize("kind", ROWS)
def test_each_kind_of_row_is_understood(kind: str, tmp_path: Path) -> None:
    row, expected = ROWS[kind]
    assert load_examples(write(tmp_path / "rows.jsonl", [row])) == [expected]


def test_a_json_list_reads_like_its_lines(tmp_path: Path) -> None:
    rows = [ROWS["plain"][0], ROWS["dolly"][0]]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = write(tmp_path / "rows.jsonl", rows)
    assert load_examples(str(tmp_path / "rows.json")) == load_examples(lines)


def test_unknown_columns_raise_naming_those_expected_and_found(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"frage": "?", "antwort": "!"}])
    with pytest.raises(ConfigError, match=r"Dolly: instruction, response.*found: frage, antwort"):
        load_examples(source)


def test_a_broken_line_raises_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "P", "answer": "A"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        load_examples(str(path))


@pytest.mark.parametrize("answer", [7, -1, "Z", "AB"])
def test_an_answer_that_is_no_choice_raises(answer: object, tmp_path: Path) -> None:
    row = {"question": "Q?", "choices": ["x", "y"], "answer": answer, "subject": "law"}
    with pytest.raises(ConfigError, match="row 0"):
        load_examples(write(tmp_path / "rows.jsonl", [row]))


@pytest.mark.parametrize(
    ("kind", "column", "value"),
    [
        ("dolly", "response", None),
        ("alpaca", "instruction", None),
        ("mmlu", "choices", None),
        ("mmlu", "choices", "x, y"),
        ("mmlu", "choices", ["x", None]),
        ("c-eval", "B", None),
        ("gsm8k", "answer", None),
        ("gsm8k", "question", float("nan")),
        ("plain", "answer", ["A", "B"]),
        ("plain", "prompt", {"text": "P"}),
    ],
)
def test_a_value_that_is_no_text_is_not_trained_on(
    kind: str, column: str, value: object, tmp_path: Path
) -> None:
    """``str(None)`` would be the answer "None"."""
    row = {**ROWS[kind][0], column: value}
    with pytest.raises(
        ConfigError, match=f"row 0: expected (text|a list of texts) in '{column}', got "
    ):
        load_examples(write(tmp_path / "rows.jsonl", [row]))


def test_more_choices_than_letters_raise_with_their_number(tmp_path: Path) -> None:
    row = {"question": "Q?", "choices": ["x"] * 11, "answer": 0}
    with pytest.raises(ConfigError, match="row 0: expected at most 10 choices, got 11"):
        load_examples(write(tmp_path / "rows.jsonl", [row]))


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_examples(str(tmp_path / "none.jsonl"))


def test_a_file_of_another_kind_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\nP,A\n")
    with pytest.raises(ConfigError, match=r"ends in \.jsonl or \.json, got .*rows\.csv"):
        load_examples(str(tmp_path / "rows.csv"))


def test_an_empty_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        load_examples(write(tmp_path / "rows.jsonl", []))


def test_the_limit_keeps_the_first_examples(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answer": "A"} for number in range(5)]
    examples = load_examples(write(tmp_path / "rows.jsonl", rows), limit=2)
    assert [example.prompt for example in examples] == ["0", "1"]


def test_the_standard_library_is_labelled_by_package() -> None:
    examples = load_examples("stdlib", limit=500)
    assert len(examples) == 500
    assert "argparse" in {example.label for example in examples}


def test_a_data_set_without_the_package_raises_with_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        load_examples("databricks/databricks-dolly-15k")


def test_a_data_set_name_carries_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, configuration, split))
        return [ROWS["mmlu"][0]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_examples("cais/mmlu:all:test") == [ROWS["mmlu"][1]]
    load_examples("owner/name")
    assert asked == [("cais/mmlu", "all", "test"), ("owner/name", None, "train")]


text = st.text(alphabet="abc ", max_size=12)


@given(prompt=text, answer=text.filter(bool), max_length=st.integers(2, 32))
def test_encoding_fits_masks_the_prompt_and_keeps_some_answer(
    prompt: str, answer: str, max_length: int
) -> None:
    ids, labels = encode_example(Letters(), Example(prompt, answer), max_length)
    assert len(ids) == len(labels) <= max_length
    learned = [label for label in labels if label != IGNORED]
    assert learned
    assert labels == [IGNORED] * (len(ids) - len(learned)) + ids[len(ids) - len(learned) :]
    full = [ord(letter) for letter in answer] + [Letters.eos_token_id]
    assert learned == full[: len(learned)]


def test_a_short_example_is_start_prompt_answer_end() -> None:
    ids, labels = encode_example(Letters(), Example("ab", "c"), 16)
    assert ids == [1, ord("a"), ord("b"), ord("c"), 2]
    assert labels == [IGNORED] * 3 + [ord("c"), 2]


def test_a_cut_prompt_keeps_its_start_token_and_its_end() -> None:
    ids, _ = encode_example(Letters(), Example("abcdef", "x"), 6)
    assert ids == [1, ord("d"), ord("e"), ord("f"), ord("x"), 2]


encoded = st.lists(st.integers(3, 99), min_size=1, max_size=9).map(
    lambda ids: (ids, [IGNORED, *ids[1:]])
)


@given(batch=st.lists(encoded, min_size=1, max_size=5))
def test_collate_pads_on_the_right_where_mask_and_labels_ignore_it(
    batch: list[tuple[list[int], list[int]]],
) -> None:
    tensors = collate(batch, pad_id=0)
    for row, (ids, labels) in enumerate(batch):
        padding = tensors["input_ids"].shape[1] - len(ids)
        assert tensors["input_ids"][row].tolist() == ids + [0] * padding
        assert tensors["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
        assert tensors["labels"][row].tolist() == labels + [IGNORED] * padding


@settings(deadline=None)
@given(
    labels=st.lists(st.sampled_from("abcde"), min_size=8, max_size=200),
    clients=st.integers(1, 8),
    alpha=st.sampled_from([1e-3, 0.1, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_partition_holds_every_index_once(
    labels: list[str], clients: int, alpha: float, seed: int
) -> None:
    parts = dirichlet_partition(labels, clients, alpha, seed, min_size=0)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


def test_a_partition_depends_on_the_seed_and_on_nothing_else() -> None:
    labels = list("abcd") * 50
    first = dirichlet_partition(labels, 5, 0.5, seed=1, min_size=5)
    np.random.seed(0)  # noqa: NPY002 - global state must not matter
    again = dirichlet_partition(labels, 5, 0.5, seed=1, min_size=5)
    other = dirichlet_partition(labels, 5, 0.5, seed=2, min_size=5)
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert [part.tolist() for part in first] != [part.tolist() for part in other]


def test_a_small_alpha_gives_clients_that_see_fewer_labels() -> None:
    labels = [letter for letter in "abcdefghijklmnopqrst" for _ in range(50)]

    def mean_labels(alpha: float) -> float:
        parts = dirichlet_partition(labels, 10, alpha, seed=0, min_size=20)
        return float(np.mean([len({labels[i] for i in part}) for part in parts]))

    assert mean_labels(0.05) < 0.6 * mean_labels(100.0)


def test_an_unreachable_minimum_raises_with_the_sizes_reached() -> None:
    with pytest.raises(ConfigError, match=r"each of 10 clients 10 examples.*sizes \[\d"):
        dirichlet_partition(["a"] * 100, 10, 0.01, seed=0, min_size=10)


def test_too_few_examples_for_the_minimum_raise_at_once() -> None:
    with pytest.raises(ConfigError, match="need 40 examples, there are 3"):
        dirichlet_partition(["a"] * 3, 4, 1.0, seed=0, min_size=10)


@given(
    indices=st.lists(st.integers(0, 999), min_size=1, max_size=50, unique=True),
    fraction=st.floats(0.0, 0.999),
    seed=st.integers(0, 99),
)
def test_d1_and_d2_are_disjoint_exhaustive_and_d2_is_not_empty(
    indices: list[int], fraction: float, seed: int
) -> None:
    d1, d2 = split_d1_d2(indices, fraction, seed)
    assert sorted([*d1, *d2]) == sorted(indices)
    assert len(d2) >= 1
    assert len(d1) >= 1 or len(indices) == 1 or fraction == 0


def test_d1_has_the_fraction_asked_for() -> None:
    d1, d2 = split_d1_d2(np.arange(100), 0.3, seed=0)
    assert (len(d1), len(d2)) == (30, 70)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 99),
)
def test_held_out_takes_from_each_label_its_share_within_one(
    sizes: list[int], share: float, seed: int
) -> None:
    examples = [
        Example(f"{label}/{number}", "A", str(label))
        for label, size in enumerate(sizes)
        for number in range(size)
    ]
    count = int(share * len(examples))
    kept, held = held_out(examples, count, seed)
    assert len(held) == count
    assert sorted(e.prompt for e in kept + held) == sorted(e.prompt for e in examples)
    for label, size in enumerate(sizes):
        taken = sum(example.label == str(label) for example in held)
        assert abs(taken - count * size / len(examples)) < 1 + 1e-9


def test_a_question_has_one_right_and_distinct_wrong_options_at_random_places() -> None:
    pool = [Example(f"P{n}", f" A{n}") for n in range(50)]
    choices = multiple_choice(pool, pool, count=50, options=4, seed=0)
    for choice in choices:
        assert len(set(choice.options)) == 4
        assert choice.options[choice.correct] == choice.prompt.replace("P", " A")
    assert {choice.correct for choice in choices} == {0, 1, 2, 3}


def test_an_example_with_its_own_options_keeps_them() -> None:
    example = Example("Q", " B", "law", (" A", " B"))
    [choice] = multiple_choice([example], [], count=1)
    assert (choice.options, choice.correct) == ((" A", " B"), 1)


def test_a_pool_with_too_few_answers_raises() -> None:
    pool = [Example("P", " A"), Example("Q", " A")]
    with pytest.raises(ConfigError, match="4 distinct answers in the pool, there are 1"):
        multiple_choice(pool, pool, count=1)
