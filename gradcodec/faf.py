"""FAF, Federated AutoEncoder-involved Fine-tuning: training in the code space.

In ``post`` mode a client trains its parameters and encodes the finished update, as CG-FedLLM
(arXiv 2405.13746, Algorithm 1) does; that does not need this module. In ``latent`` mode the codec
is involved in the training itself: the trainable variable is the code ``z``, and the parameters are

    theta = theta_0 + Dec(z) - Dec(0),

and the gradient of ``z`` is the vector-Jacobian product of ``Dec`` (``U^T g`` for a linear codec).
So what is sent is exactly what was trained; nothing is projected away after the fact. This is the
project's own reading of "AutoEncoder-involved", not the paper's algorithm.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from gradcodec.anchor import Anchor
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.parameters import NamedParameters, all_parameters, gradient_of, sharded_by
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload


class LatentOptimizer(torch.optim.Optimizer):
    """Any torch optimiser, run on the code of an update instead of on the parameters.

        opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=1e-3)   # instead of AdamW(...)
        loss.backward(); opt.step(); opt.zero_grad()                      # the loop stays
        payload = opt.payload()                                           # what to send

    The parameters stay in ``param_groups``, so schedulers, gradient clipping, gradient scaling and
    accumulation act on them as usual; each step hands the group's settings to the inner optimiser.
    The inner optimiser sees one vector ``w`` with ``z = s * w``; the scales ``s`` keep the norm of
    a step what it would be without a codec (``Transform.step_scales``), so a learning rate chosen
    without a codec can be kept. Weight decay acts on ``w``, which pulls the update (not the
    parameters) to zero.

    **Training continues from the values found in the parameters.** If other code wrote some of them
    since the last step (``load_state_dict``, ``clamp_``, an average of weights), those values
    become the new anchor, and later steps start from there. The code holds only what was *learned*,
    not such a change: from then on the old anchor plus the decoded ``payload()`` no longer gives
    the parameters, and ``anchored_at`` reports that. In a federation call ``rebase()`` after
    loading a round's state, or make a new optimiser for the round.

    Memory, in addition to the inner optimiser's state for the code: the anchor in fp32 or wider,
    and the values written last in the parameters' dtype; together 8 bytes for each float32 value
    and 6 for each bfloat16 one. Sparse gradients are made dense. A copy made by ``copy.deepcopy``
    or pickling, alone or together with the model, goes on training like a copy of any torch
    optimiser.

    Args:
        model: a module (its trainable parameters; DDP and ``torch.compile`` may wrap it), or
            parameters by name; the names, shapes and dtypes must match the codec's.
        codec: a bound codec.
        optimizer: a torch optimiser class that can optimise one vector of dense gradients and
            whose ``step`` needs no closure.
        scale: ``"auto"`` (``step_scales`` for all but plain SGD, whose step is already the
            projected gradient), or a number for all code values.
        defaults: the optimiser's own settings, ``lr`` and so on.

    Raises:
        UpdateError: the parameters are not the ones that the codec is bound to.
        ConfigError: the codec is not bound, parameters are sharded or on several devices, or the
            optimiser or one of its settings does not work here.
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
        if not isinstance(codec, Codec):
            came = codec.__name__ if isinstance(codec, type) else repr(codec)
            raise ConfigError(
                f"expected a codec bound to the parameters, got {came}: "
                "make_codec(name).bind(UpdateSpec.of(parameters)), or one that was fitted"
            )
        self.codec = codec
        spec = codec.transform.table()
        self.named = _trainable(model, spec)
        self._anchor = Anchor(self.named)
        device = self._anchor.device
        self.codec_on_device = codec.to(device)
        m = codec.code_numel(spec)
        self._w = torch.zeros(m, device=device)
        self.inner = _made(optimizer, self._w, defaults)
        self._scale = _scales(scale, codec, m, type(self.inner)).to(device)
        #: The code at the anchor: zero until somebody else writes into the parameters.
        self._since = torch.zeros(m, device=device)
        self._offset = None if codec.linear else self._decode(self._since)
        self._complete = False
        super().__init__(list(self.named.values()), dict(self.inner.defaults))
        self._complete = True

    @property
    def code(self) -> Tensor:
        """The code ``z`` ``[m]`` of everything learned since the start or ``rebase()``, fp32."""
        return self._scale * self._w

    def payload(self, *, seed: int = 0) -> Payload:
        """The quantised code, ready to send: what was learned, without changes made by others.

        Raises:
            NonFiniteError: training diverged to NaN or Inf.
        """
        return self.codec.write_code(self.code.cpu(), seed=seed)

    def anchored_at(self, state: Update) -> bool:
        """Whether adding the decoded code to ``state`` gives the current parameters.

        True if training started from exactly this state, at construction or ``rebase()``, and no
        other code has written into the parameters since the first step. It compares every value
        once, and needs no decoding unless other code wrote into the parameters.

        Args:
            state: tensors by plain name, on any device; tensors of other names are ignored.
        """
        self._take_in()
        return not bool(self._since.any()) and self._anchor.equals(state)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pull the gradients back to the code, step there, and write the parameters.

        Raises:
            UpdateError: a parameter's shape, dtype or device has changed since construction.
            ConfigError: ``param_groups`` hold other parameters than at construction.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_in()
        gradients = {}
        for name, p in self.named.items():
            gradient = gradient_of(p)
            gradients[name] = torch.zeros_like(p) if gradient is None else gradient
        self._w.grad = self._scale * self.codec_on_device.transform.pullback(self.code, gradients)
        outer, inner = self.param_groups[0], self.inner.param_groups[0]
        inner.update({k: v for k, v in outer.items() if k != "params"})
        self.inner.step()
        # Copy the settings back: some optimisers keep counters or step estimates in the group.
        outer.update({k: v for k, v in inner.items() if k != "params"})
        self._anchor.write(self._moved())
        return loss

    @torch.no_grad()
    def rebase(self) -> None:
        """Make the current parameters the new anchor: the code starts at zero again.

        The inner optimiser keeps its moments, which are in code space and so stay meaningful. This
        is how one optimiser serves many rounds of a federation: load the round's state, call this,
        train, reply.
        """
        self._check_parameters()
        self._anchor.restart()
        self._w.zero_()
        self._leave_from(torch.zeros_like(self._since))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the codec covers the parameters of the one existing group and no others.

        Raises:
            ConfigError: always, once the optimiser is constructed.
        """
        if self._complete:
            raise ConfigError(
                f"the codec is of these {len(self.named)} parameters and no others: fit a codec "
                "for all that are to be trained, and make a new LatentOptimizer"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: the code, the anchor and the inner optimiser's state."""
        self._take_in()
        return {
            "w": self._w.clone(),
            "anchor": self._anchor.state_dict(),
            "since": self._since.clone(),
            "inner": copy.deepcopy(self.inner.state_dict()),
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of ``state_dict``; also sets the parameters back to their values at that time.

        Raises:
            ConfigError: not the state of a ``LatentOptimizer`` whose code has this size.
            UpdateError: the state belongs to other parameters.
        """
        wanted = {"w", "anchor", "inner", "groups"}
        if not wanted <= set(state_dict):
            raise ConfigError(
                f"expected the state of a LatentOptimizer with {sorted(wanted)}, "
                f"got {sorted(state_dict)}"
            )
        w = state_dict["w"]
        since = state_dict.get("since", torch.zeros_like(w))  # states of earlier versions have none
        if w.shape != self._w.shape or since.shape != w.shape or len(state_dict["groups"]) != 1:
            raise ConfigError(
                f"expected a code of {self._w.numel()} values and one group, got "
                f"{list(w.shape)} and {len(state_dict['groups'])}"
            )
        self._check_parameters()
        start = self._anchor.checked(state_dict["anchor"])
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))
        self.param_groups[0].update(copy.deepcopy(state_dict["groups"][0]))
        self._anchor.start = start
        self._w.copy_(w)
        self._leave_from(since.to(self._since))
        self._anchor.write(self._moved())

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer.__getstate__ keeps only its own fields, so copies and pickles would lack ours.
        mine = {k: v for k, v in self.__dict__.items() if k in _OWN}
        return {**super().__getstate__(), **mine}

    def _decode(self, z: Tensor) -> dict[str, Tensor]:
        return self.codec_on_device.from_code(z)

    def _moved(self) -> dict[str, Tensor]:
        """How far the code has moved the parameters from the anchor."""
        if self._offset is None:
            return {n: t.float() for n, t in self._decode(self.code - self._since).items()}
        dense = self._decode(self.code)
        return {n: t.float() - self._offset[n].float() for n, t in dense.items()}

    @torch.no_grad()
    def _take_in(self) -> None:
        """If others wrote into the parameters, make the current values the new anchor."""
        self._check_parameters()
        if self._anchor.touched():
            self._anchor.settle(self._moved())
            self._leave_from(self.code)

    def _leave_from(self, z: Tensor) -> None:
        """Record that the parameters equal the anchor where the code is ``z``."""
        self._since = z
        self._offset = None if self.codec.linear else self._decode(z)

    def _check_parameters(self) -> None:
        held = [id(p) for group in self.param_groups for p in group["params"]]
        if held != [id(p) for p in self.named.values()]:
            raise ConfigError(
                f"param_groups hold other parameters than the {len(self.named)} that the codec is "
                "of: make the LatentOptimizer after wrapping, sharding or replacing parameters"
            )
        self._anchor.check()


_OWN = (
    "named",
    "codec",
    "codec_on_device",
    "inner",
    "_anchor",
    "_complete",
    "_offset",
    "_scale",
    "_since",
    "_w",
)


def _trainable(source: NamedParameters, spec: UpdateSpec) -> dict[str, nn.Parameter]:
    """The parameters of a spec, in its order."""
    known = [t.name for t in spec]
    found = all_parameters(source, known)
    frozen = [n for n in known if n in found and not found[n].requires_grad]
    if frozen:
        raise UpdateError(
            f"expected trainable parameters, {len(frozen)} of the codec's are frozen: {frozen[:3]}"
        )
    trainable = {n: p for n, p in found.items() if p.requires_grad}
    for name, p in trainable.items():
        if (kind := sharded_by(p)) is not None:
            raise ConfigError(
                f"expected whole parameters, {name!r} is sharded by {kind}: wrap the model by "
                "DistributedDataParallel instead, or train it with an ordinary optimiser and "
                "encode the difference of the gathered states"
            )
    spec.check(trainable)
    return {n: trainable[n] for n in known}


def _made(
    optimizer: type[torch.optim.Optimizer], w: Tensor, defaults: dict[str, Any]
) -> torch.optim.Optimizer:
    """The inner optimiser, made for the one vector ``w``."""
    wanted = "expected an optimiser class such as torch.optim.AdamW"
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        came = type(optimizer).__name__
        raise ConfigError(f"{wanted} and its settings by name, got an instance of {came}")
    name = getattr(optimizer, "__name__", repr(optimizer))
    try:
        inner = optimizer([w], **defaults)
    except ValueError as err:
        raise ConfigError(f"{name} does not take one vector of {w.numel()} values: {err}") from err
    if not isinstance(inner, torch.optim.Optimizer):
        raise ConfigError(f"{wanted}, got {name}, which makes a {type(inner).__name__}")
    closure = inspect.signature(inner.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{name} evaluates the loss at points of its own, by a closure; {wanted}, which steps "
            "by gradients alone"
        )
    if isinstance(inner, torch.optim.SparseAdam):
        raise ConfigError(f"{name} takes sparse gradients only, a code's are dense; {wanted}")
    return inner


def _scales(scale: str | float, codec: Codec, m: int, kind: type) -> Tensor:
    if scale == "auto":
        return torch.ones(m) if kind is torch.optim.SGD else codec.transform.step_scales()
    if isinstance(scale, int | float) and scale is not True and 0 < scale < math.inf:
        return torch.full((m,), float(scale))
    raise ConfigError(f"expected scale 'auto' or a positive number, got {scale!r}")
