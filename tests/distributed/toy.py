"""A small model, its data and its training loop, for every world of the tests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcodec.distributed import CompressState, compress_hook

WIDTH = 96
"""Matrices have 9216 elements: three parts of 4096, the last one short."""

CAP = 0.06
"""Bucket size in MB that makes at least three buckets."""


def net(seed: int = 0) -> nn.Sequential:
    """Five matrices over the default ``min_numel``, biases and a last layer under it."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 7))


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Other data at every rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, WIDTH, generator=generator)
    return x, torch.randint(0, 7, (16,), generator=generator)


@contextmanager
def wrapped(
    codec: Any = "int4", *, model: nn.Module | None = None, hook: bool = True, **options: Any
) -> Iterator[tuple[DistributedDataParallel, CompressState | None]]:
    """A wrapped model with our hook, or without any; options of DDP start with ``ddp_``."""
    model = net() if model is None else model
    ddp_options = {k[4:]: options.pop(k) for k in list(options) if k.startswith("ddp_")}
    ddp_options.setdefault("bucket_cap_mb", CAP)
    ddp = DistributedDataParallel(model, **ddp_options)
    state = None
    if hook:
        state = CompressState(ddp, codec, **options)
        ddp.register_comm_hook(state, compress_hook)
    try:
        yield ddp, state
    finally:
        if state is not None:
            state.close()


def train(
    ddp: nn.Module,
    steps: range,
    optimizer: torch.optim.Optimizer,
    skew: float = 0.0,
) -> list[float]:
    """Losses of this rank; rank ``r`` starts its backward passes ``r * skew`` seconds late."""
    rank, losses = dist.get_rank(), []
    for step in steps:
        x, y = batch(rank, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), y)
        if skew:
            time.sleep(skew * ((rank + step) % dist.get_world_size()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module, lr: float = 0.2) -> torch.optim.SGD:
    """With momentum, so that a wrong step is remembered."""
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9)


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients by name."""
    return {
        n.removeprefix("module."): p.grad.clone()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def everywhere(value: Tensor) -> list[Tensor]:
    """The value of every rank."""
    value = value.detach().contiguous()
    found = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    return found


def assert_replicas_equal(model: nn.Module) -> None:
    """To the bit."""
    mine = weights(model)
    assert torch.isfinite(mine).all()
    for other in everywhere(mine):
        assert torch.equal(mine, other)


def mean_gradients(rank: int, world: int, model: nn.Module, step: int) -> dict[str, Tensor]:
    """The exact mean over ranks at one step, computed here alone, in float64."""
    total: dict[str, Tensor] = {}
    for r in range(world):
        x, y = batch(r, step)
        loss = nn.functional.cross_entropy(model(x), y)
        for (n, _), g in zip(
            model.named_parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        ):
            total[n] = total.get(n, 0) + g.double() / world
    return total


def relative(a: Tensor, b: Tensor) -> float:
    """Squared error over squared norm of ``b``."""
    return float((a.double() - b.double()).square().sum() / b.double().square().sum())
