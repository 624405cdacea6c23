"""What an attacker reads out of a client's message: words of its only sentence.

    python -m benchmarks.run leakage

The client takes one gradient step on one short sentence and sends it: the worst case. The attacker
knows the model, the adapter and the codec, and does as DAGER (Petrov et al. 2024, arXiv 2405.15586)
does with whole weights. The input of the first layer's projections is a known function of the token
alone, ``x_v``. The gradient of ``lora_A`` is ``sum_t d_t x_t^T``, so its rows span a space in which
the inputs of the client's tokens lie, and hardly any other's. Tokens are ranked by how much of
``x_v`` lies in the span of the received rows; as many are guessed as the sentence has.

Unlike DLG (Zhu et al. 2019) this needs no optimisation and is exact without a codec. *Recovered*:
share of the sentence's distinct tokens among the guesses. *Chance*: guessing at random.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import jobs, report, rows
from benchmarks.federated import case as federated
from benchmarks.federated.figures import load
from benchmarks.federated.world import World, world_of
from benchmarks.jobs import Job
from benchmarks.privacy import subspaces
from benchmarks.run import Options
from gradcodec.codec import Codec
from gradcodec.codecs import Identity, RotatedSign
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.privacy import ClientPrivacy
from gradcodec.recipes.data import Encoded
from gradcodec.registry import make_codec
from gradcodec.types import UpdateSpec

CASE = "leakage"
SENTENCES, TOKENS = 40, 8

Make = Callable[[World], Codec]


SCHEMES: Mapping[str, tuple[str, Make, ClientPrivacy | None]] = {
    "fp32": ("fp32", lambda w: Identity(), None),
    "int8": ("int8", lambda w: make_codec("int8"), None),
    "int4": ("int4", lambda w: make_codec("int4"), None),
    "rotsign": ("rotated signs, 1 bit", lambda w: RotatedSign(), None),
    "rotsign-64": (
        "rotated signs, 1/4 bit",
        lambda w: RotatedSign(RotatedSignConfig(kept=64)),
        None,
    ),
    "topk": ("top 64 of 4096", lambda w: make_codec("topk"), None),
    "signal-17": ("fitted subspace 1/17, 8 bit", lambda w: subspaces.signal(w, 17.46).codec, None),
    "signal-128": ("fitted subspace 1/128, 8 bit", lambda w: subspaces.signal(w, 128).codec, None),
    "random-17": ("random subspace 1/17, 8 bit", lambda w: subspaces.random(w, 17.46), None),
    "fp32-noise": (
        "fp32, clipped to 1, noise 0.01 a value",
        lambda w: Identity(),
        ClientPrivacy(1.0, 0.01, seed=0),
    ),
}


QUICK = ("fp32", "int4", "signal-17")


def play_job(job: Job) -> Iterator[rows.Row]:
    """One row: the attack on every sentence."""
    world = world_of(federated.settings(job.seed))
    _, make, privacy = SCHEMES[job.scheme]
    spec = UpdateSpec.of(world.initial)
    codec = make(world).bind(spec)
    state = _trained(world)
    inputs = _inputs(world)
    shares, lengths = [], []
    for number, example in enumerate(_sentences(world)):
        update = _step(world, state, example)
        seed = job.seed + number
        if privacy is None:
            payload = codec.encoder.encode(update, seed=seed)
        else:
            payload = privacy.encode(codec, update, seed=seed)
        received = codec.decoder.decode(payload)
        wanted = set(example.input_ids[:-1])  # the last one is predicted only, never an input
        guessed = attack(received, inputs, len(wanted))
        shares.append(len(wanted & guessed) / len(wanted))
        lengths.append(len(wanted))
    yield {
        "round": 1,
        "diverged": False,
        "loss": 1 - statistics.fmean(shares),
        "recovered": statistics.fmean(shares),
        "deviation": statistics.stdev(shares),
        "whole": sum(share == 1 for share in shares) / len(shares),
        "chance": statistics.fmean(lengths) / len(inputs),
        "message_bytes": len(payload.to_bytes()),
    }


def attack(received: Mapping[str, Tensor], inputs: Tensor, count: int) -> set[int]:
    """The tokens whose inputs lie in the span of the received rows of the first layer.

    Args:
        received: the decoded update.
        inputs: ``x_v`` of every token, unit rows ``[vocabulary, width]``.
        count: how many to guess; also the rank that the rows can have.
    """
    names = [f"model.layers.0.self_attn.{m}_proj.lora_A.weight" for m in "qkv"]
    rows_ = torch.cat([received[n].float() for n in names if n in received])
    span = torch.linalg.svd(rows_, full_matrices=False).Vh[:count]
    score = (inputs @ span.T).norm(dim=1)
    return set(score.topk(count).indices.tolist())


def _sentences(world: World) -> list[Encoded]:
    """Beginnings of held-out examples."""
    out = []
    for example in world.held[:SENTENCES]:
        ids = example.input_ids[:TOKENS]
        out.append(Encoded(list(ids), list(ids)))
    return out


def _trained(world: World) -> dict[str, Tensor]:
    """The adapter after some training: with ``B = 0`` the gradient of ``A`` is zero."""
    parameters = world.parameters(world.initial)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    world.train([0], [parameters], [optimizer], 0, world.d1)
    return {n: p.detach() for n, p in parameters.items()}


def _step(world: World, state: Mapping[str, Tensor], example: Encoded) -> dict[str, Tensor]:
    """The negative gradient on one sentence, scaled to norm 1 as a step would be."""
    parameters = world.parameters(dict(state))
    loss: Tensor = world.net([parameters], [[example]]).sum()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.stack([g.norm() for g in grads]).norm()
    return {n: -g / norm for n, g in zip(parameters, grads, strict=True)}


def _inputs(world: World) -> Tensor:
    """``x_v`` of every token: its embedding after the first norm, as unit rows."""
    net = world.net
    x = net._rms(net.embedding, net.layers[0].norm_in)
    return x / x.norm(dim=1, keepdim=True)


def main(options: Options) -> list[str]:
    """Attack; then the table and the plot."""
    todo = [
        Job(CASE, name, 0, 0.0, 1, f"{__name__}:play_job", (("sentences", SENTENCES),))
        for name in options.schemes or (QUICK if options.quick else SCHEMES)
    ]
    path = options.out / f"{CASE}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    print(page(path).write(path))
    return failed


def page(path: Path) -> report.Page:
    """The page of these rows."""
    runs = load(path)
    out = report.Page("What a message gives away", f"python -m benchmarks.run {CASE}")
    table: report.Table = [("message", "bytes", "tokens recovered", "whole sentences")]
    bars = {}
    for name, (title, _, _) in SCHEMES.items():
        if name not in runs:
            continue
        row = next(iter(runs[name].values()))[-1]
        bars[title] = row["recovered"]
        error = row["deviation"] / SENTENCES**0.5
        cell = f"{row['recovered']:.1%} ± {error:.1%}"
        table.append((title, f"{row['message_bytes']:,}", cell, f"{row['whole']:.0%}"))
    table.append(("guessing", "", f"{row['chance']:.1%}", ""))
    out.table("Tokens of a client's only sentence", table)
    out.lines(
        [
            f"{SENTENCES} beginnings of held-out examples, {TOKENS} tokens each, of which the "
            "last is predicted only; one gradient step "
            "on one sentence, the worst case: many steps on many sentences are harder to read",
            "the attacker ranks tokens by the span of the first layer's lora_A rows (DAGER, arXiv "
            "2405.15586); a better attack may read more, so low numbers are no guarantee",
        ]
    )
    out.plots({"": lambda to: _draw(bars, to)})
    return out


def _draw(bars: Mapping[str, float], path: Path) -> None:
    figure, axes = report.figure(1, 1, figsize=(7, 4))
    axes.barh(list(bars), [100 * v for v in bars.values()], color=report.OURS, alpha=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="tokens of the sentence recovered, %", xlim=(0, 100))
    axes.grid(alpha=0.3, axis="x")
    report.save(figure, path)
