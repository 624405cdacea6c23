"""What a message about a damaged file of a run says, is followed; the run ends as it would have."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipes.test_experiment import TINY, timeless, write_sums

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.results import summarise
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining

SCHEMES = ("subspace-32", "paper-working", "centralised")
GATHERED = "tgap.safetensors"


class Stop(Exception):
    """Ends a run where a kill might."""


def settings(data: Path) -> Settings:
    small = {"limit": None, "lora_r": 2, "targets": ("q_proj",), "max_length": 16}
    local = LocalTraining(steps=1)
    return Settings(**{**TINY, **small, "dataset": str(data), "schemes": SCHEMES, "local": local})


def go_on(path: Path, chosen: Settings, stop: str = "") -> dict[str, Any]:
    def progress(phase: str, done: int, total: int, figures: object) -> None:
        if stop and phase.startswith(stop):
            raise Stop

    with RunFolder(path, chosen.to_dict(), resume=True) as folder:
        results = Experiment(chosen, folder, progress).run()
        return timeless(summarise(chosen, results, folder.load("tgap.json")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Path, Path, dict[str, Any]]:
    """Settings, a run that was stopped after TGAP's gathering, the run when done, its outcome."""
    root = tmp_path_factory.mktemp("runs")
    chosen = settings(write_sums(root / "sums.jsonl"))
    with pytest.raises(Stop):
        go_on(root / "gathered", chosen, "TGAP: train")
    shutil.copytree(root / "gathered", root / "done")
    return chosen, root / "gathered", root / "done", go_on(root / "done", chosen)


def damage(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "needs"),
    [
        ("tgap.json", "the fit"),
        ("resnet3-working.json", "the fit"),
        ("codecs/subspace-32/model.safetensors", "the fit"),
        ("codecs/resnet3-working/config.json", "the fit"),
        ("schemes/paper-working.json", "a scheme"),
        ("checkpoints/subspace-32.safetensors", "a scheme"),
        ("checkpoints/centralised.safetensors", "a scheme"),
        (GATHERED, "gathering"),
        ("snapshots/000000001.safetensors", "gathering"),
    ],
)
def test_doing_what_the_message_says_mends_the_run(
    damaged: str, needs: str, run: tuple[Settings, Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    chosen, gathered, done, outcome = run
    path = tmp_path / "run"
    shutil.copytree(gathered if needs == "gathering" else done, path)
    if needs == "a scheme":  # its result is read first, then its checkpoint
        files.previous(path / damaged).unlink(missing_ok=True)
        if damaged.startswith("checkpoints"):
            (path / "schemes" / f"{Path(damaged).stem}.json").unlink()
    if damaged == "resnet3-working.json":
        (path / "tgap.json").unlink()
    files.previous(path / GATHERED).unlink(missing_ok=True)
    damage(path / damaged)
    with pytest.raises(ConfigError) as raised:
        go_on(path, chosen)
    said = str(raised.value)
    assert damaged.rsplit("/", 1)[0] in said
    (to_delete,) = re.findall(rf"delete ({path}\S+) ", said) or [path / damaged]
    assert "delete" in said
    Path(to_delete).unlink()
    assert go_on(path, chosen) == outcome


@pytest.mark.slow
def test_a_missing_codec_is_asked_of_no_hub(
    run: tuple[Settings, Path, Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``run/codecs/x`` or ``x.run/codec`` could be taken for a repository's name."""
    chosen, _, done, _ = run
    shutil.copytree(done, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "codecs" / "subspace-32")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such folder .*tgap\.json and resume"):
        go_on(Path("run"), chosen)


@pytest.mark.slow
def test_a_moved_run_goes_on(
    run: tuple[Settings, Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    chosen, gathered, _, outcome = run
    shutil.copytree(gathered, tmp_path / "elsewhere")
    assert go_on(tmp_path / "elsewhere", chosen) == outcome


@pytest.mark.slow
def test_a_killed_centralised_training_goes_on(
    run: tuple[Settings, Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    chosen, _, done, outcome = run
    path = tmp_path / "run"
    shutil.copytree(done, path)
    (path / "schemes" / "centralised.json").unlink()
    (path / "checkpoints" / "centralised.safetensors").unlink()
    with pytest.raises(Stop):
        go_on(path, chosen, "centralised")
    assert len(files.load_tensors(path / "checkpoints/centralised.safetensors", "")[1]) == 1
    assert go_on(path, chosen) == outcome
