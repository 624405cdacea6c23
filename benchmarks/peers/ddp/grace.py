"""GRACE's compressors for torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from benchmarks.ddp.trainers import AggregateTrainer
from benchmarks.ddp.work import Recipe
from benchmarks.peers.ddp.checkout import GRACE


class Grace(AggregateTrainer):
    """A compressor of GRACE (Xu et al., ICDCS 2021), https://github.com/sands-lab/grace.

    ``grace_from_params`` and ``step`` are theirs, called for one parameter after another, as their
    example for torch.distributed does.

    Args:
        model: the same on all ranks.
        recipe: its optimiser.
        params: of ``grace_from_params``, without ``world_size``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, params: dict[str, Any]) -> None:
        super().__init__(model, recipe)
        make = GRACE.module("grace_dl.dist.helper").grace_from_params
        self._grace: Any = make({**params, "world_size": dist.get_world_size()})

    def aggregate(self) -> None:
        """Parameter by parameter."""
        for name, parameter in self.model.named_parameters():
            parameter.grad = self._grace.step(parameter.grad, name)
