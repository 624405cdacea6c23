"""EF-SignSGD: one bit a value, with error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import flat
from benchmarks.peers.federated.body import Reader
from benchmarks.peers.federated.downlink import Increments
from benchmarks.peers.federated.feedback import FeedbackPeer
from gradcodec import wire
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.decode_mean import decode_mean
from gradcodec.reference.encode import encode


class SignEF(FeedbackPeer):
    """Error feedback fixes SignSGD (Karimireddy et al., arXiv 1901.09847).

        p = update + e;  sent = mean|p| * sign(p), per block;  e <- p - sent

        body = bf16 scales | sign bits

    Choices and deviations:

    - The paper scales each layer's signs by its mean magnitude; here each block of 256 values has a
      scale, which fits better and costs 1/16 bit a value.
    - A zero counts as positive.
    - The paper compresses the uplink; ``downlink="sign"`` codes the server's step the same way,
      with a residual at the server (as Tang et al. do, DoubleSqueeze, arXiv 1905.05957). A client
      then gets the increments that it missed, or the fp32 state where that is fewer bytes.
    - Local training takes many steps, so what is coded is a pseudo-gradient, and the server's step
      is the mean weighted by examples.

    Args:
        initial: the state that every participant derives from a seed.
        block: values that share a scale.
        feedback: off gives scaled signSGD, at both ends.
        downlink: ``"fp32"`` or ``"sign"``.
        lr: server step on the mean update.
    """

    def __init__(
        self,
        initial: State,
        *,
        block: int = 256,
        feedback: bool = True,
        downlink: str = "fp32",
        lr: float = 1.0,
    ) -> None:
        if block < 1 or downlink not in ("fp32", "sign"):
            raise ConfigError(f"expected block >= 1, 'fp32' or 'sign', got {block}, {downlink!r}")
        self.block = block
        start = flat(initial)
        signs = Increments(start, self.pack, self.unpack, feedback=feedback)
        super().__init__(initial, signs if downlink == "sign" else None, feedback=feedback, lr=lr)

    def pack(self, vector: Tensor) -> bytes:
        """Scales and signs."""
        packed, scales = encode(vector, bits=1, block=self.block, scale="l1")
        return wire.raw_bytes(scales) + wire.raw_bytes(packed)

    def unpack(self, body: bytes) -> Tensor:
        """Plus or minus the block's scale."""
        size = self.start.numel()
        reader = Reader(body, "signs")
        scales = reader.values(-(-size // self.block), torch.bfloat16)
        packed = reader.values(packed_nbytes(size, 1), torch.uint8)
        reader.end()
        if bool((scales < 0).any()):
            raise MalformedBodyError("signs: expected scales of at least 0")
        return decode_mean(packed[None], scales[None], size, bits=1, block=self.block)
