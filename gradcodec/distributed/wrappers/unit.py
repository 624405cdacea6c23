"""``Unit``: the gradients that a wrapper reduces at once, their codec, and what is kept of them.

A unit is one FSDP module's gradients as a flat vector. It is identified by the name of that module,
never by a length or the order of calls: the length changes with the parameters that got gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.coding import DENSE, CodecCoder
from gradcodec.distributed.exchange.collectives import scatter_residual_numel
from gradcodec.distributed.plan import UnitCodec
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.shards import derive_seed
from gradcodec.errors import NonFiniteError

_log = logging.getLogger(__name__)

STEPS, _SCATTER, _REDUCE = "steps.", "scatter.", "reduce."
_WORLD, _RANK = "world", "rank"
_MEASURE_EVERY, _MEASURED = 64, 1 << 18


@dataclass
class Unit:
    """One unit's codec and memory.

    Attributes:
        name: of the module, ``"(root)"`` for the model itself.
        coding: the codec of its gradient.
        steps: reductions so far.
        scatter: residual of reduce-scatters, fp32; as large as the unsharded unit.
        reduce: residuals of all-reduces.
        partial: reductions that lacked some parameters; residuals were not used in them.
        nmse: relative squared error of the coding, measured now and then on this rank's gradient.
    """

    name: str
    coding: UnitCodec
    steps: int = 0
    scatter: Tensor | None = None
    reduce: Residuals = field(default_factory=Residuals)
    partial: int = 0
    nmse: float | None = None

    @property
    def nbytes(self) -> int:
        """Memory of its residuals."""
        return self.reduce.nbytes + (0 if self.scatter is None else self.scatter.nbytes)

    def seed(self, base: int) -> int:
        """The seed of this reduction's random numbers."""
        return derive_seed(base, *self.name.encode(), self.steps)

    def feeds_back(self, codec: Codec, whole: bool) -> bool:
        """Whether a reduction uses a residual; one that is not whole does not, and is counted."""
        if not self.coding.feedback or codec is DENSE:
            return False
        self.partial += not whole
        return whole

    def scatter_residual(self, like: Tensor, world: int) -> Tensor:
        """The residual of a reduce-scatter into a shard such as ``like``; zeros at first."""
        numel = scatter_residual_numel(self.coding.codec, like.numel(), world)
        kept = self.scatter
        if kept is not None and kept.numel() != numel:
            _log.warning(
                "%s: the residual of %d values is dropped, the unit now has %d: its trainable "
                "parameters have changed",
                self.name,
                kept.numel(),
                numel,
            )
            kept = None
        if kept is None:
            _log.info("%s: error feedback keeps %d fp32 values on each rank", self.name, numel)
            kept = torch.zeros(numel, device=like.device)
        self.scatter = kept = kept.to(like.device)
        return kept

    def measure(self, values: Tensor, codec: Codec, seed: int) -> None:
        """Measure ``nmse`` on a sample: 2^18 values every 64 reductions."""
        if codec is DENSE or (self.nmse is not None and self.steps % _MEASURE_EVERY):
            return
        sample = values.detach().reshape(-1)[:_MEASURED].float()
        energy = float(sample.square().sum())
        if not 0 < energy < float("inf"):
            return
        coder = CodecCoder(codec)
        try:
            body = coder.pack(sample, seed, None)
        except NonFiniteError:
            return
        lost = sample - coder.mean([body], sample.numel())
        self.nmse = float(lost.square().sum()) / energy

    def saved(self) -> Iterator[tuple[str, Tensor | int]]:
        """Entries of ``ShardedState.state_dict``."""
        yield STEPS + self.name, self.steps
        if self.scatter is not None:
            yield _SCATTER + self.name, self.scatter.detach().cpu().clone()
        for key, value in self.reduce.state_dict().items():
            yield f"{_REDUCE}{self.name}|{key}", value

    def restore(self, state: Mapping[str, Tensor | int], *, residuals: bool) -> None:
        """Inverse of ``saved``: start at step 0 with what is not there.

        Args:
            state: what ``ShardedState.state_dict`` returned.
            residuals: whether they are this rank's; otherwise they are dropped.
        """
        self.steps = int(state.get(STEPS + self.name, 0))
        kept = state.get(_SCATTER + self.name) if residuals else None
        self.scatter = kept.detach().float().clone() if isinstance(kept, Tensor) else None
        prefix = f"{_REDUCE}{self.name}|"
        self.reduce = Residuals()
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if residuals and inner:
            # Rank and size of the reducing group, which under HSDP is not the whole world.
            within = {key: int(inner[key]) for key in (_RANK, _WORLD)}
            self.reduce.load_state_dict(inner, **within)
