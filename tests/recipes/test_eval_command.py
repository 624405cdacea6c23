"""Laws of ``gradcodec eval``: from the Hub, from files, from a run; and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import closed_port
from loopback_hub import LoopbackHub
from recipes import rigged_llama
from recipes.test_experiment import environment

from gradcodec import cli
from gradcodec.recipes import data, models
from gradcodec.recipes.adapters import adapted
from gradcodec.recipes.evaluate import mean_loss
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.models import EMBEDDED_FOLDER
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-eval: pip install 'gradcodec[eval]'",
)
ANSWERS = "ABCDDCBBBADACBDB"


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["eval", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a request that cannot be met."""
    assert cli.main(["eval", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


# -- from files ------------------------------------------------------------------------------------


@needs_lm_eval
def test_a_base_model_and_its_adapter_stand_side_by_side(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = rigged_llama.save(tmp_path / "base", "B")
    lora = rigged_llama.save_adapter(tmp_path / "lora")
    file = rigged_llama.mmlu(tmp_path / "mmlu.jsonl", ANSWERS)
    arguments = ("--tasks", "mmlu", "--dataset", str(file), "--device", "cpu")
    out = tmp_path / "out.json"
    printed = evaluate(
        capsys,
        *("--model", str(base), "--adapter", str(lora), "--out", str(out), *arguments),
    )
    assert "base on mmlu.jsonl" in printed
    assert "| questions | number | base | lora |" in printed
    assert "| STEM | 8 | 25.0 % ± 16.4 | 100.0 % ± 0.0 |" in printed
    assert "| all | 16 | 37.5 % ± 12.5 | 100.0 % ± 0.0 |" in printed
    assert "Within two standard errors of guessing: base." in printed
    assert "| lora minus base | +62.5 % ± 12.5 | 10 | yes |" in printed
    assert (tmp_path / "out.md").read_text() in printed
    document = json.loads(out.read_text())
    assert document["versions"]["lm_eval"]
    assert document["settings"]["shots"] == {"mmlu": 0}
    scores = [row["score"] for row in document["rows"] if row["model"] == "lora"]
    assert scores == [1.0] * len(ANSWERS)
    assert len(document["rows"]) == 2 * len(ANSWERS)


@needs_lm_eval
def test_an_adapter_that_does_not_fit_is_named_before_anything_is_asked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(
        capsys,
        *("--model", str(rigged_llama.save(tmp_path / "base", "B"))),
        *("--adapter", str(rigged_llama.save_adapter(tmp_path / "wide", width=32))),
        *("--tasks", "mmlu"),
        *("--dataset", str(rigged_llama.mmlu(tmp_path / "mmlu.jsonl", ANSWERS))),
        *("--out", str(tmp_path / "out.json")),
    )
    assert "wide' does not fit this LlamaForCausalLM" in line
    assert not (tmp_path / "out.json").exists()


# -- from the Hub ----------------------------------------------------------------------------------


def python(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )


def command(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    start = "import sys; from gradcodec.cli import main; sys.exit(main())"
    return python(tmp_path, "-c", start, "eval", *arguments, **more)


def publish(hub: LoopbackHub, folder: Path, questions: Path, examples: Path) -> None:
    """The questions as the data set that lm-eval's task ``mmlu_anatomy`` downloads."""
    card = (
        "---\nconfigs:\n- config_name: anatomy\n  data_files:\n"
        "  - {split: test, path: anatomy/test.jsonl}\n"
        "  - {split: dev, path: anatomy/dev.jsonl}\n---\n"
    )
    files = {
        "README.md": card.encode(),
        "anatomy/test.jsonl": questions.read_bytes(),
        "anatomy/dev.jsonl": examples.read_bytes(),
    }
    hub.commit("cais/mmlu", files, repo_type="dataset")


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_model_adapter_and_questions_come_from_the_hub(tmp_path: Path) -> None:
    questions = rigged_llama.mmlu(tmp_path / "test.jsonl", ANSWERS, ("anatomy",))
    with LoopbackHub() as hub:
        hub.commit("user/tiny", rigged_llama.save(tmp_path / "base", "D"))
        hub.commit("user/lora", rigged_llama.save_adapter(tmp_path / "lora"))
        publish(hub, tmp_path, questions, questions)
        done = command(
            tmp_path,
            *("--model", "user/tiny", "--adapter", "user/lora", "--tasks", "mmlu_anatomy"),
            HF_ENDPOINT=hub.endpoint,
        )
        asked = {path for _, path in hub.requests}
    assert done.returncode == 0, done.stderr
    assert "| all | 16 | 25.0 % ± 11.2 | 100.0 % ± 0.0 |" in done.stdout
    assert any("user/tiny" in path and path.endswith("model.safetensors") for path in asked)
    assert any("user/lora" in path and "adapter_model.safetensors" in path for path in asked)


COMPARE = """
import json, pathlib, sys
from lm_eval import evaluator, tasks
from gradcodec.recipes import models
from gradcodec.recipes.eval_scores import chosen, score
from gradcodec.recipes.eval_tasks import Source, load_tasks

questions, examples = sys.argv[1:]
place = str(pathlib.Path(tasks.__file__).parent / "mmlu" / "default")
evaluator.add_env_info = lambda results: None  # asks pip and more, for many seconds
theirs = evaluator.simple_evaluate(
    model="hf",
    model_args={"pretrained": "user/tiny", "device": "cpu"},
    tasks=["mmlu_anatomy"],
    num_fewshot=2,
    bootstrap_iters=0,
    # Without the others, which take long to read.
    task_manager=tasks.TaskManager(include_defaults=False, include_path=place),
)["samples"]["mmlu_anatomy"]
model, tokenizer = models.load_base("user/tiny")
found = [[sample["acc"] for sample in theirs]]
for source in (Source("mmlu_anatomy"), Source("mmlu", questions, examples)):
    tasks = load_tasks([source], 2)
    numbers, _ = chosen(tasks, None, lambda row: False)
    found.append([answer.score for answer in score(model, tokenizer, tasks, numbers)])
print(json.dumps(found))
"""


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scores_are_lm_evals_own_on_the_same_items(tmp_path: Path) -> None:
    """Of a model with opinions: the shipped one, on answers of which one is a docstring's."""
    examples = data.load_examples("stdlib")[:400]
    choices = data.multiple_choice(examples, examples, 60)
    rows = [
        {
            "question": choice.prompt,
            "choices": list(choice.options),
            "answer": choice.correct,
            "subject": "anatomy",
        }
        for choice in choices
    ]
    files = [tmp_path / "test.jsonl", tmp_path / "dev.jsonl"]
    for file, some in zip(files, (rows[4:], rows[:4]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    with LoopbackHub() as hub:
        hub.commit("user/tiny", EMBEDDED_FOLDER)
        publish(hub, tmp_path, *files)
        done = python(tmp_path, "-c", COMPARE, *map(str, files), HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    theirs, from_hub, from_file = json.loads(done.stdout.splitlines()[-1])
    assert 0 < sum(theirs) < len(theirs) == 56
    assert from_hub == theirs
    assert from_file == theirs


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_that_cannot_be_downloaded_names_the_option_for_files(tmp_path: Path) -> None:
    base = str(rigged_llama.save(tmp_path / "base", "A"))
    done = command(
        tmp_path,
        *("--model", base, "--tasks", "gsm8k"),
        HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}",
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("gradcodec: ConfigError: cannot load the questions of 'gsm8k'")
    assert "--dataset" in line


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_unknown_task_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--model", "embedded", "--tasks", "mmlo")
    assert "expected a task of lm-eval, got 'mmlo'; did you mean 'mmlu'" in line


# -- from a run ------------------------------------------------------------------------------------

SCHEMES = ("fp32", "topk")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings, dict[str, float]]:
    """A tiny run on questions with options: its folder, settings and final losses."""
    folder = tmp_path_factory.mktemp("eval")
    base = rigged_llama.save(folder / "base", "A")
    questions = rigged_llama.mmlu(folder / "mmlu.jsonl", ANSWERS * 4)
    settings = Settings(
        model=str(base),
        dataset=str(questions),
        lora_r=4,
        targets=("o_proj",),
        max_length=64,
        clients=2,
        fraction=1.0,
        rounds=2,
        held_out=20,
        questions=4,
        min_client=2,
        device="cpu",
        local=LocalTraining(steps=2),
        schemes=SCHEMES,
    )
    with RunFolder(folder / "run", settings.to_dict()) as made:
        results = Experiment(settings, made, lambda *_: None).run()
    return folder / "run", settings, {r.scheme.name: r.final_loss for r in results}


def test_the_adapter_that_a_run_keeps_has_the_loss_that_it_reports(
    run: tuple[Path, Settings, dict[str, float]],
) -> None:
    folder, s, losses = run
    model, tokenizer = models.load_base(s.model)
    _, held = data.held_out(data.load_examples(s.dataset), s.held_out, s.seed)
    batch = data.collate(
        [data.encode_example(tokenizer, e, s.max_length) for e in held], tokenizer.pad_token_id
    )
    found = {}
    for scheme in SCHEMES:
        with adapted(model, str(folder / "adapters" / scheme)) as tuned:
            found[scheme] = mean_loss(tuned, [batch])
    assert found == pytest.approx(losses, rel=1e-6)
    assert len({mean_loss(model, [batch]), *found.values()}) == 3


@needs_lm_eval
def test_a_run_is_compared_on_questions_that_it_was_not_trained_on(
    run: tuple[Path, Settings, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, s, _ = run
    out = tmp_path / "out.json"
    printed = evaluate(
        capsys,
        *("--run", str(folder), "--tasks", "mmlu", "--dataset", s.dataset),
        *("--out", str(out), "--device", "cpu"),
    )
    assert "| questions | number | base | fp32 | topk |" in printed
    assert "44 questions that the run was trained on are left out" in printed
    assert "| all | 20 |" in printed
    assert all(f"| {pair} | " in printed for pair in ("fp32 minus base", "topk minus fp32"))
    asked = {(r["subtask"], r["question"]) for r in json.loads(out.read_text())["rows"]}
    rows = [json.loads(line) for line in Path(s.dataset).read_text().splitlines()]
    numbers = {"mmlu_anatomy": rows[::2], "mmlu_sociology": rows[1::2]}
    _, held = data.held_out(data.load_examples(s.dataset), s.held_out, s.seed)
    prompts = {data.example_of(numbers[task][n], "").prompt for task, n in asked}
    assert prompts == {e.prompt for e in held}


@needs_lm_eval
def test_schemes_of_a_run_can_be_chosen(
    run: tuple[Path, Settings, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, s, _ = run
    arguments = ("--run", str(folder), "--tasks", "mmlu", "--dataset", s.dataset)
    printed = evaluate(capsys, *arguments, "--schemes", "topk", "--limit", "2")
    assert "| questions | number | base | topk |" in printed
    assert "| all | 4 |" in printed
    line = refused(capsys, *arguments, "--schemes", "sign")
    assert "has no adapter of 'sign'; it has fp32, topk" in line


@needs_lm_eval
def test_folders_that_are_no_finished_run_are_named(
    run: tuple[Path, Settings, dict[str, float]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    _, s, _ = run
    arguments = ("--tasks", "mmlu", "--dataset", s.dataset)
    line = refused(capsys, *arguments, "--run", str(tmp_path))
    assert f"expected the folder of a run (--run), got {tmp_path}: no config.json" in line
    RunFolder(tmp_path, s.to_dict()).close()
    line = refused(capsys, *arguments, "--run", str(tmp_path))
    assert "expected a run with a finished scheme" in line
    (tmp_path / "moved").mkdir()
    moved = {**s.to_dict(), "dataset": str(tmp_path / "gone.jsonl")}
    RunFolder(tmp_path / "moved", moved).close()
    os.symlink(run[0] / "adapters", tmp_path / "moved" / "adapters")
    os.symlink(run[0] / "schemes", tmp_path / "moved" / "schemes")
    line = refused(capsys, *arguments, "--run", str(tmp_path / "moved"))
    assert "cannot tell on which questions the run was trained" in line


# -- requests that cannot be met -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tasks", ","), "comma-separated names (--tasks)"),
        (("--tasks", "mmlu,mmlu"), "each task once (--tasks), got mmlu twice"),
        (("--tasks", "mmlu", "--shots", "-1"), "--shots of at least 0"),
        (("--tasks", "mmlu,gsm8k", "--dataset", "a.jsonl"), "each of the 2 tasks (--dataset)"),
        (("--tasks", "mmlu", "--fewshot", "a", "b"), "each of the 1 tasks (--fewshot), got 2"),
        (("--tasks", "mmlu", "--out", "figures"), "ends in .json (--out), got 'figures'"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(capsys, "--model", "embedded", *arguments)


@pytest.mark.parametrize("name", ["notes.json", "notes.md"])
def test_files_that_eval_has_not_written_are_not_overwritten(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    out = str(tmp_path / "notes.json")
    line = refused(capsys, "--model", "embedded", "--tasks", "mmlu", "--out", out)
    assert f"{tmp_path / name} would be lost" in line
    assert (tmp_path / name).read_text() == "{}"


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "expected a model (--model) or the folder of a run (--run), got neither"),
        (("--schemes", "fp32", "--model", "embedded"), "among the schemes of a --run"),
        (("--model", "embedded", "--limit", "0"), "--limit of at least 1, got 0"),
        (("--model", "embedded", "--batch", "0"), "--batch of at least 1, got 0"),
    ],
)
def test_more_bad_requests_are_one_line(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(rigged_llama.mmlu(tmp_path / "mmlu.jsonl", "A"))
    assert named in refused(capsys, "--tasks", "mmlu", "--dataset", file, *arguments)


@pytest.mark.parametrize("missing", ["lm_eval", "accelerate"])
def test_without_the_extra_the_command_says_how_to_get_it(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name) or True
    )
    line = refused(capsys, "--model", "embedded", "--tasks", "mmlu")
    assert line == (
        f"gradcodec: ConfigError: `gradcodec eval` needs {missing}, which is missing: "
        "pip install 'gradcodec[eval]'"
    )
