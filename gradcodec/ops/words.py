"""The random signs of ``rotsign``, made where they are needed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradcodec.ops.backends import implementation, kernel, why_no_triton
from gradcodec.reference import hadamard


def random_sign_words(count: int, seed: int, device: torch.device | str | None = None) -> Tensor:
    """``count`` random signs as bits, int64 ``[sign_words(count)]``: set means minus.

    The raw words of numpy's PCG64 of this seed, the same on every device. A CUDA device makes them
    itself: copying them there would take longer than coding the values.
    """
    place = torch.device("cpu" if device is None else device)
    if implementation(place) != "triton" or why_no_triton():
        return hadamard.random_sign_words(count, seed).to(place)
    start = np.random.PCG64(seed).state["state"]
    out = torch.empty(hadamard.sign_words(count), dtype=torch.int64, device=place)
    with torch.cuda.device(place):
        kernel("sign_words")(out, state=start["state"], increment=start["inc"])
    return out
