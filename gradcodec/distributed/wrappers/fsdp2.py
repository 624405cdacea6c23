"""FSDP2 (``fully_shard``) and HSDP: a reduce-scatter, or a replica all-reduce, per FSDP module.

FSDP2 has setters for both, one per module and not recursive. What else is needed (which parameters
a module manages, over which groups) is private to torch; only this file uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcodec.distributed.checks import check_dtype
from gradcodec.distributed.wrappers.fsdp1 import ROOT
from gradcodec.distributed.wrappers.sharded import ShardedState, agreed_state
from gradcodec.distributed.wrappers.unit import Unit
from gradcodec.errors import ConfigError
from gradcodec.parameters import plain_name

_SETTERS = (
    "set_custom_reduce_scatter",
    "set_all_reduce_hook",
    "set_force_sum_reduction_for_comms",
)


@dataclass(frozen=True)
class Managed:
    """One FSDP2 module and what torch keeps about it."""

    name: str
    module: Any
    group: Any  # torch's FSDPParamGroup

    @property
    def parameters(self) -> list[str]:
        """Full names of the parameters that the module manages."""
        prefix = "" if self.name == ROOT else self.name + "."
        owners = {id(m): plain_name(n) for n, m in self.module.named_modules()}
        names = []
        for p in self.group.fsdp_params:
            owner = owners.get(id(p._module_info.module), "")
            names.append(prefix + (owner + "." if owner else "") + p._module_info.param_name)
        return names

    @property
    def replicated(self) -> bool:
        """Whether torch itself all-reduces its gradients: HSDP, or ``replicate()``."""
        return self.group.mesh_info.replicate_mesh_dim is not None

    @property
    def sharded(self) -> bool:
        """Whether it is sharded: FSDP or HSDP, not ``replicate()``."""
        return self.group.mesh_info.shard_mesh_dim is not None

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The group of torch's own all-reduce."""
        found: dist.ProcessGroup = self.group.mesh_info.replicate_process_group
        return found

    @property
    def shards(self) -> dist.ProcessGroup:
        """The group of its reduce-scatter, if it is sharded."""
        found: dist.ProcessGroup = self.group.mesh_info.shard_process_group
        return found

    def shard_numel(self) -> int:
        """Elements of this rank's shard of all trainable parameters, padding included.

        If a reduce-scatter's output is shorter, it lacks parameters that got no gradient; only all
        parameters together have this many elements.
        """
        return sum(
            p.padded_sharded_param_size.numel()
            for p in self.group.fsdp_params
            if p.sharded_param.requires_grad
        )

    @property
    def divide_factor(self) -> float | None:
        """The factor given to ``set_gradient_divide_factor``, or ``None``."""
        factor: float | None = self.group.gradient_divide_factor
        return factor

    @property
    def on_cpu(self) -> bool:
        """Whether gradients are on the CPU. On CUDA, streams keep the order without waiting."""
        device: torch.device = self.group.device
        return device.type == "cpu"

    def late(self, output: Tensor, *, hooked: bool = False) -> tuple[float, ...] | None:
        """By what FSDP2 may divide a reduced gradient, if it does nothing else with its values.

        ``None`` if it reads them at once: to add them to gradients that are there, to give them
        another dtype, or for a hook of the user's; and in fp16, which is scaled before and after.

        Args:
            output: the reduced gradient.
            hooked: whether the all-reduce hook of the module is the one that asks.
        """
        group = self.group
        read = any(
            p.sharded_param.grad is not None
            or getattr(p.sharded_param, "_post_accumulate_grad_hooks", None)
            or p.offload_to_cpu
            for p in group.fsdp_params
        )
        given = getattr(group, "_orig_dtype", None)  # of the parameters, known in the first forward
        cast = given is not output.dtype or given is torch.float16
        others = self.replicated or (group._all_reduce_hook is not None and not hooked)
        if read or cast or others:
            return None
        return 1.0, self.divide_factor or float(self.shards.size())


def is_fsdp2(model: nn.Module) -> bool:
    """Whether ``fully_shard`` or ``replicate`` manages some module of the model."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(m, FSDPModule) for m in model.modules())


def managed(model: nn.Module) -> list[Managed]:
    """The FSDP2 modules in ``model`` that have parameters, each once.

    Raises:
        ConfigError: a module with several meshes, or a torch that cannot be read.
    """
    found = []
    try:
        for name, module, groups in _param_groups(model):
            if len(groups) > 1:
                raise ConfigError(
                    f"{name}: its parameters are on {len(groups)} meshes (shard_placement_fn); "
                    "torch has no custom communication for such modules"
                )
            for group in groups:
                one = Managed(name, module, group)
                _ = one.parameters, one.replicated, one.shard_numel(), one.divide_factor
                _ = one.on_cpu, one.late(torch.empty(0))
                found.append(one)
    except AttributeError as err:
        raise ConfigError(
            f"fully_shard of torch {torch.__version__} is built otherwise than that of torch 2.13 "
            f"({err}); this version cannot be compressed"
        ) from err
    return found


def _param_groups(model: nn.Module) -> Iterator[tuple[str, Any, Sequence[Any]]]:
    from torch.distributed.fsdp import FSDPModule

    missing = [s for s in _SETTERS if not hasattr(FSDPModule, s)]
    if missing:
        raise ConfigError(
            f"expected torch >= 2.9 for compressed fully_shard: torch {torch.__version__} has no "
            f"{missing[0]}"
        )
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            # fully_shard([a, b]) makes one unit of two modules.
            if id(state) not in seen:
                seen.add(id(state))
                yield plain_name(name) or ROOT, module, _groups_of(state)


def _groups_of(state: Any) -> Sequence[Any]:
    """The parameter groups of a module; up to torch 2.11 it has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        found: Sequence[Any] = state._fsdp_param_groups
        return found
    one = state._fsdp_param_group
    return [] if one is None else [one]


