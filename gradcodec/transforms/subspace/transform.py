"""The learned linear transform: per-parameter bases fitted by TGAP, code ``z = U^T g``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.transforms.subspace.basis import BITS, FLOATS, dequantise, quantise
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.groups import group_names
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec


@dataclass(frozen=True)
class Projection:
    """One parameter's part of the transform: ``z = U^T g`` or ``g V``, and back.

    Attributes:
        axis: the side of the parameter's matrix that is projected.
        basis: ``U`` or ``V``, ``[axis.size, k]``.
    """

    axis: Axis
    basis: Tensor

    @property
    def code_shape(self) -> tuple[int, int]:
        """Shape of the parameter's part of the code."""
        k = self.basis.shape[1]
        return (k, self.axis.other) if self.axis.left else (self.axis.other, k)

    @property
    def code_numel(self) -> int:
        """Number of code values."""
        return self.basis.shape[1] * self.axis.other

    def code(self, values: Tensor) -> Tensor:
        """The parameter's values, of any shape -> its flat code, fp32 ``[code_numel]``."""
        axis = self.axis
        shape = (axis.size, axis.other) if axis.left else (axis.other, axis.size)
        g, u = values.reshape(shape).float(), self._basis_on(values)
        return (u.T @ g if axis.left else g @ u).reshape(-1)

    def values(self, code: Tensor) -> Tensor:
        """Flat code -> the parameter's values, flat, fp32."""
        u, part = self._basis_on(code), code.reshape(self.code_shape)
        return (u @ part if self.axis.left else part @ u.T).reshape(-1)

    def _basis_on(self, like: Tensor) -> Tensor:
        return self.basis.to(device=like.device, dtype=torch.float32)


