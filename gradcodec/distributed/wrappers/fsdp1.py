"""FSDP1 (``FullyShardedDataParallel``): what its communication hook does.

FSDP1 calls ``hook(state, grad, output)`` for sharded units and ``hook(state, grad)`` under
``NO_SHARD``, with bare tensors. Every FSDP module gets its own state before the first forward, so
that a call tells which unit the gradient belongs to. The attributes this needs are private to
torch; only this file uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcodec.distributed.checks import check_dtype
from gradcodec.distributed.wrappers.sharded import ShardedState, agreed_state
from gradcodec.distributed.wrappers.unit import Unit
from gradcodec.errors import ConfigError
from gradcodec.parameters import plain_name

if TYPE_CHECKING:
    import torch.distributed as dist

_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
ROOT = "(root)"


def is_fsdp1(model: object) -> bool:
    """Whether this is a ``FullyShardedDataParallel`` module."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


class UnitState:
    """The state that FSDP1 passes to the hook of one FSDP module."""

    def __init__(self, owner: ShardedState, unit: Unit, module: nn.Module) -> None:
        self.owner, self.unit, self.module = owner, unit, module
        self.group: dist.ProcessGroup = _private(module, "process_group")

    def late(self, output: Tensor) -> tuple[float, ...] | None:
        """Empty if FSDP1 keeps a reduced gradient as it is until the backward pass ends.

        ``None`` if it reads the values at once: to add them to gradients that are there, to give
        them another dtype, to copy them to the host, or for an optimiser within the pass.
        """
        handle = _private(self.module, "_handle")
        flat = _private(handle, "flat_param")
        settings = ("_offload_params", "_has_optim_in_backward", "_keep_low_precision_grads")
        read = any(_private(handle, name) for name in settings)
        added = hasattr(flat, "_saved_grad_shard")
        return None if read or added or output.dtype is not flat.dtype else ()


def compress_fsdp1(model: nn.Module, **options: Any) -> ShardedState:
    """Compress the gradients of an FSDP1 model; its units are the FSDP modules in it, by name.

    Args:
        model: a root ``FullyShardedDataParallel`` module.
        options: those of ``ShardedState``.

    Raises:
        ConfigError: a hook is registered already, a strategy is hybrid, or a setting is wrong.
        AgreementError: ranks came with different settings or units, or one of them refused.
    """
    units = dict(_fsdp_modules(model))
    groups = [_private(module, "process_group") for module in units.values()]

    def make() -> ShardedState:
        for name, module in units.items():
            strategy = _private(module, "sharding_strategy").name
            if strategy in _HYBRID:
                raise ConfigError(
                    f"FSDP1 calls no communication hook under {strategy} (module {name!r}): use "
                    "fully_shard on the sharding mesh and compress(model, "
                    "replicas=mesh['replicate'])"
                )
            if _private(module, "_comm_hook") is not None:
                raise ConfigError(
                    "FSDP1 has one slot for a communication hook, and it is taken: wrap anew"
                )
        made = ShardedState(scattered=any(map(_is_sharded, units.values())), **options)
        for name, module in units.items():
            check_dtype(name, _private(_private(module, "_handle"), "flat_param").dtype)
            made.add(name, _parameter_names(name, module))
        return made

    state = agreed_state(make, groups)
    if all(_is_sharded(m) and _on_cpu(m) for m in units.values()):
        state.reduce_behind(groups)
    try:
        model.register_comm_hook(state, reduce_unit)  # type: ignore[operator]
    except AssertionError as err:
        state.close()
        raise ConfigError(f"FSDP1 refuses a communication hook: {err}") from err
    # After a pass that an error has ended, FSDP1 goes on with what it had reduced by then.
    model.register_forward_pre_hook(lambda *_: state.finish_behind())
    # Registration gives all modules one state; replace it by one per module, which names its unit.
    for name, module in units.items():
        module._comm_hook_state = UnitState(state, state.units[name], module)  # type: ignore[assignment]
    return state


def reduce_unit(state: UnitState, grad: Tensor, output: Tensor | None = None) -> None:
    """The hook of FSDP1: average a unit's gradient over the ranks.

    On CPUs sharded gradients are reduced behind the backward pass, where FSDP1 does not read them
    before it ends (``UnitState.late``); else it blocks.

    Args:
        state: names the unit.
        grad: flat gradient ``[W n]``, padded; under ``NO_SHARD`` any shape, averaged in place.
        output: ``[n]``, this rank's shard of the mean; ``None`` under ``NO_SHARD``.
    """
    if output is None:
        state.owner.all_reduce(state.unit, grad, state.group)
    else:
        late = state.late(output)
        state.owner.reduce_scatter(state.unit, output, grad, state.group, late=late)


def _fsdp_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every FSDP module that manages parameters, by its plain name."""
    for name, module in root.named_modules():
        if is_fsdp1(module) and _private(module, "_handle") is not None:
            yield plain_name(name) or ROOT, module


def _is_sharded(module: nn.Module) -> bool:
    return str(_private(module, "sharding_strategy").name) != "NO_SHARD"


def _on_cpu(module: nn.Module) -> bool:
    device: torch.device = _private(_private(module, "_handle"), "device")
    return device.type == "cpu"


def _parameter_names(name: str, module: nn.Module) -> list[str]:
    flat = _private(_private(module, "_handle"), "flat_param")
    prefix = "" if name == ROOT else name + "."
    return [prefix + plain_name(n) for n in _private(flat, "_fqns")]


def _private(thing: Any, name: str) -> Any:
    try:
        return getattr(thing, name)
    except AttributeError as err:
        raise ConfigError(
            f"FSDP1 of torch {torch.__version__} keeps {name!r} elsewhere than torch 2.13 does; "
            "this version cannot be compressed"
        ) from err
