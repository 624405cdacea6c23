"""The federated fine-tuning of a causal language model, as the plain loop needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.federated.loop import LocalResult
from gradcodec.recipes.data import Encoded, collate
from gradcodec.recipes.evaluate import mean_loss


@dataclass(frozen=True)
class LocalTraining:
    """How one client trains in one round.

    Attributes:
        lr: learning rate of the first round; decays linearly to zero after the last.
        batch: examples per optimiser step.
        micro_batch: examples per forward pass; gradients are accumulated up to ``batch``.
        steps: optimiser steps per round; 0 for whole epochs instead.
        epochs: passes over the client's data when ``steps`` is 0.
        clip: largest gradient norm.
        weight_decay: AdamW's.
    """

    lr: float = 1.2e-2
    batch: int = 8
    micro_batch: int = 8
    steps: int = 8
    epochs: int = 1
    clip: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ConfigError(f"expected steps of at least 0, got {self.steps}")
        if not (0 < self.lr < math.inf and self.clip > 0 and 0 <= self.weight_decay < math.inf):
            raise ConfigError(
                "expected lr > 0, clip > 0 and weight_decay >= 0, all finite, "
                f"got {self.lr}, {self.clip} and {self.weight_decay}"
            )


def batch_schedule(local: LocalTraining, count: int, seed: Sequence[int]) -> list[list[int]]:
    """Which of ``count`` examples each step uses: shuffled passes, cut into batches.

    Args:
        local: how many steps of how many examples, or how many whole epochs.
        count: number of examples, at least 1.
        seed: seeds the shuffling: the run's seed, the client, the round.
    """
    rng = np.random.default_rng(seed)
    batch = min(local.batch, count)
    if local.steps:
        passes = -(-local.steps * batch // count)
        order = np.concatenate([rng.permutation(count) for _ in range(passes)])
        order = order[: local.steps * batch]
    else:
        order = np.concatenate([rng.permutation(count) for _ in range(local.epochs)])
    return [order[i : i + batch].tolist() for i in range(0, len(order), batch)]


class LanguageTask:
    """A model with adapters, its clients' encoded examples and the held-out ones.

    Training depends only on ``(seed, client, round)`` and the starting parameters, so an
    interrupted run goes on exactly where it was.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        shards: Mapping[int, Sequence[Encoded]],
        held_out: Sequence[Encoded],
        *,
        pad_id: int,
        rounds: int,
        local: LocalTraining,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.parameters, self.shards = model, dict(parameters), dict(shards)
        self.pad_id, self.rounds, self.local, self.seed = pad_id, rounds, local, seed
        self.device = torch.device(device)
        self.optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
        self.optimizer_options: Mapping[str, Any] = {
            "lr": local.lr,
            "weight_decay": local.weight_decay,
        }
        self._held_out = [self._batch(held_out[i : i + 32]) for i in range(0, len(held_out), 32)]

    def train(self, client: int, round: int, optimizer: torch.optim.Optimizer) -> LocalResult:
        """One client's local training; see ``LocalTraining``."""
        examples = self.shards[client]
        if not examples:
            return LocalResult(0, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = self.local.lr * (1 - round / self.rounds)
        losses = [
            self._step([examples[i] for i in chosen], optimizer)
            for chosen in self._schedule(client, round, len(examples))
        ]
        return LocalResult(len(examples), float(np.mean(losses)))

    def evaluate(self) -> float:
        """Mean held-out loss in nats per answer token."""
        return mean_loss(self.model, self._held_out)

    def _schedule(self, client: int, round: int, count: int) -> list[list[int]]:
        return batch_schedule(self.local, count, (self.seed, client, round))

    def _step(self, examples: Sequence[Encoded], optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for i in range(0, len(examples), self.local.micro_batch):
            part = examples[i : i + self.local.micro_batch]
            output: Any = self.model(**self._batch(part))
            share = len(part) / len(examples)
            (output.loss * share).backward()
            total += float(output.loss.detach()) * share
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.local.clip)
        optimizer.step()
        return total

    def _batch(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = collate(list(examples), self.pad_id)
        return {name: t.to(self.device) for name, t in batch.items()}
