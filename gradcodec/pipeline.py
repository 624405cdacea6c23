"""From an update to a body and back: a transform, then a packer.

    update --to_code--> z --pack--> body            (encode)
    update <-from_code- z <-unpack- body            (decode)

The packer checks the values for NaN and Inf, once. Only if it refuses them are the tensors checked
one by one, so that the error can name the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.errors import MalformedBodyError, NonFiniteError, UpdateError
from gradcodec.packers.packer import Packer
from gradcodec.packers.raw import RawPacker
from gradcodec.transforms.identity import IdentityTransform
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec


class Pipeline:
    """A transform and the packer of its code.

    Args:
        kind: the codec's kind, for error messages.
        transform: update to code.
        packer: code to bytes.
    """

    def __init__(self, kind: str, transform: Transform, packer: Packer) -> None:
        self.kind = kind
        self.transform = transform
        self.packer = packer
        #: Where bodies are decoded; values are encoded where they are.
        self.device = torch.device("cpu")

    def place(self, device: torch.device) -> None:
        """Decode on ``device`` from now on."""
        self.device = device

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """The exact size of a body for updates of this table."""
        return self.packer.nbytes(self.transform.code_numel(spec))

    def encode(self, update: Update, spec: UpdateSpec, seed: int) -> bytes:
        """The body of an update that was checked against ``spec``.

        Raises:
            UpdateError: a tensor is not of a floating dtype.
            NonFiniteError: a tensor holds NaN or Inf, or values whose code is beyond fp32.
        """
        layout.check_floating(spec)
        try:
            return self.pack_code(self.transform.to_code(update, spec), seed)
        except NonFiniteError:
            for t in spec:
                # Codes are fp32, and a finite fp64 value may be beyond its range.
                wide = " in fp32" if t.dtype is torch.float64 else ""
                layout.check_finite(update[t.name].float(), f"{self.kind}: {t.name!r}{wide}")
            raise

    def decode(self, body: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
        """The update of a body.

        Raises:
            MalformedBodyError: the body cannot come from ``encode``.
        """
        return self.transform.from_code(self.unpack_code(body, spec), spec)

    def pack_code(self, z: Tensor, seed: int) -> bytes:
        """The body of a code ``[m]``."""
        if not self.packer.finite:
            layout.check_finite(z, self.kind)
        return wire.raw_bytes(self.packer.pack(z, seed=seed))

    def unpack_code(self, body: bytes, spec: UpdateSpec) -> Tensor:
        """The code ``[m]`` of a body, fp32.

        Raises:
            MalformedBodyError: the body cannot come from ``pack_code``.
        """
        self.check_body(body, spec)
        packed, numel = self._packed(body), self.transform.code_numel(spec)
        z = self.packer.unpack(packed, numel)
        return z if self.packer.surely_finite(packed, numel) else self._sound(z)

    def mean(
        self, bodies: Sequence[bytes], shares: Sequence[float], spec: UpdateSpec
    ) -> dict[str, Tensor]:
        """``sum_i shares[i] * decode(bodies[i])``, added in the order given, in fp32.

        A linear transform's codes are averaged, and the mean is transformed back once.

        Raises:
            MalformedBodyError: as ``decode``.
        """
        if not self.transform.linear:
            return self._mean_of_updates(bodies, shares, spec)
        for body in bodies:
            self.check_body(body, spec)
        rows = torch.stack([self._packed(body) for body in bodies])
        z = self.packer.mean(rows, self.transform.code_numel(spec), shares)
        return self.transform.from_code(self._sound(z), spec)

    def _packed(self, body: bytes) -> Tensor:
        return wire.raw_tensor(body, torch.uint8).to(self.device)

    def check_body(self, body: bytes, spec: UpdateSpec) -> None:
        """Raise ``MalformedBodyError`` for a wrong length, or a table that no encoder takes."""
        self._check_length(body, spec)
        try:
            layout.check_floating(spec)
        except UpdateError as err:
            raise MalformedBodyError(f"{self.kind}: no encoder takes {err}") from err

    def _check_length(self, body: bytes, spec: UpdateSpec) -> None:
        expected = self.nbytes(spec)
        if len(body) != expected:
            raise MalformedBodyError(
                f"{self.kind}: expected a body of {expected} bytes for {spec.numel} elements, "
                f"got {len(body)}"
            )

    def _sound(self, z: Tensor) -> Tensor:
        """The unpacked code; NaN and Inf are refused if the packer refuses to pack them."""
        if self.packer.finite:
            # Finite scales are not enough. Values can be beyond fp32 although all levels are
            # within it: those of code 0 at 4 bits, which no encoder writes, and sums in a rotation.
            layout.check_unpacked(z, self.kind)
        return z

    def _mean_of_updates(
        self, bodies: Sequence[bytes], shares: Sequence[float], spec: UpdateSpec
    ) -> dict[str, Tensor]:
        total: Tensor | None = None
        for body, share in zip(bodies, shares, strict=True):
            x = layout.flatten(self.decode(body, spec), spec)
            total = x * share if total is None else total.add_(x, alpha=share)
        assert total is not None
        return layout.unflatten(total, spec)


class TensorPipeline(Pipeline):
    """Each tensor is encoded separately, in a dtype that depends on the tensor's own.

        update --tensor by tensor: wire_dtype--> values | values | ... = body

    Every dtype can be sent, and values are not checked for NaN. A bare code ``z`` is sent as the
    update ``from_code(z)``.
    """

    def __init__(self, kind: str, spec: UpdateSpec | None, packer: RawPacker) -> None:
        super().__init__(kind, IdentityTransform(spec), packer)
        self._sent = packer.wire_dtype

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """The sum of the tensors' sizes in their wire dtypes."""
        return sum(t.numel * self._sent(t.dtype).itemsize for t in self.transform.table(spec))

    def encode(self, update: Update, spec: UpdateSpec, seed: int) -> bytes:
        """The tensors' bytes, in table order."""
        sent = [update[t.name].to(self._sent(t.dtype)) for t in spec]
        if all(t.is_cuda for t in sent) and len({t.device for t in sent}) == 1:
            # Joined there, so that one copy leaves the device and not one for each tensor.
            flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in sent]
            return wire.raw_bytes(torch.cat(flat))
        return b"".join(wire.raw_bytes(t) for t in sent)

    def decode(self, body: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
        """Each tensor from its own bytes."""
        self._check_length(body, spec)
        slices = self._slices(body)
        out, at = {}, 0
        for t in spec:
            sent = self._sent(t.dtype)
            # A bool byte other than 0 and 1 would be undefined in torch.
            read = torch.uint8 if sent is torch.bool else sent
            end = at + t.numel * sent.itemsize
            out[t.name] = slices(at, end, read).to(t.dtype).reshape(t.shape)
            at = end
        return out

    def _slices(self, body: bytes) -> Callable[[int, int, torch.dtype], Tensor]:
        """Reads ``body[start:stop]`` as new values of a dtype, on the device."""
        if self.device.type == "cpu":
            view = memoryview(body)
            return lambda start, stop, dtype: wire.raw_tensor(view[start:stop], dtype)
        # There the body goes as a whole, in one copy. A view may begin at any byte: cloned.
        whole = self._packed(body)
        return lambda start, stop, dtype: whole[start:stop].clone().view(dtype)

    def pack_code(self, z: Tensor, seed: int) -> bytes:
        """The body of ``from_code(z)``."""
        return self.encode(self.transform.from_code(z), self.transform.table(), seed)

    def unpack_code(self, body: bytes, spec: UpdateSpec) -> Tensor:
        """The values as one fp32 vector."""
        return layout.flatten(self.decode(body, spec), spec)

    def mean(
        self, bodies: Sequence[bytes], shares: Sequence[float], spec: UpdateSpec
    ) -> dict[str, Tensor]:
        """The mean of the updates."""
        return self._mean_of_updates(bodies, shares, spec)
