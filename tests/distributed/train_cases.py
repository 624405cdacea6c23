"""Training with compressed gradients against dense training, on a task that takes some steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed.toy import WIDTH, assert_replicas_equal, batch, net, wrapped
from torch import nn

STEPS = 100

#: Final loss over that of dense training: measured 1.004, 1.037 and 1.046 in a world of two.
CODECS = {"int4": 1.02, "sign": 1.09, "lowrank": 1.10}


def final_loss(codec: str, rank: int, world: int) -> float:
    """Mean loss of the second half of a run with Adam; labels come from a random network."""
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 7))
    with wrapped(codec, model=net()) as (ddp, _state):
        optimizer = torch.optim.Adam(ddp.parameters(), 2e-3)
        losses = []
        for step in range(STEPS):
            x = 3 * batch(rank, step)[0]
            with torch.no_grad():
                y = teacher(x).argmax(1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert_replicas_equal(ddp)
    late = torch.tensor(losses[STEPS // 2 :]).mean()
    dist.all_reduce(late)
    return late.item() / world


def compressed_training_reaches_the_dense_loss(rank: int, world: int) -> None:
    dense = final_loss("fp32", rank, world)
    assert dense < 1.5  # it does learn: 1.95 is a guess
    for codec, factor in CODECS.items():
        reached = final_loss(codec, rank, world)
        assert reached < factor * dense, (codec, reached, dense)
