"""Laws of scoring by lm-eval: two-sided, from files, and equal to lm-eval's own."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recipes import rigged_llama

from gradcodec.errors import ConfigError
from gradcodec.recipes import models
from gradcodec.recipes.adapters import adapted
from gradcodec.recipes.eval_scores import Answer, chosen, score
from gradcodec.recipes.eval_tasks import Source, load_tasks

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'gradcodec[eval]'")

ANSWERS = "ABCDDCBBBADACBDB"


def ask(model: Any, tokenizer: Any, source: Source, **options: Any) -> list[Answer]:
    tasks = load_tasks([source], options.pop("shots", None))
    questions, _ = chosen(tasks, options.pop("limit", None), options.pop("skip", lambda row: False))
    return score(model, tokenizer, tasks, questions, **options)


def mean(answers: list[Answer]) -> float:
    return sum(a.score for a in answers) / len(answers)


@pytest.mark.parametrize("letter", "ABCD")
def test_a_model_that_says_one_letter_scores_its_share(letter: str, tmp_path: Path) -> None:
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", letter)))
    answers = ask(model, tokenizer, Source("mmlu", str(mmlu(tmp_path))))
    assert mean(answers) == Counter(ANSWERS)[letter] / len(ANSWERS)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_model_that_says_the_right_letter_scores_everything(batch: int, tmp_path: Path) -> None:
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", "B")))
    lora = rigged_llama.save_adapter(tmp_path / "lora")
    with adapted(model, str(lora)) as tuned:
        answers = ask(tuned, tokenizer, Source("mmlu", str(mmlu(tmp_path))), batch=batch)
    assert [a.score for a in answers] == [1.0] * len(ANSWERS)
    assert {a.options for a in answers} == {4}
    assert not any(a.cut for a in answers)


def mmlu(folder: Path) -> Path:
    return rigged_llama.mmlu(folder / "mmlu.jsonl", ANSWERS)


def test_ceval_reads_its_own_columns(tmp_path: Path) -> None:
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", "C")))
    rows = [
        {"question": f"KEY{x}", **dict.fromkeys("ABCD", "x"), "answer": x, "subject": "law"}
        for x in ANSWERS
    ]
    path = tmp_path / "ceval.json"
    path.write_text(json.dumps(rows))
    answers = ask(model, tokenizer, Source("ceval-valid", str(path)))
    assert mean(answers) == Counter(ANSWERS)["C"] / len(ANSWERS)
    assert {(a.subtask, a.group) for a in answers} == {("ceval-valid_law", None)}


def test_gsm8k_is_compared_after_its_filters(tmp_path: Path) -> None:
    """A model that says B says no number: nothing is right, by either filter."""
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", "B")))
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "it is 2\n#### 2"}) + "\n")
    answers = ask(model, tokenizer, Source("gsm8k", str(path)), shots=0)
    assert {(a.metric, a.score) for a in answers} == {
        ("exact_match, strict-match", 0.0),
        ("exact_match, flexible-extract", 0.0),
    }


def test_the_prompt_is_lm_evals_with_the_examples_in_front(tmp_path: Path) -> None:
    few = rigged_llama.mmlu(tmp_path / "dev.jsonl", "DD" + "A" * 10)
    tasks = load_tasks([Source("mmlu", str(mmlu(tmp_path)), str(few))], 2)
    task = tasks["mmlu_anatomy"].task
    task.build_all_requests(limit=1)
    listed = "A. one\nB. two\nC. three\nD. four\nAnswer:"
    assert [request.args for request in task.instances] == [
        (
            "The following are multiple choice questions (with answers) about anatomy.\n\n"
            f"number 0 KEYD\n{listed} D\n\nnumber 2 KEYA\n{listed} A\n\nnumber 0 KEYA\n{listed}",
            f" {letter}",
        )
        for letter in "ABCD"
    ]


def test_shots_follow_the_file_of_examples(tmp_path: Path) -> None:
    file, few = str(mmlu(tmp_path)), str(rigged_llama.mmlu(tmp_path / "dev.jsonl", "A" * 10))

    def shots(*source: Any, given: int | None = None) -> int:
        task = load_tasks([Source(*source)], given)["mmlu_sociology"].task
        return int(task.get_config("num_fewshot"))

    assert shots("mmlu", file) == 0
    assert shots("mmlu", file, few) == 5
    assert shots("mmlu", file, few, given=3) == 3


def test_the_limit_is_for_each_subject_and_after_what_is_skipped(tmp_path: Path) -> None:
    tasks = load_tasks([Source("mmlu", str(mmlu(tmp_path)))])
    skip = {"number 0 KEYA", "number 2 KEYC"}
    numbers, skipped = chosen(tasks, 3, lambda row: row["question"] in skip)
    assert numbers == {"mmlu_anatomy": [2, 3, 4], "mmlu_sociology": [0, 1, 2]}
    assert skipped == 2
    with pytest.raises(ConfigError, match="trained on all 16"):
        chosen(tasks, None, lambda row: True)


def test_only_the_chosen_questions_are_asked(tmp_path: Path) -> None:
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", "A")))
    answers = ask(
        model,
        tokenizer,
        Source("mmlu", str(mmlu(tmp_path))),
        skip=lambda row: row["answer"] != 0 or "number 0" in row["question"],
    )
    assert [(a.subtask, a.question, a.score) for a in answers] == [
        ("mmlu_sociology", 4, 1.0),
        ("mmlu_sociology", 5, 1.0),
    ]


def test_prompts_that_the_model_cannot_hold_are_counted(tmp_path: Path) -> None:
    model, tokenizer = models.load_base(str(rigged_llama.save(tmp_path / "base", "A")))
    path = rigged_llama.mmlu(tmp_path / "mmlu.jsonl", "AA")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["question"] = "word " * 600
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [a.cut for a in ask(model, tokenizer, Source("mmlu", str(path)))] == [False, True]


def row(**changes: Any) -> dict[str, Any]:
    return {
        "question": "q",
        "choices": list("wxyz"),
        "answer": 1,
        "subject": "anatomy",
        **changes,
    }


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], "holds no rows"),
        ([3], "columns of mmlu: question, choices, answer, subject; got int"),
        ([{"question": "q", "answer": "2"}], "row 0: .*got question, answer"),
        ([row(), row(subject="alchemy")], "row 1: mmlu has no subject 'alchemy'; it has abstract"),
        ([row(choices=["x"])], r"a list of 4 choices, got \['x'\]"),
        ([row(choices=["x", "y", "z", None])], "row 0: expected a list of texts in 'choices'"),
        ([row(question=None)], "row 0: expected text in 'question', got None"),
        ([row(answer=4)], "0 to 3, or A to D, got 4"),
        ([row(answer="AB")], "0 to 3, or A to D, got 'AB'"),
        ([row(answer=True)], "0 to 3, or A to D, got True"),
    ],
)
def test_a_file_of_something_else_is_named(rows: list[Any], named: str, tmp_path: Path) -> None:
    path = tmp_path / "mmlu.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ConfigError, match=named):
        load_tasks([Source("mmlu", str(path))])


def test_letters_are_answers_too(tmp_path: Path) -> None:
    path = tmp_path / "mmlu.jsonl"
    path.write_text(json.dumps(row(answer=" c")) + "\n")
    task = load_tasks([Source("mmlu", str(path))])["mmlu_anatomy"].task
    assert task.eval_docs[0]["answer"] == 2


@pytest.mark.parametrize(
    ("source", "shots", "named"),
    [
        (("hellaswag", "FILE"), None, "one of mmlu, ceval-valid, gsm8k, got 'hellaswag'"),
        (("mmlu", "FILE"), 1, r"expected 1 examples for mmlu_anatomy, got 0.*--fewshot"),
        (("mmlu", "FILE", "FILE"), 9, "expected 9 examples for mmlu_anatomy, got 8"),
        (("mmlu", None, "FILE"), None, r"--dataset.* beside the file of examples"),
        (("mmlu", "questions.parquet"), None, r"expected a .jsonl or .json file"),
    ],
)
def test_sources_that_do_not_fit_are_named(
    source: tuple[str | None, ...], shots: int | None, named: str, tmp_path: Path
) -> None:
    file = str(mmlu(tmp_path))
    with pytest.raises(ConfigError, match=named):
        load_tasks([Source(*(file if part == "FILE" else part for part in source))], shots)


def test_the_same_task_twice_is_refused(tmp_path: Path) -> None:
    source = Source("mmlu", str(mmlu(tmp_path)))
    with pytest.raises(ConfigError, match="each task once, got mmlu_anatomy twice"):
        load_tasks([source, source])
