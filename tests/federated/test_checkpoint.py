"""Laws of checkpoints: a kill costs nothing, and a file that is not one is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import CODECS, Toy, equal, quantised, subspace, timeless
from safetensors.torch import load_file, save_file

from gradcodec.codecs.base import Codec
from gradcodec.errors import ConfigError
from gradcodec.federated import checkpoint
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.loop import Federation, LoopConfig, RoundReport
from gradcodec.federated.server import Server

ROUNDS = 5
CASES = {
    "identity": (CODECS["identity"], ServerConfig()),
    "momentum": (quantised(), ServerConfig(momentum=0.7, lr=0.8)),
    "latent": (quantised(2), ServerConfig(mode="latent", momentum=0.5)),
    "state": (CODECS["int8"], ServerConfig(representation="state")),
    "nonlinear": (CODECS["nonlinear"], ServerConfig(mode="latent")),
}


def make(codec: Codec | None = None, config: ServerConfig | None = None) -> Federation:
    task = Toy()
    server = Server(task.initial, codec or quantised(), config=config)
    return Federation(task, server, LoopConfig(ROUNDS, range(6), 2, seed=2))


def run(federation: Federation, reports: list[RoundReport], path: Path, until: int) -> None:
    while federation.finished < until:
        reports.append(federation.step())
        checkpoint.save(path, federation, reports)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("killed", range(1, ROUNDS + 1))
def test_resuming_after_any_round_equals_an_uninterrupted_run(
    case: str, killed: int, tmp_path: Path
) -> None:
    whole, all_reports = make(*CASES[case]), []
    run(whole, all_reports, tmp_path / "whole.safetensors", ROUNDS)

    path = tmp_path / "run.safetensors"
    run(make(*CASES[case]), [], path, killed)  # and here the process ends
    again = make(*CASES[case])
    reports = checkpoint.load(path, again)
    assert len(reports) == again.finished == killed
    run(again, reports, path, ROUNDS)
    again.load_global()

    assert timeless(reports) == timeless(all_reports)  # losses, rejections and every byte count
    assert equal(again.server.state_dict(), whole.server.state_dict())
    assert equal(again.server.replica.state(), whole.server.replica.state())
    assert equal(Toy.initial.fget(again.task), Toy.initial.fget(whole.task))  # type: ignore[attr-defined]
    assert again.versions == whole.versions


def test_a_checkpoint_is_one_safetensors_file(tmp_path: Path) -> None:
    federation = make()
    run(federation, [], tmp_path / "a" / "b.safetensors", 2)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.safetensors"]
    tensors = load_file(tmp_path / "a" / "b.safetensors")
    assert equal(tensors, federation.server.state_dict())


def refuse(path: Path, federation: Federation | None = None) -> None:
    """Loading is refused, and the federation goes on as if it had not been tried."""
    federation = federation or make()
    first = federation.step()
    before = federation.server.state_dict()
    with pytest.raises(ConfigError, match=path.name):
        checkpoint.load(path, federation)
    assert (federation.finished, federation.server.round) == (1, 1)
    assert equal(federation.server.state_dict(), before)
    assert federation.clients
    assert federation.step().round == first.round + 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_torn_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, 3)
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    refuse(path)


def test_a_damaged_increment_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    federation = make()
    run(federation, [], path, 3)
    blob = path.read_bytes()
    at = blob.index(federation.server.increments[1]) + 40
    path.write_bytes(blob[:at] + bytes([blob[at] ^ 16]) + blob[at + 1 :])
    refuse(path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "{}"},
        {"federation": "{"},
        {"federation": "{}"},
        {"federation": "[]"},
        {"federation": '{"finished": 1, "versions": [], "reports": []}'},
        {"federation": '{"finished": 1, "versions": {}, "reports": [{"rejected": {}, "x": 1}]}'},
        {"federation": '{"finished": 1, "versions": {}, "reports": []}'},
    ],
)
def test_a_foreign_safetensors_file_is_refused(metadata: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    refuse(path)


@pytest.mark.parametrize(
    "other", [subspace(), CODECS["int8"], CODECS["nonlinear"]], ids=lambda c: type(c).__name__
)
def test_a_checkpoint_of_another_codec_is_refused(other: Codec, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run(make(other), [], path, 2)
    refuse(path)


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "missing.safetensors")
    refuse(tmp_path)


KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from federated.test_checkpoint import make, run
from gradcodec.federated import checkpoint

path = Path(sys.argv[1])
federation, reports = make(), []
run(federation, reports, path, 2)
reports.append(federation.step())
moment = sys.argv[3]
setattr(checkpoint.os, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
checkpoint.save(path, federation, reports)
"""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_during_save_leaves_the_former_checkpoint(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tests = str(Path(__file__).parents[1])
    script = [sys.executable, "-c", KILLED_WHILE_SAVING, str(path), tests, moment]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "x.partial").exists()
    again = make()
    reports = checkpoint.load(path, again)
    assert again.finished == len(reports) == 2
    run(again, reports, path, ROUNDS)
    whole, all_reports = make(), []
    run(whole, all_reports, tmp_path / "whole.safetensors", ROUNDS)
    assert timeless(reports) == timeless(all_reports)
