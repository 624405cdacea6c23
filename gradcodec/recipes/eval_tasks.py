"""The tasks of ``gradcodec eval``: lm-eval's own, with questions from the Hub or from files.

A file replaces nothing but where the questions come from: prompt, options, description, few-shot
rule and metric stay those of lm-eval's task of that name.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcodec.errors import ConfigError
from gradcodec.names import wrong_name
from gradcodec.recipes import data

__all__ = ["GROUPS", "Source", "Subtask", "load_tasks", "quiet", "require_lm_eval"]

Row = Mapping[str, Any]

#: Examples in the prompt where a file with examples is given and no number: the papers' number.
SHOTS = 5

#: lm-eval's tags of MMLU's subjects, in the order of the table.
GROUPS = {
    "mmlu_stem_tasks": "STEM",
    "mmlu_humanities_tasks": "humanities",
    "mmlu_social_sciences_tasks": "social sciences",
    "mmlu_other_tasks": "other",
}


@dataclass(frozen=True)
class Source:
    """One task, and where its questions come from.

    Attributes:
        task: lm-eval's name of a task or of a group of tasks.
        dataset: a ``.jsonl`` or ``.json`` file of questions; ``None`` for what lm-eval downloads.
        fewshot: a file of the examples that stand before each question.
    """

    task: str
    dataset: str | None = None
    fewshot: str | None = None


@dataclass(frozen=True)
class Subtask:
    """A task object of lm-eval.

    Attributes:
        asked: the task that was asked for, of which this one may be a part.
        task: the object, with its questions.
        group: the group of subjects that it belongs to; only MMLU has groups.
    """

    asked: str
    task: Any
    group: str | None


@dataclass(frozen=True)
class _Kind:
    """How a file of questions becomes tasks of lm-eval.

    Attributes:
        folder: of lm-eval's configurations.
        columns: that a row must have.
        by_subject: there is a task for each subject, ``<task>_<subject>``.
    """

    folder: str
    columns: tuple[str, ...]
    by_subject: bool = True


#: The tasks that read files.
_FILES = {
    "mmlu": _Kind("mmlu/default", ("question", "choices", "answer", "subject")),
    "ceval-valid": _Kind("ceval", ("question", "A", "B", "C", "D", "answer", "subject")),
    "gsm8k": _Kind("gsm8k", ("question", "answer"), by_subject=False),
}


def require_lm_eval() -> None:
    """Raises ``ConfigError`` where lm-eval, or what its models need, is not installed."""
    for name in ("lm_eval", "accelerate", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"`gradcodec eval` needs {name}, which is missing: pip install 'gradcodec[eval]'"
            )


def load_tasks(sources: Sequence[Source], shots: int | None = None) -> dict[str, Subtask]:
    """Return lm-eval's task objects by name, with their questions.

    Args:
        sources: the tasks.
        shots: examples before each question; ``None`` means 5 where a file of examples is given,
            else the task's own number (none for MMLU and C-Eval, 5 for GSM8K).

    Raises:
        ConfigError: a task is unknown or listed twice, its questions cannot be downloaded, a file
            has other columns or subjects than the task, or there are too few examples.
    """
    tasks: dict[str, Subtask] = {}
    for source in sources:
        if source.dataset is not None:
            found = _from_file(source, shots)
        elif source.fewshot is not None:
            raise ConfigError(
                f"expected a file of questions (--dataset) beside the file of examples (--fewshot) "
                f"of {source.task}, got none"
            )
        else:
            found = _from_hub(source.task, shots)
        again = [name for name in found if name in tasks]
        if again:
            raise ConfigError(f"expected each task once, got {again[0]} twice")
        tasks |= found
    return tasks


def _manager(folder: str) -> Any:
    """What knows the configurations of one folder of lm-eval."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place))


