"""Laws of checkpoints: a kill costs nothing, and a file that is not one is refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import CODECS, Toy, equal, quantised, subspace, timeless
from safetensors.torch import load_file, save_file

from gradcodec import files
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.federated import checkpoint
from gradcodec.federated.collect import collect
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.loop import Federation, LoopConfig, RoundReport
from gradcodec.federated.server import Server
from gradcodec.tgap import GradientRecorder, SecondMoments, SignalMoments, SnapshotStore
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

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
    path = tmp_path / "a" / "b.safetensors"
    assert set(path.parent.iterdir()) == {path, files.previous(path)}
    tensors = load_file(path)
    assert equal(checkpoint.unprefixed("server", tensors), federation.server.state_dict())


def refuse(path: Path, federation: Federation | None = None, match: str = "") -> None:
    """Loading is refused, and the federation goes on as if it had not been tried."""
    federation = federation or make()
    first = federation.step()
    before = federation.server.state_dict()
    with pytest.raises(ConfigError, match=match or path.name):
        checkpoint.load(path, federation)
    assert (federation.finished, federation.server.round) == (1, 1)
    assert equal(federation.server.state_dict(), before)
    assert federation.clients
    assert federation.step().round == first.round + 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_torn_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, 3)
    files.previous(path).unlink()
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))])
    refuse(path, match="x.safetensors is damaged .*; delete it to start again from round 0")


def flip(path: Path, at: int, mask: int = 16) -> None:
    blob = bytearray(path.read_bytes())
    blob[at] ^= mask
    path.write_bytes(blob)


def test_the_checkpoint_before_a_damaged_one_takes_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, 3)
    flip(path, -10)
    again = make()
    reports = checkpoint.load(path, again)
    assert again.finished == len(reports) == 2
    assert "x.safetensors is damaged" in caplog.text
    assert len(checkpoint.load(path, make())) == 2  # and stays there
    run(again, reports, path, ROUNDS)
    whole, all_reports = make(), []
    run(whole, all_reports, tmp_path / "whole.safetensors", ROUNDS)
    assert timeless(reports) == timeless(all_reports)
    assert equal(again.server.state_dict(), whole.server.state_dict())


def test_two_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, 3)
    flip(path, -10)
    flip(files.previous(path), 30)
    refuse(path, match="damaged")


@pytest.mark.parametrize("change", [{"seed": 3}, {"per_round": 3}, {"clients": range(1, 7)}])
def test_a_checkpoint_of_another_sampling_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, 2)
    federation = make()
    options = {"rounds": ROUNDS, "clients": range(6), "per_round": 2, "seed": 2, **change}
    federation.config = LoopConfig(**options)
    refuse(path, federation, match=r"its round 2 has clients \[")


def test_a_part_that_cannot_be_loaded_leaves_everything_as_it_was(tmp_path: Path) -> None:
    spec = UpdateSpec.of(Toy().initial)
    moments = SecondMoments(spec, SubspaceConfig(ratio=4))
    moments.add(Toy().initial)
    federation, path = make(), tmp_path / "run.safetensors"
    federation.step()
    checkpoint.save(path, federation, [], {"good": moments, "other": moments})
    there, kept = make(), SecondMoments(spec, SubspaceConfig(ratio=4))
    elsewhere = SecondMoments(UpdateSpec(spec.tensors[:1]), SubspaceConfig(ratio=4))
    before = there.server.state_dict()
    with pytest.raises(ConfigError, match="not a checkpoint of this federation"):
        checkpoint.load(path, there, {"good": kept, "other": elsewhere})
    assert equal(there.server.state_dict(), before)
    assert (there.finished, there.server.round, kept.count, elsewhere.count) == (0, 0, 0, 0)
    checkpoint.load(path, there, {"good": kept})  # nothing stands in the way of a right one
    assert (there.finished, kept.count) == (1, 1)


def test_more_rounds_of_the_same_sampling_go_on(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    run(make(), [], path, ROUNDS)
    longer = make()
    longer.config = LoopConfig(ROUNDS + 1, range(6), 2, seed=2)
    reports = checkpoint.load(path, longer)
    run(longer, reports, path, ROUNDS + 1)
    assert [r.round for r in reports] == list(range(ROUNDS + 1))


@pytest.mark.parametrize(
    "meta",
    [
        None,
        {},
        [],
        {"finished": 1, "versions": [], "reports": [], "next": []},
        {"finished": 1, "versions": {}, "reports": [{"rejected": {}, "x": 1}], "next": []},
        {"finished": 1, "versions": {}, "reports": [], "next": []},
        {"finished": 1, "versions": {}, "reports": [], "next": [0, 2]},
    ],
)
def test_a_foreign_sealed_file_is_refused(meta: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    files.save_tensors(path, {"weight": torch.zeros(3)}, meta)
    refuse(path)


@pytest.mark.parametrize("metadata", [None, {"federation": "{}"}, {"sha256": "0" * 64}])
def test_a_file_without_a_seal_is_refused(metadata: Any, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
    refuse(path, match="is damaged")


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


#: Where a save can be killed, by the call of ``os`` that it would have been: which one, how often
#: it had been called before, and the rounds that are on the disk then.
MOMENTS = [("fsync", 0, 2), ("link", 0, 2), ("replace", 0, 2), ("replace", 1, 2), ("fsync", 1, 3)]

KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from federated.test_checkpoint import MOMENTS, make, run
from gradcodec import files
from gradcodec.federated import checkpoint

for name, before, _ in MOMENTS:
    path = Path(sys.argv[1]) / f"{name}{before}" / "x.safetensors"
    federation, reports = make(), []
    run(federation, reports, path, 2)
    reports.append(federation.step())
    if (child := os.fork()) == 0:
        real, calls = getattr(os, name), [0]
        def call(*args):
            calls[0] += 1
            if calls[0] > before:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        setattr(files.os, name, call)
        checkpoint.save(path, federation, reports)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, name
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    script = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), tests]
    done = subprocess.run(
        script,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    whole, all_reports = make(), []
    run(whole, all_reports, tmp_path / "whole.safetensors", ROUNDS)
    for name, before, rounds in MOMENTS:
        path = tmp_path / f"{name}{before}" / "x.safetensors"
        again = make()
        reports = checkpoint.load(path, again)
        assert again.finished == len(reports) == rounds, name
        run(again, reports, path, ROUNDS)
        assert timeless(reports) == timeless(all_reports)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from federated.test_checkpoint import make, run, checkpoint
path = Path(sys.argv[1]) / "x.safetensors"
federation, reports = make(), []
run(federation, reports, path, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # no file may grow further, as on a full disk
reports.append(federation.step())
try:
    checkpoint.save(path, federation, reports)
except OSError:
    raise SystemExit(7)
"""


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path), tests]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 7, done.stderr
    assert not [p.name for p in tmp_path.iterdir() if files.is_temporary(p.name)]
    again = make()
    reports = checkpoint.load(tmp_path / "x.safetensors", again)
    assert again.finished == len(reports) == 2


