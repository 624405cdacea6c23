"""The error of each scheme on gradients, updates and noise, and its bits a value."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.codecs.coders import SCHEMES
from benchmarks.codecs.data import SETS, Snapshot, flat, load
from benchmarks.peers.rice import decode_positions, encode_positions
from gradcodec import ops
from gradcodec.packers.positions import FORMS, Positions

K, CHUNK = 64, 4096


def measure(names: Sequence[str], count: int) -> tuple[list[rows.Row], list[str]]:
    """A row per scheme with its figures on each set, and why some are missing.

    Args:
        names: of ``SCHEMES``.
        count: snapshots of each set; squared errors and squares are added up over them.
    """
    torch.set_num_threads(1)
    found: dict[str, rows.Row] = {name: {"scheme": name} for name in names}
    missing: dict[str, str] = {}
    for title in SETS:
        snapshots = load(title, count)
        for name in names:
            try:
                found[name][title] = _figures(name, snapshots)
            except ImportError as reason:
                missing[name] = f"{name}: {reason}"
    return [row for name, row in found.items() if name not in missing], list(missing.values())


def _figures(name: str, snapshots: Sequence[Snapshot]) -> rows.Row:
    coder = SCHEMES[name].make(snapshots[0])
    lost = size = kept = product = nbytes = 0.0
    numel = 0
    for snapshot in snapshots:
        x = flat(snapshot).double()
        coded = coder.encode(snapshot)
        y = coder.decode(coded).double()
        lost += float((x - y).square().sum())
        size += float(x.square().sum())
        kept += float(y.square().sum())
        product += float(x @ y)
        nbytes += coder.nbytes(coded)
        numel += x.numel()
    return {
        "bits": round(8 * nbytes / numel, 4),
        "nmse": float(f"{lost / size:.5g}"),
        "cosine": round(product / math.sqrt(size * kept), 6) if kept else 0.0,
        "values": numel,
    }


# -- positions of top-k ----------------------------------------------------------------------------


def positions(numel: int) -> tuple[list[rows.Row], list[str]]:
    """Bits and seconds for the positions of the 64 largest of every 4096 normal values.

    Ways that were kept (packed, Elias-Fano) and others: Rice's code (of the top-k peers) and a
    range coder over gaps (constriction), whose sizes are not known before.
    """
    torch.set_num_threads(1)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    index = ops.topk_encode(x, k=K, chunk=CHUNK)[1].long()
    at = (index + torch.arange(len(index))[:, None] * CHUNK).reshape(-1)
    choices = math.lgamma(CHUNK + 1) - math.lgamma(K + 1) - math.lgamma(CHUNK - K + 1)
    found: list[rows.Row] = [{"scheme": "bound", "bits": round(choices / math.log(2) / K, 4)}]
    for form in FORMS:
        ours = Positions(form, numel, K, CHUNK)
        found.append(_coded(form, at, ours.write, ours.read, len))
    numbers = at.numpy()
    found.append(
        _coded(
            "rice",
            at,
            lambda _: encode_positions(numbers, numel),
            lambda body: torch.from_numpy(decode_positions(body, numel, len(at))),
            len,
        )
    )
    try:
        import constriction  # noqa: F401 - whether it is there
    except ImportError:
        return found, ["range coder: pip install 'gradcodec[bench]'"]
    found.append(_coded("range coder", at, _ranges, lambda c: _unranged(c, len(at)), _words))
    return found, []


def _coded(
    name: str,
    at: Tensor,
    encode: Callable[[Tensor], Any],
    decode: Callable[[Any], Tensor],
    nbytes: Callable[[Any], int],
) -> rows.Row:
    coded = encode(at)
    if not torch.equal(decode(coded), at):
        raise RuntimeError(f"{name}: positions did not come back")
    return {
        "scheme": name,
        "bits": round(8 * nbytes(coded) / len(at), 4),
        "encode_ns": round(1e9 * _best(lambda: encode(at)) / len(at), 2),
        "decode_ns": round(1e9 * _best(lambda: decode(coded)) / len(at), 2),
    }


def _best(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _gaps() -> Any:
    """Gaps between independent positions: geometric, ends put together."""
    import constriction
    import numpy as np

    share = (1 - K / CHUNK) ** np.arange(CHUNK)
    model = constriction.stream.model.Categorical
    return model((share / share.sum()).astype(np.float32), perfect=False)


def _ranges(at: Tensor) -> Any:
    import constriction
    import numpy as np

    coder = constriction.stream.queue.RangeEncoder()
    coder.encode((np.diff(at.numpy(), prepend=-1) - 1).astype(np.int32), _gaps())
    return coder.get_compressed()


def _words(coded: Any) -> int:
    return 4 * len(coded)


def _unranged(coded: Any, count: int) -> Tensor:
    import constriction
    import numpy as np

    gaps = constriction.stream.queue.RangeDecoder(coded).decode(_gaps(), count)
    return torch.from_numpy(np.cumsum(gaps.astype(np.int64) + 1) - 1)