@functools.cache
def _whole_manager() -> Any:
    """What knows all configurations; reading these thousands of files takes many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _from_hub(name: str, shots: int | None) -> dict[str, Subtask]:
    near = [k.folder for task, k in _FILES.items() if name == task or name.startswith(f"{task}_")]
    manager = _manager(near[0]) if near else _whole_manager()
    if name not in manager.task_index:
        manager = _whole_manager()
    if name not in manager.task_index:
        where = "`lm-eval ls tasks` lists all"
        raise ConfigError(wrong_name("a task of lm-eval", name, manager.all_tasks, where))
    try:
        with quiet():
            tasks: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # unreachable, missing, gated: datasets raises many classes
        some = ", ".join(_FILES)
        way = (
            "give its questions as a file (--dataset FILE.jsonl)"
            if name in _FILES
            else f"without a network, choose one of those that read a file (--dataset): {some}"
        )
        raise ConfigError(f"cannot load the questions of {name!r}: {error}; {way}") from error
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", shots or 0)
    return {
        leaf: Subtask(name, task, _group(manager.task_index[leaf])) for leaf, task in tasks.items()
    }


def _from_file(source: Source, shots: int | None) -> dict[str, Subtask]:
    from lm_eval.api.task import ConfigurableTask

    kind = _FILES.get(source.task)
    if kind is None:
        raise ConfigError(
            f"expected a task that reads a file (--dataset), one of {', '.join(_FILES)}, got "
            f"{source.task!r}"
        )
    manager = _manager(kind.folder)
    questions = _by_task(str(source.dataset), source.task, kind, manager)
    examples = _by_task(source.fewshot, source.task, kind, manager) if source.fewshot else {}
    tasks = {}
    for name, rows in questions.items():
        entry = manager.task_index[name]
        config = {k: v for k, v in copy.deepcopy(entry.cfg).items() if k != "tag"}
        wanted = shots
        if wanted is None:
            wanted = SHOTS if source.fewshot else config.get("num_fewshot") or 0
        before = examples.get(name, [])
        if len(before) < wanted:
            raise ConfigError(
                f"expected {wanted} examples for {name}, got {len(before)}: give a file that has "
                "them (--fewshot FILE.jsonl), or ask for fewer (--shots N)"
            )
        splits = {
            config.get("test_split") or config["validation_split"]: rows,
            config["fewshot_split"]: before,
        }
        config |= {"custom_dataset": _reader(splits), "num_fewshot": wanted}
        with quiet():
            task = ConfigurableTask(config=config)
        tasks[name] = Subtask(source.task, task, _group(entry))
    return tasks


def _group(entry: Any) -> str | None:
    """The group by the tags of a configuration; lm-eval drops them from the task that it builds."""
    return next((GROUPS[tag] for tag in entry.tags if tag in GROUPS), None)


@contextmanager
def quiet() -> Iterator[None]:
    """No notices on how gradcodec uses lm-eval, and no progress bar for each subject."""
    import lm_eval.api.task as module

    log, bar = logging.getLogger("lm_eval"), module.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        log.setLevel(level)
        module.tqdm = bar


def _reader(splits: Mapping[str, list[dict[str, Any]]]) -> Any:
    """A function that lm-eval calls for the data set."""
    import datasets

    made = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    return lambda **_: made


def _by_task(file: str, task: str, kind: _Kind, manager: Any) -> dict[str, list[dict[str, Any]]]:
    """A file's rows by the name of lm-eval's task, in the order of the file."""
    if not file.endswith((".jsonl", ".json")):
        raise ConfigError(f"expected a .jsonl or .json file of questions, got {file!r}")
    tasks: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(data.rows_of_file(Path(file))):
        where = f"{file}, row {number}"
        if not isinstance(row, Mapping) or any(column not in row for column in kind.columns):
            got = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise ConfigError(
                f"{where}: expected the columns of {task}: {', '.join(kind.columns)}; got {got}"
            )
        data.check_filled(row, kind.columns, where)
        name = f"{task}_{row['subject']}" if kind.by_subject else task
        if name not in manager.task_index:
            subjects = [n.removeprefix(f"{task}_") for n in manager.all_subtasks]
            raise ConfigError(
                f"{where}: {task} has no subject {row['subject']!r}; it has {', '.join(subjects)}"
            )
        tasks.setdefault(name, []).append(_row(row, task, where))
    if not tasks:
        raise ConfigError(f"{file} holds no rows")
    return tasks


def _row(row: Row, task: str, where: str) -> dict[str, Any]:
    """The columns that lm-eval's prompt uses, as it expects them."""
    question = str(row["question"])
    if task == "gsm8k":
        return {"question": question, "answer": str(row["answer"])}
    options = row["choices"] if task == "mmlu" else [row[letter] for letter in "ABCD"]
    given = row["answer"]
    letter = given.strip().upper() if isinstance(given, str) else given
    right = "ABCD".find(letter) if isinstance(letter, str) and len(letter) == 1 else letter
    if not isinstance(options, list) or len(options) != 4:
        raise ConfigError(f"{where}: expected a list of 4 choices, got {options!r}")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < 4:
        raise ConfigError(f"{where}: expected an answer of 0 to 3, or A to D, got {given!r}")
    texts = [str(option) for option in options]
    if task == "mmlu":
        return {"question": question, "choices": texts, "answer": right}
    return {"question": question, **dict(zip("ABCD", texts, strict=True)), "answer": "ABCD"[right]}
