"""Second moments -> the subspace codec, in closed form."""

from __future__ import annotations

from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.tgap.moments import SecondMoments
from gradcodec.transforms.subspace.allocate import allocate
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig


def fit_subspace(moments: SecondMoments, config: SubspaceConfig | None = None) -> Subspace:
    """The best tied linear autoencoder of the recorded gradients (Eckart-Young, per parameter).

    Minimises ``sum_t ||G_t - U U^T G_t||^2`` over orthonormal ``U`` with ``k`` columns: the top
    ``k`` eigenvectors of the second moment ``sum_t G_t G_t^T``. How many columns each parameter
    gets is ``subspace.allocate``'s rule.

    Args:
        moments: what a recorder gathered.
        config: by default the config of the moments. Another one may change ratio and allocation,
            but not ``side``; and a sketched side has no more directions than its sketch.

    Raises:
        TrainingError: nothing was recorded, or only zeros.
        ConfigError: the config asks for other sides than were recorded.
    """
    config = config or moments.config
    if moments.count == 0:
        raise TrainingError(
            "nothing was recorded: expected optimiser steps inside the recorder, or, of signal "
            "moments, a round with updates of two clients or more"
        )
    shared = config.share != "none"
    spectra = moments.merged(config.share) if shared else moments.spectra()
    if all(float(values.sum()) == 0 for values, _ in spectra.values()):
        raise TrainingError(f"all {moments.count} recorded updates are zero")
    if any(Axis.choose(t, config) != moments.axes[t.name] for t in moments.spec if t.numel):
        raise ConfigError(
            "this config projects other sides than were recorded; record again with it"
        )
    # Parameters that share a basis have the same spectrum here and get the same rank.
    ranks = allocate(moments.spec, {n: values for n, (values, _) in spectra.items()}, config)
    bases = {
        name: (moments.axes[name], vectors[:, : ranks[name]].float())
        for name, (_, vectors) in spectra.items()
        if ranks[name]
    }
    return Subspace.from_bases(config, moments.spec, bases)