class CompressedReduceScatter:
    """FSDP2's ``ReduceScatter`` for one module: ``set_custom_reduce_scatter`` takes it.

    It has the methods of torch's abstract class, which is private, and does not inherit from it.
    """

    def __init__(self, state: ShardedState, unit: Unit, of: Managed) -> None:
        self.state, self.unit, self.of = state, unit, of

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer that FSDP2 fills."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sum or average ``input_tensor`` ``[W n]`` into ``output_tensor`` ``[n]``.

        Raises:
            ConfigError: another reduction, which FSDP2 asks for to apply a custom divide factor.
        """
        if op == dist.ReduceOp.SUM:
            kind = "sum"
        elif op == dist.ReduceOp.AVG:
            kind = "mean"
        else:
            raise ConfigError(
                f"{self.unit.name}: FSDP2 asks for PREMUL_SUM, whose factor cannot be read; call "
                "set_force_sum_reduction_for_comms(True), as compress() does, after "
                "set_gradient_divide_factor"
            )
        whole = output_tensor.numel() == self.of.shard_numel()
        late = self.of.late(output_tensor)
        self.state.reduce_scatter(
            self.unit, output_tensor, input_tensor, group, op=kind, whole=whole, late=late
        )


class CompressedReplicaReduce:
    """FSDP2's all-reduce hook for one module: the mean over replicas of its sharded gradient."""

    def __init__(
        self, state: ShardedState, unit: Unit, of: Managed, replicas: dist.ProcessGroup
    ) -> None:
        self.state, self.unit, self.of, self.replicas = state, unit, of, replicas

    def __call__(self, reduce_output: Tensor) -> None:
        """Average ``[n]`` in place, or sum if a divide factor replaces the average."""
        whole = reduce_output.numel() == self.of.shard_numel()
        op = "mean" if self.of.divide_factor is None else "sum"
        late = self.of.late(reduce_output, hooked=True)
        self.state.all_reduce(
            self.unit, reduce_output, self.replicas, op=op, whole=whole, late=late
        )


def compress_sharded(units: list[Managed], **options: Any) -> ShardedState:
    """Compress the reduce-scatters of a model on a 1-D mesh.

    Sets FSDP2's reduction to SUM, so that FSDP2 does all scaling.

    Raises:
        ConfigError: a module has a custom reduce-scatter already, or a setting is wrong.
    """

    def make() -> ShardedState:
        for one in units:
            there = type(one.group._reduce_scatter_comm).__name__
            if there != "DefaultReduceScatter":
                raise ConfigError(f"{one.name}: its reduce-scatter is {there} already")
        return _with_units(units, scattered=True, **options)

    groups = [one.shards for one in units]
    state = agreed_state(make, groups)
    if all(one.on_cpu for one in units):
        state.reduce_behind(groups)
    for one in units:
        unit = state.units[one.name]
        one.module.set_custom_reduce_scatter(CompressedReduceScatter(state, unit, one))
        one.module.set_force_sum_reduction_for_comms(True)
    return state


def compress_replicas(
    model: nn.Module, units: list[Managed], replicas: dist.ProcessGroup, **options: Any
) -> ShardedState:
    """Compress the mean over ``replicas`` of a model that ``fully_shard`` shards on one dimension.

    The sharding dimension stays dense. Replicas must start from equal parameters.

    Raises:
        ConfigError: a module has an all-reduce hook already, the replicas differ, or a setting is
            wrong.
    """

    def make() -> ShardedState:
        for one in units:
            if one.group._all_reduce_hook is not None:
                raise ConfigError(f"{one.name}: it has an all-reduce hook already")
        return _with_units(units, scattered=False, **options)

    state = agreed_state(make, [replicas])
    _check_equal_start(model, replicas)
    if all(one.on_cpu for one in units):
        state.reduce_behind([replicas])
    for one in units:
        unit = state.units[one.name]
        one.module.set_all_reduce_hook(CompressedReplicaReduce(state, unit, one, replicas))
    return state


def _with_units(units: list[Managed], **options: Any) -> ShardedState:
    state = ShardedState(**options)
    for one in units:
        for p in one.group.fsdp_params:
            if p.sharded_param.requires_grad:
                check_dtype(f"{one.name}: {p._module_info.param_name}", p.sharded_param.dtype)
        state.add(one.name, one.parameters)
    return state


def _check_equal_start(model: nn.Module, replicas: dist.ProcessGroup) -> None:
    """Check that all replicas hold the same shards: nothing makes them equal afterwards."""
    total = torch.zeros(2, dtype=torch.float64)
    for i, p in enumerate(model.parameters()):
        local = p.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        if local.is_meta:
            return
        value = float(local.double().sum()) + float(local.double().square().sum())
        total[i % 2] += value * (1 + i % 7)
    lowest, highest = total.clone(), total.clone()
    if not dist.get_backend_config(replicas).count("cpu"):
        lowest, highest = lowest.cuda(), highest.cuda()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=replicas)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=replicas)
    if not torch.equal(lowest, highest):
        raise ConfigError(
            "replicas start from different parameters: seed alike, or broadcast before fully_shard"
        )
