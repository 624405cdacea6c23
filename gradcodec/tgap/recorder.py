"""Attach to any training loop and record what an optimiser is given, or what it did."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradcodec.codecs.subspace import SubspaceConfig
from gradcodec.errors import ConfigError
from gradcodec.representation import RECORDED, check, represent
from gradcodec.tgap.moments import SecondMoments
from gradcodec.tgap.snapshots import SnapshotStore
from gradcodec.types import UpdateSpec


def named_parameters(model: nn.Module | Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; ``ConfigError`` if there are none."""
    items = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    found = {n: p for n, p in items if p.requires_grad}
    if not found:
        raise ConfigError("expected a model with trainable parameters, got none")
    return found


class GradientRecorder:
    """Record gradients of a model over time; use it as a context manager around training.

    .. code-block:: python

        recorder = GradientRecorder(model, SubspaceConfig(ratio=32))
        for client in clients:
            with recorder:
                train(model, client)          # any loop, any torch optimiser
        codec = fit_subspace(recorder.moments)

    With ``representation="gradient"`` every optimiser step inside the block is recorded, as the
    optimiser sees it (accumulated, unscaled and clipped). The others record once per block, when it
    ends. Second moments are streamed; ``snapshots`` additionally keeps whole updates on disk for
    the autoencoders.

    Args:
        model: a module, or parameters by name.
        moments: where to stream second moments, or the subspace settings to make them for;
            ``None`` records none.
        representation: ``"gradient"``, ``"update"``, ``"state"`` or ``"balanced"``.
        snapshots: where to store whole updates, or ``None``.
        every: record every n-th optimiser step only.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        moments: SecondMoments | SubspaceConfig | None = None,
        *,
        representation: str = "gradient",
        snapshots: SnapshotStore | None = None,
        every: int = 1,
    ) -> None:
        self.parameters = named_parameters(model)
        self.spec = UpdateSpec.of(self.parameters)
        self.representation = check(representation, RECORDED)
        if isinstance(moments, SubspaceConfig):
            moments = SecondMoments(self.spec, moments)
        self.moments = moments
        self.snapshots = snapshots
        if every < 1:
            raise ConfigError(f"recorder: expected every >= 1, got {every}")
        self.every = every
        self.steps = 0
        self._ids = {id(p) for p in self.parameters.values()}
        self._hook: RemovableHandle | None = None
        self._start: dict[str, Tensor] = {}

    def __enter__(self) -> GradientRecorder:
        if self._hook is not None or self._start:
            raise ConfigError("recorder: already recording; blocks may not be nested")
        if self.representation == "gradient":
            self._hook = register_optimizer_step_pre_hook(self._before_step)
        else:
            self._start = {n: p.detach().clone() for n, p in self.parameters.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        start, self._start = self._start, {}
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        elif kind is None:
            self._record(represent(self.representation, self.parameters, start))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # The hook sees every optimiser of the process; only those that hold our parameters count.
        if not any(id(p) in self._ids for g in optimizer.param_groups for p in g["params"]):
            return
        if self.steps % self.every == 0:
            self._record({n: p.grad for n, p in self.parameters.items() if p.grad is not None})
        self.steps += 1

    @torch.no_grad()
    def _record(self, update: dict[str, Tensor]) -> None:
        if self.moments is not None:
            self.moments.add(update)
        if self.snapshots is not None:
            whole = {
                n: update[n] if n in update else torch.zeros_like(p)
                for n, p in self.parameters.items()
            }
            self.snapshots.add(whole)
