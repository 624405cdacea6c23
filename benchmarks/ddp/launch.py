"""Ranks as processes on shaped links, and what they report."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.ddp import rank as ddp_rank
from benchmarks.ddp.rank import Spec
from benchmarks.links.link import LINKS, Network
from gradcodec.errors import TrainingError

PRELOADED = ["benchmarks.ddp.rank", "transformers.models.llama.modeling_llama"]
"""Imported once, by the server that ranks are forked from: a rank is there in a moment."""


def play(network: Network, world: int, spec: Spec, *, patience: float) -> Iterator[dict[str, Any]]:
    """Run ``world`` ranks; yields the rows of rank 0 as they come, and leaves no process behind.

    Args:
        network: entered already.
        world: ranks.
        spec: what they are to do.
        patience: seconds without any message after which they count as hung.

    Raises:
        TrainingError: one of them raised, died or hung.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when the server imports it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # addresses here have no host names
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = _free_port()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, network.place(rank), port, spec, there)
            process: BaseProcess = context.Process(
                target=ddp_rank.main, args=arguments, daemon=True
            )
            process.start()
            there.close()
            processes.append(process)
            pipes.append(here)
        yield from _listen(network, pipes, patience)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()


def _listen(network: Network, pipes: list[Connection], patience: float) -> Iterator[dict[str, Any]]:
    """Serve the ranks until all are done."""
    left = list(pipes)
    while left:
        ready = wait(left, patience)
        if not ready:
            raise TrainingError(f"no rank has said anything for {patience:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                kind, what = pipe.recv()
            except (EOFError, ConnectionError):
                raise TrainingError(f"rank {pipes.index(pipe)} died without a word") from None
            if kind == "error":
                raise TrainingError(f"rank {pipes.index(pipe)}: {what.strip()}")
            if kind == "shape":
                network.shape(LINKS[what])
                pipe.send(True)
            elif kind == "row":
                yield what
            elif kind == "done":
                left.remove(pipe)


def _free_port() -> int:
    """On loopback; in a fresh namespace every port is free."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
