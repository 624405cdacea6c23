"""Frameworks that own the loop: two ranks run, are killed, and go on to the bits of a whole run.

Every run loads torch and a framework in two processes, so tests share those of the Trainer that are
whole or killed: ``made``, of which a test that goes on has a copy.
"""

import functools
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import two_ranks
from safetensors.torch import load_file

from gradcodec.errors import ConfigError

CASES = Path(__file__).with_name("trainer_cases.py")
PACKAGES = {
    "trainer": "transformers",
    "lightning": "lightning",
    "lightning-sharded": "lightning",  # FSDP2
    "accelerate": "accelerate",
}


def ranks(
    framework: str, folder: Path, mode: str = "whole", value: str = "", *, fails: bool = False
) -> str:
    """What two ranks print; killed ones end with an error, others must not unless they should."""
    folder.mkdir(parents=True, exist_ok=True)
    well, out = two_ranks(CASES, framework, str(folder), mode, value)
    assert well != (fails or mode == "kill"), out[-4000:]
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Maps a framework and ``"whole"`` or ``"kill"`` to the folder of such a run, made once."""

    @functools.cache
    def run(framework: str, mode: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{framework}-{mode}")
        ranks(framework, folder, mode)
        return folder

    return run


Made = Callable[[str, str], Path]


def weights(folder: Path) -> torch.Tensor:
    return load_file(folder / "weights.safetensors")["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", PACKAGES)
def test_a_killed_run_goes_on_to_the_bits_of_a_whole_one(
    framework: str, made: Made, tmp_path: Path
) -> None:
    if find_spec(PACKAGES[framework]) is None:
        pytest.skip(f"needs: pip install {PACKAGES[framework]}")
    whole = made(framework, "whole")
    killed = shutil.copytree(made(framework, "kill"), tmp_path / "killed")
    assert not (killed / "weights.safetensors").exists()
    ranks(framework, killed, "resume")
    assert torch.equal(weights(whole), weights(killed))
    figures = json.loads((whole / "figures.json").read_text())
    assert len(figures) == 4
    assert all(2 < f["gradcodec/ratio"] < 9 for f in figures)  # small tensors pay for headers
    assert all(f[f"gradcodec/{k}_ms"] > 0 for f in figures for k in ("encode", "exchange"))


def in_tensorboard(folder: Path) -> dict[str, list[float]]:
    """What its event files hold, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out: dict[str, list[float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        found = EventAccumulator(str(path))
        found.Reload()
        for tag in found.Tags()["scalars"]:
            out.setdefault(tag, []).extend(event.value for event in found.Scalars(tag))
    return out


def in_wandb(folder: Path) -> dict[str, list[float]]:
    """What an offline run would upload, by name."""
    from wandb.proto.wandb_internal_pb2 import Record

    out: dict[str, list[float]] = {}
    for path in folder.rglob("*.wandb"):
        for data in in_leveldb_log(path.read_bytes()):
            for item in Record.FromString(data).history.item:
                name = item.key or "/".join(item.nested_key)
                out.setdefault(name, []).append(json.loads(item.value_json))
    return out


def in_leveldb_log(blob: bytes) -> Iterator[bytes]:
    """The records of a ``.wandb`` file: 7 bytes of its own, then LevelDB's log format."""
    at, block, whole = 7, 1 << 15, b""
    header = struct.Struct("<IHB")  # checksum, length, and whether it is the record's last piece
    while at + header.size <= len(blob):
        _, length, kind = header.unpack_from(blob, at)
        if kind == 0:  # the rest of a block is empty
            at += block - at % block
            continue
        at += header.size
        whole += blob[at : at + length]
        at += length
        if kind in (1, 4):
            yield whole
            whole = b""
        if block - at % block < header.size:
            at += block - at % block


@pytest.mark.slow
@pytest.mark.parametrize("board", ["tensorboard", "wandb"])
@pytest.mark.parametrize("framework", ["trainer", "lightning", "accelerate"])
def test_a_board_receives_the_figures(framework: str, board: str, tmp_path: Path) -> None:
    for package in (PACKAGES[framework], board):
        if find_spec(package) is None:
            pytest.skip(f"needs: pip install {package}")
    ranks(framework, tmp_path, board)
    found = {"tensorboard": in_tensorboard, "wandb": in_wandb}[board](tmp_path / "board")
    told = json.loads((tmp_path / "figures.json").read_text())
    assert len(told) == 4
    for name in (n for n in told[0] if n.startswith("gradcodec/")):
        (values,) = [v for tag, v in found.items() if tag.removeprefix("train/") == name]
        assert values == pytest.approx([figures[name] for figures in told]), name


@pytest.mark.slow
def test_micro_batches_clipping_bf16_and_the_best_model_have_the_bits_of_a_plain_run(
    tmp_path: Path,
) -> None:
    if find_spec("transformers") is None:
        pytest.skip("needs: pip install transformers")
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    ranks("trainer", plain, "options")
    ranks("trainer", coded, "options", "fp32")
    assert torch.equal(weights(plain), weights(coded))


@pytest.mark.slow
def test_without_a_ranks_file_training_goes_on_and_feedback_starts_anew(
    made: Made, tmp_path: Path
) -> None:
    if find_spec("transformers") is None:
        pytest.skip("needs: pip install transformers")
    killed = shutil.copytree(made("trainer", "kill"), tmp_path / "killed")
    (killed / "out" / "checkpoint-4" / "gradcodec-rank1.safetensors").unlink()
    assert "error feedback starts anew" in ranks("trainer", killed, "resume")
    whole, resumed = weights(made("trainer", "whole")), weights(killed)
    assert not torch.equal(whole, resumed)
    assert (whole - resumed).norm() < 0.05 * whole.norm()


@pytest.mark.slow
def test_a_run_resumes_from_a_checkpoint_outside_its_folder(made: Made, tmp_path: Path) -> None:
    if find_spec("transformers") is None:
        pytest.skip("needs: pip install transformers")
    elsewhere = str(made("trainer", "kill") / "out" / "checkpoint-4")
    ranks("trainer", tmp_path, "resume_from", elsewhere)
    assert torch.equal(weights(made("trainer", "whole")), weights(tmp_path))


@pytest.mark.slow
def test_a_checkpoint_to_go_on_from_is_refused_where_training_begins(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs: pip install transformers")
    from gradcodec.integrations.transformers import CompressCallback

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    data = [{"input_ids": torch.zeros(1)}]
    made = transformers.Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=data)
    made.add_callback(CompressCallback(made, resume_from=tmp_path / "checkpoint-4"))
    with pytest.raises(ConfigError, match="this one begins"):
        made.train()


@pytest.mark.slow
def test_another_runs_checkpoint_of_the_same_step_is_not_mistaken_for_it(
    made: Made, tmp_path: Path
) -> None:
    if find_spec("transformers") is None:
        pytest.skip("needs: pip install transformers")
    ranks("trainer", tmp_path, "kill", "0.2")
    elsewhere = str(made("trainer", "kill") / "out" / "checkpoint-4")
    assert "belongs to other weights" in ranks("trainer", tmp_path, "resume", elsewhere)


@pytest.mark.slow
def test_lightning_forgets_the_state_of_a_checkpoint_that_it_only_validates(tmp_path: Path) -> None:
    if find_spec("lightning") is None:
        pytest.skip("needs: pip install lightning")
    ranks("lightning-validates-first", tmp_path)
    assert (tmp_path / "weights.safetensors").exists()


@pytest.mark.slow
def test_a_ranks_damaged_file_is_an_error_on_all_ranks(made: Made, tmp_path: Path) -> None:
    if find_spec("transformers") is None:
        pytest.skip("needs: pip install transformers")
    killed = shutil.copytree(made("trainer", "kill"), tmp_path / "killed")
    (path,) = (killed / "out").glob("*/gradcodec-rank1.safetensors")
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 1
    path.write_bytes(blob)
    out = ranks("trainer", killed, "resume", fails=True)
    assert "another rank's state in" in out  # rank 0, which would wait otherwise
    assert str(path) in out


@pytest.mark.slow
def test_trls_trainer_is_compressed_too(tmp_path: Path) -> None:
    if find_spec("trl") is None:
        pytest.skip("needs: pip install trl")
    ranks("sft", tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(7 < f["gradcodec/ratio"] < 9 for f in figures)
    assert len(figures) == 2
