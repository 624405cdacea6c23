"""The benchmark on a pretrained LLaMA, played with the embedded one and a handful of questions."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.federated.world import world_of
from benchmarks.gpu import llama as gpu
from benchmarks.llama import case, tasks
from benchmarks.llama.schemes import SCHEMES
from benchmarks.llama.transfer import bundled
from benchmarks.run import Options
from gradcodec.codec import Codec
from gradcodec.hub.local import bundled_path
from gradcodec.recipes.settings import PRESETS
from gradcodec.recipes.task import LocalTraining

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up questions; the worlds of the case are small and made from it."""
    folder = tmp_path / "data"
    folder.mkdir()
    sums = [{"question": f"What do {n} apples cost?", "answer": f"#### {3 * n}"} for n in range(60)]
    choices = [
        {"question": f"{n}?", "choices": ["a", "b"], "answer": n % 2, "subject": f"s{n % 3}"}
        for n in range(60)
    ]
    for name, found in (("gsm8k-train", sums), ("mmlu-test", choices)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text)
    small = {
        name: dataclasses.replace(
            PRESETS[name],
            clients=4,
            fraction=0.5,
            min_client=4,
            held_out=6,
            tgap_rounds=2,
            max_length=32,
            device="cpu",
            local=LocalTraining(steps=1, batch=2, micro_batch=2),
        )
        for name in ("smollm2-gsm8k", "smollm2-mmlu")
    }
    monkeypatch.setattr(tasks, "PRESETS", small)
    monkeypatch.setenv(tasks.PLACES[0], "embedded")
    monkeypatch.setenv(tasks.PLACES[1], str(folder))
    monkeypatch.setattr("benchmarks.federated.fitted.CACHE", tmp_path / "tgap")
    world_of.cache_clear()
    yield folder
    world_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_stages_by_plan_are_played_to_the_end(data: Path, task: str) -> None:
    names = ("fp32", "rotsign-64", "narrow-wide-16", "fit-16", "refit-16")
    for name in names:
        made = list(case.play_job(case.job(task, SCHEMES[name], 0, 4e-3, 8)))
        assert [row["round"] for row in made] == list(range(1, 9)), name
        last = made[-1]
        assert not last["diverged"]
        assert not last["rejected"]
        assert (last["accuracy"] is None) == (task == "gsm8k")
        if name == "narrow-wide-16":  # the narrow rounds cost less than the wide ones
            up = [row["uplink_bytes"] for row in made]
            assert up[0] < (up[3] - up[2]) / 2
            assert made[0]["codec_bytes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", tasks.TASKS)
def test_bases_from_elsewhere_are_trained_in_like_fitted_ones(data: Path, task: str) -> None:
    """By size alone: in two rounds of a toy no source of bases is better than another."""
    ends = {}
    for name in ("sub-8", "other-8", "random-8"):
        made = list(case.play_job(case.job(task, SCHEMES[name], 0, 4e-3, 2)))
        assert not made[-1]["rejected"], name
        ends[name] = made[-1]
    assert ends["random-8"]["codec_bytes"] == 0 < ends["other-8"]["codec_bytes"]
    assert len({end["loss"] for end in ends.values()}) == 3, "three different codecs"
    ups = [end["uplink_bytes"] for end in ends.values()]
    assert max(ups) < 1.5 * min(ups)


def test_a_codec_of_the_package_costs_its_download() -> None:
    name = "stdlib-llama-lora-r8-32x"
    spec = Codec.from_pretrained(name).spec
    assert spec is not None
    world: Any = SimpleNamespace(initial={t.name: torch.zeros(t.shape) for t in spec})
    folder = bundled_path(name)
    size = sum((folder / file).stat().st_size for file in ("config.json", "model.safetensors"))
    assert bundled(name)(world).codec_bytes == size


@pytest.mark.slow
def test_a_case_that_was_run_is_not_run_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(tmp_path, quick=True, schemes=("fp32", "rotsign-64"), rounds=1, workers=1)
    assert case.main(options) == []
    path = tmp_path / "llama-gsm8k.jsonl"
    before = path.read_bytes()
    capsys.readouterr()
    assert case.main(options) == []
    assert "0 of 2 runs to do" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert {run[0]["scheme"] for run in rows.runs(path).values()} == {"fp32", "rotsign-64"}


def test_a_run_is_the_same_wherever_its_model_and_data_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = case.job("gsm8k", SCHEMES["fp32"], 0, 4e-3, 10).stamp()["run"]
    for place in tasks.PLACES:
        monkeypatch.setenv(place, "/somewhere/else")
    assert case.job("gsm8k", SCHEMES["fp32"], 0, 4e-3, 10).stamp()["run"] == there
    assert tasks.settings("gsm8k", 0, 10).model == "/somewhere/else"


def test_every_scheme_has_a_family_that_is_tuned() -> None:
    assert {s.family for s in SCHEMES.values()} <= set(SCHEMES)


def test_the_script_for_a_gpu_asks_for_schemes_and_tasks_that_there_are() -> None:
    groups = (*gpu.TWENTY, *gpu.TEN, *gpu.LAST, *gpu.OTHER, *gpu.MMLU, gpu.PEERS)
    assert {name for group in groups for name in group} <= set(SCHEMES)
    assert all(SCHEMES[SCHEMES[n].family].grid for group in groups for n in group)
    for task in gpu.KNOWN:
        assert tasks.settings(task, 0, 1).clients == 20
