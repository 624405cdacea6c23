"""Analysis 4 of what is trained: matrix entropy and spectrum of ``B A`` after the last round.

The paper compares three trainings by the matrix entropy of what they end with: on pooled data, in
a federation, and in a federation whose updates pass an autoencoder. An adapter of noise stands
beside them: an entropy that it has as well says nothing of what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.federated.methods import Coded, State
from benchmarks.federated.world import play, world_of
from benchmarks.paper.coders import Through
from benchmarks.paper.measures import noise_like
from benchmarks.paper.recordings import ends
from benchmarks.paper.setup import Setup
from gradcodec.codecs import Identity
from gradcodec.describe.spectrum import energies
from gradcodec.errors import TrainingError
from gradcodec.metrics import matrix_entropy

Row = dict[str, Any]


class Training(NamedTuple):
    """What a reader sees, and how the adapter comes about."""

    title: str
    adapter: Callable[[Setup], State]


def trained(setup: Setup, name: str) -> Row:
    """The held-out loss of an adapter, and each of its layers' products."""
    state = TRAININGS[name].adapter(setup)
    loss = world_of(setup.settings()).evaluate(state)
    return {"layers": layers(state), "held_out": loss, "loss": loss}


def layers(state: State) -> list[Row]:
    """Entropy, in nats, spectrum and norm of ``B A`` of each adapted weight."""
    out = []
    for name, a in state.items():
        if "lora_A" in name:
            product = state[name.replace("lora_A", "lora_B")].double() @ a.double()
            out.append(
                {
                    "name": name,
                    "entropy": matrix_entropy(product),
                    "spectrum": energies(product)[: len(a)].tolist(),
                    "norm": float(product.norm()),
                }
            )
    return out


def centralised(setup: Setup) -> State:
    """One model on all clients' D2 pooled, in as many steps as they make together.

    The rate is that of a client over the clients of a round: its steps follow one another, theirs
    are averaged.
    """
    world = world_of(setup.settings())
    s = world.settings
    pool = [example for shard in world.d2.values() for example in shard]
    shards = dict.fromkeys(range(s.per_round), pool)
    own = world.parameters(world.initial)
    optimizer = torch.optim.AdamW(list(own.values()), weight_decay=s.local.weight_decay)
    for number in range(setup.rounds):
        for group in optimizer.param_groups:
            group["lr"] = s.local.lr / s.per_round * (1 - number / setup.rounds)
        for part in shards:
            world.train([part], [own], [optimizer], number, shards)
    return {name: p.detach().cpu() for name, p in own.items()}


def federated(setup: Setup) -> State:
    """Where the recorded rounds on D2 end: a federation without compression."""
    return ends(setup.test())[0]


def compressed(setup: Setup) -> State:
    """The same rounds, but every update passes the working autoencoder."""
    world = world_of(setup.settings())
    coder = setup.coder("ae-working")
    assert isinstance(coder, Through)
    method = Coded(world.initial, coder.codec, Identity())
    rounds = play(world, method, lr=world.settings.local.lr, rounds=setup.rounds)
    for row in rounds:
        if row["diverged"]:
            raise TrainingError(f"round {row['round']}: {row.get('error', 'no finite loss')}")
    return method.state()


def noise(setup: Setup) -> State:
    """White noise with the norm of each tensor of ``federated``."""
    return {
        name: _noise(tensor, setup.seed + at)
        for at, (name, tensor) in enumerate(federated(setup).items())
    }


def _noise(tensor: Tensor, seed: int) -> Tensor:
    drawn = noise_like(tensor, 1.0, seed)
    return drawn * (tensor.norm() / drawn.norm())


TRAININGS: Mapping[str, Training] = MappingProxyType(
    {
        "centralised": Training("all data in one place", centralised),
        "federation": Training("a federation, fp32", federated),
        "compressed": Training("a federation, ResNet-3 AE, working", compressed),
        "noise-adapter": Training("*an adapter of noise*", noise),
    }
)
