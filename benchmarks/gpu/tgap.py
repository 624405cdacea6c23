"""TGAP at the size of LLaMA-7B: seconds and memory of recording and fitting, on random weights.

    python -m benchmarks.gpu.tgap --out OUT [--device cpu]

A LLaMA with the shapes of 7B and random bf16 weights takes eight LoRA training steps (r = 8 on q
and v, batches of 4 x 256 random tokens), first without a recorder and then with one of gradients; a
subspace is fitted on what it recorded. What is measured does not depend on the values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from gradcodec.recipes import models
from gradcodec.tgap import GradientRecorder, fit_subspace
from gradcodec.transforms.subspace.config import SubspaceConfig

CASE = "gpu-tgap"
STEPS = 8


def steps(model: Any, parameters: Any, recorder: Any, tokens: torch.Tensor) -> list[float]:
    """Seconds of each training step."""
    taken = []
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=1e-4)
    with recorder:
        for batch in tokens:
            _wait(tokens.device)
            began = time.perf_counter()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            _wait(tokens.device)
            taken.append(time.perf_counter() - began)
    return taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Record, fit, encode once; one row."""
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    tiny = device.type == "cpu"
    shape = (
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            vocab_size=256,
            num_attention_heads=4,
        )
        if tiny
        else LlamaConfig()
    )
    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        base = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    targets = ("q_proj", "v_proj")
    model: Any = models.add_lora(base, r=8, alpha=16, targets=targets, seed=0)
    parameters = models.adapter_parameters(model)
    build = time.perf_counter() - began
    size = (STEPS, 2, 16) if tiny else (STEPS, 4, 256)
    tokens = torch.randint(0, shape.vocab_size, size, device=device)
    recorder = GradientRecorder(parameters, SubspaceConfig(ratio=32))
    plain = steps(model, parameters, nullcontext(), tokens)
    watched = steps(model, parameters, recorder, tokens)
    began = time.perf_counter()
    codec = fit_subspace(recorder.moments)
    fit = time.perf_counter() - began
    update = {n: torch.randn_like(p) for n, p in parameters.items()}
    mine = codec.to(device)
    mine.encoder.encode(update)
    _wait(device)
    began = time.perf_counter()
    body = mine.encoder.encode(update).body
    found = {
        "parameters": sum(p.numel() for p in base.parameters()),
        "adapter_values": sum(p.numel() for p in parameters.values()),
        "build_s": round(build, 2),
        "step_ms": round(1e3 * statistics.median(plain[2:]), 2),
        "recorded_step_ms": round(1e3 * statistics.median(watched[2:]), 2),
        "fit_s": round(fit, 2),
        "encode_ms": round(1e3 * (time.perf_counter() - began), 2),
        "body_bytes": len(body),
        "codec_bytes": codec.weight_nbytes,
    }
    name = "cpu"
    if not tiny:
        name = torch.cuda.get_device_name()
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    rows.append(
        args.out / f"{CASE}.jsonl",
        {**rows.stamp(CASE, "subspace-32", 0, {"device": name}), **found},
    )
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
