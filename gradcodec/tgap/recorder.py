"""Attach to any training loop and record what an optimiser is given, or what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from gradcodec import layout
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.representation import RECORDED, check, represent
from gradcodec.tgap.moments import SecondMoments
from gradcodec.tgap.parts import parts_of
from gradcodec.tgap.snapshots import SnapshotStore
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec


class GradientRecorder:
    """Record gradients of a model over time; use it as a context manager around training.

        recorder = GradientRecorder(model, SubspaceConfig(ratio=32))
        for client in clients:
            with recorder:
                train(model, client)          # any loop, any torch optimiser
        codec = fit_subspace(recorder.moments)

    With ``representation="gradient"`` the gradient of every optimiser step inside the block is
    recorded as the optimiser sees it: accumulated, unscaled and clipped; with a closure, after each
    call of the closure. Of several optimisers, each contributes the parameters that it holds. The
    other representations are recorded once per block, when it ends. Second moments are streamed;
    ``snapshots`` keeps whole updates on disk for the autoencoders.

    Under FSDP1 and ``fully_shard`` whole gradients are recorded, under the names in the unwrapped
    model. Gathering them is a collective, so every rank must make a recorder and enter its block.
    Gradients are averaged over the ranks by then, so all ranks record the same, whatever their
    data; ``moments`` or ``snapshots`` may be given to one rank only. Host memory holds one whole
    gradient of the model at a time, the device that of a single parameter.

    Args:
        model: a module, wrapped or not, or parameters by name; for FSDP1 the outermost module.
        moments: where to stream second moments, or the subspace settings for which to make them;
            ``None`` records no second moments.
        representation: ``"gradient"``, ``"update"``, ``"state"`` or ``"balanced"``.
        snapshots: where to store whole updates, or ``None``.
        every: record every n-th optimiser step only; other representations have no steps.

    Raises:
        ConfigError: nothing is trainable, FSDP1 parameters come without their module, or a setting
            is wrong.
        UpdateError: ``moments`` belong to other parameters, or a dtype has no wire code.
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
        self.parts = parts_of(model)
        self.spec = UpdateSpec(tuple(part.spec for part in self.parts.values()))
        self.representation = check(representation, RECORDED)
        if isinstance(moments, SubspaceConfig):
            moments = SecondMoments(self.spec, moments)
        elif moments is not None:
            _check_same(moments, self.spec)
        self.moments = moments
        self.snapshots = snapshots
        if type(every) is not int or every < 1:
            raise ConfigError(f"recorder: expected every >= 1, got {every!r}")
        if every > 1 and representation != "gradient":
            raise ConfigError(
                f"recorder: every={every} counts optimiser steps, and {representation!r} is "
                "recorded once a block: leave every out"
            )
        self.every = every
        self.steps = 0
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._hooks: list[RemovableHandle] = []
        #: The optimiser whose step is running; steps of others inside it count as part of it.
        self._stepping: Optimizer | None = None
        self._start: dict[str, Tensor] | None = None

    @property
    def _recording(self) -> bool:
        return bool(self._hooks) or self._start is not None

    def __enter__(self) -> GradientRecorder:
        if self._recording:
            raise ConfigError("recorder: already recording; blocks may not be nested")
        if self.representation == "gradient":
            self._stepping = None
            self._hooks = [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]
        else:
            differs = self.representation == "update"
            self._start = {n: p.value().clone() for n, p in self.parts.items() if differs}
        return self

    @torch.no_grad()
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        start, self._start = self._start, None
        hooks, self._hooks, self._stepping = self._hooks, [], None
        for hook in hooks:
            hook.remove()
        if kind is None and start is not None:
            ends = {n: part.value() for n, part in self.parts.items()}
            if self.representation == "update":
                self._record(self._whole(represent("update", ends, start)))
            else:
                self._record(represent(self.representation, self._whole(ends), {}))

    def __getstate__(self) -> dict[str, Any]:
        if self._recording:
            raise ConfigError("recorder: cannot be copied while it records; leave its block first")
        return self.__dict__.copy()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # The hook sees every optimiser of the process; only those that hold our parameters count.
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        names = tuple(n for n, part in self.parts.items() if id(part.holder) in held)
        if not names or self._stepping not in (None, optimizer):
            return None
        itself, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            self._see(names)
            self._stepping = optimizer
            return None
        self._stepping = optimizer

        def watched() -> Any:
            loss = closure()
            self._see(names)
            return loss

        if rest:
            return (itself, watched, *rest[1:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if optimizer is self._stepping:
            self._stepping = None

    def _see(self, names: tuple[str, ...]) -> None:
        if self._counts[names] % self.every == 0:
            gradients = {n: self.parts[n].gradient() for n in names}
            self._record(self._whole(gradients))
        self._counts[names] += 1
        self.steps += 1

    @torch.no_grad()
    def _whole(self, parts: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """The whole tensors that these are parts of, without those that no rank has."""
        found = {}
        for name, part in parts.items():
            whole = self.parts[name].whole(part)
            if whole is not None:
                # To the host at once: a gathered tensor makes room for the next, and what is done
                # with it there need not wait for the device again.
                found[name] = whole.cpu()
        return found

    @torch.no_grad()
    def _record(self, update: dict[str, Tensor]) -> None:
        for name, tensor in update.items():
            layout.check_finite(tensor, name)
        if self.moments is not None:
            self.moments.add(update)
        if self.snapshots is not None:
            self.snapshots.add(
                {
                    t.name: update[t.name]
                    if t.name in update
                    else torch.zeros(t.shape, dtype=t.dtype)
                    for t in self.spec
                }
            )


def _check_same(moments: SecondMoments, spec: UpdateSpec) -> None:
    """Statistics given by hand must be of the parameters that will be recorded."""
    if not isinstance(moments, SecondMoments):
        raise ConfigError(
            "recorder: expected SecondMoments, a SubspaceConfig to make them for, or None, got "
            f"{type(moments).__name__}"
        )
    known = {t.name: t.shape for t in moments.spec}
    for t in spec:
        if known.get(t.name) != t.shape:
            raise UpdateError(f"recorder: {t} is not in the moments, which are of other parameters")
