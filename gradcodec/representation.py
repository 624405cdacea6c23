"""Which tensors of a training are sent: the paper leaves it open, so each reading has a name here.

- ``update``: the difference between the parameters after and before local training;
- ``state``: the parameters after it (the literal reading of the paper's Algorithm 1);
- ``balanced``: the state with every LoRA pair in its balanced gauge, which removes the freedom
  ``(B Q, Q^-1 A)`` that leaves the product unchanged;
- ``gradient`` (for TGAP only): the gradient that the optimiser is given at each step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gradcodec.errors import ConfigError
from gradcodec.types import Update

SENT = ("update", "state", "balanced")
RECORDED = ("gradient", *SENT)


def check(representation: str, allowed: tuple[str, ...] = SENT) -> str:
    """Return ``representation``, or raise ``ConfigError`` that lists the allowed ones."""
    if representation not in allowed:
        raise ConfigError(f"expected a representation of {allowed}, got {representation!r}")
    return representation


def represent(representation: str, end: Update, start: Update) -> dict[str, Tensor]:
    """The tensors that represent a segment of training, in the parameters' own dtypes."""
    if representation == "update":
        return {n: end[n].detach() - start[n] for n in end}
    state = {n: t.detach().clone() for n, t in end.items()}
    return balanced(state) if representation == "balanced" else state


def balanced(state: Update) -> dict[str, Tensor]:
    """Every LoRA pair replaced by the equal-product pair with ``B^T B = A A^T = diag(s)``.

    With ``B A = U diag(s) V^T`` (thin SVD, through QR of both factors): ``B' = U sqrt(s)``,
    ``A' = sqrt(s) V^T``. Signs are fixed (largest entry of each column of U positive), so equal
    products give equal factors. Tensors without a partner stay as they are.
    """
    out = dict(state)
    for name, a in state.items():
        partner = name.replace("lora_A", "lora_B")
        if partner == name or partner not in state or a.ndim != 2:
            continue
        b = state[partner]
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        left, right = q_b @ u, vh @ q_a.T
        sign = torch.where(left.gather(0, left.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
        # If the rank exceeds a side of the product, the surplus columns are zero.
        spare = b.shape[1] - len(s)
        left = functional.pad(left * sign * s.sqrt(), (0, spare))
        right = functional.pad(sign.T * s.sqrt()[:, None] * right, (0, 0, 0, spare))
        out[partner], out[name] = left.to(b.dtype), right.to(a.dtype)
    return out
