"""Codecs that a broadcast brings: the receiver's own two, or a ``WireError``; nothing else."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections import Counter
from typing import Any

import pytest
import torch
from hostile.codec_folders import VALUES, damage_bytes, damage_weights, places
from torch import Tensor

from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Identity, Subspace
from gradcodec.encodable import DTYPE_CODES
from gradcodec.errors import WireError
from gradcodec.federated.switch import Switch
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload

COUNT = 50_000 if os.environ.get("GRADCODEC_HOSTILE") == "long" else 600
HEAD = 28
"""Bytes before the three lengths."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(64, 24, generator=generator) for n in ("layers.0.w", "layers.1.w")}


@pytest.fixture(scope="module", params=["float32", "int4"])
def switch(request: pytest.FixtureRequest, state: dict[str, Tensor]) -> Switch:
    u = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))[0]
    config = SubspaceConfig(basis_dtype=request.param)
    subspace = Subspace.from_bases(
        config, UpdateSpec.of(state), {n: (Axis(True, 64, 24), u) for n in state}
    )
    up, down = (Chain(subspace, BlockQuant(BlockQuantConfig(bits))) for bits in (1, 2))
    return Switch.to(up, down, "latent", 2, state)


def remade(switch: Switch, settings: bytes, weights: bytes) -> bytes:
    """The part with other settings and weights, lengths that fit, and the digests as they were."""
    lengths = struct.pack("<IQQ", len(settings), len(weights), 0)
    return switch.to_bytes()[:HEAD] + lengths + settings + weights


def damaged(rng: random.Random, switch: Switch) -> bytes:
    """Other settings, other weights, or other bytes."""
    settings: dict[str, Any] = copy.deepcopy(dict(switch.settings))
    weights = switch.weights
    what = rng.randrange(4)
    if what in (0, 1):
        for _ in range(rng.choice((1, 1, 3))):
            holder, key = rng.choice(places(settings))
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
            if not settings:
                break
    elif what == 2:
        named = Identity().decoder.decode(Payload.from_bytes(weights))
        damage_weights(rng, named)
        kept = {n: t for n, t in named.items() if t.dtype in DTYPE_CODES}
        weights = Identity().encoder.encode(kept).to_bytes()
    part = remade(switch, json.dumps(settings).encode(), weights)
    return damage_bytes(rng, part) if what == 3 else part


def test_a_damaged_codec_is_refused_as_a_wire_error(
    switch: Switch, state: dict[str, Tensor]
) -> None:
    rng, outcomes = random.Random(3), Counter[str]()
    for _ in range(COUNT):
        part = damaged(rng, switch)
        try:
            read = Switch.from_bytes(part)
            up, down = read.codecs(state)
        except WireError as err:
            outcomes[type(err).__name__] += 1
            continue
        # Only where settings say the same in other words, or a length was hit that is not used.
        assert (up.digest, down.digest) == switch.digests
        outcomes["the same codecs"] += 1
    assert outcomes["MalformedBodyError"] > 0.3 * COUNT
    assert outcomes["CodecMismatchError"] > 0.01 * COUNT
