"""Snapshots -> an autoencoder codec, by gradient descent on the reconstruction error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradcodec import layout
from gradcodec.codecs import Autoencoder
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.autoencoder.halves import ColumnDecoder, ColumnEncoder, build_nets
from gradcodec.types import Update, UpdateSpec

Snapshots = Sequence[Update] | Callable[[], Iterable[Update]]
"""Updates in order of time: a sequence, read one by one, or a function that returns a new pass."""

TRAIN_SHARE = 0.8
"""First part of the snapshots that is trained on; the rest, later in time, validates."""

SHRINKAGES = (0.0, 0.25, 0.5)
"""Candidates for shrinking the folded coefficients' correlations to zero, as samples are few."""


@dataclass(frozen=True)
class FitRow:
    """One line of the history, all in normalised units.

    Attributes:
        step: updates made so far.
        train_mse: mean of the batch losses since the row before.
        val_rse: ``sum ||x~ - x||^2 / sum ||x||^2`` over the validation snapshots.
    """

    step: int
    train_mse: float
    val_rse: float


class AutoencoderFit(NamedTuple):
    """The codec with the best validation weights, and how it got there."""

    codec: Autoencoder
    history: list[FitRow]


def fit_autoencoder(
    snapshots: Snapshots,
    config: AutoencoderConfig,
    spec: UpdateSpec,
    *,
    steps: int = 1000,
    batch: int = 4,
    lr: float = 2e-4,
    seed: int = 0,
    evaluations: int = 20,
    loss_log: Callable[[FitRow], None] | None = None,
) -> AutoencoderFit:
    """Train encoder and decoder together: ``min mean (Dec(Enc(x)) - x)^2``, Adam, as the paper.

    ``x`` is an update divided by its scales, which come from the training part. The working
    variant starts at the best linear code of its form, found in two closed-form steps over the
    training part. First, the row bases are the top eigenvectors of each kind's second moment
    ``sum_t G_t G_t^T``. Second, ``mix`` is the top eigenvectors of the second moment of the folded
    coefficients, where columns of one layer go together, with correlations shrunk by the
    ``SHRINKAGES`` value that validates best; if plain selection of the first coefficients validates
    better, ``mix`` is that selection. The start is a candidate too, so training never makes the
    validation error worse. On the LoRA updates of our small LLaMA the start was the best: neither
    training everything nor the blocks alone lowered the validation error.

    Args:
        snapshots: the first 80 % are trained on, the last 20 % validate; a single one does both.
            A sequence is shuffled anew in each epoch; a function's passes keep their order.
        config: which autoencoder.
        spec: the snapshots' tensor table.
        steps: optimiser steps; 0 gives the initial codec.
        batch: snapshots a step.
        lr: Adam's learning rate; the paper's is 2e-4.
        seed: of initial weights and shuffling; equal seeds give equal codecs on one machine.
        evaluations: how often the validation part is measured, evenly spread.
        loss_log: called with every new row of the history.

    Raises:
        ConfigError: a number is out of range.
        TrainingError: no snapshots, only zeros, or a loss that is not finite.
        UpdateError: a snapshot does not fit ``spec``.
        NonFiniteError: a snapshot holds NaN or Inf.
    """
    if steps < 0 or batch < 1 or evaluations < 1 or not (lr > 0 and math.isfinite(lr)):
        raise ConfigError(
            "expected steps >= 0, batch >= 1, evaluations >= 1 and a finite lr > 0, "
            f"got {steps}, {batch}, {evaluations} and {lr}"
        )
    data = Vectors(snapshots, spec)
    scales = fit_scales(data.train(), config, spec)
    data.divisor = scales.repeat_interleave(torch.tensor([t.numel for t in spec], dtype=torch.long))
    encoder, decoder = build_nets(config, spec, seed)
    if isinstance(encoder, ColumnEncoder) and isinstance(decoder, ColumnDecoder):
        _start_at_klt(encoder, decoder, data)
    history = train_pair(
        nn.Sequential(encoder, decoder), data, steps, batch, lr, seed, evaluations, loss_log
    )
    return AutoencoderFit(Autoencoder.from_nets(config, spec, encoder, decoder, scales), history)


def fit_scales(vectors: Iterable[Tensor], config: AutoencoderConfig, spec: UpdateSpec) -> Tensor:
    """Root mean squares ``[tensors]`` of flat vectors, pooled as ``config.normalise`` says.

    A pool that is all zero gets scale 1.

    Raises:
        TrainingError: everything is zero.
    """
    energy, count = torch.zeros(len(spec), dtype=torch.float64), 0
    sizes = [t.numel for t in spec]
    for x in vectors:
        parts = torch.split(x.double().square(), sizes)
        energy += torch.stack([p.sum() for p in parts]) if parts else 0
        count += 1
    if not float(energy.sum()) > 0:
        raise TrainingError(f"all {count} snapshots are zero")
    if config.normalise == "none":
        return torch.ones(len(spec))
    shapes = [layout.matrix_shape(t) for t in spec]
    pools = {
        "global_rms": [0] * len(spec),
        "factor_rms": [int(rows < cols) for rows, cols in shapes],
        "tensor_rms": list(range(len(spec))),
    }[config.normalise]
    pool = torch.tensor(pools)
    numel = torch.tensor(sizes, dtype=torch.float64)
    total = torch.zeros(len(spec), dtype=torch.float64).index_add(0, pool, energy)
    elements = torch.zeros_like(total).index_add(0, pool, numel * count)
    rms = (total / elements.clamp_min(1)).sqrt().float()[pool]
    return torch.where(rms > 0, rms, torch.ones_like(rms))


