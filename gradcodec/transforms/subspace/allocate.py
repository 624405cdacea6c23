"""How many dimensions of the code each parameter gets."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.groups import groups
from gradcodec.types import UpdateSpec


def allocate(
    spec: UpdateSpec, spectra: Mapping[str, Tensor], config: SubspaceConfig
) -> dict[str, int]:
    """Share code dimensions out over parameters.

    Parameters that share a basis count as one: they get the same number of dimensions, and a
    dimension costs the code values of all of them. Every parameter first gets ``min_rank``
    dimensions, then:

    - ``"uniform"``: each gets ``size / ratio`` dimensions, if that is more; ``size`` is the length
      of its projected side;
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
        ``spec.numel / ratio`` code values, except that under ``"uniform"`` sides shorter than
        ``min_rank * ratio`` exceed their share.

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
