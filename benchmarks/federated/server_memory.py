"""How much memory a round of a server takes, by the number of replies.

    python -m benchmarks.federated.server_memory --replies 10000 --numel 1000000

Replies are made of one encoded update with another client id each; every one is decoded and added
up. Memory is the growth of the process's peak over that of the server with one reply.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time

import torch

from gradcodec.federated import Server, ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.registry import make_codec


def peak() -> int:
    """Most bytes that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(replies: int, numel: int, codec: str, hold_bytes: int) -> dict[str, object]:
    """One row."""
    initial = {"w": torch.zeros(numel)}
    server = Server(initial, make_codec(codec), config=ServerConfig(hold_bytes=hold_bytes))
    update = {"w": torch.randn(numel, generator=torch.Generator().manual_seed(0))}
    payload = dataclasses.replace(server.uplink.encoder.encode(update), base=server.replica.digest)
    first = Reply(0, 0, 1, payload)
    server.receive(first.to_bytes())
    before, sent, began = peak(), 0, time.perf_counter()
    for number in range(1, replies):
        blob = dataclasses.replace(first, client=number, examples=1 + number % 7).to_bytes()
        sent += len(blob)
        server.receive(blob)
    received = time.perf_counter() - began
    server.close_round()
    return {
        "case": "server_memory",
        "replies": replies,
        "numel": numel,
        "codec": codec,
        "hold_bytes": hold_bytes,
        "sent_bytes": sent,
        "grown_bytes": peak() - before,
        "seconds_a_reply": received / max(replies - 1, 1),
        "torch": torch.__version__,
    }


def main() -> None:
    """Print one row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=10_000)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--codec", default="sign")
    parser.add_argument("--hold-bytes", type=int, default=16 << 20)
    options = parser.parse_args()
    print(json.dumps(measure(options.replies, options.numel, options.codec, options.hold_bytes)))


if __name__ == "__main__":
    main()
