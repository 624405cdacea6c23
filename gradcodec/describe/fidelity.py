"""What a codec keeps of one update: relative error, angle and bytes, in all and per tensor."""

from __future__ import annotations

import math

from torch import Tensor

from gradcodec import layout, metrics
from gradcodec.codec import Codec
from gradcodec.describe.chart import Chart, Row
from gradcodec.describe.kinds import kinds, labels
from gradcodec.transforms.identity import IdentityTransform
from gradcodec.types import Update, UpdateSpec


def fidelity(update: Update, decoded: Update, each: bool = False) -> Chart | None:
    """Relative squared error ``||y - x||^2 / ||x||^2`` of each kind of tensor, and of each tensor.

    Args:
        update: what was encoded, ``x``.
        decoded: what came out, ``y``: the same names and shapes.
        each: a line for each tensor instead of each kind.

    Returns:
        A chart whose bars are the kinds' errors; infinite where zeros came out as something else.
        ``None`` if no tensor has elements.

    Raises:
        UpdateError: names or sizes differ.
        NonFiniteError: a value is NaN or Inf.
    """
    for which in (update, decoded):
        for name, tensor in which.items():
            layout.check_finite(tensor, f"inspect: {name!r}")
    found = kinds(UpdateSpec.of(update), each)
    if not found:
        return None
    energy = _energy(update)
    short, pattern = labels(list(found))
    rows = []
    for kind, names in found.items():
        x, y = {n: update[n] for n in names}, {n: decoded[n] for n in names if n in decoded}
        errors = [metrics.rse({n: x[n]}, {n: y[n]}) for n in names if n in y]
        error = metrics.rse(x, y)
        columns = (
            f"{len(names)}",
            f"{_energy(x) / energy:.1%}" if energy else "none",
            _number(error),
            _number(max(errors)),
            f"{metrics.cosine(x, y):.3f}",
        )
        rows.append(Row(short[kind], error, tuple(errors), columns))
    return Chart(
        title="what is lost of the update" + (f", {pattern}" if pattern else ""),
        measure="relative squared error (0: nothing lost, 1: as if not sent, ∞: zeros changed)",
        cell="relative squared error of a tensor",
        across="tensors of the kind, first layer first",
        heads=("tensors", "of energy", "error", "worst", "cosine"),
        rows=tuple(rows),
    )


def facts(update: Update, decoded: Update, codec: Codec, size: int) -> dict[str, str]:
    """Bytes, error and cosine of a whole update, as label -> text.

    Args:
        update: what was encoded.
        decoded: what came out.
        codec: what encoded it.
        size: bytes of the payload.
    """
    spec = UpdateSpec.of(update)
    rows = {
        "sent": f"{size:,} bytes, {spec.nbytes / max(size, 1):.4g}x less than {spec.nbytes:,} raw",
        "error": f"{_number(metrics.rse(update, decoded))} of the energy "
        f"({_number(metrics.snr_db(update, decoded))} dB)",
        "cosine": f"{metrics.cosine(update, decoded):.4f}",
    }
    floating = all(t.dtype.is_floating_point for t in spec)
    if floating and not isinstance(codec.transform, IdentityTransform):
        through = codec.from_code(codec.to_code(update), spec)
        rows["before packing"] = f"{_number(metrics.rse(update, through))} is outside of the code"
    return rows


def _energy(update: Update | dict[str, Tensor]) -> float:
    return float(metrics.flat64(update).square().sum())


def _number(x: float) -> str:
    if math.isinf(x):
        return "-∞" if x < 0 else "∞"
    return f"{x:.3g}"
