"""DeMo by its authors' file."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from benchmarks.ddp.trainers import AggregateTrainer
from benchmarks.ddp.work import Recipe
from benchmarks.peers.ddp.checkout import DEMO


class Demo(AggregateTrainer):
    """Decoupled momentum (Peng et al., arXiv 2411.19870), https://github.com/bloc97/DeMo.

    An optimiser of its own: the fast components of each rank's momentum are exchanged, and the sign
    of their mean is the step. So it has a learning rate of its own, and neither AdamW's moments nor
    the recipe's momentum. Defaults otherwise (decay 0.999, the 32 largest of each 64x64 DCT).

    Its transform takes vectors and matrices; a convolution's weights are shown to it as a matrix
    of outputs by inputs times places, on the same memory.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, lr: float) -> None:
        super().__init__(model, dataclasses.replace(recipe, lr=lr))
        self._real = [p for p in model.parameters() if p.requires_grad]
        self._shown = [nn.Parameter(_flat(p.data)) for p in self._real]
        self.optimizer: torch.optim.Optimizer = DEMO.module("demo").DeMo(self._shown, lr=lr)

    def aggregate(self) -> None:
        """The gradients, under the shapes it takes; exchange, coding and update are one call."""
        for real, shown in zip(self._real, self._shown, strict=True):
            if real.grad is None:
                raise RuntimeError("DeMo needs a gradient of every parameter")
            shown.grad = _flat(real.grad)
        self.optimizer.step()

    def update(self) -> None:
        """Done already."""
        for parameter in (*self._real, *self._shown):
            parameter.grad = None


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 2 else tensor