class Vectors:
    """Snapshots as flat fp32 vectors ``[n]``, divided by ``divisor``, split in time."""

    def __init__(self, snapshots: Snapshots, spec: UpdateSpec) -> None:
        self.snapshots, self.spec = snapshots, spec
        self.count = sum(1 for _ in snapshots()) if callable(snapshots) else len(snapshots)
        if self.count == 0:
            raise TrainingError("there are no snapshots to train on")
        self.trained = max(1, int(TRAIN_SHARE * self.count))
        self.divisor = torch.ones(spec.numel)

    def train(self) -> Iterator[Tensor]:
        """The training part, in order."""
        return self._read(0, self.trained)

    def validation(self) -> Iterator[Tensor]:
        """The validation part, in order."""
        return self._read(self.trained if self.count > 1 else 0, self.count)

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Endless batches ``[N, n]`` of the training part; the last of an epoch may be smaller."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            if callable(self.snapshots):
                epoch = self.train()
            else:
                order = torch.randperm(self.trained, generator=generator).tolist()
                epoch = (self._vector(self.snapshots[i]) for i in order)
            while rows := list(islice(epoch, size)):
                yield torch.stack(rows)

    def _read(self, start: int, stop: int) -> Iterator[Tensor]:
        if callable(self.snapshots):
            return map(self._vector, islice(self.snapshots(), start, stop))
        snapshots = self.snapshots
        return (self._vector(snapshots[i]) for i in range(start, stop))

    def _vector(self, update: Update) -> Tensor:
        self.spec.check(update)
        x = layout.flatten(update, self.spec)
        layout.check_finite(x, "snapshot")
        return x / self.divisor


@torch.no_grad()
def _start_at_klt(encoder: ColumnEncoder, decoder: ColumnDecoder, data: Vectors) -> None:
    """Set row bases and channel mix to the top eigenvectors of their second moments, in place."""
    columns = encoder.columns
    moments = [torch.zeros(g.side, g.side, dtype=torch.float64) for g in columns.groups]
    for x in data.train():
        for moment, (matrix,) in zip(moments, columns.pack(x[None]), strict=True):
            moment += matrix @ matrix.T
    for moment, up, down in zip(moments, encoder.rows, decoder.rows, strict=True):
        basis = _top(moment, up.shape[1])
        up.copy_(basis)
        down.copy_(basis)
    channels = encoder.trunk.mix.in_channels
    moment = torch.zeros(channels, channels, dtype=torch.float64)
    for x in data.train():
        folded: Tensor = encoder.trunk.fold(encoder.grid(x[None]))[0].flatten(1)
        moment += folded @ folded.T
    pair = nn.Sequential(encoder, decoder)
    kept = encoder.trunk.mix.out_channels
    # Plain selection stays a candidate. It is the best one with few samples, and where columns of
    # unlike length share a cell, so that mixing would move energy into cells that are not sent.
    starts = [torch.eye(channels, kept)]
    for shrink in SHRINKAGES:
        starts.append(_top(torch.lerp(moment, moment.diag().diag(), shrink), kept))
    errors = []
    for basis in starts:
        encoder.trunk.start_at(basis)
        decoder.trunk.start_at(basis)
        errors.append(_rse(pair, data.validation()))
    best = starts[errors.index(min(errors))]
    encoder.trunk.start_at(best)
    decoder.trunk.start_at(best)


def _top(moment: Tensor, count: int) -> Tensor:
    """Eigenvectors ``[size, count]`` of the largest eigenvalues, descending, fp32."""
    _, vectors = torch.linalg.eigh(moment)
    top: Tensor = vectors.flip(1)[:, :count].float()
    return top


def train_pair(
    pair: nn.Sequential,
    data: Vectors,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    evaluations: int,
    loss_log: Callable[[FitRow], None] | None,
) -> list[FitRow]:
    """Adam on ``pair`` ``[N, n] -> [N, n]`` in place; ends with its best validation row's weights.

    The networks are any; everything else is as for ``fit_autoencoder``. Returns the history.

    Raises:
        TrainingError: a loss is not finite.
    """
    optimiser = torch.optim.Adam(pair.parameters(), lr=lr)
    batches = data.batches(batch, seed)
    history: list[FitRow] = []
    best = copy.deepcopy(pair.state_dict())
    every = max(1, steps // evaluations)
    losses = [_loss(pair.eval(), next(data.batches(batch, seed))).item()]
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            row = FitRow(step, sum(losses) / len(losses), _rse(pair, data.validation()))
            if not (math.isfinite(row.train_mse) and math.isfinite(row.val_rse)):
                raise TrainingError(f"the loss is not finite at step {step}; lower lr={lr}")
            if row.val_rse < min((r.val_rse for r in history), default=math.inf):
                best = copy.deepcopy(pair.state_dict())
            history.append(row)
            losses = []
            if loss_log is not None:
                loss_log(row)
        if step == steps:
            break
        pair.train()
        loss = _loss(pair, next(batches))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    pair.load_state_dict(best)
    return history


def _loss(pair: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (pair(x) - x).square().mean()
    return loss


@torch.no_grad()
def _rse(pair: nn.Module, vectors: Iterable[Tensor]) -> float:
    """Relative squared error over flat vectors; batch normalisation uses running statistics."""
    pair.eval()
    error = energy = 0.0
    for x in vectors:
        error += float((pair(x[None])[0] - x).double().square().sum())
        energy += float(x.double().square().sum())
    return error / energy if energy else error
