"""Codes as integers modulo 2^k, with masks that vanish in the sum: the server needs the sum alone.

    z_i --round(. / step)--> x_i --+ mask_i--> y_i --wire--> sum_i y_i = sum_i x_i  (mod 2^k)

A linear codec's codes add up, and here all clients share one scale, so the sum of integers is the
sum of codes. These are the arithmetic and the masks of Bonawitz et al. (CCS 2017). How pairs of
clients come to a common secret, and what happens if one of them drops out, is the protocol's:
Flower's SecAgg+ has both (docs/privacy.md).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError, MalformedBodyError, UpdateError
from gradcodec.privacy.mechanism import ClientPrivacy

_WORDS = {8: "<u1", 16: "<u2", 32: "<u4"}
_TAILS = 9.0
"""Standard deviations within which all noised values lie (``secure_normal`` ends at 8.6)."""
_SECRET_BYTES = 16


@dataclass(frozen=True)
class FixedPoint:
    """Values within ``+-limit`` as integers modulo ``2^bits``, the same scale for all clients.

    ``x = round(z / step) mod 2^bits`` with ``step = limit / floor((2^(bits - 1) - 1) / clients)``,
    so that the sum of ``clients`` such integers does not wrap around. Rounding errs by ``step / 2``
    at most, per client and value.

    Attributes:
        limit: largest magnitude of a value; public, or it tells about the client that set it.
        clients: most clients whose integers are added.
        bits: 8, 16 or 32.
    """

    limit: float
    clients: int
    bits: int = 32

    def __post_init__(self) -> None:
        if self.bits not in _WORDS:
            raise ConfigError(f"expected bits of {tuple(_WORDS)}, got {self.bits!r}")
        if not (isinstance(self.limit, int | float) and 0 < self.limit < math.inf):
            raise ConfigError(f"expected a finite limit > 0, got {self.limit!r}")
        if type(self.clients) is not int or not 1 <= self.clients < 1 << (self.bits - 1):
            raise ConfigError(
                f"expected clients of 1..{(1 << (self.bits - 1)) - 1}, got {self.clients!r}"
            )

    @classmethod
    def of(cls, privacy: ClientPrivacy, clients: int, bits: int = 32) -> FixedPoint:
        """For what ``privacy.release`` returns: the bound and the tails of the noise."""
        return cls(privacy.clip + _TAILS * privacy.std, clients, bits)

    @property
    def step(self) -> float:
        """What one integer is worth."""
        return self.limit / (((1 << (self.bits - 1)) - 1) // self.clients)

    def nbytes(self, numel: int) -> int:
        """Bytes of ``numel`` integers."""
        return numel * self.bits // 8

    @torch.no_grad()
    def to_bytes(self, z: Tensor, mask: Tensor | None = None) -> bytes:
        """A code ``[m]``, masked, as little-endian words.

        Args:
            z: floating ``[m]``.
            mask: int64 ``[m]``, of ``pairwise_mask``.

        Raises:
            NonFiniteError: the code holds NaN or Inf.
            UpdateError: a value is beyond the limit; it would wrap around.
            ConfigError: the mask is not int64 ``[m]``.
        """
        layout.check_finite(z, "code")
        values = z.detach().cpu().double().reshape(-1)
        peak = float(values.abs().amax()) if values.numel() else 0.0
        if peak > self.limit:
            raise UpdateError(f"expected values within {self.limit:g}, got one of {peak:g}")
        whole = (values / self.step).round().long()
        if mask is not None:
            if mask.dtype != torch.int64 or mask.shape != whole.shape:
                raise ConfigError(
                    f"expected an int64 mask {list(whole.shape)}, "
                    f"got {mask.dtype} {list(mask.shape)}"
                )
            whole = whole + mask
        words: bytes = (whole & self._all).numpy().astype(_WORDS[self.bits]).tobytes()
        return words

    @torch.no_grad()
    def sum(self, bodies: Sequence[bytes], numel: int) -> Tensor:
        """The sum of the codes of all bodies, fp64 ``[numel]``; masks must cancel in it.

        Raises:
            ConfigError: there are no bodies, or more than ``clients``.
            MalformedBodyError: a body has another length.
        """
        if not 1 <= len(bodies) <= self.clients:
            raise ConfigError(f"expected 1..{self.clients} bodies, got {len(bodies)}")
        total = np.zeros(numel, dtype=np.int64)
        for body in bodies:
            if len(body) != self.nbytes(numel):
                raise MalformedBodyError(
                    f"expected {self.nbytes(numel)} bytes for {numel} values, got {len(body)}"
                )
            total = (total + np.frombuffer(body, dtype=_WORDS[self.bits])) & self._all
        half = 1 << (self.bits - 1)
        centred = torch.from_numpy(((total + half) & self._all) - half)
        return centred.double() * self.step

    @property
    def _all(self) -> int:
        return (1 << self.bits) - 1


def pairwise_mask(
    secrets: Mapping[int, bytes], me: int, round: int, numel: int, bits: int = 32
) -> Tensor:
    """The mask of client ``me``, int64 ``[numel]``; those of all clients add up to 0 mod 2^bits.

    ``sum_{j > me} G(s_j) - sum_{j < me} G(s_j)``, where ``G`` expands the secret that ``me`` shares
    with ``j``, and the round, by SHAKE-256. To whoever lacks the secrets a masked vector looks
    uniformly random, whatever is in it.

    Args:
        secrets: by the other clients' numbers, the secret that this client shares with each: at
            least 16 bytes from a key agreement, equal on both sides, never sent.
        me: this client's number.
        round: which round; a mask that served twice would show a difference of codes.
        numel: length of the code.
        bits: as of ``FixedPoint``.

    Raises:
        ConfigError: a secret is short, ``me`` has one with itself, or there are none.
    """
    if bits not in _WORDS:
        raise ConfigError(f"expected bits of {tuple(_WORDS)}, got {bits!r}")
    if not secrets or me in secrets:
        raise ConfigError(f"expected secrets with other clients than {me}, got {sorted(secrets)}")
    total = np.zeros(numel, dtype=np.int64)
    for other, secret in secrets.items():
        if not isinstance(secret, bytes) or len(secret) < _SECRET_BYTES:
            raise ConfigError(
                f"expected a secret of at least {_SECRET_BYTES} bytes with client {other}"
            )
        seed = b"gradcodec mask" + struct.pack("<QB", round, bits) + secret
        stream = hashlib.shake_256(seed).digest(numel * bits // 8)
        words = np.frombuffer(stream, dtype=_WORDS[bits]).astype(np.int64)
        total += words if other > me else -words
    return torch.from_numpy(total & ((1 << bits) - 1))
