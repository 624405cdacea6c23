"""The benchmark's world is the federated example's, computed another way."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.federated import case as federated
from benchmarks.federated import fitted
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.world import Row, World, play, play_together
from benchmarks.peers import federated as peers
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec.codecs import Identity
from gradcodec.federated import Federation, Server, ServerConfig
from gradcodec.metrics import flat64
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining
from gradcodec.tgap import fit_subspace
from gradcodec.transforms.subspace.config import SubspaceConfig

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    limit=300,
    clients=4,
    fraction=0.5,
    rounds=2,
    min_client=12,
    held_out=20,
    questions=4,
    tgap_rounds=2,
    local=LocalTraining(steps=2),
    device="cpu",
    schemes=("fp32",),
)


@pytest.fixture(scope="module")
def world() -> World:
    return World(SETTINGS, compute=torch.float32)


def experiment_in(folder: Path, settings: Settings) -> Experiment:
    """The example's own run, in an empty folder."""
    return Experiment(settings, RunFolder(folder, settings.to_dict()), lambda *_: None)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return experiment_in(tmp_path_factory.mktemp("run"), SETTINGS)


def test_clients_hold_what_they_hold_in_the_example(world: World, experiment: Experiment) -> None:
    assert world.d1 == experiment.d1
    assert world.d2 == experiment.d2
    assert world.held == experiment.held
    assert list(world.initial) == list(experiment.initial)
    assert all(torch.equal(t, experiment.initial[n]) for n, t in world.initial.items())


def test_losses_and_bytes_are_those_of_the_plain_loop(world: World, experiment: Experiment) -> None:
    task = experiment._task(experiment.d2, SETTINGS.rounds)
    server = Server(experiment.initial, Identity())
    federation = Federation(task, server, world.loop(SETTINGS.rounds))
    up = down = payload = 0
    method = Coded(world.initial, Identity())
    rows = play(world, method, lr=SETTINGS.local.lr, rounds=SETTINGS.rounds)
    for report, row in zip(federation.run(), rows, strict=True):
        up, down = up + report.uplink_bytes, down + report.downlink_bytes
        payload += report.uplink_payload_bytes
        assert row["participants"] == report.participants
        assert (row["uplink_bytes"], row["downlink_bytes"]) == (up, down)
        assert row["uplink_payload_bytes"] == payload
        assert row["loss"] == pytest.approx(report.loss, rel=1e-4)
        assert row["train_loss"] == pytest.approx(report.train_loss, rel=1e-4)


def test_training_that_blows_up_ends_in_a_row_that_says_so(world: World) -> None:
    rows = list(play(world, Coded(world.initial, Identity()), lr=1e30, rounds=2))
    assert [row["diverged"] for row in rows] == [True]
    assert rows[0]["loss"] is None


def test_runs_in_step_are_the_runs_alone_and_one_that_blows_up_leaves(world: World) -> None:
    def methods() -> list[tuple[Method, float]]:
        subspace = random_bases(world.initial, ratio=8, seed=0)
        latent = Coded(world.initial, subspace, None, ServerConfig(mode="latent"))
        return [
            (Coded(world.initial, Identity()), 1e30),
            (Coded(world.initial, Identity()), SETTINGS.local.lr),
            (latent, SETTINGS.local.lr),
        ]

    together: dict[int, list[Row]] = {0: [], 1: [], 2: []}
    for i, row in play_together(world, methods(), rounds=2):
        together[i].append(row)
    assert [row["diverged"] for row in together[0]] == [True]
    for i, (method, lr) in list(enumerate(methods()))[1:]:
        for ours, alone in zip(together[i], play(world, method, lr=lr, rounds=2), strict=True):
            assert ours["loss"] == pytest.approx(alone.pop("loss"), rel=1e-4)
            assert ours["train_loss"] == pytest.approx(alone.pop("train_loss"), rel=1e-4)
            del alone["seconds"]
            assert alone.items() <= ours.items()


def test_peers_play_as_well_and_their_payload_is_told_from_its_envelope(world: World) -> None:
    row = next(play(world, peers.FFALoRA(world.initial), lr=1e-3, rounds=2))
    half = sum(t.numel() for n, t in world.initial.items() if "lora_B" in n)
    assert row["uplink_payload_bytes"] == 4 * half * SETTINGS.per_round
    assert row["uplink_bytes"] == row["uplink_payload_bytes"] + 16 * SETTINGS.per_round
    assert row["loss"] < world.start_loss


def test_a_peer_that_trains_scalars_of_seeds_plays_to_the_end(world: World) -> None:
    method = peers.FedKSeed(world.initial, seeds=64, draws=4)
    row = list(play(world, method, lr=1e-2, rounds=2))[-1]
    assert row["round"] == 2
    assert not row["rejected"]
    assert row["uplink_bytes"] < 2 * SETTINGS.per_round * (16 + 4 + 5 * 4 * SETTINGS.local.steps)
    assert 0 < abs(row["loss"] - world.start_loss) < 1


@pytest.mark.parametrize("records", ["signal", "update"])
def test_tgap_finds_what_it_finds_in_the_example(
    records: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(fitted, "CACHE", tmp_path)
    config = SubspaceConfig(ratio=32, allocation="tempered")
    moments = fitted.moments(world, config)
    assert moments.count == SETTINGS.tgap_rounds * SETTINGS.per_round
    assert len(fitted.snapshots(world)) == moments.count
    signal = records == "signal"
    mine = fitted.signal(world, config) if signal else fit_subspace(moments, config)
    run = experiment_in(tmp_path / "run", replace(SETTINGS, tgap_records=records))
    theirs = run.fit({"subspace-32": config}, "codecs")["subspace-32"]
    assert mine.spec is not None
    assert mine.code_numel(mine.spec) == theirs.code_numel(mine.spec)
    # Vectors of nearly equal eigenvalues may be mixed by the last bits of a sum, which differ
    # between machines. What such bases keep differs a little in direction, and hardly in energy.
    update = fitted.snapshots(world)[0]
    kept = [flat64(codec.from_code(codec.to_code(update))) for codec in (mine, theirs)]
    assert float((kept[0] - kept[1]).norm()) < 0.02 * float(kept[1].norm())
    assert float(kept[0].norm()) == pytest.approx(float(kept[1].norm()), rel=1e-4)


def test_a_codec_is_made_once(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fitted, "CACHE", tmp_path)
    made = []

    def make() -> Identity:
        made.append(1)
        return Identity()

    first, again = (fitted.kept(world, "identity", make) for _ in range(2))
    assert made == [1]
    assert first.nbytes == again.nbytes > 0


@pytest.mark.parametrize("name", [n for n, s in federated.SCHEMES.items() if s.kind == "peer"])
def test_every_peer_of_the_list_can_be_made(world: World, name: str) -> None:
    needs = "openfl" if name.startswith("eden") else "bitsandbytes"
    if name.startswith(("eden", "nvflare")) and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    method = federated.SCHEMES[name].make(world)
    assert method.codec_bytes == 0
    assert set(method.state()) == set(world.initial)


def test_all_schemes_are_tuned_with_the_same_effort() -> None:
    assert len(federated.SCHEMES) == len(federated._ALL)
    assert {len(s.grid) for s in federated.SCHEMES.values()} == {3}


def test_other_ranks_and_seeds_make_other_worlds(world: World) -> None:
    other = World(replace(SETTINGS, seed=1, lora_r=4))
    assert next(iter(other.initial.values())).shape[0] == 4
    assert other.d2 != world.d2
