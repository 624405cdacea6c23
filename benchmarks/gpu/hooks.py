"""Compressed data-parallel training on CUDA tensors: equal bits on both replicas, and seconds.

    python -m benchmarks.gpu.hooks --out OUT [--device cpu]

NCCL refuses two ranks on one GPU, so two processes share the device over gloo, which carries bytes
through host memory; one more process runs NCCL with a single rank. Two parts:

1. *checked*: four steps of a small LLaMA in DDP, compiled DDP, DDP under bf16 autocast and FSDP2,
   with several codecs each. Rows say whether all ranks end with equal bits.
2. *timed*: a LLaMA of 1.1e9 parameters in bf16. Seconds of a step with plain DDP and with codecs,
   what coding and exchange take of it, and how much of that the backward pass hides.

With ``--device cpu`` the models are tiny and the codecs few: that shows that the script works, and
the seconds say nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gradcodec as gc
from benchmarks import rows

CASE = "gpu-hooks"
CHECKED: Mapping[str, tuple[str, ...]] = {
    "ddp": ("int4", "int4-rotated", "sign-rotated", "rotsign", "topk", "int2", "lowrank"),
    "ddp-compiled": ("int4", "sign-rotated"),
    "ddp-autocast": ("int4", "topk"),
    "fsdp2": ("int8", "int4"),
    "nccl-alone": ("int4",),
    "fsdp2-nccl-alone": ("int8",),
}
TIMED = (None, "int4", "sign-rotated", "rotsign")
LIMIT = {"cuda": 75, "cpu": 300}
"""Seconds that the processes of a part may take."""


def llama(width: int, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal LLaMA with random weights, equal on all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000 if width >= 1024 else 256,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(4, width // 128),
        num_key_value_heads=max(4, width // 128),
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int, shape: tuple[int, int], vocab: int) -> Any:
    """Loss of a batch that differs by rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, vocab, shape, generator=generator)
    tokens = tokens.to(next(model.parameters()).device)
    return model(input_ids=tokens, labels=tokens).loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a shard; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the bits of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        bits = whole(parameter.detach()).cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


