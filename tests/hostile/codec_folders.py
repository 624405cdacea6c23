"""Codec folders that a stranger made, loaded under a limit of memory: run by test_codec_folders.py.

    python tests/hostile/codec_folders.py attacks
    python tests/hostile/codec_folders.py mutations COUNT SEED

Prints one JSON document. Every folder has the digests that belong to what is in it, also the
codec's own: whoever can make a folder can make those, too.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gradcodec import make_codec, wire
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import Autoencoder, BlockQuant, Subspace
from gradcodec.encodable import DTYPE_CODES
from gradcodec.errors import ConfigError, HubError, WireError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload

Document = dict[str, Any]
Weights = dict[str, Tensor]

ROOM = 600 << 20
"""Bytes of address space that loading and decoding may take beyond what importing took."""
BODY = 1 << 20
"""Longest body that is decoded; what it decodes to is paid for by its length."""
SPEC = UpdateSpec((TensorSpec("layers.0.w", (64, 24)), TensorSpec("layers.1.w", (64, 24))))
AE: Document = AutoencoderConfig().to_dict()
SUBSPACE: Document = SubspaceConfig(basis_dtype="float32").to_dict()


def limit_memory() -> None:
    """From now on an allocation of more than ``ROOM`` fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# -- folders ---------------------------------------------------------------------------------------


def document(config: Any, rows: Any, weights: Weights) -> Document:
    """``config.json`` of a codec whose own digest is not known yet."""
    return {
        "schema": 1,
        "library": "a stranger's",
        "codec": config,
        "spec": rows,
        "weights": {n: tensor_digest(t) for n, t in weights.items()},
        "digest": "00" * wire.DIGEST_BYTES,
    }


def tensor_digest(tensor: Tensor) -> str:
    """A weight's digest; of dtypes that have none, something."""
    return wire.tensor_digest(tensor) if tensor.dtype in DTYPE_CODES else "00" * 32


