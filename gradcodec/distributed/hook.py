"""The function for ``register_comm_hook`` of ``DistributedDataParallel`` and of FSDP1."""

# No `from __future__ import annotations` here: DDP compares the annotations with the objects
# themselves and refuses strings.

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.wrappers.ddp import CompressState
from gradcodec.distributed.wrappers.fsdp1 import reduce_fsdp1
from gradcodec.errors import ConfigError


def compress_hook(
    state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
    output: Tensor | None = None,
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over all ranks, compressed as ``state`` says.

    Register it with ``ddp.register_comm_hook(state, compress_hook)``, or hand both to whatever
    wraps DDP (Lightning's ``DDPStrategy(ddp_comm_state=state, ddp_comm_hook=compress_hook)``). It
    enqueues and returns; the state's thread exchanges while the backward pass goes on.

    FSDP1 calls the same function with a unit's flat gradient instead of a bucket, and ``output``
    for this rank's part of the mean unless it shards nothing; that is done before it returns.

    Raises:
        ConfigError: ``state`` is not a ``CompressState`` of this model, or the bucket comes from
            compiled autograd's ``python_reducer``, which hands over single gradients.
        AgreementError: ranks differ in what must be equal.
        TrainingError: a rank is gone, or an earlier exchange failed.
    """
    if isinstance(bucket, Tensor):
        reduce_fsdp1(state, bucket, output)
        # FSDP1 looks at no result; DDP, whose signature this is, never comes here.
        return cast("torch.futures.Future[Tensor]", None)
    if not isinstance(state, CompressState):
        raise ConfigError(f"expected a CompressState as the hook's state, got {type(state)}")
    if isinstance(bucket, tuple):
        raise ConfigError(
            "expected a GradBucket, got a (gradient, parameter) pair: "
            "torch._dynamo.config.optimize_ddp = 'python_reducer' cannot be combined with this hook"
        )
    future: torch.futures.Future[Tensor] = state.submit(bucket)
    return future
