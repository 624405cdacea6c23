"""Fed-SB: every adapter is a small trainable core between two frozen factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer
from gradcodec.errors import ConfigError

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Frame:
    """What Fed-SB fixes for one module: ``W = W_0 + scale U R V`` with ``R [r, r]`` trained.

    Attributes:
        left: ``U [out, r]``, orthonormal columns.
        right: ``V [r, in]``, orthonormal rows.
        core: the first ``R``.
    """

    left: Tensor
    right: Tensor
    core: Tensor

    @classmethod
    def of(cls, gradient: Tensor, r: int, lr: float, scale: float) -> Frame:
        """LoRA-SB's start (arXiv 2411.19557): truncated SVD of Adam's first full step.

        Args:
            gradient: of the frozen weight ``[out, in]``, a mean over clients.
            r: rank.
            lr: of that first step, ``-lr sign(gradient)``.
            scale: LoRA's alpha / r.
        """
        u, s, vt = torch.linalg.svd(-lr * gradient.sign(), full_matrices=False)
        return cls(u[:, :r].contiguous(), vt[:r].contiguous(), torch.diag(s[:r]) / scale)


class FedSB(Peer):
    """Fed-SB (Singhal et al., arXiv 2502.15436).

        U, V: from one full gradient, at all participants, forever
        R [r, r]: trained, fp32 in both directions

    The mean of the cores gives the mean of the products exactly. ``U`` and ``V`` are a download
    (``codec_bytes``); what the clients sent to find them is not counted. In the model the core is
    multiplied into the right factor: ``lora_A = R V``, ``lora_B = U``.

    Args:
        frames: by the module's name (a prefix of the adapter's two tensors).
        initial: the adapter of the benchmark, for its names and shapes.
        lr: server step on the mean update.
    """

    def __init__(self, initial: State, frames: Mapping[str, Frame], *, lr: float = 1.0) -> None:
        wanted = {n.removesuffix(end) for n in initial for end in (A, B) if n.endswith(end)}
        if set(frames) != wanted or len(initial) != 2 * len(wanted):
            raise ConfigError(f"expected frames of {len(wanted)} modules, got {len(frames)}")
        self.frames = frames
        self.codec_bytes = 4 * sum(f.left.numel() + f.right.numel() for f in frames.values())
        super().__init__({name: frame.core for name, frame in frames.items()}, lr=lr)

    def arrive(self, client: int, blob: bytes) -> State:
        """The cores from the bytes, the rest from the download."""
        return self._whole(super().arrive(client, blob))

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Trains the cores; the factors follow."""
        return _CoreOptimizer(self.frames, parameters, cls, options)

    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """The cores: ``lora_A V^T``."""
        cores = {name: end[name + A] @ frame.right.T for name, frame in self.frames.items()}
        return super().reply(client, optimizer, cores, n)

    def state(self) -> State:
        """The server's cores in everyone's factors."""
        return self._whole(super().state())

    def _whole(self, cores: State) -> State:
        out = {}
        for name, frame in self.frames.items():
            out[name + A] = cores[name] @ frame.right
            out[name + B] = frame.left.clone()
        return out


class _CoreOptimizer(torch.optim.Optimizer):
    """An optimiser of the cores, driven by the gradients of ``lora_A``: ``dR = dA V^T``."""

    def __init__(
        self,
        frames: Mapping[str, Frame],
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        options: Mapping[str, Any],
    ) -> None:
        self._wholes = [parameters[name + A] for name in frames]
        device = self._wholes[0].device
        self._rights = [frame.right.to(device) for frame in frames.values()]
        cores = [w.detach() @ v.T for w, v in zip(self._wholes, self._rights, strict=True)]
        self._cores = [nn.Parameter(core) for core in cores]
        self._inner = cls(self._cores, **options)
        super().__init__(self._wholes, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every core, written into ``lora_A``."""
        for core, whole, right in zip(self._cores, self._wholes, self._rights, strict=True):
            core.grad = None if whole.grad is None else whole.grad @ right.T
        self._inner.step()
        for core, whole, right in zip(self._cores, self._wholes, self._rights, strict=True):
            whole.copy_(core @ right)
