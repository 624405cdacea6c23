"""Attach to any training loop and record what an optimiser is given, or what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradcodec import layout
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
    optimiser sees it: accumulated, unscaled and clipped; what a closure computes, after each call
    of it. Of several optimisers each contributes the parameters that it holds. The others record
    once per block, when it ends. Second moments are streamed; ``snapshots`` keeps whole updates on
    disk for the autoencoders.

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
        self._counts: Counter[tuple[str, ...]] = Counter()
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

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The hook sees every optimiser of the process; only those that hold our parameters count.
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        names = tuple(n for n, p in self.parameters.items() if id(p) in held)
        if not names:
            return None
        itself, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._see(names)
            return None

        def watched() -> Any:
            loss = closure()
            self._see(names)
            return loss

        if rest:
            return (itself, watched, *rest[1:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _see(self, names: tuple[str, ...]) -> None:
        if self._counts[names] % self.every == 0:
            gradients = {n: self.parameters[n].grad for n in names}
            self._record({n: g for n, g in gradients.items() if g is not None})
        self._counts[names] += 1
        self.steps += 1

    @torch.no_grad()
    def _record(self, update: dict[str, Tensor]) -> None:
        for name, tensor in update.items():
            layout.check_finite(tensor, name)
        if self.moments is not None:
            self.moments.add(update)
        if self.snapshots is not None:
            whole = {
                n: update[n] if n in update else torch.zeros_like(p)
                for n, p in self.parameters.items()
            }
            self.snapshots.add(whole)
