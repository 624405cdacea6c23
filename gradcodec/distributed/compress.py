"""One call for every wrapper: find how a model is parallel and compress what it sends."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gradcodec.codec import Codec
from gradcodec.distributed.checks import check_options
from gradcodec.distributed.compression import Compression
from gradcodec.distributed.exchange.agreement import LinkChannel, must_agree
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.hook import compress_hook
from gradcodec.distributed.wrappers import fsdp1, fsdp2
from gradcodec.distributed.wrappers.ddp import CompressState, CopiedState
from gradcodec.distributed.wrappers.group import CompressedGroup
from gradcodec.distributed.wrappers.sharded import ShardedState
from gradcodec.errors import ConfigError

DEFAULT_CODEC = "int4"


def compress(
    model: nn.Module,
    codec: Codec | str | None = None,
    *,
    replicas: DeviceMesh | dist.ProcessGroup | None = None,
    **options: Any,
) -> Compression:
    """Compress the gradients of a wrapped model; all ranks call it once, after wrapping.

    What is compressed, by what the model is:

    - ``DistributedDataParallel``: its all-reduce, by a communication hook;
    - ``FullyShardedDataParallel`` (FSDP1): its reduce-scatter (``NO_SHARD``: all-reduce);
    - ``fully_shard`` (FSDP2), 1-D mesh: the reduce-scatter of every module;
    - ``fully_shard`` on ``mesh["shard"]``, with ``replicas=mesh["replicate"]``: the all-reduce over
      the replicas, which this adds; the sharding dimension stays dense;
    - ``fully_shard`` on a 2-D mesh (HSDP) or ``replicate()``, over a compressed backend: nothing
      further; the group of that backend compresses already, and this returns that group.

    Gradients are averaged as the wrapper averages them without compression.

    Args:
        model: the wrapped model, also after ``torch.compile``.
        codec: a codec or its name, ``"int4"`` by default; ``None`` over a compressed backend.
        replicas: for HSDP by hand, where the model is sharded on one dimension only: the mesh or
            group of the replicas.
        options: those of ``CompressState`` for DDP, those of ``ShardedState`` otherwise.

    Returns:
        A ``Compression``: its counters, its state for checkpoints, and ``close``; also a context
        manager.

    Raises:
        ConfigError: the model cannot be compressed; the message says why and what can.
        AgreementError: ranks came with different models or settings, or one of them refused.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("expected an initialised process group: call init_process_group first")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected the wrapped model, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if replicas is not None and not fsdp2.is_fsdp2(model):
        raise ConfigError(
            f"replicas= is for models that fully_shard shards, got {type(model).__name__}"
        )
    if isinstance(model, DistributedDataParallel):
        return _ddp(model, DEFAULT_CODEC if codec is None else codec, options)
    if fsdp1.is_fsdp1(model):
        return _fsdp1(model, DEFAULT_CODEC if codec is None else codec, options)
    if fsdp2.is_fsdp2(model):
        return _fsdp2(model, codec, replicas, options)
    raise ConfigError(_why_not(model))


def _ddp(
    model: DistributedDataParallel, codec: Codec | str, options: dict[str, Any]
) -> CompressState:
    # Ranks compare this check too: if one refuses, the others must not wait for it.
    with must_agree(LinkChannel(control_link(model.process_group)), "compress"):
        _check_ddp(model, options)
    state = CompressState(model, codec=codec, process_group=model.process_group, **options)
    model.register_comm_hook(state, compress_hook)
    return state


def _check_ddp(model: DistributedDataParallel, options: dict[str, Any]) -> None:
    check_options("compress of DistributedDataParallel", CompressState, options)
    if getattr(model, "_use_python_reducer", False):
        raise ConfigError(
            "torch._dynamo.config.optimize_ddp is 'python_reducer': DDP then reduces parameter by "
            "parameter in compiled code, which cannot encode; set it to 'ddp_optimizer' before "
            "wrapping"
        )
    # In a copy of a compressed model only the mark of the copy is in the slot.
    hooks = [pair for pair in model._comm_hooks if not isinstance(pair[1], CopiedState)]
    model._comm_hooks = hooks
    taken = [hook.__qualname__ for hook, _ in hooks]
    if taken or getattr(model, "mixed_precision", None) is not None:
        who = "mixed_precision=" if getattr(model, "mixed_precision", None) else taken[0]
        raise ConfigError(
            f"DDP has one slot for a communication hook and no way to empty it; {who} has taken "
            "it: wrap anew without it (for mixed precision use torch.autocast)"
        )


def _fsdp1(model: nn.Module, codec: Codec | str, options: dict[str, Any]) -> ShardedState:
    check_options("compress of FSDP1", ShardedState, options)
    return fsdp1.compress_fsdp1(model, codec=codec, **options)


def _fsdp2(
    model: nn.Module,
    codec: Codec | str | None,
    replicas: DeviceMesh | dist.ProcessGroup | None,
    options: dict[str, Any],
) -> ShardedState | CompressedGroup:
    units = fsdp2.managed(model)
    replicated = [u for u in units if u.replicated]
    if replicated:
        if replicas is not None:
            raise ConfigError(
                f"{replicated[0].name}: torch all-reduces over its replicas already; for replicas= "
                "shard on one dimension only: fully_shard(module, mesh=mesh['shard'])"
            )
        return _replicated_by_torch(replicated, codec, options)
    codec = DEFAULT_CODEC if codec is None else codec
    check_options("compress of a fully_shard model", ShardedState, options)
    if replicas is None:
        return fsdp2.compress_sharded(units, codec=codec, **options)
    group = replicas.get_group() if isinstance(replicas, DeviceMesh) else replicas
    return fsdp2.compress_replicas(model, units, group, codec=codec, **options)


def _replicated_by_torch(
    units: list[fsdp2.Managed], codec: Codec | str | None, options: dict[str, Any]
) -> CompressedGroup:
    groups = {id(u.replicas): u.replicas for u in units}
    found = [g for g in groups.values() if isinstance(g, CompressedGroup)]
    if len(found) != len(groups):
        kind = "HSDP on a 2-D mesh" if units[0].sharded else "replicate()"
        by_hand = (
            " or shard on one dimension and pass replicas=mesh['replicate']"
            if units[0].sharded
            else " or use DistributedDataParallel"
        )
        raise ConfigError(
            f"{kind}: torch hard-codes its all-reduce, which only a backend can compress: "
            "register_compressed_backend(name, codec) and init_device_mesh(..., "
            f"backend_override={{'replicate': name}}) before wrapping,{by_hand}"
        )
    if len(found) > 1:
        raise ConfigError(f"expected one replica group, got {len(found)}")
    if codec is not None or options:
        raise ConfigError(
            f"the backend {found[0].name!r} was registered with its codec and settings already; "
            "leave codec and options out here"
        )
    return found[0]


def _why_not(model: nn.Module) -> str:
    """The reason why a model has nothing to be compressed."""
    from torch.distributed._composable.contract import _get_registry

    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) or fsdp1.is_fsdp1(module):
            return f"{type(model).__name__} is not wrapped itself: pass its module {name!r}"
        if "replicate" in (_get_registry(module) or {}):
            return (
                "replicate() made by the DDP-based API has no slot for a hook of ours: use "
                "DistributedDataParallel"
            )
    return (
        f"expected a model wrapped by DistributedDataParallel, FullyShardedDataParallel or "
        f"fully_shard, got a plain {type(model).__name__}, which sends nothing; for your own loop "
        "use compressed_all_reduce"
    )
