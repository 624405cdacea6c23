"""What clients agree on: second moments of the signal in their updates, without the noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError
from gradcodec.tgap.moments import ExactMoment, SecondMoments
from gradcodec.types import TensorSpec, Update


class SignalMoments(SecondMoments):
    """Cross moments between clients: ``S = E[G_a G_b^T]`` over pairs ``a != b`` of one round.

    With ``G_c = s + e_c``, a common signal and noise that is independent between clients, the
    second moment of updates is ``E[s s^T] + E[e e^T]``, and averaging over clients keeps the first
    term only. ``S`` estimates that first term without bias:

        C (C - 1) S = (sum_c G_c) (sum_c G_c)^T - sum_c G_c G_c^T

    so its top eigenvectors are the directions in which a mean of updates moves, not those in which
    single clients have large updates. ``S`` may be indefinite; negative eigenvalues are pure noise
    and count as zero. A server gathers ``S`` from the replies that it receives anyway, so it costs
    no bytes.

    This method is the project's own; CG-FedLLM (arXiv 2405.13746) fits on single gradients.

    For a side longer than ``EXACT_LIMIT`` the matrix is not kept, and an indefinite sum cannot be
    sketched. There the second moment of each round's mean is gathered instead, which holds a
    ``C``-th of the noise.
    """

    def add(self, update: Update) -> None:
        """Refused: one client alone shows no agreement; use ``add_round``."""
        raise ConfigError("signal moments need the updates of a round together: add_round")

    @torch.no_grad()
    def add_round(self, updates: Sequence[Update]) -> None:
        """Add the updates of one round, one per client; a single one adds nothing.

        On an error nothing is added.

        Raises:
            UpdateError, NonFiniteError: other names or shapes than the parameters', NaN or Inf.
        """
        for update in updates:
            self.spec.check(update)
            for name, tensor in update.items():
                layout.check_finite(tensor, name)
        pairs = len(updates) * (len(updates) - 1)
        if not pairs:
            return
        for t in self.spec:
            if t.name not in self.axes:
                continue
            moment = self._moments[t.name]
            sides = [self._side(update[t.name], t) for update in updates]
            total = torch.stack(sides).sum(0)
            if not isinstance(moment, ExactMoment):
                moment.add(total.T / len(sides))
                continue
            moment.sum.addmm_(total, total.T, alpha=1 / pairs)
            for side in sides:
                moment.sum.addmm_(side, side.T, alpha=-1 / pairs)
        self.count += 1

    def _side(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        """A parameter's matrix with the projected side in front, fp32 on the CPU."""
        matrix = tensor.detach().reshape(layout.matrix_shape(spec))
        return (matrix if self.axes[spec.name].left else matrix.T).float().cpu()