def load(folder: Path, text: bytes, weights: bytes) -> Codec:
    """Load a folder, once more with the digest that the first try said belongs to it."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    for last in (False, True):
        (folder / "config.json").write_bytes(text)
        try:
            return Codec.from_pretrained(folder)
        except HubError as err:
            told = re.search(r"of digest ([0-9a-f]{16}).* give ([0-9a-f]{16})", str(err))
            if last or told is None:
                raise
            text = text.replace(told[1].encode(), told[2].encode())
    raise AssertionError


def use(codec: Codec, rng: random.Random) -> str:
    """Decode bodies of the right length; ``DECODED`` or the class of the ``WireError``."""
    if codec.spec is None:
        return "unbound"
    if codec.nbytes() > BODY:
        return "too long a body"
    body = rng.randbytes(codec.nbytes())
    try:
        codec.decoder.decode(Payload(codec.config.kind, codec.digest, body))
    except WireError as err:
        return type(err).__name__
    except ConfigError as err:
        if "are needed and not here" in str(err):
            return "half a codec"
        raise
    return "decoded"


# -- attacks ---------------------------------------------------------------------------------------


def nested(depth: int, where: str) -> Document:
    """Chains in each other."""
    codec: Document = {"kind": "identity"}
    for _ in range(depth):
        other = {"kind": "identity"}
        codec = {"kind": "chain", "outer": other, "inner": other} | {where: codec}
    return codec


W: Weights = {"encoder.x": torch.zeros(1)}


def rows(*shape: int, name: str = "w", dtype: str = "float32") -> list[Any]:
    """A table of one tensor."""
    return [[name, list(shape), dtype]]


#: config, rows of the tensor table, weights, words of the error
ATTACKS: dict[str, tuple[Any, Any, Weights, str]] = {
    "an autoencoder over a large table": (AE, rows(65536, 1), W, "do not fit"),
    "an autoencoder over a huge table": (
        {**AE, "oversample": 64},
        rows(1 << 24, 1),
        W,
        "do not fit",
    ),
    "an autoencoder over the largest table": (
        {**AE, "oversample": 64},
        rows(1 << 48, 1),
        W,
        "row basis",
    ),
    "an autoencoder of as many bases as tensors": (
        {**AE, "bases": "tensor"},
        [[f"w{i}", [1 << 20, 1], "float32"] for i in range(2000)],
        W,
        "do not fit",
    ),
    "a literal autoencoder": (
        {**AE, "variant": "literal"},
        rows(1 << 24, 1),
        W,
        "do not fit",
    ),
    "no bases": (SUBSPACE, rows(1048576, 300), {}, "leave tensors that have no code"),
    "a basis of no columns": (
        SUBSPACE,
        rows(1048576, 300),
        {"shared.left.w": torch.zeros(1048576, 0)},
        "leave tensors that have no code",
    ),
    "one small basis of many tensors": (
        SUBSPACE,
        [*rows(1048576, 300), ["b", [4], "float32"]],
        {"shared.left.b": torch.ones(4, 1)},
        "leave tensors that have no code",
    ),
    "a size of 31 digits": (SUBSPACE, rows(10**30, 0), {}, "at most 281474976710656 elements"),
    "sizes of 4,000 digits": (SUBSPACE, rows(*[10**4000] * 16), {}, "at most 281474976710656"),
    "17 dimensions": (SUBSPACE, rows(*[1] * 17), {}, "at most 16 sizes"),
    "a name of 1 MB": (SUBSPACE, rows(1, name="w" * 1_000_000), {}, "at most 4096 bytes"),
    "half a character": ({"kind": "identity"}, rows(1, name="\ud800"), {}, "is not text"),
    "integers coded with loss": (
        {"kind": "topk"},
        rows(1, dtype="int64"),
        {},
        "only floating tensors",
    ),
    "a basis of NaN": (
        SUBSPACE,
        rows(4, 4),
        {"shared.left.w": torch.full((4, 1), torch.nan)},
        "finite",
    ),
    "a basis of another dtype": (
        SUBSPACE,
        rows(4, 4),
        {"shared.left.w": torch.ones(4, 1, dtype=torch.int64)},
        "expected torch.float32, got torch.int64",
    ),
    "a quantised basis of infinite levels": (
        {**SUBSPACE, "basis_dtype": "int4"},
        rows(64, 4),
        {
            "shared.left.w": torch.zeros(1, 32, dtype=torch.uint8),
            "shared.left_scales.w": torch.full((1, 1), 3e38, dtype=torch.bfloat16),
        },
        "levels that are finite",
    ),
    "a quantised basis that is one number": (
        {**SUBSPACE, "basis_dtype": "int8"},
        rows(64, 4),
        {"shared.left.w": torch.tensor(1, dtype=torch.uint8)},
        "uint8 codes",
    ),
    "weights of a codec without": ({"kind": "cast"}, None, W, "has no weights"),
    "chains in each other": (nested(600, "inner"), None, {}, "stages in each other"),
    "chains in each other, outside": (nested(600, "outer"), None, {}, "stages in each other"),
    "a ratio of 400 digits": ({**SUBSPACE, "ratio": 10**400}, rows(4, 4), {}, "ratio within"),
    "a setting that is true": ({"kind": "topk", "k": True}, None, {}, "k, a whole number"),
}


def attacks() -> dict[str, Any]:
    """Error, seconds and growth of memory by attack."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, table, weights, _) in ATTACKS.items():
            text = json.dumps(document(config, table, weights)).encode()
            blob = safetensors.torch.save(weights)
            before, began = rss(), time.perf_counter()
            try:
                outcome = use(load(Path(folder, "codec"), text, blob), random.Random(0))
            except Exception as err:
                outcome = f"{type(err).__name__}: {err}"
            found[name] = {
                "outcome": outcome[:2000],
                "seconds": time.perf_counter() - began,
                "growth": rss() - before,
                "folder": len(text) + len(blob),
            }
    return found


def rss() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- mutations -------------------------------------------------------------------------------------


def originals() -> list[Codec]:
    """A codec of every kind, those with weights in several forms."""
    u = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))[0]
    subspaces = [
        Subspace.from_bases(
            SubspaceConfig(basis_dtype=dtype, share=share),
            SPEC,
            {t.name: (Axis(True, 64, 24), u) for t in SPEC},
        )
        for dtype, share in (("float32", "none"), ("int4", "kind"), ("bfloat16", "kind"))
    ]
    chain = Chain(subspaces[0], BlockQuant(BlockQuantConfig(2)))
    untrained = [make_codec(n) for n in ("fp32", "bf16", "int4-unbiased", "topk", "rotsign")]
    networks = [
        Autoencoder.initialised(AutoencoderConfig(arch), SPEC, seed=0)
        for arch in ("resnet3", "uformer")
    ]
    return [*subspaces, chain, *networks, *untrained, *(c.bind(SPEC) for c in untrained)]


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 8, 63, 1 << 20, 1 << 48, 1 << 63, 10**30, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, "", "\0", "\n", "\ud800", "w" * 5000, "float32", "kind", "int4"),
    *([], [[]], {}, {"kind": "identity"}, nested(3, "inner"), nested(5, "outer"), [1] * 17),
    *([1 << 24, 1 << 24], [0, 1 << 40], rows(1 << 30, 7), rows(4, 4)),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys = value if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def damage_document(rng: random.Random, doc: Document) -> None:
    """One place gets another value, goes away, comes twice or changes place with another."""
    spots = places(doc)
    # What the codec is and is bound to, more often than the digests of its weights.
    inside = [s for s in spots if s[0] is not doc and s[0] is not doc.get("weights")]
    holder, key = rng.choice(inside or spots) if rng.random() < 0.8 else rng.choice(spots)
    what = rng.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(rng.choice([holder[key], *VALUES])))
    elif what == 2:
        other, place = rng.choice(spots)
        try:
            holder[key], other[place] = other[place], holder[key]
            json.dumps(doc)
        except (KeyError, IndexError, ValueError, RecursionError):  # one lay in the other
            holder[key] = 0
            doc.setdefault("codec", {})
    elif what == 3 and isinstance(holder, dict):
        holder[rng.choice(("bits", "k", "extra", "\ud800", "kind"))] = rng.choice(VALUES)
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))


