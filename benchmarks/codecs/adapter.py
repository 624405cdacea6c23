"""The cost of coding a LLaMA-7B adapter and of TGAP's collection: seconds, bytes, memory.

    python -m benchmarks.run speed            # every codec: some minutes; --quick: six of them

1. Encoding and decoding a LLaMA-7B LoRA adapter (r = 8; q, k, v, o of 32 layers: 256 tensors,
   8,388,608 values of noise), to bytes and from bytes, with one thread and with two, each time in a
   process of its own. Bases are random orthonormal ones, the same for all layers; the arithmetic is
   that of fitted ones.
2. TGAP's collection: eight training steps of the embedded LLaMA without a recorder, with one of
   updates, with one of gradients, in turns; one thread.

Peak memory is that of ``benchmarks.measure.peak``. Every row says how busy the machine was when it
began (``load``, of one minute); on a busy one two threads mostly wait for each other. Rows and a
page.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks import report, rows
from benchmarks.measure import apart, median, peak
from benchmarks.report import Goal, Page, Table, goal_rows
from benchmarks.run import Options, check_names
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Subspace
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.recipes import data, models
from gradcodec.recipes.report import size
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LanguageTask
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.groups import groups
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload

CASE = "speed"
THREADS = (1, 2)
LAYERS, WIDTH, RANK = 32, 4096, 8

Make = Callable[[UpdateSpec], Codec]


def adapter_spec(layers: int = LAYERS, width: int = WIDTH, rank: int = RANK) -> UpdateSpec:
    """LoRA factors of q, k, v and o in every layer, named as ``peft`` does."""
    shapes = (("A", (rank, width)), ("B", (width, rank)))
    return UpdateSpec(
        tuple(
            TensorSpec(f"model.layers.{layer}.self_attn.{module}_proj.lora_{factor}.weight", shape)
            for layer in range(layers)
            for module in "qkvo"
            for factor, shape in shapes
        )
    )


def noise(spec: UpdateSpec) -> dict[str, Tensor]:
    """A seeded update of this spec."""
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator) for t in spec}


def random_subspace(spec: UpdateSpec, config: SubspaceConfig) -> Subspace:
    """Seeded orthonormal bases of ``size / ratio`` columns, one for each group of parameters."""
    generator = torch.Generator().manual_seed(1)
    bases: dict[str, tuple[Axis, Tensor]] = {}
    known = {t.name: t for t in spec}
    for members in groups(spec, config.share).values():
        axis = Axis.choose(known[members[0]], config)
        shape = (axis.size, int(axis.size / config.ratio))
        u = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
        bases.update(dict.fromkeys(members, (axis, u)))
    return Subspace.from_bases(config, spec, bases)


def _subspace(ratio: float) -> Make:
    config = SubspaceConfig(ratio, basis_dtype="int4", share="kind")
    quantiser = BlockQuantConfig(2)
    return lambda spec: Chain(random_subspace(spec, config), BlockQuant(quantiser))


def _untrained(name: str) -> Make:
    return lambda spec: make_codec(name).bind(spec)


CODECS: Mapping[str, Make] = MappingProxyType(
    {
        "subspace-64-int4": _subspace(64),
        "subspace-32-int4": _subspace(32),
        **{name: _untrained(name) for name in UNTRAINED},
    }
)
QUICK = ("subspace-64-int4", "subspace-32-int4", "sign", "int4", "topk", "fp16")
TGAP = "tgap"
MOST_S, MOST_PEAK = 0.5, 2.0
"""Goals: seconds of encoding and decoding together on two threads; memory beside the adapter."""
RECORDERS = ("update", "gradient")


# -- coding --------------------------------------------------------------------------------------


def code(name: str, threads: int, repeats: int) -> rows.Row:
    """Cost of one codec on the adapter."""
    torch.set_num_threads(threads)
    spec = adapter_spec()
    update = noise(spec)
    began = time.perf_counter()
    codec = CODECS[name](spec)
    build = time.perf_counter() - began

    def encode() -> bytes:
        return codec.encoder.encode(update).to_bytes()

    began = time.perf_counter()
    blob = encode()  # takes the codec's digest, once
    first = time.perf_counter() - began

    def decode() -> dict[str, Tensor]:
        return codec.decoder.decode(Payload.from_bytes(blob))

    decode()
    peaks = [peak(call) for call in (encode, decode)]
    times = [median(call, repeats) for call in (encode, decode)]
    return {
        "encode_s": times[0],
        "decode_s": times[1],
        "build_s": round(build, 4),
        "first_encode_s": round(first, 4),
        "body_bytes": codec.nbytes(spec),
        "codec_bytes": codec.weight_nbytes,
        "adapter_bytes": spec.nbytes,
        **{
            f"{what}_peak_of_adapter": None if most is None else round(most / spec.nbytes, 3)
            for what, most in zip(("encode", "decode"), peaks, strict=True)
        },
    }


# -- TGAP ----------------------------------------------------------------------------------------


def collection(repeats: int) -> rows.Row:
    """Seconds of eight training steps with and without a recorder, and their ratios."""
    torch.set_num_threads(1)
    s = Settings()
    base, tokenizer = models.load_base(s.model)
    model = models.add_lora(base, r=s.lora_r, alpha=s.lora_alpha, targets=s.targets, seed=s.seed)
    parameters = models.adapter_parameters(model)
    examples = data.load_examples(s.dataset, limit=256)
    encoded = [data.encode_example(tokenizer, e, s.max_length) for e in examples]
    task = LanguageTask(
        model,
        parameters,
        {0: encoded},
        [],
        pad_id=tokenizer.pad_token_id,
        rounds=1,
        local=s.local,
    )
    start = {n: p.detach().clone() for n, p in parameters.items()}
    config = SubspaceConfig(ratio=32)
    watchers = {
        "none": None,
        **{r: GradientRecorder(parameters, config, representation=r) for r in RECORDERS},
    }
    seconds: dict[str, list[float]] = {name: [] for name in watchers}
    for turn in range(repeats + 1):
        for name, watcher in watchers.items():
            with torch.no_grad():
                for n, p in parameters.items():
                    p.copy_(start[n])
            optimizer = torch.optim.AdamW(list(parameters.values()), **task.optimizer_options)
            began = time.perf_counter()
            with watcher or nullcontext():
                task.train(0, 0, optimizer)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    # Neighbours in time are compared: how busy the machine is changes more than the cost.
    pairs = {r: list(zip(seconds[r], seconds["none"], strict=True)) for r in RECORDERS}
    return {
        "training_s": round(statistics.median(seconds["none"]), 4),
        **{
            f"{r}_ratio": round(statistics.median(a / b for a, b in pairs[r]), 4) for r in RECORDERS
        },
        "steps": s.local.steps,
    }


# -- the case ------------------------------------------------------------------------------------


def main(options: Options) -> list[str]:
    """Measure, append a row each, write the page."""
    known = (*CODECS, TGAP)
    names = options.schemes or ((*QUICK, TGAP) if options.quick else known)
    check_names(names, known)
    repeats = 3 if options.quick else 5
    path = options.out / f"{CASE}.jsonl"
    for name in names:
        for threads in (1,) if name == TGAP else THREADS:
            load = round(os.getloadavg()[0], 2)
            config = {"threads": threads, "repeats": repeats}
            if name == TGAP:
                came = apart(collection, repeats)
            else:
                config |= {"layers": LAYERS, "width": WIDTH, "rank": RANK}
                came = apart(code, name, threads, repeats)
            rows.append(path, {**rows.stamp(CASE, name, 0, config), "load": load, **came})
    made = page(path)
    print("no codec was measured" if made is None else made.write(path))
    return []


def page(path: Path) -> Page | None:
    """The page of the last row of each codec and number of threads."""
    last = {(r["scheme"], r["config"]["threads"]): r for r in rows.read(path)}
    tgap = last.pop((TGAP, 1), None)
    if not last:
        return None
    out = Page("A LLaMA-7B adapter: seconds, bytes and memory", f"python -m benchmarks.run {CASE}")
    out.table("Goals", goal_rows(_goals(list(last.values()))))
    out.table("Encoding to bytes and decoding from them", _coding(last))
    first = next(iter(last.values()))
    notes = [
        f"{LAYERS} layers, width {WIDTH}, r = {RANK} on q, k, v, o: 8,388,608 values of noise, "
        f"33.6 MB; torch {first['versions']['torch']}, {first['machine']}",
        "seconds are medians on a shared machine; load is that of the minute before",
        "peak: resident memory beyond what there was, result included, over the adapter's bytes",
    ]
    if tgap is not None:
        ratios = ", ".join(f"{r}s {tgap[f'{r}_ratio']:.3f}" for r in RECORDERS)
        notes.append(
            f"TGAP's collection on the embedded LLaMA: {tgap['steps']} steps with a recorder, as a "
            f"multiple of those without: {ratios}; in turns, one thread"
        )
    out.lines(notes, "How to read this")
    fastest = [row for (_, threads), row in last.items() if threads == max(THREADS)]
    out.plots({"-seconds": partial(_plot, fastest)})
    return out


def _plot(found: Sequence[rows.Row], path: Path) -> None:
    """Bars of seconds by codec, decoding behind encoding."""
    made, ax = report.figure(figsize=(7, 0.24 * len(found) + 1.2))
    names = [row["scheme"] for row in found]
    encode, decode = ([row[f"{what}_s"] for row in found] for what in ("encode", "decode"))
    ax.barh(names, encode, label="encode")
    ax.barh(names, decode, left=encode, label="decode")
    ax.invert_yaxis()
    ax.set_xlabel(f"seconds on {max(THREADS)} threads")
    ax.legend(frameon=False)
    report.save(made, path)


def _coding(last: Mapping[tuple[str, int], rows.Row]) -> Table:
    times, peaks = ("encode s", "decode s"), ("encode peak", "decode peak")
    out: Table = [("codec", "threads", *times, "body", "codec", *peaks, "load")]
    for (name, threads), row in last.items():
        took = [f"{row[f'{what}_s']:.3f}" for what in ("encode", "decode")]
        most = [row[f"{what}_peak_of_adapter"] for what in ("encode", "decode")]
        held = ["?" if one is None else f"{one:.2f}x" for one in most]
        codec = size(row["codec_bytes"]) if row["codec_bytes"] else "-"
        load = f"{row['load']:.1f}"
        out.append((name, str(threads), *took, size(row["body_bytes"]), codec, *held, load))
    return out


def _goals(found: Sequence[rows.Row]) -> list[Goal]:
    together = {
        r["scheme"]: r["encode_s"] + r["decode_s"]
        for r in found
        if r["config"]["threads"] == max(THREADS)
    }
    peaks = {
        r["scheme"]: max(r["encode_peak_of_adapter"], r["decode_peak_of_adapter"])
        for r in found
        if r["encode_peak_of_adapter"] is not None
    }
    goals = []
    for words, known, most, unit in (
        (f"encode + decode on two threads under {MOST_S} s", together, MOST_S, " s"),
        (f"peak under {MOST_PEAK:g}x the adapter", peaks, MOST_PEAK, "x"),
    ):
        worst = max(known, key=lambda name: known[name], default=None)
        text = "" if worst is None else f"most: {worst} {known[worst]:.2f}{unit}"
        goals.append(Goal(words, None if worst is None else known[worst] < most, text))
    return goals
