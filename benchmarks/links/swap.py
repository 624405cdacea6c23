"""Two ranks swap messages over a shaped link: gloo's all-to-all, and ``distributed.link.Link``.

    python -m benchmarks.run link_swap

A link has two directions, so a swap of ``n`` bytes takes at least ``n`` bytes' time. The two ways
take turns. Rows: ``results/link_swap.jsonl``, one per link, size and way.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import rows
from benchmarks.links.link import LINKS, Place, network
from benchmarks.run import Options
from gradcodec.distributed.exchange.link import Link

CASE = "link_swap"
SIZES = (100_000, 400_000, 1_600_000, 6_400_000)
ALL_TO_ALL, OURS = "all_to_all_single", "Link.swap"
TIMES = 20
PORT = 29_517


def all_to_all(link: Link, message: Tensor) -> None:
    """As gloo does it."""
    splits = [0 if r == link.rank else len(message) for r in range(2)]
    dist.all_to_all_single(torch.empty_like(message), message, splits, splits)


def swap(link: Link, message: Tensor) -> None:
    """As the hook does it."""
    link.swap([[message], [message]], [len(message)] * 2)


def rank_main(rank: int, place: Place, pipe: Connection) -> None:
    """Rank 0 sends its seconds; both wait until a link is there."""
    place.enter()
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = place.interface
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{place.master}:{PORT}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    link = Link(None, torch.device("cpu"))
    ways = {ALL_TO_ALL: all_to_all, OURS: swap}
    while True:
        dist.barrier()
        pipe.send("ready")
        name = pipe.recv()
        if name is None:
            break
        place.pace(LINKS[name])
        for size in SIZES:
            message = torch.zeros(size, dtype=torch.uint8)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(TIMES):
                for way, one in ways.items():
                    dist.barrier()
                    begun = time.perf_counter()
                    one(link, message)
                    seconds[way].append(time.perf_counter() - begun)
            pipe.send((size, seconds))
    dist.destroy_process_group()


def measure(path: Path) -> None:
    """All links, sizes and ways; appends rows and prints them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # addresses here have no host names
    context = multiprocessing.get_context("forkserver")
    with network(2) as links:
        pipes, processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=rank_main, args=(rank, links.place(rank), there))
            process.start()
            pipes.append(here)
            processes.append(process)
        print(
            "link         bytes way                     least     median    slowest   turns taken"
        )
        for name in ("1gbit", "100mbit"):
            for pipe in pipes:
                pipe.recv()
            links.shape(LINKS[name])
            for pipe in pipes:
                pipe.send(name)
            for _ in SIZES:
                size, seconds = pipes[0].recv()
                pipes[1].recv()
                for way, those in seconds.items():
                    least = LINKS[name].seconds(size)
                    middle, worst = statistics.median(those), max(those)
                    late = sum(s > 1.6 * least for s in those)
                    times = "".join(f" {1000 * t:7.1f} ms" for t in (least, middle, worst))
                    line = f"{name:8} {size:9,} {way:18}{times}   {late} of {len(those)}"
                    print(line, flush=True)
                    config = {"link": name, "bytes": size, "times": TIMES}
                    row = rows.stamp(CASE, way, 0, config)
                    found = {"network": links.kind, "least_s": least, "seconds": those}
                    rows.append(path, {**row, **found})
        for pipe in pipes:
            pipe.recv()
            pipe.send(None)
        for process in processes:
            process.join()


def main(options: Options) -> list[str]:
    """Measure, append a row each, print them; what failed, as text."""
    measure(options.out / f"{CASE}.jsonl")
    return []
