"""What TGAP finds in one world: moments, snapshots and codecs, made once and kept on disk.

D1 --federated LoRA, fp32, watched--> moments of updates and of gradients, snapshots of updates
   --fit--> codecs

The rounds are those of the federated example (``Experiment.fit``). Worker processes share the
files; whoever changes how TGAP collects or fits deletes ``runs/bench-tgap``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from benchmarks.federated.methods import Coded
from benchmarks.federated.world import Parameters, World, play
from benchmarks.run import ROOT
from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError
from gradcodec.recipes.schemes import TRAINED
from gradcodec.tgap import (
    GradientRecorder,
    SecondMoments,
    SignalMoments,
    SnapshotStore,
    fit_autoencoder,
    fit_subspace,
)
from gradcodec.tgap.moments import ExactMoment
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

CACHE = ROOT / "runs" / "bench-tgap"

#: What is recorded besides snapshots, all in one pass. Sides do not depend on the ratio then.
RECORDED = ("update", "gradient")
SIDES = SubspaceConfig(side="long")


class Fitted(NamedTuple):
    """A codec and the bytes of its files, which each participant downloads once."""

    codec: Codec
    nbytes: int


def codec(world: World, name: str) -> Fitted:
    """One of ``gradcodec.recipes.schemes.TRAINED``, fitted on the world's D1."""
    config = TRAINED[name]
    if isinstance(config, SubspaceConfig):
        records = world.settings.records_for(config.ratio)
        if records == "signal":
            return kept(world, name, lambda: signal(world, config))
        return kept(world, name, lambda: fit_subspace(moments(world, config, records), config))
    return kept(world, name, lambda: _autoencoder(world, config))


def kept(world: World, name: str, make: Callable[[], Codec]) -> Fitted:
    """A codec that is made once for this world; ``name`` says of what, it is the folder's."""
    folder = _folder(world) / "codecs" / name
    with one_at_a_time(folder):
        if not folder.exists():
            whole(folder, lambda beside: make().save_pretrained(beside))
    files = (folder / "config.json", folder / "model.safetensors")
    return Fitted(Codec.from_pretrained(folder), sum(f.stat().st_size for f in files))


@functools.lru_cache(maxsize=8)
def moments(world: World, config: SubspaceConfig, records: str = "update") -> SecondMoments:
    """Second moments of TGAP's ``"update"``s or ``"gradient"``s, to fit ``config`` and others.

    Raises:
        ConfigError: the config projects another side than was recorded, the long one.
    """
    found = SecondMoments(UpdateSpec.of(world.initial), config)
    if found.axes != SecondMoments(found.spec, SIDES).axes:
        raise ConfigError("only long sides are recorded here; ask for side='long'")
    stored = load_file(collected(world) / f"{records}.safetensors")
    found.count = int(stored.pop("count"))
    for name, total in stored.items():
        _exact(found, name).sum = total
    return found


def signal(world: World, config: SubspaceConfig) -> Codec:
    """A subspace fitted on what the clients of each TGAP round agreed on, as a server sees it."""
    moments = SignalMoments(UpdateSpec.of(world.initial), config)
    store, together = snapshots(world), world.settings.per_round
    for first in range(0, len(store), together):
        moments.add_round(store[first : first + together])
    return fit_subspace(moments, config)


def snapshots(world: World) -> SnapshotStore:
    """Every client's update of every TGAP round."""
    return SnapshotStore(collected(world) / "snapshots")


def collected(world: World) -> Path:
    """The folder of what TGAP's rounds left: moments and snapshots."""
    folder = _folder(world) / "collected"
    with one_at_a_time(folder):
        if not folder.exists():
            whole(folder, lambda beside: _collect(world, beside))
    return folder


def _collect(world: World, folder: Path) -> None:
    """Uncompressed federated averaging on D1, watched."""
    s = world.settings
    spec = UpdateSpec.of(world.initial)
    found = {records: SecondMoments(spec, SIDES) for records in RECORDED}
    store = SnapshotStore(folder / "snapshots")

    @contextmanager
    def watch(parameters: Parameters) -> Iterator[None]:
        with ExitStack() as stack:
            for records, into in found.items():
                snaps = store if records == "update" else None
                recorder = GradientRecorder(
                    parameters, into, representation=records, snapshots=snaps
                )
                stack.enter_context(recorder)
            yield

    rounds = play(
        world,
        Coded(world.initial, Identity()),
        lr=s.local.lr,
        rounds=s.tgap_rounds,
        shards=world.d1,
        seed=s.seed + 1,
        watch=watch,
    )
    last = list(rounds)[-1]
    for records, into in found.items():
        stored: dict[str, torch.Tensor] = {n: _exact(into, n).sum for n in into.axes}
        save_file({**stored, "count": torch.tensor(into.count)}, folder / f"{records}.safetensors")
    (folder / "last.json").write_text(json.dumps(last) + "\n")


def _exact(moments: SecondMoments, name: str) -> ExactMoment:
    moment = moments._moments[name]
    if not isinstance(moment, ExactMoment):
        raise ConfigError(f"{name}: its side is too long for a whole second moment")
    return moment


def _autoencoder(world: World, config: AutoencoderConfig) -> Codec:
    s = world.settings
    spec = UpdateSpec.of(world.initial)
    return fit_autoencoder(snapshots(world), config, spec, steps=s.ae_steps, seed=s.seed).codec


def _folder(world: World) -> Path:
    """Where a world's files are: equal settings, equal folder; rounds of FAF do not count."""
    settings: Mapping[str, object] = world.settings.to_dict()
    counted = {k: v for k, v in settings.items() if k not in ("rounds", "schemes", "questions")}
    text = json.dumps({**counted, "compute": str(world.net.compute)}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return CACHE / f"seed{world.settings.seed}-{digest}"


def whole(folder: Path, make: Callable[[Path], None]) -> None:
    """Make a folder entirely or not at all."""
    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    make(beside)
    os.replace(beside, folder)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Other processes that want the same wait here, and then find it made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
