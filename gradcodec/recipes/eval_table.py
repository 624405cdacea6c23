r"""From answers to figures: means, standard errors, and differences paired by question.

A mean of n scores has the standard error :math:`s / \sqrt n` with s the sample standard deviation;
over several subjects too, where lm-eval pools the subjects' variances instead. Two models are
compared by the mean of the differences of their scores to the same question, with the standard
error of that mean: questions that both answer alike add little to it, so it is smaller than that
of two independent samples, the more alike the models are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradcodec.errors import ConfigError
from gradcodec.recipes.eval_scores import Answer
from gradcodec.recipes.eval_tasks import GROUPS

__all__ = ["ALL", "differences", "figures", "markdown"]

#: Name of the row over all questions.
ALL = "all"

Figure = dict[str, Any]


def figures(answers: Mapping[str, Sequence[Answer]]) -> list[Figure]:
    """Mean score of each model, for all questions of a task and for each group of subjects.

    Args:
        answers: of each model, by its name; all to the same questions.

    Returns:
        Plain JSON values: ``mean`` and ``stderr`` are shares of 1; ``stderr`` is ``None`` for a
        single question; ``chance`` is the mean for guessing, ``None`` for free answers.
    """
    out = []
    for model, own in answers.items():
        for (task, metric), some in _by_metric(own).items():
            groups = [ALL, *(g for g in GROUPS.values() if any(a.group == g for a in some))]
            for group in groups:
                members = [a for a in some if group in (ALL, a.group)]
                chances = [1 / a.options for a in members if a.options]
                mean, stderr = _mean([a.score for a in members])
                out.append(
                    {
                        "task": task,
                        "metric": metric,
                        "group": group,
                        "model": model,
                        "questions": len(members),
                        "mean": mean,
                        "stderr": stderr,
                        "chance": sum(chances) / len(chances) if chances else None,
                    }
                )
    return out


def differences(answers: Mapping[str, Sequence[Answer]]) -> list[Figure]:
    """Each later model against each earlier one, over all questions of a task.

    Returns:
        Plain JSON values: the mean of (score of ``model`` - score of ``minus``), its paired
        standard error, in how many questions the two scores differ, and whether the difference is
        larger than two standard errors.

    Raises:
        ConfigError: the models did not answer the same questions.
    """
    out = []
    names = list(answers)
    for number, model in enumerate(names):
        for minus in names[:number]:
            ours, theirs = _by_metric(answers[model]), _by_metric(answers[minus])
            for (task, metric), some in ours.items():
                before = {(a.subtask, a.question): a.score for a in theirs.get((task, metric), ())}
                keys = [(a.subtask, a.question) for a in some]
                if sorted(keys) != sorted(before):
                    raise ConfigError(
                        f"expected the same questions of {task} for {model} and {minus}, got "
                        f"{len(keys)} and {len(before)} with {len(before.keys() & keys)} in common"
                    )
                paired = [a.score - before[key] for a, key in zip(some, keys, strict=True)]
                mean, stderr = _mean(paired)
                out.append(
                    {
                        "task": task,
                        "metric": metric,
                        "model": model,
                        "minus": minus,
                        "questions": len(paired),
                        "difference": mean,
                        "stderr": stderr,
                        "changed": sum(d != 0 for d in paired),
                        "beyond_two_stderr": _beyond(mean, stderr),
                    }
                )
    return out


def markdown(
    answers: Mapping[str, Sequence[Answer]], shots: Mapping[str, int], cut: Mapping[str, int]
) -> str:
    """The tables of `figures` and `differences`, and in words what they show and do not show.

    Args:
        answers: of each model, by its name.
        shots: examples before each question, by task.
        cut: how many prompts were too long for the model and lost their start, by task.
    """
    rows, pairs = figures(answers), differences(answers)
    models = list(answers)
    parts = []
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in rows):
        here = [r for r in rows if (r["task"], r["metric"]) == (task, metric)]
        of = {(r["group"], r["model"]): r for r in here}
        groups = [g for g in dict.fromkeys(r["group"] for r in here) if g != ALL]
        lines = [
            f"**{task}**: {metric}, {_count(shots[task], 'example')} before each question",
            "",
            f"| questions | number | {' | '.join(models)} |",
            "|---|--:" + "|--:" * len(models) + "|",
        ]
        for group in (*groups, ALL):
            cells = [_share(of[group, m]["mean"], of[group, m]["stderr"]) for m in models]
            number = of[group, models[0]]["questions"]
            lines.append(f"| {group} | {number:,} | {' | '.join(cells)} |")
        lines += ["", *_words([of[ALL, m] for m in models], cut.get(task, 0))]
        compared = [p for p in pairs if (p["task"], p["metric"]) == (task, metric)]
        if compared:
            lines += [
                "",
                "| compared, question by question | difference | scored differently "
                "| beyond two standard errors |",
                "|---|--:|--:|---|",
            ]
            for p in compared:
                name = f"{p['model']} minus {p['minus']}"
                value = _share(p["difference"], p["stderr"], sign="+")
                beyond = "yes" if p["beyond_two_stderr"] else "no"
                lines.append(f"| {name} | {value} | {p['changed']:,} | {beyond} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _words(rows: Sequence[Figure], cut: int) -> list[str]:
    """What the figures over all questions say about guessing, and what they leave open."""
    lines = ["± is one standard error."]
    chance = rows[0]["chance"]
    if chance is not None:
        lines.append(f"Guessing gives {100 * chance:.1f} %.")
        far = {r["model"]: _beyond(r["mean"] - chance, r["stderr"]) for r in rows}
        better = [r["model"] for r in rows if far[r["model"]] and r["mean"] > chance]
        worse = [r["model"] for r in rows if far[r["model"]] and r["mean"] < chance]
        same = [name for name, beyond in far.items() if not beyond]
        if better:
            lines.append(f"Better than that by more than two standard errors: {', '.join(better)}.")
        if worse:
            lines.append(f"Worse than that by more than two standard errors: {', '.join(worse)}.")
        if same:
            lines.append(f"Within two standard errors of guessing: {', '.join(same)}.")
    if cut:
        lines.append(
            f"{_count(cut, 'prompt')} had more tokens than the model takes and lost the start."
        )
    return [" ".join(lines)]


def _by_metric(answers: Sequence[Answer]) -> dict[tuple[str, str], list[Answer]]:
    out: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        out.setdefault((answer.task, answer.metric), []).append(answer)
    return out


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which a single value does not have."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return float(array.mean()), None
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))


def _beyond(value: float, stderr: float | None) -> bool:
    return stderr is not None and abs(value) > 2 * stderr


def _share(mean: float, stderr: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} %" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
