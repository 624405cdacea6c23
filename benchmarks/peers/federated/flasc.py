"""FLASC: top-k sparse messages in both directions around dense local training."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.downlink import States
from benchmarks.peers.federated.sparse import pack_sparse, top_k, unpack_sparse
from gradcodec import layout
from gradcodec.errors import ConfigError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FLASC(Peer):
    """Federated LoRA with Sparse Communication (Kuo et al., arXiv 2406.05233).

        global --top-k_down--> client: dense training from the sparse state
        end - sparse state --top-k_up--> server: mean into its dense global

    The mask is over all LoRA values together and ``k = int(density * n)``, as in the authors' code;
    neither end has error feedback. What the download leaves out stays in the server's dense state.

    Choices and deviations:

    - The paper masks the LoRA weights themselves, whose A starts at random values that all know.
      Sending those again would leave no room for B until it has outgrown them, so by default the
      mask is over the difference to the shared start (``relative=False`` is the paper's mask).
    - The mean is weighted by examples and applied as it is; the authors' server runs Adam on the
      unweighted mean.
    - Values are fp32. Positions are sent and counted too, by Rice's code (at density 1/8 about 4.4
      bits each). The densities are public, so k is not sent.
    - What is evaluated is what a client would be sent, as the authors' code does by default;
      ``evaluate="dense"`` takes the server's own state.

    Args:
        initial: the state that every participant derives from a seed.
        density_up, density_down: shares of values that are sent.
        dtype: of the sent values.
        relative: the download's mask is over the difference to the start.
        evaluate: ``"sparse"`` or ``"dense"``.
        lr: server step on the mean update.
    """

    def __init__(
        self,
        initial: State,
        *,
        density_up: float = 1 / 8,
        density_down: float = 1 / 8,
        dtype: torch.dtype = torch.float32,
        relative: bool = True,
        evaluate: str = "sparse",
        lr: float = 1.0,
    ) -> None:
        if not (0 < density_up <= 1 and 0 < density_down <= 1):
            raise ConfigError(f"expected densities in (0, 1], got {density_up}, {density_down}")
        if dtype not in DTYPES:
            raise ConfigError(f"expected dtype of {DTYPES}, got {dtype}")
        if evaluate not in ("sparse", "dense"):
            raise ConfigError(f"expected evaluate 'sparse' or 'dense', got {evaluate!r}")
        start = flat(initial)
        self.size, self.dtype, self.evaluate = start.numel(), dtype, evaluate
        self.k_up = max(1, int(density_up * self.size))
        self.k_down = max(1, int(density_down * self.size))
        downlink = States(
            start,
            lambda v: self._pack(v, self.k_down),
            lambda b: self._unpack(b, self.k_down),
            relative=relative,
        )
        super().__init__(initial, downlink, lr=lr)

    def encode(self, client: int, update: Tensor) -> bytes:
        """The ``k_up`` largest values and where they are."""
        return self._pack(update, self.k_up)

    def decode(self, body: bytes) -> Tensor:
        """Zero where nothing was sent."""
        return self._unpack(body, self.k_up)

    def state(self) -> State:
        """What a client would be sent of the server's state, or all of it."""
        if self.evaluate == "dense":
            return super().state()
        down = self.downlink
        return layout.unflatten(down.read(down.write(down.vector)), self.spec)

    def _pack(self, vector: Tensor, k: int) -> bytes:
        return pack_sparse(vector, top_k(vector, k), self.dtype)

    def _unpack(self, body: bytes, k: int) -> Tensor:
        return unpack_sparse(body, self.size, k, self.dtype, "FLASC")
