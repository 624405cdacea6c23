"""Which models can take local steps, and over which group what each rank holds is averaged."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from gradcodec.distributed.anchors import local_part
from gradcodec.distributed.checks import check_dtype, is_dtensor
from gradcodec.errors import ConfigError
from gradcodec.parameters import NamedParameters, named_parameters, sharded_by

Replicas = DeviceMesh | dist.ProcessGroup | None
"""The ranks that hold copies of the same parameters; ``None`` is the default group."""


def group_of(replicas: object) -> dist.ProcessGroup | None:
    """The process group of a mesh of one dimension; a group itself.

    Raises:
        ConfigError: a mesh of more dimensions.
    """
    if not isinstance(replicas, DeviceMesh):
        return replicas  # type: ignore[return-value]  # ``place`` refuses what is no group
    if replicas.ndim != 1:
        raise ConfigError(
            f"expected replicas= as a mesh of one dimension, such as mesh['replicate'], got one of "
            f"{replicas.ndim}"
        )
    return replicas.get_group()


def local_parameters(model: NamedParameters, replicas: Replicas) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, if ranks can train them apart from each other.

    Raises:
        ConfigError: something averages gradients in each step already, or shards the parameters
            over the ranks that would average them.
    """
    if isinstance(model, DistributedDataParallel) and replicas is None:
        raise ConfigError(
            "DistributedDataParallel averages gradients in every step, so there are no local "
            "steps: pass its module, or as replicas= the group of ranks of which each is in "
            "another DistributedDataParallel"
        )
    found = named_parameters(model)
    for name, parameter in found.items():
        _check(name, parameter, replicas)
    return found


def _check(name: str, parameter: Tensor, replicas: Replicas) -> None:
    if is_dtensor(parameter):
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        if mesh.ndim != 1:
            raise ConfigError(
                f"{name!r} is on a mesh of {mesh.ndim} dimensions, over which torch averages "
                "gradients in every step: shard over one, fully_shard(module, mesh=mesh['shard']), "
                "and pass replicas=mesh['replicate']"
            )
        if replicas is None:
            raise ConfigError(
                f"{name!r} is a DTensor, of which each rank holds a part: pass as replicas= the "
                "mesh or group of ranks that hold the same part"
            )
    elif where := sharded_by(parameter):
        raise ConfigError(
            f"{name!r} is sharded by {where}, which local steps do not support: use fully_shard "
            "and replicas="
        )
    if parameter.is_meta:
        raise ConfigError(f"{name!r} is on the meta device: give the model storage first")
    check_dtype(name, local_part(parameter).dtype)


def reshard(model: object) -> None:
    """Let ``fully_shard`` modules drop gathered copies, which a new shard makes stale."""
    if isinstance(model, nn.Module):
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
