"""The control of this project's own idea: bases that nobody fitted."""

from __future__ import annotations

import hashlib

import torch

from benchmarks.federated.methods import Coded, State
from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Subspace
from gradcodec.errors import ConfigError
from gradcodec.federated import ServerConfig
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec


def random_bases(initial: State, *, ratio: float, seed: int) -> Subspace:
    """Orthonormal bases, uniform in orientation, one per tensor: QR of a Gaussian matrix.

    Each tensor's generator is seeded by the seed and its name, so all participants draw the same
    bases and none are sent. Sizes and sides are those of a fitted subspace with uniform allocation.
    """
    spec = UpdateSpec.of(initial)
    config = SubspaceConfig(ratio=ratio, allocation="uniform", basis_dtype="float32")
    bases = {}
    for t in spec:
        axis = Axis.choose(t, config)
        k = min(axis.size, max(config.min_rank, int(axis.size / ratio)))
        own = hashlib.sha256(f"{seed} {t.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(own[:7], "little"))
        bases[t.name] = axis, torch.linalg.qr(torch.randn(axis.size, k, generator=generator)).Q
    return Subspace.from_bases(config, spec, bases)


def random_subspace(
    initial: State,
    *,
    ratio: float = 32.0,
    bits: int = 2,
    seed: int = 0,
    config: ServerConfig | None = None,
) -> Coded:
    """Training in a random subspace, codes in ``bits`` bits both ways; nothing is downloaded.

    Intrinsic dimension (Li et al., arXiv 1804.08838) in federated learning: seed-drawn linear
    subspaces of the parameters, trained in. Unlike its single basis over all parameters there is
    one per tensor (``k`` columns applied to its matrix view), fixed for the whole federation;
    everything else - latent mode, quantiser, messages - is this project's.

    Args:
        initial: the state that every participant derives from a seed.
        ratio: update values per code value.
        bits: of a code value on the wire.
        seed: of the bases; known to all.
        config: server settings, in latent mode.
    """
    config = config or ServerConfig(mode="latent")
    if config.mode != "latent":
        raise ConfigError(f"a random subspace is trained in: expected latent, got {config.mode!r}")
    codec = Chain(random_bases(initial, ratio=ratio, seed=seed), BlockQuant(BlockQuantConfig(bits)))
    return Coded(initial, codec, config=config)
