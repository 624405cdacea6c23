"""A rank of ``LocalSteps`` whose process is killed, and the new process that takes its place.

    python killed_rank.py ROLE FOLDER       ROLE: 0, 1, 2 (is killed), new

Ranks meet through files in FOLDER: ``first`` is the store of the group that loses a rank,
``second`` that of the group after it. Survivors print what they were told.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from distributed.local_cases import anchors, one_step
from distributed.toy import assert_replicas_equal, everywhere, net, sgd

from gradcodec.distributed import LocalSteps
from gradcodec.errors import TrainingError

KILLED_AT, END, EVERY = 5, 24, 4
"""The step before which rank 2 dies: ranks have exchanged once, and exchange next at step 8."""


def group(folder: Path, store: str, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / store}",
        rank=rank,
        world_size=3,
        timeout=datetime.timedelta(seconds=60),
    )


def main(role: str, folder: Path) -> None:
    torch.set_num_threads(1)
    joining, rank = role == "new", 2 if role == "new" else int(role)
    group(folder, "second" if joining else "first", rank)
    model = net()
    optimizer = sgd(model, 0.05)
    options = {"codec": "int4", "fragments": 2, "overlap": 1}
    local = LocalSteps(model, optimizer, every=EVERY, joining=joining, **options)  # type: ignore[arg-type]
    step = 0
    if not joining:
        try:
            while True:
                if step == KILLED_AT and rank == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                one_step(model, optimizer, local, step)
                step += 1
        except TrainingError as err:
            print(f"rank {rank}: {err}")
        assert step < END
        dist.destroy_process_group()
        group(folder, "second", rank)
    local.join()
    step = int(local.stats()["steps"])
    assert KILLED_AT <= step < END
    before = anchors(local).clone()
    assert all(torch.equal(before, other) for other in everywhere(before))
    for at in range(step, END):
        one_step(model, optimizer, local, at)
    local.finish()
    assert_replicas_equal(model)
    mine = anchors(local)
    assert all(torch.equal(mine, other) for other in everywhere(mine))
    assert not torch.equal(mine, before)
    local.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
