"""One model's answers to the questions of lm-eval's tasks, a row for each question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.eval_tasks import Subtask, quiet

__all__ = ["Answer", "chosen", "score"]

_SEED = 1234  # lm-eval's own, of the examples that stand before a question


@dataclass(frozen=True)
class Answer:
    """How one question was answered.

    Attributes:
        task: name of the task asked for, such as ``"mmlu"``.
        subtask: lm-eval's task that the question is of, such as ``"mmlu_anatomy"``.
        group: group of subjects, or ``None``.
        metric: what was measured; with the filter of the answer where there are several.
        question: number of the question in its subtask.
        score: 1 if it was answered right, else 0; a share for metrics that have shares.
        options: how many options there were to choose from; 0 for a free answer.
        cut: whether the prompt had more tokens than the model takes, and lost its start.
    """

    task: str
    subtask: str
    group: str | None
    metric: str
    question: int
    score: float
    options: int
    cut: bool


def chosen(
    tasks: Mapping[str, Subtask], limit: int | None, skip: Callable[[Mapping[str, Any]], bool]
) -> tuple[dict[str, list[int]], int]:
    """Return which questions to ask of each task, and how many were left out by `skip`.

    Args:
        tasks: What `load_tasks` returned.
        limit: the first questions of each task; ``None`` for all.
        skip: whether a row must not be asked.

    Raises:
        ConfigError: the limit is below 1, or nothing is left to ask.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"expected --limit of at least 1, got {limit}")
    numbers, skipped = {}, 0
    for name, subtask in tasks.items():
        kept: list[int] = []
        for number, row in enumerate(subtask.task.eval_docs):
            if limit is not None and len(kept) == limit:
                break
            if skip(row):
                skipped += 1
            else:
                kept.append(number)
        if kept:
            numbers[name] = kept
    if not numbers:
        raise ConfigError(f"no question is left to ask: the run was trained on all {skipped}")
    return numbers, skipped


def score(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Subtask],
    questions: Mapping[str, list[int]],
    batch: int = 1,
) -> list[Answer]:
    """Ask `model` the questions, and score its answers with lm-eval.

    Multiple choice is scored by likelihood: the option whose text is likeliest after the prompt
    counts as the answer. Free answers are generated greedily and compared after lm-eval's filters.

    Args:
        model: A `transformers` causal language model, on its device.
        tokenizer: Its tokenizer.
        tasks: What `load_tasks` returned.
        questions: Numbers of the questions to ask, by task; others are not asked.
        batch: Prompts per forward pass.

    Raises:
        ConfigError: `batch` is below 1, or a task's metric has no number for each question.
    """
    if batch < 1:
        raise ConfigError(f"expected --batch of at least 1, got {batch}")
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    asked = {name: tasks[name].task for name in questions}
    for task in asked.values():
        # Every model gets the same examples before each question.
        task.set_fewshot_seed(seed=_SEED)
    with quiet():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        result: Any = evaluate(lm, {"tasks": asked}, samples=dict(questions), bootstrap_iters=0)
        return [
            answer
            for name, samples in result["samples"].items()
            for answer in _answers(name, tasks[name], samples, lm)
        ]


def _answers(
    name: str, subtask: Subtask, samples: list[dict[str, Any]], lm: Any
) -> Iterator[Answer]:
    options = subtask.task.OUTPUT_TYPE == "multiple_choice"
    # A continuation's last token is never an input; a free answer needs room.
    room = lm.max_length if options else lm.max_length - lm.max_gen_toks
    filters = {sample["filter"] for sample in samples}
    for sample in samples:
        metric = sample["metrics"][0]
        value = sample[metric]
        if isinstance(value, bool) or not isinstance(value, int | float):
            try:
                value = float(value)  # numpy's numbers
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"expected a task with a score for each question, got {name}, whose "
                    f"{metric} has none"
                ) from error
        yield Answer(
            task=subtask.asked,
            subtask=name,
            group=subtask.group,
            metric=metric if len(filters) == 1 else f"{metric}, {sample['filter']}",
            question=int(sample["doc_id"]),
            score=float(value),
            options=len(sample["arguments"]) if options else 0,
            cut=len(lm.tok_encode(sample["arguments"][0][0])) > room,
        )
