"""PowerSGD by its authors' package."""

from __future__ import annotations

from torch import nn

from benchmarks.ddp.trainers import AggregateTrainer
from benchmarks.ddp.work import Recipe
from benchmarks.peers.ddp.checkout import EPFML


class EpfmlPowerSGD(AggregateTrainer):
    """PowerSGD (Vogels et al., arXiv 1905.13727), https://github.com/epfml/powersgd.

    As their ``optimizer_step`` does it, whose three parts are called here one by one to be timed:
    the aggregator is given the gradients, which hold what it left there (the error) plus the new
    ones, since they are never zeroed; the optimiser gets the averages; the errors are put back.

    Args:
        model: the same on all ranks.
        recipe: its optimiser.
        rank: of the approximation.
        start: steps that are not compressed (their default is 100).
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, rank: int, start: int) -> None:
        super().__init__(model, recipe)
        theirs = EPFML.module("powersgd")
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        config = theirs.Config(rank=rank, start_compressing_after_num_steps=start)
        self._aggregator = theirs.PowerSGD(self._parameters, config)

    def aggregate(self) -> None:
        """Averages in ``grad``, errors kept."""
        self._errors = [p.grad for p in self._parameters]
        averages = self._aggregator.aggregate(self._errors)
        for parameter, average in zip(self._parameters, averages, strict=True):
            parameter.grad = average

    def update(self) -> None:
        """The optimiser's step, then the errors are back in ``grad``."""
        self.optimizer.step()
        for parameter, error in zip(self._parameters, self._errors, strict=True):
            parameter.grad = error
