"""What clients of a federation compute, uncompressed, round by round: the input of all analyses.

    D1 --rounds--> what codecs are fitted on      D2 --rounds--> what they are tried on

Recordings are made once and kept in ``runs/bench-paper``; worker processes share them. One that was
broken off goes on after its last whole round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.federated.fitted import one_at_a_time
from benchmarks.federated.world import Parameters, World, world_of
from benchmarks.run import ROOT
from gradcodec import files, layout
from gradcodec.recipes.settings import Settings
from gradcodec.types import TensorSpec, Update, UpdateSpec

CACHE = ROOT / "runs" / "bench-paper"

READINGS = ("federated", "local")
"""How TGAP gathers: in a federation (v3 of the paper), or each client alone (v1, v2)."""

OBJECTS = ("update", "gradient", "state")
"""What may be encoded; the paper leaves it open.

``update``: what a round of local training changed. ``gradient``: mean of its steps' gradients, as
the optimiser is given them. ``state``: the adapter after it, the literal Algorithm 1.
"""


@dataclass(frozen=True)
class Recording:
    """``R`` rounds of ``K`` clients, values as flat vectors of ``n = spec.numel``.

    Attributes:
        spec: the adapter's tensors.
        starts: adapters before local training, fp32 ``[R, K, n]``.
        updates: what it changed, ``[R, K, n]``.
        gradients: mean gradient of its steps, ``[R, K, n]``.
        clients: who they were, ``[R, K]``.
        examples: how many examples each has, ``[R, K]``.
    """

    spec: UpdateSpec
    starts: Tensor
    updates: Tensor
    gradients: Tensor
    clients: Tensor
    examples: Tensor

    def of(self, what: str) -> Tensor:
        """The object ``what`` of ``OBJECTS``, ``[R, K, n]``."""
        if what == "state":
            return self.starts + self.updates
        return {"update": self.updates, "gradient": self.gradients}[what]

    def snapshots(self, what: str) -> list[Update]:
        """The same as named tensors, in the order of rounds."""
        return [layout.unflatten(x, self.spec) for x in self.of(what).flatten(0, 1)]


def recorded(settings: Settings, share: str, rounds: int, reading: str = "federated") -> Recording:
    """The recording of these settings; made if it is not there.

    Args:
        settings: model, data, clients and local training.
        share: ``"d1"`` or ``"d2"``, of each client's data.
        rounds: how many.
        reading: one of ``READINGS``.
    """
    path = folder(settings) / f"{share}-{reading}-{rounds}.safetensors"
    begun = path.with_suffix(".begun")
    with one_at_a_time(path):
        if not path.exists():
            earlier = _load(begun) if begun.exists() else None
            for recording in record(world_of(settings), share, rounds, reading, earlier):
                _save(begun, recording)
            begun.replace(path)
    return _load(path)


def record(
    world: World,
    share: str,
    rounds: int,
    reading: str = "federated",
    earlier: Recording | None = None,
) -> Iterator[Recording]:
    """Play the rounds, uncompressed: equal clients, batches and rates as ``world.play``'s.

    In the federated reading the weighted mean of the clients' updates moves the next round's start.
    In the local one the clients of the first round go on alone.

    Args:
        world: who plays.
        share: of each client's data.
        rounds: how many; rates fall to zero over them.
        reading: one of ``READINGS``.
        earlier: the first of these rounds, which are not played again.

    Yields:
        All rounds so far, after each; ``earlier`` first.
    """
    s = world.settings
    spec = UpdateSpec.of(world.initial)
    shards = {"d1": world.d1, "d2": world.d2}[share]
    loop = world.loop(rounds, s.seed + (share == "d1"))
    local = reading == "local"
    state, alone = world.initial, [world.initial] * s.per_round
    found: dict[str, list[Tensor]] = {name: [] for name in _TENSORS}
    if earlier is not None:
        found = {name: list(getattr(earlier, name)) for name in _TENSORS}
        state, alone = ends(earlier)
        yield earlier
    for number in range(len(found["updates"]), rounds):
        clients = loop.sample(0 if local else number)
        starts = alone if local else [state] * len(clients)
        own = [world.parameters(start) for start in starts]
        options = {"lr": s.local.lr * (1 - number / rounds), "weight_decay": s.local.weight_decay}
        optimizers = [torch.optim.AdamW(list(p.values()), **options) for p in own]
        means = [_gradients(o, p) for o, p in zip(optimizers, own, strict=True)]
        world.train(clients, own, optimizers, number, shards)
        before = torch.stack([layout.flatten(start, spec) for start in starts])
        after = torch.stack([layout.flatten({n: p.cpu() for n, p in q.items()}, spec) for q in own])
        examples = torch.tensor([len(shards[c]) for c in clients])
        found["starts"].append(before)
        found["updates"].append(after - before)
        found["gradients"].append(torch.stack([mean() for mean in means]))
        found["clients"].append(torch.tensor(clients))
        found["examples"].append(examples)
        recording = Recording(spec, **{name: torch.stack(parts) for name, parts in found.items()})
        state, alone = ends(recording)
        yield recording


def ends(recording: Recording) -> tuple[Update, list[Update]]:
    """Where the next round starts: all clients together, and each alone."""
    starts, updates = recording.starts[-1], recording.updates[-1]
    mean = starts[0] + weighted(updates, recording.examples[-1])
    alone = [layout.unflatten(x, recording.spec) for x in starts + updates]
    return layout.unflatten(mean, recording.spec), alone


def weighted(updates: Tensor, examples: Tensor) -> Tensor:
    """Mean of ``updates`` ``[K, n]`` by the number of ``examples`` ``[K]``."""
    share = examples.double() / examples.sum()
    return (share @ updates.double()).float()


def _gradients(optimizer: torch.optim.Optimizer, parameters: Parameters) -> Callable[[], Tensor]:
    """A function that returns the mean of the gradients of all steps made after this call."""
    seen: list[Tensor] = []

    def see(*_: Any) -> None:
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
        seen.append(torch.cat([g.detach().reshape(-1).float().cpu() for g in whole]))

    optimizer.register_step_pre_hook(see)
    return lambda: torch.stack(seen).mean(0)


# -- on disk ---------------------------------------------------------------------------------------

_TENSORS = ("starts", "updates", "gradients", "clients", "examples")


def folder(settings: Settings) -> Path:
    """Where files that depend on these settings are; those of the codecs do not count."""
    left_out = ("rounds", "schemes", "questions", "ae_steps", "tgap_rounds")
    counted = {k: v for k, v in settings.to_dict().items() if k not in left_out}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]
    return CACHE / f"seed{settings.seed}-{digest}"


def _save(path: Path, recording: Recording) -> None:
    tensors = {name: getattr(recording, name).contiguous() for name in _TENSORS}
    table = [[t.name, list(t.shape)] for t in recording.spec]
    files.save_tensors(path, tensors, {"table": table})


def _load(path: Path) -> Recording:
    tensors, meta = files.load_tensors(path, "delete it to record again")
    spec = UpdateSpec(tuple(TensorSpec(name, tuple(shape)) for name, shape in meta["table"]))
    return Recording(spec, **{name: tensors[name] for name in _TENSORS})