def checked(mode: str, codec: str, device: torch.device) -> rows.Row:
    """Four steps; whether all ranks hold equal bits after them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = llama(128, 2, device, torch.float32)
    if mode.startswith("fsdp2"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world,))
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    compression = gc.compress(wrapped, codec=codec)
    trained = torch.compile(wrapped) if mode == "ddp-compiled" else wrapped
    half = torch.autocast(device.type, torch.bfloat16) if mode == "ddp-autocast" else nullcontext()
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        with half:
            loss = loss_of(trained, rank, 0, (2, 32), 256)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    prints: list[Any] = [None] * world
    dist.all_gather_object(prints, fingerprint(model))
    stats = compression.stats()
    compression.close()
    return {
        "equal_bits": len(set(prints)) == 1,
        "losses": [round(x, 4) for x in losses],
        "learned": losses[-1] < losses[0],
        "less_wire": round(stats["dense_wire_bytes"] / max(1, stats["wire_bytes"]), 2),
    }


def timed(codec: str | None, device: torch.device, tiny: bool) -> rows.Row:
    """Median seconds of a step, and where they go."""
    rank = dist.get_rank()
    width, layers, shape = (128, 2, (1, 32)) if tiny else (2048, 18, (4, 512))
    model = llama(width, layers, device, torch.bfloat16)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    compression = None if codec is None else gc.compress(wrapped, codec=codec)
    vocab = model.config.vocab_size  # type: ignore[union-attr]

    def step(number: int, sync: bool) -> float:
        _wait(device)
        dist.barrier()
        began = time.perf_counter()
        with nullcontext() if sync else wrapped.no_sync():
            loss_of(wrapped, rank, number, shape, vocab).backward()
        _wait(device)
        taken = time.perf_counter() - began
        for parameter in wrapped.parameters():
            parameter.grad = None
        return taken

    for number in range(2):
        step(number, True)
    step(0, False)
    computing = statistics.median(step(n, False) for n in range(3))
    before = None if compression is None else compression.stats()
    steps = [step(n, True) for n in range(2, 5)]
    found: rows.Row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_s": round(statistics.median(steps), 4),
        "compute_s": round(computing, 4),
    }
    if compression is not None and before is not None:
        after = compression.stats()
        parts = {
            part: (after[f"{part}_seconds"] - before[f"{part}_seconds"]) / len(steps)
            for part in ("encode", "exchange", "decode")
        }
        found |= {f"{part}_s": round(seconds, 4) for part, seconds in parts.items()}
        shown = found["step_s"] - found["compute_s"]
        found["hidden_s"] = round(sum(parts.values()) - shown, 4)
        found["wire_bytes"] = (after["wire_bytes"] - before["wire_bytes"]) // len(steps)
        found["residual_bytes"] = after["residual_bytes"]
        compression.close()
    if device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- processes -----------------------------------------------------------------------------------


def rank_main(mode: str, out: Path, device: torch.device, meeting: str) -> int:
    """One rank of one mode; rank 0 writes the rows."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    # Whoever waits for ever shows where before it is killed.
    faulthandler.dump_traceback_later(0.9 * LIMIT[device.type])
    backend = "nccl" if mode.endswith("alone") and device.type == "cuda" else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, f"file://{meeting}", timedelta(seconds=60), rank=rank, world_size=world
    )
    jobs = TIMED if mode == "timed" else CHECKED[mode]
    if device.type == "cpu":
        jobs = jobs[:2]
    bad = 0
    for codec in jobs:
        try:
            if mode == "timed":
                found = timed(codec, device, device.type == "cpu")
            else:
                found = checked(mode, str(codec), device)
                bad += not found["equal_bits"]
        except Exception:
            # The other rank may wait for this one, so this mode ends here.
            found, bad = {"error": traceback.format_exc()[-3000:]}, bad + 1
            _write(out, mode, codec, device, found)
            return bad
        _write(out, mode, codec, device, found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()
    return bad


def _write(out: Path, mode: str, codec: str | None, device: torch.device, found: rows.Row) -> None:
    if dist.get_rank() and "error" not in found:
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    config = {"mode": mode, "device": name, "ranks": dist.get_world_size()}
    rows.append(out / f"{CASE}.jsonl", {**rows.stamp(CASE, str(codec), 0, config), **found})
    print(mode, codec, found, flush=True)


def start(mode: str, out: Path, device: str, folder: str) -> list[subprocess.Popen[bytes]]:
    """The processes of a mode."""
    world = 1 if mode.endswith("alone") else 2
    processes = []
    for rank in range(world):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
        command = [sys.executable, "-m", "benchmarks.gpu.hooks", "--out", str(out)]
        command += ["--device", device, "--mode", mode, "--meeting", f"{folder}/{mode}"]
        processes.append(subprocess.Popen(command, env=env))
    return processes


def _together(modes: Sequence[str], out: Path, device: str, folder: str) -> int:
    """Run these modes side by side; how many ranks failed or did not end."""
    processes = [process for mode in modes for process in start(mode, out, device, folder)]
    end, bad = time.monotonic() + LIMIT[device], 0
    for process in processes:
        try:
            bad += process.wait(max(0.1, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            bad += 1
        finally:
            process.kill()
    return bad


def main() -> int:
    """Start what is checked side by side, then what is timed alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--modes", default=",".join((*CHECKED, "timed")), help="such as ddp,timed")
    parser.add_argument("--mode", choices=(*CHECKED, "timed"), help="one rank of one mode")
    parser.add_argument("--meeting", help="the file where its ranks meet")
    args = parser.parse_args()
    if args.mode:
        return rank_main(args.mode, args.out, torch.device(args.device), args.meeting)
    with tempfile.TemporaryDirectory() as folder:
        asked = args.modes.split(",")
        groups = ([m for m in asked if m in CHECKED], [m for m in asked if m == "timed"])
        bad = sum(_together(modes, args.out, args.device, folder) for modes in groups)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
