"""Subspaces that come from elsewhere: out of the package, from other data, from nothing.

Each is used as the fitted ones are: training in its code space, one bit a code value up, two down.
"""

from __future__ import annotations

from benchmarks.federated import fitted
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.scheme import Make
from benchmarks.federated.world import World, world_of
from benchmarks.llama.tasks import settings
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import RotatedSign
from gradcodec.errors import ConfigError
from gradcodec.federated import ServerConfig
from gradcodec.hub.local import bundled_path
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig


def bundled(name: str) -> Make:
    """A codec of the package; its whole folder counts as downloaded, though it came with pip."""

    def make(world: World) -> Method:
        codec = Codec.from_pretrained(name)
        if not isinstance(codec, Chain):
            raise ConfigError(f"expected a subspace and a packer in {name!r}, got {codec!r}")
        files = ("config.json", "model.safetensors")
        nbytes = sum((bundled_path(name) / file).stat().st_size for file in files)
        return _latent(world, codec.outer, nbytes)

    return make


def elsewhere(config: SubspaceConfig, task: str) -> Make:
    """Fitted on D1 of a task with the same seed, used on whatever is played."""

    def make(world: World) -> Method:
        s = world.settings
        there = world_of(settings(task, s.seed, s.rounds))
        name = f"signal-{config.ratio:g}-{config.share}-{config.basis_dtype}"
        return _latent(world, *fitted.kept(there, name, lambda: fitted.signal(there, config)))

    return make


def unfitted(config: SubspaceConfig) -> Make:
    """Bases drawn from the seed, which is all that a client downloads."""

    def make(world: World) -> Method:
        bases = random_bases(world.initial, ratio=config.ratio, seed=world.settings.seed)
        return _latent(world, bases, 0)

    return make


def _latent(world: World, transform: Codec, nbytes: int) -> Method:
    both = Chain(transform, RotatedSign()), Chain(transform, make_codec("int2-rotated"))
    return Coded(world.initial, *both, ServerConfig(mode="latent"), codec_bytes=nbytes)