class SubspaceTransform(Transform):
    """Orthonormal bases, one per parameter; both directions use the same bases.

        g [rows, cols] --U^T g--> z [k, cols]   --concatenate--> code      (basis on the left)
        g [rows, cols] --g V----> z [rows, k]                              (basis on the right)
        code --U z | z V^T--> g~

    With ``U`` the top eigenvectors of the gradients' second moment this is the best linear
    autoencoder of its size (Baldi and Hornik 1989); CG-FedLLM (arXiv 2405.13746) trains a
    convolutional one instead. A parameter without a basis is not updated at all.

    If bases are stored quantised, both ends dequantise the same codes, exactly: the transform stays
    linear and tied, however large the quantisation error. A basis that several parameters share is
    stored once, under their group's name.

    The code is linear, so payloads are averaged as codes, and the vector-Jacobian product of
    ``from_code`` is ``to_code`` itself.

    Raises:
        ConfigError: there is no spec, or the weights are not bases of its parameters.
    """

    kind = "subspace"

    def __init__(
        self, config: SubspaceConfig, spec: UpdateSpec | None, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__(spec, weights)
        if spec is None:
            raise ConfigError("subspace: a spec is needed; the bases belong to named parameters")
        self.config = config
        #: The projections of parameters that have a basis, in table order.
        self.parts = _match(spec, self.weights, config)

    def of(self, name: str) -> Projection | None:
        """The part of one parameter; ``None`` if it has no basis."""
        return self.parts.get(name)

    def step_scales(self) -> Tensor:
        """``[m]``: sqrt(parameter elements / code values), the step scale of each code value.

        An adaptive optimiser moves every value by about its learning rate. Scaled by this, a step
        in code space has the same Euclidean norm as a step on the parameters themselves.
        """
        scales = [
            torch.full((p.code_numel,), math.sqrt(p.axis.size / max(p.basis.shape[1], 1)))
            for p in self.parts.values()
        ]
        return torch.cat(scales) if scales else torch.empty(0)

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """Sum of ``k * other side`` over the parameters that have a basis."""
        self.table(spec)
        return sum(p.code_numel for p in self.parts.values())

    def to_code(self, update: Update, spec: UpdateSpec | None = None) -> Tensor:
        """``U^T g`` or ``g V`` per parameter, concatenated in table order."""
        for t in self.table(spec):
            part = self.parts.get(t.name)
            if part is None or not part.code_numel:
                layout.check_finite(update[t.name], f"subspace: {t.name!r}")
        return self._project(update)

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """The projection, which is the transposed Jacobian for every ``z``."""
        return self._project(gradients)

    def _project(self, update: Update) -> Tensor:
        codes = [p.code(update[name].detach()) for name, p in self.parts.items()]
        return torch.cat(codes) if codes else torch.empty(0)

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """``U z`` or ``z V^T`` per parameter; zeros where there is no basis."""
        spec = self.table(spec)
        if z.numel() != self.code_numel():
            raise UpdateError(
                f"subspace: expected a code of {self.code_numel()} values, got {z.numel()}"
            )
        sizes = [p.code_numel for p in self.parts.values()]
        codes = dict(zip(self.parts, torch.split(z, sizes), strict=True)) if sizes else {}
        out = {}
        for t in spec:
            if t.name in codes:
                dense = self.parts[t.name].values(codes[t.name])
                out[t.name] = layout.narrow(dense.reshape(t.shape), t.dtype)
            else:
                out[t.name] = torch.zeros(t.shape, dtype=t.dtype, device=z.device)
        return out


def weights_of(
    config: SubspaceConfig, spec: UpdateSpec, bases: Mapping[str, tuple[Axis, Tensor]]
) -> dict[str, Tensor]:
    """How fitted bases are stored: weights by name, one basis per group that shares it.

    Args:
        config: says which parameters share a basis, and the dtype.
        spec: the parameters.
        bases: by parameter name, ``(axis, U [axis.size, k])``.

    Raises:
        ConfigError: parameters that share a basis were given different ones.
    """
    names = group_names(spec, config.share)
    shared: dict[str, tuple[Axis, Tensor]] = {}
    for name, (axis, u) in bases.items():
        group = names.get(name, name)
        its_axis, its_u = shared.setdefault(group, (axis, u))
        if axis != its_axis or not (u is its_u or torch.equal(u, its_u)):
            raise ConfigError(f"subspace: {name} has another basis than the rest of {group}")
    apart = [n for n, group in names.items() if group in shared and n not in bases]
    if apart:
        raise ConfigError(f"subspace: {apart[0]} lacks the basis of {names[apart[0]]}")
    weights: dict[str, Tensor] = {}
    for group, (axis, u) in shared.items():
        if config.basis_dtype in FLOATS:
            weights[axis.prefix + group] = u.to(FLOATS[config.basis_dtype]).contiguous()
        else:
            codes, scales = quantise(u, BITS[config.basis_dtype])
            weights[axis.prefix + group] = codes
            weights[axis.scales_prefix + group] = scales
    return weights


def _basis(stored: Tensor, scales: Tensor | None, size: int, config: SubspaceConfig) -> Tensor:
    """A basis ``[size, k]`` as it is stored, dequantised unless it is stored in floats."""
    bits = BITS.get(config.basis_dtype)
    if bits is not None:
        return dequantise(stored, scales, size, bits)
    if stored.dtype != FLOATS[config.basis_dtype]:
        raise ConfigError(f"expected {FLOATS[config.basis_dtype]}, got {stored.dtype}")
    return stored


def _match(
    spec: UpdateSpec, weights: Mapping[str, Tensor], config: SubspaceConfig
) -> dict[str, Projection]:
    """Find every parameter's basis, in spec order, and check that it fits."""
    names = group_names(spec, config.share)
    bits = BITS.get(config.basis_dtype)
    left_over = set(weights)
    loaded: dict[str, Tensor] = {}
    found: dict[str, Projection] = {}
    for t in spec:
        rows, cols = layout.matrix_shape(t)
        for axis in (Axis(True, rows, cols), Axis(False, cols, rows)):
            key, beside = (p + names[t.name] for p in (axis.prefix, axis.scales_prefix))
            if key not in weights:
                continue
            if t.name in found:
                raise ConfigError(f"subspace: {t} has a basis on either side, expected one")
            if key not in loaded:
                loaded[key] = weights[key]
                left_over.discard(key)
                if bits is not None:
                    left_over.discard(beside)
                try:
                    loaded[key] = _basis(weights[key], weights.get(beside), axis.size, config)
                except ConfigError as err:
                    raise ConfigError(f"subspace: basis of {t}: {err}") from err
            u = loaded[key]
            if u.ndim != 2 or u.shape[0] != axis.size or u.shape[1] > axis.size:
                raise ConfigError(f"subspace: basis of {t} has shape {list(u.shape)}")
            found[t.name] = Projection(axis, u)
    if left_over:
        raise ConfigError(f"subspace: bases of unknown parameters: {sorted(left_over)[:3]}")
    return found
