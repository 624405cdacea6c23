"""Two bands: a fitted subspace with many bits a value, and everything outside it with few.

    u --U^T---> z ------> signs, about a bit a value  | body
    u - U z = w --------> signs of a few of w's        |
    decoded: U z~ + shrink (I - U U^T) w~, so no noise of w~ gets into the subspace

Without a subspace there is one band, the whole update. Clients train all parameters, so nothing is
left out, and what is outside arrives at last. Replies go down as they are (``Relayed``): a few
hundredths of a bit a value from each of four clients are fewer bytes than their mean in four bits,
and they lose nothing more.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.federated import fitted
from benchmarks.federated.methods import State
from benchmarks.federated.scheme import Make
from benchmarks.federated.world import World
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.downlink import States
from benchmarks.peers.federated.envelope import Broadcast, Reply
from gradcodec import layout
from gradcodec.codecs import Subspace
from gradcodec.errors import CodecMismatchError, MalformedBodyError
from gradcodec.packers.rotsign import RotatedSignConfig, RotatedSignPacker
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import raw_bytes, raw_tensor

_EXAMPLES = struct.Struct("<Q")  # before each reply in a broadcast: its weight


@dataclass(frozen=True)
class Bands:
    """How an update ``[n]`` is coded.

    Attributes:
        spec: the tensor table.
        subspace: its bases, bound; ``None`` for one band.
        inside, outside: packers of the code and of the rest.
        shrink: factor of what is decoded outside. The least squared error of a mean of ``C``
            replies is at about ``1 / (1 + noise / C)``, far below 1 for a few hundredths of a bit.
    """

    spec: UpdateSpec
    subspace: Subspace | None
    inside: RotatedSignPacker
    outside: RotatedSignPacker
    shrink: float

    @property
    def nbytes(self) -> int:
        """Size of a body."""
        rest = self.outside.nbytes(self.spec.numel)
        if self.subspace is None:
            return rest
        return rest + self.inside.nbytes(self.subspace.code_numel(self.spec))

    def encode(self, update: Tensor, seed: int) -> bytes:
        """The body of an update."""
        if self.subspace is None:
            return raw_bytes(self.outside.pack(update, seed=seed))
        z = self.subspace.to_code(layout.unflatten(update, self.spec))
        rest = self.outside.pack(update - self._of_code(z), seed=seed + 1)
        return raw_bytes(self.inside.pack(z, seed=seed)) + raw_bytes(rest)

    def decode(self, body: bytes) -> Tensor:
        """The update of a body."""
        numel = self.spec.numel
        if self.subspace is None:
            return self.shrink * self.outside.unpack(raw_tensor(body, torch.uint8), numel)
        size = self.subspace.code_numel(self.spec)
        cut = self.inside.nbytes(size)
        z = self.inside.unpack(raw_tensor(body[:cut], torch.uint8), size)
        rest = self.outside.unpack(raw_tensor(body[cut:], torch.uint8), numel)
        again = self.subspace.to_code(layout.unflatten(rest, self.spec))
        return self._of_code(z) + self.shrink * (rest - self._of_code(again))

    def _of_code(self, z: Tensor) -> Tensor:
        assert self.subspace is not None
        return layout.flatten(self.subspace.from_code(z), self.spec)


class Relayed(States):
    """Every round's replies, as they came; a client averages those of the rounds that it missed.

    Args:
        start: the initial vector ``[n]``.
        step_of: the server's step ``[n]`` from the bytes of a round's replies.
    """

    def __init__(self, start: Tensor, step_of: Callable[[bytes], Tensor]) -> None:
        super().__init__(start, relative=True)
        self.step_of = step_of
        self.rounds: list[bytes] = []

    def broadcast(self, version: int) -> bytes:
        """The replies of all rounds since ``version``."""
        return Broadcast(self.version, tuple(self.rounds[version:])).to_bytes()

    def arrive(self, held: Tensor, version: int, blob: bytes) -> tuple[int, Tensor]:
        """Add the steps that the server took, from bytes alone."""
        message = Broadcast.from_bytes(blob)
        if version + len(message.parts) != message.round:
            raise CodecMismatchError(
                f"expected the rounds from {version} to {message.round}, got {len(message.parts)}"
            )
        for part in message.parts:
            held = held + self.step_of(part)
        return message.round, held


class Banded(Peer):
    """A federation with ``Bands`` up and ``Relayed`` down.

    Args:
        initial: the state that every participant derives from a seed.
        bands: the code.
        codec_bytes: what the bases cost a client once.
    """

    def __init__(self, initial: State, bands: Bands, codec_bytes: int) -> None:
        self.relayed = Relayed(flat(initial), self._step_of)
        super().__init__(initial, self.relayed)
        self.bands, self.codec_bytes = bands, codec_bytes
        self._came: dict[int, bytes] = {}

    def encode(self, client: int, update: Tensor) -> bytes:
        """The two bands."""
        return self.bands.encode(update, (client << 12) + self.memory(client).version)

    def read(self, reply: Reply) -> Tensor:
        """The sum of the bands; the body is kept for the broadcast."""
        self._came[reply.client] = _EXAMPLES.pack(reply.examples) + reply.body
        return self.bands.decode(reply.body)

    def close_round(self) -> None:
        """As of every peer; the bodies that counted become the round's increment."""
        counted = sorted(self._replies)
        super().close_round()
        self.relayed.rounds.append(b"".join(self._came[client] for client in counted))
        self._came = {}

    def _step_of(self, part: bytes) -> Tensor:
        """The server's own arithmetic, on the replies in the order of its sum."""
        size = _EXAMPLES.size + self.bands.nbytes
        if not part or len(part) % size:
            raise MalformedBodyError(f"expected replies of {size} bytes each, got {len(part)}")
        replies = {}
        for i, at in enumerate(range(0, len(part), size)):
            (examples,) = _EXAMPLES.unpack_from(part, at)
            body = part[at + _EXAMPLES.size : at + size]
            replies[i] = (examples, self.bands.decode(body))
        return self.lr * self.aggregate(replies)


def banded(
    ratio: float | None,
    inside: tuple[int, int],
    outside: tuple[int, int],
    shrink: float = 1.0,
    share: str = "kind",
    basis_dtype: str = "int4",
) -> Make:
    """``inside`` and ``outside``: how many of a block's rotated values are sent, and the block."""
    near, far = (
        RotatedSignPacker(RotatedSignConfig(block=b, kept=k)) for k, b in (inside, outside)
    )

    def make(world: World) -> Banded:
        spec = UpdateSpec.of(world.initial)
        if ratio is None:
            return Banded(world.initial, Bands(spec, None, near, far, shrink), 0)
        config = SubspaceConfig(
            ratio=ratio, allocation="tempered", side="long", share=share, basis_dtype=basis_dtype
        )
        name = f"signal-{ratio:g}-{share}-{basis_dtype}"
        codec, nbytes = fitted.kept(world, name, lambda: fitted.signal(world, config))
        bound = codec.bind(spec)
        assert isinstance(bound, Subspace)
        return Banded(world.initial, Bands(spec, bound, near, far, shrink), nbytes)

    return make
