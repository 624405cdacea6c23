"""The learned linear codec: per-parameter bases fitted by TGAP, code ``z = U^T g``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codecs.base import Codec, register
from gradcodec.codecs.settings import CodecConfig, check_number, check_one_of, check_whole
from gradcodec.codecs.subspace_basis import BASIS_DTYPES, BITS, FLOATS, dequantise, quantise
from gradcodec.codecs.subspace_groups import SHARES, group_names, groups
from gradcodec.encodable import MAX_NUMEL
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import TensorSpec, Update, UpdateSpec

ALLOCATIONS = ("uniform", "energy", "tempered")
SIDES = ("auto", "long", "short")


@dataclass(frozen=True)
class SubspaceConfig(CodecConfig):
    """How the bases were (or are to be) fitted; they themselves are the codec's weights.

    Attributes:
        ratio: update elements per code value, at least 1.
        allocation: how code dimensions are shared out over parameters (see ``allocate``).
        temper: exponent of the parameter's energy under ``"tempered"``, 0 (relative) .. 1 (energy).
        side: which side of a matrix gets the basis: ``"long"``, ``"short"``, or ``"auto"``: the
            short one where it still leaves ``min_rank`` dimensions, since that basis is smaller.
        min_rank: fewest dimensions a parameter may get.
        basis_dtype: storage of the bases: ``"float32"``, ``"bfloat16"``, ``"float16"``, or
            ``"int8"`` or ``"int4"`` with scales (see ``subspace_basis``).
        share: which parameters have one basis together: ``"none"``, ``"kind"`` (the same factor in
            all layers) or ``"inputs"`` (``lora_A`` of q, k and v; see ``subspace_groups``).
    """

    kind: ClassVar[str] = "subspace"
    ratio: float = 32.0
    allocation: str = "uniform"
    temper: float = 0.5
    side: str = "auto"
    min_rank: int = 1
    basis_dtype: str = "bfloat16"
    share: str = "none"

    def __post_init__(self) -> None:
        check_number(self.kind, "ratio", self.ratio, 1, MAX_NUMEL)
        check_one_of(self.kind, "allocation", self.allocation, ALLOCATIONS)
        check_one_of(self.kind, "side", self.side, SIDES)
        check_number(self.kind, "temper", self.temper, 0, 1)
        check_whole(self.kind, "min_rank", self.min_rank, 1, MAX_NUMEL)
        check_one_of(self.kind, "basis_dtype", self.basis_dtype, BASIS_DTYPES)
        check_one_of(self.kind, "share", self.share, SHARES)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``share`` came later and is left out of codecs that do not use it."""
        data = super().to_dict()
        if self.share == "none":
            del data["share"]
        return data


@dataclass(frozen=True)
class Axis:
    """The side of a parameter's matrix view ``[rows, cols]`` that is projected."""

    left: bool
    size: int
    other: int

    @classmethod
    def choose(cls, spec: TensorSpec, config: SubspaceConfig) -> Axis:
        """Apply the config's ``side`` rule to one parameter."""
        rows, cols = layout.matrix_shape(spec)
        short = min(rows, cols)
        fits = short / config.ratio >= max(config.min_rank, 2)
        use_short = config.side == "short" or (config.side == "auto" and fits)
        left = (rows <= cols) if use_short else (rows >= cols)
        return cls(left, rows if left else cols, cols if left else rows)

    @property
    def prefix(self) -> str:
        """Weight name prefix: which side is part of the name, so a square matrix is unambiguous."""
        return "shared.left." if self.left else "shared.right."

    @property
    def scales_prefix(self) -> str:
        """Weight name prefix of a quantised basis's scales."""
        return "shared.left_scales." if self.left else "shared.right_scales."


