"""The subspaces of both cases, 8 bits a value: fitted on what clients agree on, or drawn."""

from __future__ import annotations

from benchmarks.federated import fitted
from benchmarks.federated.world import World
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.subspace.config import SubspaceConfig

PACKED = BlockQuant(BlockQuantConfig(8))
"""How a code travels."""


def signal(world: World, ratio: float) -> fitted.Fitted:
    """A subspace fitted on the world's D1, and the bytes of its bases; kept on disk."""
    config = SubspaceConfig(ratio=ratio, allocation="tempered", side="long")
    made = fitted.kept(world, f"signal-{ratio:g}", lambda: fitted.signal(world, config))
    return fitted.Fitted(_quantised(made.codec), made.nbytes)


def random(world: World, ratio: float) -> Codec:
    """Random bases, drawn from the world's seed, which everybody knows."""
    return _quantised(random_bases(world.initial, ratio=ratio, seed=world.settings.seed))


def _quantised(transform: Codec) -> Codec:
    return Chain(transform, PACKED)
