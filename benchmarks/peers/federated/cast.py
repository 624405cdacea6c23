"""Casts to fewer bits, as NVIDIA FLARE's quantisation filters do them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.body import Reader, value_bytes
from benchmarks.peers.federated.downlink import States
from benchmarks.peers.optional import bitsandbytes_functional
from gradcodec import wire
from gradcodec.errors import ConfigError, MalformedBodyError

#: NVFLARE's names, and bitsandbytes' own names and block sizes for them.
KINDS: dict[str, tuple[str, int]] = {
    "float16": ("", 0),
    "blockwise8": ("dynamic", 4096),
    "float4": ("fp4", 64),
    "normfloat4": ("nf4", 64),
}


class Cast(Peer):
    """NVFLARE's ``ModelQuantizer`` and ``ModelDequantizer`` on both directions.

        update --cast--> up;   global (- start) --cast--> down

        body = per tensor: fp32 maxima of its blocks | codes

    The 8-bit type is Dettmers et al.'s dynamic tree (arXiv 2110.02861), NF4 is QLoRA's (arXiv
    2305.14314); the casts themselves are bitsandbytes' functions. There is no error feedback.

    Choices and deviations:

    - NVFLARE casts the weights that it sends down. Of LoRA factors that would change the random A
      at every download, so by default the difference to the shared start is cast
      (``relative=False`` is what NVFLARE does).
    - NVFLARE sends the table of levels with every tensor (1 kB at 8 bits); it is a constant here.
    - NVFLARE runs bitsandbytes on a GPU only; on CPUs its functions give the same types.

    Args:
        initial: the state that every participant derives from a seed.
        kind: ``"float16"``, ``"blockwise8"``, ``"float4"`` or ``"normfloat4"``.
        relative: what is cast for the download is the difference to the start.
        lr: server step on the mean update.

    Raises:
        ImportError: bitsandbytes is not installed; ``"float16"`` does not need it.
    """

    def __init__(
        self,
        initial: State,
        *,
        kind: str = "normfloat4",
        relative: bool = True,
        lr: float = 1.0,
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"expected a kind of {sorted(KINDS)}, got {kind!r}")
        self.kind, self.block = KINDS[kind]
        self.sizes = [t.numel() for t in initial.values()]
        self._levels = torch.empty(0)
        if self.kind:
            self._functions: Any = bitsandbytes_functional()
            self._levels = self._constant_levels()
        downlink = States(flat(initial), self._pack, self.decode, relative=relative)
        super().__init__(initial, downlink, lr=lr)

    def encode(self, client: int, update: Tensor) -> bytes:
        """Maxima and codes, tensor by tensor."""
        return self._pack(update)

    def _pack(self, vector: Tensor) -> bytes:
        if not self.kind:
            return value_bytes(vector, torch.float16)
        bodies = []
        for part in torch.split(vector, self.sizes):
            codes, maxima = self._quantised(part)
            bodies.append(wire.raw_bytes(maxima) + wire.raw_bytes(codes))
        return b"".join(bodies)

    def decode(self, body: bytes) -> Tensor:
        """Levels times maxima."""
        reader = Reader(body, f"cast {self.kind or 'float16'}")
        if not self.kind:
            values = reader.values(sum(self.sizes), torch.float16).float()
        else:
            values = torch.cat([self._dequantised(reader, n) for n in self.sizes])
        reader.end()
        return values

    def _constant_levels(self) -> Tensor:
        functions = self._functions
        levels: Tensor = (
            functions.create_dynamic_map()
            if self.kind == "dynamic"
            else functions.get_4bit_type(self.kind, device="cpu", blocksize=self.block)
        )
        return levels

    def _quantised(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and fp32 maxima of a tensor's blocks."""
        functions, block = self._functions, self.block
        if self.kind == "dynamic":
            codes, state = functions.quantize_blockwise(part, code=self._levels, blocksize=block)
        else:
            codes, state = functions.quantize_4bit(part, blocksize=block, quant_type=self.kind)
        return codes, state.absmax

    def _dequantised(self, reader: Reader, size: int) -> Tensor:
        functions, block = self._functions, self.block
        maxima = reader.values(-(-size // block), torch.float32)
        if bool((maxima < 0).any()):
            raise MalformedBodyError(f"{reader.what}: expected maxima of at least 0")
        state = functions.QuantState(
            absmax=maxima,
            shape=torch.Size([size]),
            code=self._levels,
            blocksize=block,
            quant_type=self.kind,
            dtype=torch.float32,
        )
        values: Tensor
        if self.kind == "dynamic":
            codes = reader.values(size, torch.uint8)
            values = functions.dequantize_blockwise(codes, state, blocksize=block)
        else:
            codes = reader.values((size + 1) // 2, torch.uint8).view(-1, 1)
            values = functions.dequantize_4bit(codes, state, quant_type=self.kind)
        return values.reshape(-1)
