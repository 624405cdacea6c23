"""FedKSeed: training along directions from a fixed set of seeds; a model is one scalar for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.body import Reader, count_bytes
from benchmarks.peers.federated.downlink import Increments
from benchmarks.peers.federated.sparse import pack_sparse, unpack_sparse
from gradcodec import layout
from gradcodec.errors import ConfigError
from gradcodec.types import UpdateSpec

SCALARS = "scalars"
_FIRST_SEED = 1 << 31  # above the numbers that clients draw their choices from


class FedKSeed(Peer):
    """FedKSeed (Qin et al., arXiv 2312.06353), with seeds drawn uniformly (not FedKSeed-Pro).

        z_j ~ N(0, I_n), j < K: from K seeds that all know
        step: a_j <- a_j - lr / draws * <g, z_j> for the drawn j;   w = w_0 + sum_j a_j z_j
        up: the changes of a, fp32, and which they are;   the server: a <- a + their mean
        down: what of a changed in each round that the client missed, or all of a (4 K bytes)

    What is federated are the K numbers ``a``, and they are equal at both ends to the bit. The
    weights follow from them, by differences from those that were rebuilt last: directions whose
    number did not change are never drawn. One instance of this class holds one such pair, so where
    it plays all participants, clients find what the server rebuilt; a client by itself arrives at
    the same weights to the last bit of fp32 (sums are fp64).

    Choices and deviations, most of them in the peer's favour:

    - The projected gradient ``(L(w + eps z) - L(w - eps z)) / (2 eps)`` is its limit ``<g, z>``,
      by backpropagation: no error of truncation, and one backward pass serves any number of
      directions. The benchmark clips ``g`` as it does for all.
    - The paper's clients take 200 steps a round with one direction each. Here they take the
      benchmark's 6, with ``draws`` different directions each and the mean of what these say: 192
      scalars a round.
    - The learning rate falls from round to round here, so it is in the numbers that are sent. The
      optimiser of the benchmark has no other part; there is no weight decay.
    - Numbers of one seed are added up before they are sent; which seeds they are of is sent by
      Rice's code (about 6 bits each). The paper sends a list of pairs.
    - The paper sends all K numbers down in every round; here that is the most that is sent.
    - The trained weights are the benchmark's adapter, not the whole model.

    Args:
        initial: the state that every participant derives from a seed.
        seeds: K.
        draws: directions of a step.
        lr: server step on the mean update.
    """

    def __init__(
        self, initial: State, *, seeds: int = 4096, draws: int = 32, lr: float = 1.0
    ) -> None:
        if not 1 <= draws <= seeds <= _FIRST_SEED:
            raise ConfigError(f"expected 1 <= draws <= seeds <= 2^31, got {draws} of {seeds}")
        zeros = torch.zeros(seeds)
        downlink = Increments(zeros, _pack, self.decode, feedback=False)
        super().__init__({SCALARS: zeros}, downlink, lr=lr)
        self.model = UpdateSpec.of(initial)
        self.seeds, self.draws = seeds, draws
        self._rebuilt = zeros.double(), flat(initial).double()

    def direction(self, j: int) -> Tensor:
        """``z_j [n]``, on the CPU and so the same for every participant."""
        generator = torch.Generator().manual_seed(_FIRST_SEED + j)
        return torch.randn(self.model.numel, generator=generator)

    def encode(self, client: int, update: Tensor) -> bytes:
        """``count u32 | scalars fp32 | which seeds``, of those that changed."""
        return _pack(update)

    def decode(self, body: bytes) -> Tensor:
        """Zero where nothing was sent."""
        reader = Reader(body, "FedKSeed")
        count = reader.count()
        return unpack_sparse(reader.rest(), self.start.numel(), count, torch.float32, "FedKSeed")

    def arrive(self, client: int, blob: bytes) -> State:
        """The scalars from the bytes, the weights from the scalars."""
        return self._weights(super().arrive(client, blob)[SCALARS])

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """Steps along seeds that are the client's choice of this round."""
        own = (client << 16 | self.memory(client).version) % _FIRST_SEED
        choice = torch.Generator().manual_seed(own)

        def choose() -> list[int]:
            return torch.randperm(self.seeds, generator=choice)[: self.draws].tolist()

        return SeedOptimizer(self, parameters, choose, options["lr"])

    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """What the optimiser added to the scalars."""
        if not isinstance(optimizer, SeedOptimizer):
            raise ConfigError(f"expected FedKSeed's optimizer, got {type(optimizer).__name__}")
        self.model.check(end)
        layout.check_finite(layout.flatten(end, self.model), f"client {client}")
        scalars = self.memory(client).held + optimizer.moved
        return super().reply(client, optimizer, {SCALARS: scalars}, n)

    def close_round(self) -> None:
        """The mean of the scalars, and the weights that it stands for."""
        super().close_round()
        self.state()

    def state(self) -> State:
        """The weights of the server's scalars."""
        return self._weights(super().state()[SCALARS])

    @torch.no_grad()
    def _weights(self, scalars: Tensor) -> State:
        """``w`` by the difference to the scalars that were rebuilt last."""
        before, vector = self._rebuilt
        change = scalars.double() - before
        moved = change.nonzero().flatten().tolist()
        if moved:
            vector = vector.clone()
            for j in moved:
                vector.add_(self.direction(j), alpha=float(change[j]))
            self._rebuilt = scalars.double(), vector
        return layout.unflatten(vector.float(), self.model)


class SeedOptimizer(torch.optim.Optimizer):
    """Plain descent along drawn directions, which remembers how far it went along each.

    Args:
        peer: whose directions.
        parameters: of the model, by name; on any device.
        choose: the seeds of the next step.
        lr: learning rate.

    Attributes:
        moved: the sum of the steps by seed ``[K]``.
    """

    def __init__(
        self,
        peer: FedKSeed,
        parameters: Mapping[str, nn.Parameter],
        choose: Callable[[], list[int]],
        lr: float,
    ) -> None:
        self._peer, self._parameters, self._choose = peer, parameters, choose
        self.moved = torch.zeros(peer.seeds)
        super().__init__(list(parameters.values()), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, computed where the directions are and then written to the parameters."""
        spec, lr = self._peer.model, self.param_groups[0]["lr"]
        grads = {
            n: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
            for n, p in self._parameters.items()
        }
        gradient = layout.flatten(grads, spec)
        chosen = self._choose()
        step = torch.zeros_like(gradient)
        for j in chosen:
            direction = self._peer.direction(j)
            scalar = -lr / len(chosen) * float(gradient @ direction)
            step.add_(direction, alpha=scalar)
            self.moved[j] += scalar
        parts = layout.unflatten(step, spec)
        for name, p in self._parameters.items():
            p.add_(parts[name].to(p.device))


def _pack(scalars: Tensor) -> bytes:
    """How many are not zero, they, and which they are."""
    positions = scalars.nonzero().flatten()
    return count_bytes(len(positions)) + pack_sparse(scalars, positions, torch.float32)
