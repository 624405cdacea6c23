"""FAF, Federated AutoEncoder-involved Fine-tuning: training in the code space.

In ``post`` mode a client trains its parameters and encodes the finished update, as CG-FedLLM
(arXiv 2405.13746, Algorithm 1) does; nothing of this file is needed. In ``latent`` mode the codec
is involved in the training itself: the trainable variable is the code ``z``, the parameters are

    theta = theta_0 + Dec(z) - Dec(0),

and the gradient of ``z`` is the vector-Jacobian product of ``Dec`` (``U^T g`` for a linear codec).
So what is sent is exactly what was trained; nothing is projected away after the fact. This is the
project's own reading of "AutoEncoder-involved", not the paper's algorithm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from gradcodec.codecs.base import Codec
from gradcodec.errors import ConfigError
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload


class LatentOptimizer(torch.optim.Optimizer):
    """Any torch optimiser, run on the code of an update instead of on the parameters.

    .. code-block:: python

        opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=1e-3)   # instead of AdamW(...)
        loss.backward(); opt.step(); opt.zero_grad()                      # the loop stays
        payload = opt.payload()                                           # what to send

    The parameters stay in ``param_groups``, so schedulers, gradient clipping, gradient scaling and
    accumulation act on them as ever; the group's settings are handed to the inner optimiser at each
    step. The inner optimiser sees one vector ``w`` with ``z = s * w``; the scales ``s`` keep the
    norm of a step what it would be without a codec (``Codec.step_scales``), so a learning rate can
    be kept. Weight decay acts on ``w``, which pulls the update (not the parameters) to zero.

    Args:
        model: a module (its trainable parameters), or parameters by name; the names, shapes and
            dtypes must be the codec's.
        codec: a bound codec.
        optimizer: a torch optimiser class.
        scale: ``"auto"`` (``step_scales`` for all but plain SGD, whose step is already the
            projected gradient), or a number for all code values.
        defaults: the optimiser's own settings, ``lr`` and so on.

    Raises:
        UpdateError: the parameters are not the ones that the codec is bound to.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        codec: Codec,
        optimizer: type[torch.optim.Optimizer],
        *,
        scale: str | float = "auto",
        **defaults: Any,
    ) -> None:
        items = model.named_parameters() if isinstance(model, nn.Module) else model.items()
        self.named = {n: p for n, p in items if p.requires_grad}
        self.codec = codec
        spec = codec._known_spec(None)
        spec.check(self.named)
        self.named = {t.name: self.named[t.name] for t in spec}
        device = next(iter(self.named.values())).device
        self.codec_on_device = codec.to(device)
        m = codec.code_numel(spec)
        if scale == "auto":
            plain = optimizer is torch.optim.SGD
            self._scale = torch.ones(m) if plain else codec.step_scales()
        elif isinstance(scale, int | float) and scale > 0:
            self._scale = torch.full((m,), float(scale))
        else:
            raise ConfigError(f"expected scale 'auto' or a positive number, got {scale!r}")
        self._scale = self._scale.to(device)
        self._w = torch.zeros(m, device=device)
        self.inner = optimizer([self._w], **defaults)
        super().__init__(list(self.named.values()), dict(self.inner.defaults))
        self._anchor = self._wide()
        self._offset = self._decode(torch.zeros(m, device=device)) if not codec.linear else None

    @property
    def code(self) -> Tensor:
        """The code ``z`` ``[m]`` of everything learned since the anchor, fp32."""
        return self._scale * self._w

    def payload(self, *, seed: int = 0) -> Payload:
        """The quantised code, ready to send.

        Raises:
            NonFiniteError: training diverged to NaN or Inf.
        """
        return self.codec.write_code(self.code.cpu(), seed=seed)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pull the gradients back to the code, step there, and write the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {
            n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in self.named.items()
        }
        self._w.grad = self._scale * self.codec_on_device.pullback(self.code, gradients)
        inner = self.inner.param_groups[0]
        inner.update({k: v for k, v in self.param_groups[0].items() if k != "params"})
        self.inner.step()
        self._write()
        return loss

    @torch.no_grad()
    def rebase(self) -> None:
        """Make the current parameters the new anchor: the code starts at zero again.

        The inner optimiser keeps its moments, which are in code space and so stay meaningful.
        """
        self._anchor = self._wide()
        self._w.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: the code, the anchor and the inner optimiser's state."""
        return {
            "w": self._w.clone(),
            "anchor": {n: t.clone() for n, t in self._anchor.items()},
            "inner": copy.deepcopy(self.inner.state_dict()),
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; also writes the parameters back to where they were."""
        UpdateSpec.of(self._anchor).check(state_dict["anchor"])
        self._w.copy_(state_dict["w"])
        self._anchor = {n: state_dict["anchor"][n].to(t) for n, t in self._anchor.items()}
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))
        for group, saved in zip(self.param_groups, state_dict["groups"], strict=True):
            group.update(saved)
        self._write()

    def _wide(self) -> dict[str, Tensor]:
        # At least fp32: in bf16 the small steps of an update would be rounded away one by one.
        return {
            n: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
            for n, p in self.named.items()
        }

    def _decode(self, z: Tensor) -> dict[str, Tensor]:
        return self.codec_on_device.from_code(z)

    def _write(self) -> None:
        dense = self._decode(self.code)
        for name, p in self.named.items():
            moved = dense[name].float()
            if self._offset is not None:
                moved = moved - self._offset[name].float()
            p.copy_(self._anchor[name] + moved)