def damage_weights(rng: random.Random, weights: Weights) -> None:
    """One weight gets another dtype, shape or value, another name, or goes away."""
    if not weights:
        weights["shared.more"] = torch.zeros(2)
        return
    name = rng.choice(sorted(weights))
    tensor = weights[name].clone()
    what = rng.randrange(6)
    if what == 0:
        del weights[name]
    elif what == 1:
        weights[name] = tensor.to(rng.choice([*DTYPE_CODES, torch.uint16, torch.float8_e4m3fn]))
    elif what == 2:
        shape = rng.choice([(), (0,), (0, 1 << 40), (1 << 40, 0), (1, 1), (3,), (64, 65)])
        numel = torch.Size(shape).numel()
        weights[name] = torch.zeros(numel, dtype=tensor.dtype).reshape(shape)
    elif what == 3:
        weights[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[None]
    elif what == 4:
        weights[rng.choice(["shared.left.w", "encoder.x", "decoder.\n", name + "x"])] = tensor
    elif tensor.numel() and tensor.is_floating_point():
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, -torch.inf, 3e38])
        weights[name] = tensor


def damage_bytes(rng: random.Random, blob: bytes) -> bytes:
    """A few bytes set, a piece cut out or put in twice."""
    out = bytearray(blob)
    at = rng.randrange(min(len(out), 2000) + 1)
    what, piece = rng.randrange(3), rng.choice((1, 8, 64))
    if what == 0:
        for i in range(at, min(at + piece, len(out))):
            out[i] = rng.choice((0, 0x7F, 0xFF, 0x22, 0x5B, rng.randrange(256)))
    elif what == 1:
        del out[at : at + piece]
    else:
        out[at:at] = out[at : at + piece] * 3
    return bytes(out)


def mutated(rng: random.Random, codec: Codec) -> tuple[bytes, bytes]:
    """Bytes of both files of a damaged folder."""
    table = None
    if codec.spec is not None:
        table = [[t.name, list(t.shape), "float32"] for t in codec.spec]
    weights = {n: t.clone() for n, t in codec.weights.items()}
    in_weights = rng.random() < (0.4 if weights else 0.1)
    if in_weights:
        damage_weights(rng, weights)
    doc = document(json.loads(json.dumps(codec.config.to_dict())), table, weights)
    for _ in range(rng.choice((1, 1, 2)) if not in_weights or rng.random() < 0.2 else 0):
        damage_document(rng, doc)
    text, blob = json.dumps(doc).encode(), safetensors.torch.save(weights)
    if rng.random() < 0.1:
        text = damage_bytes(rng, text)
    if rng.random() < 0.1:
        blob = damage_bytes(rng, blob)
    return text, blob


def mutations(count: int, seed: int) -> dict[str, Any]:
    """What came out of so many damaged folders."""
    rng, known = random.Random(seed), originals()
    outcomes: Counter[str] = Counter()
    surprises: list[dict[str, str]] = []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for codec in known:  # also loads whatever is loaded late, before memory is limited
            codec.save_pretrained(folder)
            use(Codec.from_pretrained(folder), rng)
        limit_memory()
        before = rss()
        for _ in range(count):
            codec = rng.choice(known)
            text, blob = mutated(rng, codec)
            began = time.perf_counter()
            try:
                outcomes[use(load(Path(folder, "damaged"), text, blob), rng)] += 1
            except (HubError, ConfigError) as err:
                outcomes[type(err).__name__] += 1
            except Exception as err:
                outcomes["anything else"] += 1
                found = {"error": f"{type(err).__name__}: {err}"[:500], "config": text.decode()}
                surprises.append({**found, "kind": codec.config.kind})
            slowest = max(slowest, time.perf_counter() - began)
        growth = rss() - before
    return {
        "outcomes": outcomes,
        "surprises": surprises[:5],
        "slowest": slowest,
        "growth": growth,
    }


def main() -> None:
    """Run what the arguments say and print what was found."""
    torch.set_num_threads(1)
    if sys.argv[1] == "attacks":
        for codec in originals():  # loads whatever is loaded late
            assert codec.digest
        limit_memory()
        print(json.dumps(attacks()))
    else:
        print(json.dumps(mutations(int(sys.argv[2]), int(sys.argv[3]))))


if __name__ == "__main__":
    main()
