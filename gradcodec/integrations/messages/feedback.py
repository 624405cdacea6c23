"""Error feedback between rounds, and the codecs that it, or a running sum, converges with."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, RotatedSign
from gradcodec.distributed.coding import is_cast, wants_feedback
from gradcodec.errors import ConfigError, NonFiniteError
from gradcodec.per_tensor import PerTensor
from gradcodec.types import Update
from gradcodec.wire import Payload


class Feedback:
    """Error feedback on the code: what packing lost is added to the next code (Seide et al. 2014).

        y_t = z_t + e_t        sent: Q(y_t)        e_{t+1} = y_t - Q(y_t)

    ``z`` is the update's code ``[m]``, fp32; without a learned transform that is its values. The
    residual ``e`` starts again at 0 if the tensors or the codec change.

    Args:
        always: also for codecs that gain nothing from it because they are right on average.
    """

    def __init__(self, always: bool = False) -> None:
        self._always = always
        self._residual: Tensor | None = None
        self._digest = b""

    @property
    def kept(self) -> tuple[Tensor | None, bytes]:
        """The residual, fp32 ``[m]`` or ``None``, and the digest of the codec it belongs to."""
        return self._residual, self._digest

    @kept.setter
    def kept(self, kept: tuple[Tensor | None, bytes]) -> None:
        self._residual, self._digest = kept

    def serves(self, codec: Codec) -> bool:
        """Whether payloads of this codec take part.

        Raises:
            ConfigError: they shall, and their errors may be larger than what is encoded.
        """
        lossy = [c for c in _packed_by(codec) if not is_cast(c) and not c.config.learned]
        if not self._always:
            # Rotated signs contract, but so little that a residual may be three times an update.
            biased = [c for c in lossy if wants_feedback(c) and not isinstance(c, RotatedSign)]
            return bool(lossy) and biased == lossy
        if not contracts(codec):
            raise ConfigError(
                f"error feedback diverges with {codec}, whose error may be larger than its input: "
                "leave error_feedback out"
            )
        return bool(lossy)

    @torch.no_grad()
    def encode(self, codec: Codec, update: Update, seed: int) -> Payload:
        """The payload of an update and of what earlier ones lost; a refused update loses nothing.

        Raises:
            NonFiniteError: a tensor holds NaN or Inf.
            UpdateError: it does not fit the codec.
        """
        z = codec.to_code(update)
        same = self._digest == codec.digest
        if self._residual is not None and same and self._residual.shape == z.shape:
            z = z + self._residual
        try:
            payload = codec.write_code(z, seed=seed)
        except NonFiniteError:
            for name, tensor in update.items():
                layout.check_finite(tensor, repr(name))
            raise
        self._residual, self._digest = z - codec.read_code(payload), codec.digest
        return payload


def contracts(codec: Codec) -> bool:
    """Whether the error of each packer is smaller than its input, so that a residual stays small.

    Fewer than one sign per value and stochastic rounding to 2 bits are examples of others.
    """
    return all(_contracts(c) for c in _packed_by(codec))


def _contracts(codec: Codec) -> bool:
    if isinstance(codec, RotatedSign):
        return codec.config.kept == codec.config.block
    return not isinstance(codec, BlockQuant) or codec.config.contractive


def _packed_by(codec: Codec) -> list[Codec]:
    """The codecs whose packers write the body."""
    if isinstance(codec, PerTensor):
        return [c for part in codec.parts for c in _packed_by(part)]
    return _packed_by(codec.inner) if isinstance(codec, Chain) else [codec]
