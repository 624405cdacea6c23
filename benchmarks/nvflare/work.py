"""What the sites train: LoRA pairs of the sizes of Qwen2.5-0.5B, towards teachers of low rank.

A pair ``A [8, 896]``, ``B [out, 8]`` learns the product ``U V`` of its teacher from random inputs.
The teachers of two sites share half of their rank, so the sites want almost the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RANK, WIDTH = 8, 896
OUTPUTS = {"q_proj": 896, "v_proj": 128}
SITES = 2


class Pair(nn.Module):
    """One adapter; ``B`` starts at 0."""

    def __init__(self, out: int, random: torch.Generator) -> None:
        super().__init__()
        start = torch.randn(RANK, WIDTH, generator=random) / math.sqrt(WIDTH)
        self.lora_A, self.lora_B = nn.Parameter(start), nn.Parameter(torch.zeros(out, RANK))


class Adapters(nn.Module):
    """The adapters of all layers; with 24 layers, 540,672 parameters in 96 tensors."""

    def __init__(self, layers: int = 24, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: Pair(out, random) for name, out in OUTPUTS.items()})
            for _ in range(layers)
        )
        self.seed = seed

    def pairs(self) -> list[Pair]:
        """All adapters, in order."""
        return [pair for layer in self.layers for pair in layer.values()]


def teacher(number: int, out: int, site: int, seed: int) -> tuple[Tensor, Tensor]:
    """``U [out, 8]`` and ``V [8, 896]`` of an adapter's teacher at a site."""
    half = RANK // 2
    shared = torch.Generator().manual_seed(1_000 * seed + number)
    own = torch.Generator().manual_seed(1_000_000 + 1_000 * seed + 2 * number + site)
    u = torch.cat(
        [torch.randn(out, half, generator=g) * s for g, s in ((shared, 1), (own, 0.1))], 1
    )
    v = torch.cat([torch.randn(half, WIDTH, generator=g) for g in (shared, own)])
    return u / (2 * math.sqrt(WIDTH)), v


def train(model: Adapters, site: int, number: int, steps: int = 6) -> None:
    """Adam on a site's data of one round."""
    random = torch.Generator().manual_seed(977 * number + site + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = []
        for i, pair in enumerate(model.pairs()):
            u, v = teacher(i, len(pair.lora_B), site, model.seed)
            x = torch.randn(32, WIDTH, generator=random)
            wrong = x @ pair.lora_A.T @ pair.lora_B.T - x @ v.T @ u.T
            losses.append(wrong.square().mean())
        torch.stack(losses).sum().backward()
        optimizer.step()


@torch.no_grad()
def loss(model: Adapters) -> float:
    """Expected squared error per output of the mean of both sites' teachers, over all adapters.

    ``|B A - T|_F^2 / out``, which is 1 for adapters of zeros, about.
    """
    total = 0.0
    for i, pair in enumerate(model.pairs()):
        out = len(pair.lora_B)
        mean = sum(u @ v for u, v in (teacher(i, out, s, model.seed) for s in range(SITES))) / SITES
        total += float((pair.lora_B @ pair.lora_A - mean).square().sum()) / out
    return total / len(model.pairs())
