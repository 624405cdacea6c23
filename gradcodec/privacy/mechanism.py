"""Bound what one client contributes, and add Gaussian noise to it, before anything leaves it.

    update --to_code--> z --clip--> |z| <= C --noise--> y --pack--> bytes      place="code"
    update --clip--> --noise--> y --to_code--> z --pack--> bytes               place="update"

Whatever follows ``y`` is post-processing and spends no privacy: packers choose scales, positions
and levels from the noised values alone.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.types import Update
from gradcodec.wire import Payload

PLACES = ("code", "update")
_INSIDE = 1 - 2.0**-22
"""Factor of what was clipped: rounding to fp32 must not take it beyond the bound."""


@dataclass(frozen=True)
class ClientPrivacy:
    """The Gaussian mechanism at client level (McMahan et al., arXiv 1710.06963), noise at clients.

    A reply is ``x * min(1, clip / |x|) + N(0, std^2 I)`` with ``std = noise * clip /
    sqrt(shares)``; ``x`` is the code or the update, ``|.|`` the L2 norm over all its values.

    **On the code, noise is cheapest.** The guarantee depends on ``noise`` alone, not on the number
    of values; the noise's norm is ``std * sqrt(m)`` for ``m`` values. A code of ``n / r`` values
    meets ``sqrt(r)`` times less of it, and with orthonormal bases keeps the norm of its part of
    the update.

    **The encoder may depend on public data and on codes of earlier rounds, but not on the private
    data of a round.** A codec that was fitted on the clients' data (TGAP on D1) spends privacy of
    its own there, which nothing here counts.

    Attributes:
        clip: the bound ``C``, above 0.
        noise: standard deviation of the noise on the *sum* of a round, in units of ``clip``: what
            ``gradcodec.privacy.calibrate`` gives. 0 bounds without noise.
        shares: how many clients' noise adds up to that. 1: each reply alone is protected, also
            from the server (local DP). ``n``: only the sum of ``n`` replies is, for a server that
            sees no more (secure aggregation) or is trusted; a server with this setting does not
            close a round of fewer replies.
        place: ``"code"`` or ``"update"``.
        seed: ``None`` draws noise from the operating system's cryptographic generator. A number
            makes it repeatable, for experiments: who knows the seed can subtract the noise.
    """

    clip: float
    noise: float
    shares: int = 1
    place: str = "code"
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.clip, int | float) and 0 < self.clip < math.inf):
            raise ConfigError(f"expected a finite clip > 0, got {self.clip!r}")
        if not (isinstance(self.noise, int | float) and 0 <= self.noise < math.inf):
            raise ConfigError(f"expected a finite noise >= 0, got {self.noise!r}")
        if type(self.shares) is not int or self.shares < 1:
            raise ConfigError(f"expected shares of at least 1, got {self.shares!r}")
        if self.place not in PLACES:
            raise ConfigError(f"expected a place of {PLACES}, got {self.place!r}")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ConfigError(f"expected a seed >= 0 or None, got {self.seed!r}")

    @property
    def std(self) -> float:
        """Standard deviation of the noise that one client adds to each value."""
        return self.noise * self.clip / math.sqrt(self.shares)

    @torch.no_grad()
    def release(self, value: Tensor, *, draw: int = 0) -> Tensor:
        """Bound and noise one vector ``[m]``: what comes out may be shown; fp32, on the CPU.

        Everything that depends on the client's data must be in ``value``: an error-feedback
        residual of what clipping or noise took, too, or it escapes the bound. The residual of a
        packer behind this (``packer.pack(released, residual=e)``) is post-processing.

        Args:
            value: finite, ``[m]``; it is not modified.
            draw: with a ``seed``, distinguishes clients and rounds.

        Raises:
            NonFiniteError: the value holds NaN or Inf, which no factor can bound.
        """
        layout.check_finite(value, "private value")
        # In fp64: there the bound and the noise are rounded less than anything that is sent.
        x = value.detach().cpu().double().reshape(-1)
        norm = float(torch.linalg.vector_norm(x))
        if norm > self.clip:
            x = x * (self.clip / norm * _INSIDE)
        if self.noise:
            x = x + self.std * self._normal(x.numel(), draw)
        return x.float()

    def encode(self, codec: Codec, update: Update, *, seed: int = 0) -> Payload:
        """The private counterpart of ``codec.encoder.encode``; the codec is bound.

        Raises:
            ConfigError: the codec is not bound.
            UpdateError, NonFiniteError: the update does not fit, or holds NaN or Inf.
        """
        if self.place == "code":
            return self.write_code(codec, codec.to_code(update), seed=seed)
        spec = codec.transform.table()
        spec.check(update)
        released = self.release(layout.flatten(update, spec), draw=seed)
        return codec.encoder.encode(layout.unflatten(released, spec), seed=seed)

    def write_code(self, codec: Codec, z: Tensor, *, seed: int = 0) -> Payload:
        """The payload of a code ``[m]`` that was trained; ``place`` is ``"code"``.

        Raises:
            ConfigError: ``place`` is ``"update"``, the codec is not bound, or the length is wrong.
            NonFiniteError: the code holds NaN or Inf.
        """
        if self.place != "code":
            raise ConfigError("a trained code is noised as it is: expected place 'code'")
        return codec.write_code(self.release(z, draw=seed), seed=seed)

    def _normal(self, numel: int, draw: int) -> Tensor:
        if self.seed is None:
            return secure_normal(numel)
        generator = np.random.default_rng([self.seed, draw])
        return torch.from_numpy(generator.standard_normal(numel))


def secure_normal(numel: int) -> Tensor:
    """Standard normal values ``[numel]``, fp64, from the operating system's secure generator.

    Torch's generator would not do: it is a Mersenne twister seeded with few bits, and whoever
    guesses the seed subtracts the noise. By Box and Muller from 53-bit uniforms: values beyond 8.6
    do not occur. Neighbouring floats are not equally likely, which in principle tells inputs
    apart (Mironov 2012); no discrete mechanism is built.
    """
    pairs = (numel + 1) // 2
    words = np.frombuffer(secrets.token_bytes(16 * pairs), dtype="<u8").reshape(2, pairs)
    uniform = ((words >> np.uint64(11)) + 1) * 2.0**-53  # (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(both[:numel])
