"""FSDP1 (``FullyShardedDataParallel``): what its communication hook does.

FSDP1 calls ``hook(state, grad, output)`` for sharded units and ``hook(state, grad)`` under
``NO_SHARD``, with bare tensors. So that a call tells whose gradient it is, every FSDP module gets a
state of its own before the first forward. The attributes this needs are private to torch; they are
all touched in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradcodec.distributed.checks import check_dtype
from gradcodec.distributed.wrappers.units import ShardedState, Unit, agreed_state
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
    """What the hook of one FSDP module is given as its state."""

    def __init__(self, owner: ShardedState, unit: Unit, group: dist.ProcessGroup) -> None:
        self.owner, self.unit, self.group = owner, unit, group


def sharded_state(
    model: object, of_ddp: Mapping[str, object] | None = None, **options: Any
) -> ShardedState | None:
    """The state of an FSDP1 model, or ``None`` of any other.

    Its units are the FSDP modules in the model, by their names. Whoever registers the state binds
    it to them, at the latest in the first forward.

    Args:
        model: perhaps a root ``FullyShardedDataParallel`` module.
        of_ddp: what only DDP has, all ``None`` for such a module.
        options: those of ``ShardedState``.

    Raises:
        ConfigError: a hybrid strategy, or a setting of ``ShardedState``.
    """
    if not is_fsdp1(model):
        return None
    assert isinstance(model, nn.Module)
    for option, value in (of_ddp or {}).items():
        if value is not None:
            raise ConfigError(f"{option}= is for DistributedDataParallel, got an FSDP1 model")
    units = dict(_fsdp_modules(model))
    for name, module in units.items():
        strategy = _private(module, "sharding_strategy").name
        if strategy in _HYBRID:
            raise ConfigError(
                f"FSDP1 calls no communication hook under {strategy} (module {name!r}): use "
                "fully_shard on the sharding mesh and compress(model, replicas=mesh['replicate'])"
            )
    groups = [_private(module, "process_group") for module in units.values()]

    def make() -> ShardedState:
        made = ShardedState(scattered=any(map(_is_sharded, units.values())), **options)
        for name, module in units.items():
            check_dtype(name, _private(_private(module, "_handle"), "flat_param").dtype)
            made.add(name, _parameter_names(name, module))
        return made

    state = agreed_state(make, groups)

    def first_forward(root: nn.Module, _: object) -> None:
        # Registration, which hands over one state for all modules, has happened by now.
        bind(root, state)
        handle.remove()

    handle = model.register_forward_pre_hook(first_forward)
    return state


def bind(root: nn.Module, state: ShardedState) -> None:
    """Give every FSDP module whose hook has this state one that also names the unit."""
    for name, module in _fsdp_modules(root):
        registered = _private(module, "_comm_hook_state")
        if getattr(registered, "sharded", registered) is state:
            group = _private(module, "process_group")
            module._comm_hook_state = UnitState(state, state.units[name], group)  # type: ignore[assignment]


def hook_taken(root: nn.Module) -> bool:
    """Whether a communication hook is registered already."""
    return any(_private(module, "_comm_hook") is not None for _, module in _fsdp_modules(root))


def reduce_fsdp1(state: object, grad: Tensor, output: Tensor | None = None) -> None:
    """Average a unit's gradient over the ranks.

    Args:
        state: what the unit was bound to.
        grad: flat gradient ``[W n]``, padded; under ``NO_SHARD`` any shape, averaged in place.
        output: ``[n]``, this rank's part of the mean; ``None`` under ``NO_SHARD``.

    Raises:
        ConfigError: the state was not made from this model.
    """
    if not isinstance(state, UnitState):
        raise ConfigError(
            "expected a state that was made from the FSDP model itself and whose model has run a "
            f"forward since, got {type(state).__name__}: CompressState(fsdp_model, ...)"
        )
    if output is None:
        state.owner.all_reduce(state.unit, grad, state.group)
    else:
        state.owner.reduce_scatter(state.unit, output, grad, state.group)


def _fsdp_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every FSDP module that manages parameters, by its plain name."""
    for name, module in root.named_modules():
        if is_fsdp1(module) and _private(module, "_handle") is not None:
            yield plain_name(name) or ROOT, module


def _is_sharded(module: nn.Module) -> bool:
    return str(_private(module, "sharding_strategy").name) != "NO_SHARD"


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
