"""The function for ``register_comm_hook`` of ``DistributedDataParallel``."""

# No `from __future__ import annotations` here: DDP compares the annotations with the objects
# themselves and refuses strings.

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.wrappers.ddp import CompressState, CopiedState
from gradcodec.errors import ConfigError


def compress_hook(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    output: Tensor | None = None,
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over all ranks, compressed as ``state`` says.

    Register it with ``ddp.register_comm_hook(state, compress_hook)``. It enqueues the bucket and
    returns; a thread of the state exchanges it while the backward pass goes on. DDP never passes
    ``output``; FSDP1 would, and is refused.

    Raises:
        ConfigError: ``state`` is not a ``CompressState`` of this model, or the bucket comes from
            FSDP1, or from compiled autograd's ``python_reducer``, which hands over single
            gradients.
        AgreementError: ranks differ in what must be equal.
        TrainingError: a rank is gone, an earlier exchange failed, or the state was closed.
    """
    if isinstance(bucket, Tensor):
        raise ConfigError(
            "expected a GradBucket of DistributedDataParallel, got a tensor: this hook cannot be "
            "registered with FSDP1; call compress(model) instead"
        )
    if isinstance(state, CopiedState):
        raise ConfigError(
            "this is a copy of a compressed model, and its state was not copied: call "
            "compress(copy) on all ranks"
        )
    if not isinstance(state, CompressState):
        raise ConfigError(f"expected a CompressState as the hook's state, got {type(state)}")
    if isinstance(bucket, tuple):
        raise ConfigError(
            "expected a GradBucket, got a (gradient, parameter) pair: "
            "torch._dynamo.config.optimize_ddp = 'python_reducer' cannot be combined with this hook"
        )
    future: torch.futures.Future[Tensor] = state.submit(bucket)
    return future