@register
class Subspace(Codec):
    """Orthonormal bases, one per parameter; Encoder and Decoder are tied (they share the bases).

        g [rows, cols] --U^T g--> z [k, cols]   --concatenate--> code      (basis on the left)
        g [rows, cols] --g V----> z [rows, k]                              (basis on the right)
        code --U z | z V^T--> g~

    With ``U`` the top eigenvectors of the gradients' second moment this is the best linear
    autoencoder of its size (Baldi and Hornik 1989); CG-FedLLM (arXiv 2405.13746) trains a
    convolutional one instead. A parameter without a basis is not updated at all.

    Quantised bases are the bases: both ends dequantise the same stored codes, exactly, so the
    transform stays linear and tied whatever the quantisation cost. A basis that several parameters
    share is stored once, under their group's name.

    The code is linear, so payloads are averaged as codes, and its vector-Jacobian product is the
    encoder itself.
    """

    Config = SubspaceConfig
    config: SubspaceConfig
    learned: ClassVar[bool] = True

    def __init__(self, config: CodecConfig, **parts: Any) -> None:
        super().__init__(config, **parts)
        if self.spec is None:
            raise ConfigError("subspace: a spec is needed; the bases belong to named parameters")
        self._bases = _match(self.spec, self.weights, self.config)

    @classmethod
    def from_bases(
        cls, config: SubspaceConfig, spec: UpdateSpec, bases: Mapping[str, tuple[Axis, Tensor]]
    ) -> Subspace:
        """Codec of fitted bases by parameter name: ``(axis, U [axis.size, k])``.

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
        return cls(config, spec=spec, weights=weights)

    def bases(self) -> dict[str, tuple[Axis, Tensor]]:
        """Bases by parameter name: ``(axis, U [axis.size, k])``."""
        return dict(self._bases)

    def code_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each parameter's part of the code, in code order."""
        return {
            name: (u.shape[1], axis.other) if axis.left else (axis.other, u.shape[1])
            for name, (axis, u) in self._bases.items()
        }

    def step_scales(self) -> Tensor:
        """``[m]``: sqrt(parameter elements / code values), the step scale of each code value.

        An adaptive optimiser moves every value by about its learning rate. Scaled by this, a step
        in code space has the same Euclidean norm as the step it stands for.
        """
        parts = [
            torch.full((rows * cols,), math.sqrt(axis.size / max(u.shape[1], 1)))
            for (rows, cols), (axis, u) in zip(
                self.code_shapes().values(), self._bases.values(), strict=True
            )
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    @property
    def code_space(self) -> bytes:
        """These very bases."""
        return self.digest

    def code_numel(self, spec: UpdateSpec) -> int:
        """Sum of ``k * other side`` over the parameters that have a basis."""
        self._own(spec)
        return sum(rows * cols for rows, cols in self.code_shapes().values())

    def to_code(self, update: Update) -> Tensor:
        """``U^T g`` or ``g V`` per parameter, concatenated in spec order."""
        self._spec_of(update)
        return self._project(update)

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """The transposed Jacobian is the encoder, whatever ``z``."""
        return self._project(gradients)

    def _project(self, update: Update) -> Tensor:
        parts = []
        for name, (axis, u) in self._bases.items():
            g = update[name].detach()
            shape = (axis.size, axis.other) if axis.left else (axis.other, axis.size)
            g = g.reshape(shape).float()
            basis = u.to(device=g.device, dtype=torch.float32)
            parts.append((basis.T @ g if axis.left else g @ basis).reshape(-1))
        code = torch.cat(parts) if parts else torch.empty(0)
        return code

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """``U z`` or ``z V^T`` per parameter; zeros where there is no basis."""
        spec = self._own(spec)
        shapes = self.code_shapes()
        sizes = [rows * cols for rows, cols in shapes.values()]
        parts = dict(zip(shapes, torch.split(z, sizes), strict=True)) if sizes else {}
        out = {}
        for t in spec:
            if t.name not in parts:
                out[t.name] = torch.zeros(t.shape, dtype=t.dtype, device=z.device)
                continue
            axis, u = self._bases[t.name]
            basis = u.to(device=z.device, dtype=torch.float32)
            part = parts[t.name].reshape(shapes[t.name])
            dense = basis @ part if axis.left else part @ basis.T
            out[t.name] = layout.narrow(dense.reshape(t.shape), t.dtype)
        return out

    def packed_nbytes(self, numel: int) -> int:
        """Four bytes a value; chain a quantiser behind to send fewer."""
        return 4 * numel

    def _own(self, spec: UpdateSpec | None) -> UpdateSpec:
        if spec is not None and spec != self.spec:
            raise UpdateError("subspace: the bases belong to another tensor table")
        return self._known_spec(None)


def allocate(
    spec: UpdateSpec, spectra: Mapping[str, Tensor], config: SubspaceConfig
) -> dict[str, int]:
    """Share code dimensions out over parameters.

    Parameters that share a basis are one: they get the same number, and a dimension of theirs costs
    what it costs all of them. Every parameter first gets ``min_rank`` dimensions, then:

    - ``"uniform"``: each gets ``size / ratio`` of its own ``size``-long side, if that is more;
    - ``"energy"``: greedily the dimension with the most energy per code value, which minimises the
      total squared error of reconstruction;
    - ``"tempered"``: the same, with each parameter's spectrum divided by its total energy to the
      power ``1 - temper``, so that quiet parameters are not starved.

    Args:
        spec: the parameters.
        spectra: eigenvalues of each parameter's second moment, largest first; the same for
            parameters that share a basis (``SecondMoments.merged``).
        config: rule and ratio.

    Returns:
        Number of dimensions ``k`` by parameter name. Together they make at most
        ``spec.numel / ratio`` code values; under ``"uniform"``, sides shorter than
        ``min_rank * ratio`` come on top.

    Raises:
        ConfigError: ``min_rank`` alone is more than the ratio allows, except under ``"uniform"``.
    """
    axes = {t.name: Axis.choose(t, config) for t in spec if t.numel}
    budget = spec.numel / config.ratio
    most = {n: min(a.size, len(spectra[n])) for n, a in axes.items()}
    ranks = {n: min(config.min_rank, most[n]) for n in axes}
    if config.allocation == "uniform":
        for name, axis in axes.items():
            ranks[name] = max(ranks[name], min(most[name], int(axis.size / config.ratio)))
    spent = sum(ranks[n] * axes[n].other for n in axes)
    if spent > budget and config.allocation != "uniform":
        raise ConfigError(
            f"subspace: {spent} code values are needed for min_rank={config.min_rank}, "
            f"ratio {config.ratio} allows {int(budget)}"
        )
    if config.allocation == "uniform":
        return ranks
    power = 0.0 if config.allocation == "energy" else 1 - config.temper
    offers = []
    for members in groups(spec, config.share).values():
        name = members[0]
        values = spectra[name].double().clamp_min(0)
        weight = float(values.sum()) ** power or 1.0
        other = axes[name].other
        for j in range(ranks[name], most[name]):
            offers.append((float(values[j]) / weight / other, members, len(members) * other))
    for score, members, cost in sorted(offers, key=lambda o: (-o[0], o[1])):
        if score > 0 and spent + cost <= budget:
            ranks.update(dict.fromkeys(members, ranks[members[0]] + 1))
            spent += cost
    return ranks


def _basis(stored: Tensor, scales: Tensor | None, size: int, config: SubspaceConfig) -> Tensor:
    """A basis ``[size, k]`` as it is stored, dequantised where it is not stored in floats."""
    bits = BITS.get(config.basis_dtype)
    if bits is not None:
        return dequantise(stored, scales, size, bits)
    if stored.dtype != FLOATS[config.basis_dtype]:
        raise ConfigError(f"expected {FLOATS[config.basis_dtype]}, got {stored.dtype}")
    return stored


def _match(
    spec: UpdateSpec, weights: Mapping[str, Tensor], config: SubspaceConfig
) -> dict[str, tuple[Axis, Tensor]]:
    """Find every parameter's basis, in spec order, and check that it fits."""
    names = group_names(spec, config.share)
    bits = BITS.get(config.basis_dtype)
    left_over = set(weights)
    loaded: dict[str, Tensor] = {}
    found = {}
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
            found[t.name] = (axis, u)
    if left_over:
        raise ConfigError(f"subspace: bases of unknown parameters: {sorted(left_over)[:3]}")
    return found
