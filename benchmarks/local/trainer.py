"""One rank's training with ``gc.LocalSteps``."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.ddp.trainers import OptimiserTrainer, Times, library_times
from benchmarks.ddp.work import Recipe
from gradcodec import LocalSteps


class LocalStepsTrainer(OptimiserTrainer):
    """The library's own class around the recipe's optimiser.

    Args:
        model: the same on all ranks.
        recipe: the inner optimiser.
        options: of ``LocalSteps``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, **options: Any) -> None:
        super().__init__(model, recipe)
        self._local = LocalSteps(model, self.optimizer, **options)

    def update(self) -> None:
        """The optimiser's step, and the exchange if it is due."""
        self._local.step()

    def finish(self) -> None:
        """What was trained since the last exchange is exchanged as well; its bytes count."""
        self._local.finish()

    def times(self) -> Times:
        """The library's own."""
        return library_times(self._local)

    def notes(self) -> dict[str, Any]:
        """The library's own count of bytes, beside what TCP says."""
        stats = self._local.stats()
        return {name: stats[name] for name in ("wire_bytes", "dense_wire_bytes", "residual_bytes")}

    def close(self) -> None:
        """The thread of exchanges ends."""
        self._local.close()
