"""Analysis 3: noise on updates or codes, and whether less of it after decoding means denoising.

The paper adds noise of growing variance, finds that the error after decoding hardly grows, and
calls that denoising. A decoder that ignores its input shows the same. So two gains are measured
(``measures.gain``): how much of a difference between two clients comes through, and how much of the
noise. A denoiser lets the first through and not the second; a constant decoder neither; the
identity both.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.paper.coders import Through
from benchmarks.paper.measures import Decode, Errors, errors, gain, noise_like, shuffled
from benchmarks.paper.setup import Setup

LEVELS = (0.04, 0.4, 4.0, 40.0, 400.0)
"""Standard deviations, in RMS of a round's updates: the paper's 5e-5 to 5e-1 at its 1.3e-3."""

CODERS = (
    *("identity", "int4", "rotsign-128", "subspace", "ae-working", "ae-literal", "ae-unscaled"),
    *("prior", "untrained", "train-mean", "noise", "zero"),
)

Row = dict[str, Any]


def noise(setup: Setup, name: str) -> Row:
    """Gains and errors of one coder, means over the clients of three rounds.

    Each client is compared with the next one of its round. ``swapped`` errors are those of decoding
    the next one's message in place of one's own: as good as one's own where input does not matter.
    ``levels`` have noise on updates, ``code_levels`` on codes, relative to their own RMS.
    """
    test = setup.test()
    decode = setup.coder(name)
    x = test.updates[[0, setup.rounds // 2, setup.rounds - 1]]
    y = _each(decode, x)
    mixed = torch.stack([shuffled(one, test.spec, seed=0) for one in x.flatten(0, 1)]).view_as(x)
    found = {
        **_kept(errors(x.flatten(0, 1), y.flatten(0, 1))),
        "swapped": _kept(errors(x.flatten(0, 1), _next(y).flatten(0, 1))),
        "client_gain": gain(y - _next(y), x - _next(x)),
        "shuffled_gain": gain(y - _each(decode, mixed), x - mixed),
        "levels": [],
    }
    rms = x.double().square().mean((1, 2)).sqrt().tolist()
    for level in LEVELS:
        # One noise for all clients of a round: what differs between them is what they learned.
        noises = [noise_like(x[0, 0], level * rms[r], seed=r) for r in range(len(x))]
        added = torch.stack(noises)[:, None].expand_as(x)
        z = _each(decode, x + added)
        found["levels"].append(
            {
                "level": level,
                **_kept(errors(x.flatten(0, 1), z.flatten(0, 1))),
                "noise_gain": gain(z - y, added),
                "client_gain": gain(z - _next(z), x - _next(x)),
            }
        )
    if isinstance(decode, Through):
        found["code_levels"] = []
        for level in LEVELS:
            z = _each(functools.partial(decode.with_noise, sigma=level), x)
            kept = _kept(errors(x.flatten(0, 1), z.flatten(0, 1)))
            found["code_levels"].append({"level": level, **kept})
    return {**found, "loss": found["rse"]}


def _each(decode: Decode, x: Tensor) -> Tensor:
    """Every snapshot of ``[R, K, n]`` through the coder; its random numbers are the same."""
    return torch.stack([decode(one) for one in x.flatten(0, 1)]).view_as(x)


def _next(x: Tensor) -> Tensor:
    """The next client's of the same round."""
    return x.roll(-1, dims=1)


def _kept(found: Errors) -> Errors:
    return {name: found[name] for name in ("rse", "cosine", "snr_paper")}
