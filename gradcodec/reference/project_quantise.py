"""Codes of a full-parameter gradient in a subspace: project from both sides, quantise, pack."""

from __future__ import annotations

from torch import Tensor

from gradcodec.reference.encode import encode
from gradcodec.reference.hadamard import CHUNK


def project_quantise(
    grad: Tensor,
    left: Tensor,
    right: Tensor | None = None,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """``z = left^T G right`` and its code.

    Args:
        grad: ``G [m, n]``, floating.
        left: ``[m, r]``, orthonormal columns where decoding is to be ``left z right^T``.
        right: ``[n, s]``, or ``None`` for the identity.
        bits: of ``encode`` over ``z`` in row-major order, to nearest; like the next two.
        block: values that share a scale.
        scale: what ``delta`` comes from.

    Returns:
        packed, scales, and ``z`` fp32 ``[r, n]`` or ``[r, s]``. Products are in fp32; ``z`` may
        differ in its last bits between devices, and codes with it where it lies between two levels.
    """
    g = grad.float()
    z = left.float().T @ (g if right is None else g @ right.float())
    packed, scales = encode(z.reshape(-1), bits=bits, block=block, scale=scale)
    return packed, scales, z
