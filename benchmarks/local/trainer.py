"""One rank's training with ``gc.LocalSteps``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from benchmarks.ddp.trainers import Times, set_rate
from benchmarks.ddp.work import Recipe
from gradcodec import LocalSteps


class LocalStepsTrainer:
    """The library's own class around the recipe's optimiser (see ``ddp.trainers.Trainer``).

    Args:
        model: the same on all ranks.
        recipe: the inner optimiser.
        options: of ``LocalSteps``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, **options: Any) -> None:
        self.model = model
        self.optimizer = recipe.optimiser(list(model.parameters()))
        self.peak = recipe.lr
        self._local = LocalSteps(model, self.optimizer, **options)

    def step(self, batch: list[Tensor], rate: float) -> float:
        """Forward, backward, update, and the exchange if it is due."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(*batch)
        loss.backward()
        set_rate(self.optimizer, self.peak * rate)
        self._local.step()
        return float(loss.detach())

    def finish(self) -> None:
        """What was trained since the last exchange is exchanged as well; its bytes count."""
        self._local.finish()

    def times(self) -> Times:
        """The library's own."""
        stats = self._local.stats()
        return {part: stats[f"{part}_seconds"] for part in ("encode", "exchange", "decode")}

    def notes(self) -> dict[str, Any]:
        """The library's own count of bytes, beside what TCP says."""
        stats = self._local.stats()
        return {name: stats[name] for name in ("wire_bytes", "dense_wire_bytes", "residual_bytes")}

    def close(self) -> None:
        """The thread of exchanges ends."""
        self._local.close()