# -- TGAP's gathering, which is kept with the federation -------------------------------------------


def gather(how: str, path: Path | None, folder: Path, stop: int | None = None) -> dict[str, Any]:
    """Gather into everything that there is; ``stop`` ends it after so many rounds or clients."""

    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Stop

    task = Toy()
    spec = UpdateSpec.of(task.parameters)
    store = SnapshotStore(folder, limit=4)  # thinned on the way
    exact, signal = SecondMoments(spec, SubspaceConfig(ratio=2)), None
    recorders = [
        GradientRecorder(task.parameters, exact),
        GradientRecorder(task.parameters, representation="update", snapshots=store),
    ]

    @contextmanager
    def watch() -> Iterator[None]:
        with recorders[0], recorders[1]:
            yield

    filled: dict[str, Any] = {"gradients": exact, "store": store}
    if how == "federated":
        signal = filled["signal"] = SignalMoments(spec, SubspaceConfig(ratio=2))
    with suppress(Stop):
        filled["cost"] = collect(
            task,
            watch,
            LoopConfig(4, range(6), 2, seed=5),
            how,
            progress,
            signal.add_round if signal is not None else None,
            path=path,
            filled=filled,
        )
    return filled


@pytest.mark.parametrize("how", ["federated", "local"])
def test_gathering_goes_on_to_the_bit_wherever_it_ended(how: str, tmp_path: Path) -> None:
    whole = gather(how, None, tmp_path / "whole")
    for stop in range(1, 5):
        path, folder = tmp_path / f"{stop}.safetensors", tmp_path / str(stop)
        gather(how, path, folder, stop)
        # As a kill in the next round would leave it: updates that no checkpoint knows of.
        late = SnapshotStore(folder, limit=4)
        for _ in range(2 if stop < 4 else 0):
            late.add({n: torch.zeros_like(p) for n, p in Toy().parameters.items()})
        again = gather(how, path, folder)
        for name in {"gradients", "signal"} & set(whole):
            assert equal(again[name].state_dict(), whole[name].state_dict()), name
        assert all(equal(a, b) for a, b in zip(again["store"], whole["store"], strict=True))
        assert again["store"].state_dict() == whole["store"].state_dict()
        assert replace(again["cost"], seconds=0) == replace(whole["cost"], seconds=0)


@pytest.mark.parametrize("how", ["federated", "local"])
def test_a_gathering_of_other_settings_is_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    gather(how, path, tmp_path / "s", 2)
    other = "local" if how == "federated" else "federated"
    with pytest.raises(ConfigError, match=r"x\.safetensors .*; delete it to"):
        gather(other, path, tmp_path / "s")
    (tmp_path / "s" / "000000000.safetensors").unlink()
    with pytest.raises(ConfigError, match="000000000"):
        gather(how, path, tmp_path / "s")
