"""torch's own communication hooks."""

from __future__ import annotations

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from benchmarks.ddp.trainers import HookTrainer
from benchmarks.ddp.work import Recipe

_ONE_BUCKET = {"bucket_cap_mb": 1024}
"""With more, torch's PowerSGD issues collectives in different orders on gloo, and aborts."""


def fp16(model: nn.Module, recipe: Recipe) -> HookTrainer:
    """Half precision on the wire."""
    return HookTrainer(
        model, recipe, lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    )


def power_sgd(model: nn.Module, recipe: Recipe, *, rank: int, start: int) -> HookTrainer:
    """PowerSGD (Vogels et al., arXiv 1905.13727) by torch, in one bucket.

    Args:
        model: the same on all ranks.
        recipe: its optimiser.
        rank: of the approximation.
        start: steps that are not compressed (its default is 1000).
    """
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=start
    )
    return HookTrainer(
        model,
        recipe,
        lambda ddp: ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook),
        ddp=_ONE_BUCKET,
    )
