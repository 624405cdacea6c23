"""SparseLoCo: chunk-wise top-k, two-bit values, error feedback that decays."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.body import Reader
from benchmarks.peers.federated.feedback import FeedbackPeer
from gradcodec import wire
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference import two_means
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits

_BITS = 2


class SparseLoCo(FeedbackPeer):
    """SparseLoCo (Sarfi et al., arXiv 2508.15706).

        e <- beta * e + update;  sent = Q(top-k per chunk of e);  e <- e - sent
        server: global <- global + lr * mean(sent)

        body = bf16 levels | 2-bit codes | indices within their chunk, 12 bits each

    Choices and deviations:

    - The paper pre-trains with all workers in every round; here a client that sits rounds out keeps
      its residual as it is and decays it once, when it next replies.
    - Chunks run over the flattened adapter. The authors cut each tensor into tiles of up to 64 x 64
      values; a LoRA factor is often smaller than one, so its k would be a larger share.
    - The two-bit levels are those of ``gradcodec.reference.two_means``: sign and one of two
      magnitudes, fitted by Lloyd's iteration to each chunk, two bf16 numbers. The authors take the
      means of four uniform bins over 6 sigma of a tensor's kept values, of which the one around
      zero is nearly empty after top-k; the levels here have the smaller error.
    - Indices are sent in ``ceil(log2(chunk))`` bits each, as the paper counts them.
    - The paper's workers gather all messages; here the server sends its fp32 state.
    - The server's step is the paper's mean over all who replied, weighted by examples; what one
      did not send counts as zero. The authors' early code divides each position by its senders
      instead; on toy problems that was far worse.

    Args:
        initial: the state that every participant derives from a seed.
        k, chunk: values kept of every chunk; a last, short chunk keeps ``min(k, its length)``.
        decay: the paper's beta.
        lr: the outer learning rate (alpha).
    """

    def __init__(
        self,
        initial: State,
        *,
        k: int = 64,
        chunk: int = 4096,
        decay: float = 0.95,
        lr: float = 1.0,
    ) -> None:
        if not (8 <= k <= chunk and 0 <= decay <= 1):
            raise ConfigError(f"expected 8 <= k <= chunk, decay in [0, 1], got {k}, {chunk}")
        super().__init__(initial, decay=decay, lr=lr)
        self.k, self.chunk = k, chunk
        self.index_bits = (chunk - 1).bit_length()
        full, rest = divmod(self.start.numel(), chunk)
        self.kept = full * k + min(k, rest)
        self.chunks = -(-self.kept // k)

    def pack(self, vector: Tensor) -> bytes:
        """Levels, codes, indices."""
        full = vector.numel() // self.chunk * self.chunk
        rows = vector[:full].view(-1, self.chunk)
        index = [rows.abs().topk(self.k, dim=1).indices.sort(1).values.reshape(-1)] if full else []
        tail = vector[full:]
        if tail.numel():
            index.append(tail.abs().topk(min(self.k, tail.numel())).indices.sort().values)
        inside = torch.cat(index)
        packed, levels = two_means.encode(vector[inside + self._starts()], self.k)
        parts = (levels, packed, pack_bits(inside, self.index_bits))
        return b"".join(wire.raw_bytes(p) for p in parts)

    def unpack(self, body: bytes) -> Tensor:
        """Zero where nothing was sent."""
        reader = Reader(body, "SparseLoCo")
        levels = reader.values(2 * self.chunks, torch.bfloat16)
        codes = reader.values(packed_nbytes(self.kept, _BITS), torch.uint8)
        packed = reader.values(packed_nbytes(self.kept, self.index_bits), torch.uint8)
        reader.end()
        values = two_means.decode_mean(codes[None], levels[None], self.kept, self.k)
        index = unpack_bits(packed, self.index_bits, self.kept).long() + self._starts()
        size = self.start.numel()
        if int(index[-1]) >= size or bool((index.diff() <= 0).any()):
            raise MalformedBodyError(f"SparseLoCo: expected increasing indices below {size}")
        return torch.zeros(size).index_copy_(0, index, values)

    def _starts(self) -> Tensor:
        """First position of each kept value's chunk ``[kept]``."""
        return torch.arange(self.kept) // self.k * self.chunk
