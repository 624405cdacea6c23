"""Full-parameter training of the embedded LLaMA under ``fully_shard``, in 4 bits on the wire.

    torchrun --nproc-per-node 2 examples/fsdp2_llama.py
    torchrun --nproc-per-node 2 examples/fsdp2_llama.py --codec fp32   # nothing lost, to compare
    torchrun --nproc-per-node 4 examples/fsdp2_llama.py --replicas 2   # HSDP, the slow link coded

An ordinary FSDP2 loop; the lines marked ``(+)`` are all that compression adds to it. Gradients are
rounded at random without bias, so no rank keeps a residual of the whole model. With ``--replicas``
ranks shard within a group and average between groups: the shards stay dense, the average, which
crosses the slow network, is coded with error feedback as large as a shard. Two CPU cores, about a
minute.
"""

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradcodec as gc  # (+)
from gradcodec.recipes.corpus import docstring_pairs_in
from gradcodec.recipes.models import load_base
from gradcodec.recipes.report import size

BATCH, LENGTH, HELD_OUT = 4, 64, 32  # sequences per rank, tokens in each, sequences kept apart
PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def main() -> None:
    """Train, and say what it cost."""
    args = parse_arguments()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    base, tokenizer = load_base("embedded")
    model: Any = base
    ids = sequences(tokenizer)
    held_out, train = ids[:HELD_OUT], ids[HELD_OUT:]

    shape = (args.replicas, world // args.replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    replicas = mesh["replicate"] if args.replicas > 1 else None
    state = gc.compress(model, args.codec, replicas=replicas)  # (+)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    say = print if rank == 0 else silent
    say(f"{shape[0]} x {shape[1]} ranks, {args.codec}")
    say(f"step {0:3}  held-out loss {evaluate(model, held_out):.4f}")
    generator = torch.Generator().manual_seed(rank)  # each rank reads other examples
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        batch = train[torch.randint(len(train), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()  # gradients are reduced in here, module by module
        optimizer.step()
        if step % max(1, args.steps // 4) == 0:
            say(f"step {step:3}  held-out loss {evaluate(model, held_out):.4f}")
    seconds = time.perf_counter() - began

    report(say, state.stats(), seconds)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", default="int4", help="int8, int4, int4-unbiased, fp32, ...")
    parser.add_argument("--replicas", type=int, default=1, help="groups that shard each by itself")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=5e-4)
    return parser.parse_args()


def sequences(tokenizer: Any) -> Tensor:
    """Questions and answers of the standard library's docstrings, ``[n, LENGTH]``, shuffled."""
    library = Path(sysconfig.get_path("stdlib"))
    pairs = [pair for name in PACKAGES for pair in docstring_pairs_in(library / name, name)]
    ids: list[int] = []
    for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist():
        text = pairs[i].prompt + pairs[i].answer
        ids += [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor) -> float:
    """Nats per token on sequences that are not trained on; every rank must call it."""
    return float(model(input_ids=ids, labels=ids).loss)


def report(say: Any, stats: dict[str, Any], seconds: float) -> None:
    """What the compressed reductions sent, and what it took."""
    steps = stats["steps"]
    plain, sent = stats["dense_wire_bytes"], stats["wire_bytes"]
    say(f"\nsent, dense      {size(plain / steps)} per step and rank")
    say(f"sent, here       {size(sent / steps)}, {plain / max(1, sent):.1f}x less")
    say(f"error feedback   {size(stats['residual_bytes'])} per rank")
    parts = ", ".join(
        f"{p} {stats[f'{p}_seconds']:.1f} s" for p in ("encode", "exchange", "decode")
    )
    say(f"time             {seconds:.1f} s, of it {parts}")


def silent(*_: object) -> None:
    """What the other ranks say."""


if __name__ == "__main__":
    main()
