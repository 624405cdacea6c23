"""Analyses 1 and 2: the paper's SNR beside honest errors, and the compression rate in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.coders import Decodes, Through
from benchmarks.paper.measures import Errors, by_factor, factors
from benchmarks.paper.recordings import Recording, weighted
from benchmarks.paper.setup import Setup

Row = dict[str, Any]
Whose = dict[str, dict[str, Errors]]


def snr(setup: Setup, name: str, what: str) -> Row:
    """One coder on one object, round by round: ``rounds[r][whose][factor][metric]``."""
    decode = setup.coder(name, what)
    rounds = [
        {"number": number + 1, **one_round(setup.test(), number, what, decode)}
        for number in range(setup.rounds)
    ]
    errors = [r["client"]["all"]["rse"] for r in rounds]
    return {"rounds": rounds, "loss": sum(errors) / len(errors)}


def one_round(test: Recording, number: int, what: str, decode: Decodes) -> Whose:
    """Errors of one round by whose they are, and by factor.

    ``client``: of what single clients send. ``innovation``: of the update in it, which of a state
    is a small part. ``mean`` and ``sum``: of the innovations' mean by examples, which is FedAvg,
    and of their plain sum, which is the paper's formula.
    """
    masks = factors(test.spec)
    x = test.of(what)[number]
    y = torch.stack([decode(one, seed=number * len(x) + k) for k, one in enumerate(x)])
    start = test.starts[number] if what == "state" else torch.zeros_like(x)
    new, found = x - start, y - start
    examples = test.examples[number]
    out = {
        "client": by_factor(x, y, masks),
        "mean": by_factor(weighted(new, examples), weighted(found, examples), masks),
        "sum": by_factor(new.sum(0), found.sum(0), masks),
    }
    if what == "state":
        out["innovation"] = by_factor(new, found, masks)
    return out


def size(setup: Setup, name: str) -> Row:
    """What one client's update takes: code values, payload body, whole message."""
    decode = setup.coder(name)
    assert isinstance(decode, Through)
    x = setup.test().updates[0, 0]
    payload = decode.payload(x)
    return {
        "numel": x.numel(),
        "code_numel": decode.codec.code_numel(decode.spec),
        "payload_bytes": len(payload.body),
        "wire_bytes": len(payload.to_bytes()),
        "codec_bytes": decode.codec.weight_nbytes,
        "loss": len(payload.to_bytes()) / (4 * x.numel()),
    }


def aggregation(setup: Setup) -> Row:
    """What sums and means of factors make of the products that clients trained.

    A client changes ``W`` by ``(B + dB)(A + dA) - B A``. Means (or sums) of A and of B, each alone,
    do not give the mean (or sum) of these products. ``mean`` and ``sum``: relative error, each
    against its own. ``length``: how many times longer the sum's step is than the mean's.
    ``increments``: the paper's formula on increments as written, ``(sum dB)(sum dA)``, against the
    sum of what clients trained.
    """
    test = setup.test()
    rounds = []
    for number in range(setup.rounds):
        examples = test.examples[number]
        share = examples.double() / examples.sum()
        ones = torch.ones_like(share)
        energy = dict.fromkeys(("mean", "sum"), 0.0)
        error = {**energy, "increments": 0.0}
        for (a, da), (b, db) in pairs(test, number):
            whole = (b + db) @ (a + da) - b @ a
            for rule, weights in (("mean", share), ("sum", ones)):
                wanted = torch.einsum("k,kij->ij", weights, whole)
                moved = [torch.einsum("k,kij->ij", weights, d) for d in (db, da)]
                got = (b[0] + moved[0]) @ (a[0] + moved[1]) - b[0] @ a[0]
                energy[rule] += float(wanted.square().sum())
                error[rule] += float((got - wanted).square().sum())
                if rule == "sum":
                    error["increments"] += float((moved[0] @ moved[1] - wanted).square().sum())
        rounds.append(
            {
                "number": number + 1,
                "mean": error["mean"] / energy["mean"],
                "sum": error["sum"] / energy["sum"],
                "increments": error["increments"] / energy["sum"],
                "length": float(
                    test.updates[number].sum(0).norm()
                    / weighted(test.updates[number], examples).norm()
                ),
            }
        )
    return {"rounds": rounds, "loss": sum(r["mean"] for r in rounds) / len(rounds)}


def pairs(test: Recording, number: int) -> list[tuple[tuple[Tensor, Tensor], ...]]:
    """Per module ``(A, dA), (B, dB)``, each ``[K, rows, columns]`` in fp64."""
    sizes = [t.numel for t in test.spec]
    starts = torch.split(test.starts[number].double(), sizes, dim=1)
    updates = torch.split(test.updates[number].double(), sizes, dim=1)
    found = {
        t.name: (s.reshape(-1, *t.shape), u.reshape(-1, *t.shape))
        for t, s, u in zip(test.spec, starts, updates, strict=True)
    }
    return [
        (pair, found[name.replace("lora_A", "lora_B")])
        for name, pair in found.items()
        if "lora_A" in name
    ]
