"""DiLoCo: ranks train alone for many steps, then exchange what they learned, in 2 bits a value.

    torchrun --nproc-per-node 2 examples/diloco.py
    torchrun --nproc-per-node 2 examples/diloco.py --codec fp32   # nothing lost, to compare

Douillard et al. 2023 (arXiv 2311.08105). Each rank takes ``--inner`` AdamW steps from common
parameters. What it moved them by, its pseudogradient, is averaged with ``compressed_all_reduce``;
error feedback sends in later rounds what two bits lose in this one. Nesterov SGD takes the outer
step with the mean. The embedded LLaMA (5.8 million parameters), two CPU cores, about a minute.
"""

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradcodec as gc
from gradcodec.distributed import Residuals, Traffic
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

    model, tokenizer = load_base("embedded")
    ids = sequences(tokenizer)
    held_out, train = ids[:HELD_OUT], ids[HELD_OUT:]
    mine = train[rank::world]  # ranks never see each other's examples

    inner = torch.optim.AdamW(model.parameters(), lr=args.lr)
    common = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    outer = torch.optim.SGD(common, lr=args.outer_lr, momentum=args.momentum, nesterov=True)
    residuals, traffic = Residuals(), Traffic()

    say = print if rank == 0 else silent
    numel = sum(p.numel() for p in common)
    say(f"{world} ranks, {numel:,} parameters, {args.inner} steps alone, then {args.codec}")
    say(f"round {0:2}  held-out loss {evaluate(model, held_out):.4f}")
    generator = torch.Generator().manual_seed(rank)
    began = time.perf_counter()
    for round in range(1, args.rounds + 1):
        for _ in range(args.inner):
            batch = mine[torch.randint(len(mine), (BATCH,), generator=generator)]
            inner.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            inner.step()
        with torch.no_grad():
            moved = [c - p for c, p in zip(common, model.parameters(), strict=True)]
            traffic += gc.compressed_all_reduce(moved, args.codec, seed=round, residuals=residuals)
            for shared, gradient in zip(common, moved, strict=True):
                shared.grad = gradient
            outer.step()
            for p, shared in zip(model.parameters(), common, strict=True):
                p.copy_(shared)
        say(f"round {round:2}  held-out loss {evaluate(model, held_out):.4f}")
    seconds = time.perf_counter() - began

    report(say, traffic, args.rounds * args.inner, numel, seconds)
    say(f"replicas equal to the bit: {equal_everywhere(model)}")
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", default="int2-rotated", help="int8, int4, int2, sign, ...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inner", type=int, default=12, help="steps between exchanges")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the inner AdamW")
    parser.add_argument("--outer-lr", type=float, default=0.7)
    parser.add_argument("--momentum", type=float, default=0.6, help="0.9 for hundreds of rounds")
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
    """Nats per token on sequences that are not trained on."""
    return float(model(input_ids=ids, labels=ids).loss)


def equal_everywhere(model: nn.Module) -> bool:
    """Whether all ranks hold the same parameters."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    first = flat.clone()
    dist.broadcast(first, src=0)
    equal = torch.tensor(int(torch.equal(flat, first)))
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    return bool(equal)


def report(say: Any, traffic: Traffic, steps: int, numel: int, seconds: float) -> None:
    """What went over the wire, and what it took."""
    world = dist.get_world_size()
    every_step = 2 * (world - 1) / world * 4 * numel * steps
    say(f"\nsent, plain DDP  {size(every_step)} in {steps} steps")
    say(f"sent, here       {size(traffic.wire)}, {every_step / max(1, traffic.wire):.0f}x less")
    parts = (traffic.encode, traffic.exchange, traffic.decode)
    encode, exchange, decode = (f"{p:.1f} s" for p in parts)
    say(
        f"time             {seconds:.1f} s, of it encode {encode}, exchange {exchange}, "
        f"decode {decode}"
    )


def silent(*_: object) -> None:
    """What the other ranks say."""


if __name__ == "__main__":
    main()
