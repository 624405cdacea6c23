"""What the other ranks see when one of them dies or hangs; each case has a world of its own."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from distributed.toy import sgd, train, wrapped

from gradcodec.distributed import CompressState, compressed_all_reduce
from gradcodec.distributed.exchange.link import Link
from gradcodec.errors import TrainingError

TIMEOUT = 12.0
"""Seconds of the groups' timeout in these worlds."""


def a_dead_rank_is_an_error_at_the_others(rank: int, world: int) -> None:
    with wrapped("int4") as (ddp, state):
        assert state is not None
        optimizer = sgd(ddp)
        train(ddp, range(2), optimizer)
        if rank == world - 1:
            os._exit(0)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="another rank has died"):
            train(ddp, range(2, 4), optimizer)
        assert time.monotonic() - start < TIMEOUT + 10
        with pytest.raises(TrainingError, match="an earlier exchange failed"):
            state.submit(None)
    os._exit(0)


def a_rank_that_hangs_is_an_error_within_the_timeout(rank: int, world: int) -> None:
    if rank == world - 1:
        time.sleep(TIMEOUT + 20)
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(TrainingError, match="timeout"):
        compressed_all_reduce(torch.ones(5000), "int4")
    assert TIMEOUT - 2 < time.monotonic() - start < TIMEOUT + 15


def a_rank_that_dies_before_the_handshake_is_an_error(rank: int, world: int) -> None:
    from distributed.toy import net

    if rank == world - 1:
        os._exit(0)
    for act in (lambda: CompressState(net()), lambda: compressed_all_reduce(torch.ones(5), "int4")):
        with pytest.raises(TrainingError, match="another rank has died"):
            act()


def messages_of_other_lengths_end_with_the_timeout(rank: int, world: int) -> None:
    """And not with an aborted process: whoever gets past the handshake, as an old version does."""
    link = Link(None, torch.device("cpu"))
    sent = torch.zeros(100 + rank, dtype=torch.uint8)
    with pytest.raises(TrainingError, match="another version of gradcodec"):
        link.swap([[sent]] * world, [100 + rank] * world)


def a_process_may_end_without_closing(rank: int, world: int) -> None:
    """Neither the thread nor the group keeps the interpreter."""
    from distributed.toy import net
    from torch.nn.parallel import DistributedDataParallel

    from gradcodec.distributed import CompressState, compress_hook

    ddp = DistributedDataParallel(net())
    state = CompressState(ddp, "int4")
    ddp.register_comm_hook(state, compress_hook)
    train(ddp, range(2), sgd(ddp))
    dist.barrier()
