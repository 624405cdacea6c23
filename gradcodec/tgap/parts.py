"""What a recorder watches: parameters that each rank holds whole or in part.

A sharded parameter is recorded whole, under its name in the model. Its gradient is the one that the
optimiser is given; FSDP has averaged it over the ranks by then, so every rank records the same.
Gathering it is a collective of all ranks, one parameter after another, so the device holds only one
whole gradient at a time.

Torch keeps private which part of which parameter a rank of FSDP1 holds; only this file reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradcodec.errors import ConfigError
from gradcodec.parameters import (
    NamedParameters,
    gradient_of,
    join,
    named_parameters,
    plain_modules,
    plain_name,
    sharded_by,
)
from gradcodec.types import TensorSpec


class Part(Protocol):
    """What this rank holds of one trainable parameter."""

    spec: TensorSpec
    """Spec of the whole parameter, under its plain name."""
    holder: nn.Parameter
    """The object that an optimiser holds for this parameter."""

    def value(self) -> Tensor:
        """This rank's values, as the wrapper keeps them (DTensor, flat part); not a copy."""

    def gradient(self) -> Tensor | None:
        """This rank's gradient, in the same form."""

    def whole(self, part: Tensor | None) -> Tensor | None:
        """All ranks' parts put together ``[spec.shape]``; ``None`` if no rank has a part."""


class Whole:
    """An ordinary parameter, or a DTensor, which can gather its own shards."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.spec = TensorSpec(name, tuple(parameter.shape), parameter.dtype)
        self.holder = parameter

    def value(self) -> Tensor:
        """The parameter itself."""
        return self.holder.detach()

    def gradient(self) -> Tensor | None:
        """The gradient, made dense."""
        return gradient_of(self.holder)

    def whole(self, part: Tensor | None) -> Tensor | None:
        """The whole tensor: a collective for a DTensor, ``part`` itself otherwise."""
        gather = getattr(part, "full_tensor", None)
        return part if gather is None else gather()


class FlatPart:
    """What a rank holds of one parameter inside a flat parameter of FSDP1."""

    def __init__(self, name: str, module: nn.Module, index: int) -> None:
        handle: Any = _private(module, "_handle")
        self._handle = handle
        self._flat: Any = _private(handle, "flat_param")
        self._group = _private(module, "process_group") if handle.uses_sharded_strategy else None
        where = _private(self._flat, "_shard_param_infos")[index]
        self._held = bool(where.in_shard)
        self._offset = int(where.offset_in_shard or 0)
        self._numel = int(where.numel_in_shard or 0)
        self._start = int(where.intra_param_start_idx or 0)
        #: None without ``use_orig_params=True``: optimisers then hold the flat parameter.
        own = self._flat._params[index] if handle._use_orig_params else None
        self._own: nn.Parameter | None = own
        self.holder = self._flat if own is None else own
        shape = tuple(_private(self._flat, "_shapes")[index])
        self.spec = TensorSpec(name, shape, self.holder.dtype)

    def value(self) -> Tensor:
        """This rank's values ``[held]``, flat."""
        return self._cut(self._flat.detach())

    def gradient(self) -> Tensor | None:
        """This rank's gradient ``[held]``, flat."""
        gradient = self.holder.grad
        if gradient is None or self._own is not None:
            return gradient if gradient is None else gradient.detach().reshape(-1)
        return self._cut(gradient.detach())

    def whole(self, part: Tensor | None) -> Tensor | None:
        """The sum of all ranks' parts, each padded with zeros, which is exact."""
        if self._group is None:
            return part if part is None else part.reshape(self.spec.shape)
        import torch.distributed as dist

        # The last element says whether any rank has a part.
        dtype = self.spec.dtype if part is None else part.dtype
        total = torch.zeros(self.spec.numel + 1, dtype=dtype, device=self._handle.device)
        if part is not None and self._held:
            total[self._start : self._start + self._numel] = part.to(total.device)
            total[-1] = 1
        dist.all_reduce(total, group=self._group)
        return total[:-1].reshape(self.spec.shape) if bool(total[-1]) else None

    def _cut(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1)[self._offset : self._offset + self._numel]


def parts_of(source: NamedParameters) -> dict[str, Part]:
    """What this rank holds of each trainable parameter, by plain name, in the model's order.

    Raises:
        ConfigError: nothing is trainable; or FSDP1 parameters come without the module that manages
            them.
    """
    flat = dict(_flat_parts(source)) if isinstance(source, nn.Module) else {}
    if isinstance(source, nn.Module):
        _none_is_kept_outside(source, [part._flat for part in flat.values()])
    if not flat:
        found: dict[str, Part] = {}
        for name, p in named_parameters(source).items():
            if (kind := sharded_by(p)) is not None and not hasattr(p, "full_tensor"):
                raise ConfigError(
                    f"{name!r} belongs to {kind}, which alone knows its parts: pass the outermost "
                    "wrapped module instead of parameters by name or of a module inside"
                )
            found[name] = Whole(name, p)
        return found
    assert isinstance(source, nn.Module)
    return _in_order(source, flat)


def _flat_parts(root: nn.Module) -> Iterator[tuple[tuple[int, str], FlatPart]]:
    """Parts of FSDP1, by the id of the module that owns the parameter and its name there."""
    if not any(sharded_by(p) for p in root.parameters()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for path, module in plain_modules(root):
        if not isinstance(module, FullyShardedDataParallel) or _private(module, "_handle") is None:
            continue
        flat = _private(module._handle, "flat_param")
        infos, names = _private(flat, "_param_infos"), _private(flat, "_fqns")
        for index, (info, name) in enumerate(zip(infos, names, strict=True)):
            part = FlatPart(join(path, plain_name(name)), module, index)
            yield (id(info.module), info.param_name), part


def _none_is_kept_outside(root: nn.Module, flats: Sequence[Tensor]) -> None:
    """``ConfigError`` for a module whose parameters are in flat parameters other than ``flats``.

    Without ``use_orig_params`` FSDP1 takes parameters out of their module and leaves views there.
    """
    known = {id(flat) for flat in flats}
    for path, module in plain_modules(root):
        for name, value in vars(module).items():
            flat = value._base if isinstance(value, Tensor) else None
            if flat is not None and id(flat) not in known and sharded_by(flat) is not None:
                raise ConfigError(
                    f"{join(path, name)!r} belongs to an FSDP1 module outside of this one: pass "
                    "the outermost"
                )


def _in_order(root: nn.Module, flat: Mapping[tuple[int, str], FlatPart]) -> dict[str, Part]:
    """All trainable parameters in the order of the model that was wrapped."""
    found: dict[str, Part] = {}
    by_module: dict[int, dict[str, FlatPart]] = {}
    for (module_id, name), part in flat.items():
        by_module.setdefault(module_id, {})[name] = part
    others = named_parameters(root)
    managed = {id(part.holder) for part in flat.values()}
    for path, module in plain_modules(root):
        for part in by_module.get(id(module), {}).values():
            if part.holder.requires_grad:
                found[part.spec.name] = part
        for name in module._parameters:
            full = join(path, name)
            p = others.get(full)
            if p is None or id(p) in managed:
                continue
            if sharded_by(p) is not None:
                raise ConfigError(
                    f"{full!r} belongs to an FSDP1 module outside of this one: pass the outermost"
                )
            found[full] = Whole(full, p)
    return found


def _private(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name)
    except AttributeError as err:
        raise ConfigError(
            f"FSDP1 of torch {torch.__version__} keeps {name!r} elsewhere than torch 2.13 does: "
            "use fully_shard, whose gradients can be recorded"
        ) from err
