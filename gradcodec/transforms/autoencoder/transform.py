"""The autoencoder transforms of CG-FedLLM, literal and working."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from gradcodec import layout
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.autoencoder.halves import latent_numel, load, state_of
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec


class AutoencoderTransform(Transform):
    """A trained encoder and decoder network, as in CG-FedLLM (arXiv 2405.13746).

    Literal, the published networks on the published image (``image.Image``)::

        update --/scales--> image [1, H, W] --six stride-2 stages, 3 residual blocks--> z [64, h, w]
        update <-*scales-- image [1, H, W] <--six transposed stages, Tanh, 3 blocks---- z

    Working, the same residual blocks, with learned linear maps in place of the stages::

        update --/scales--> columns [d, W] --U^T--> grid [oversample k, W] --mix, blocks--> z [k, W]
        update <-*scales-- columns [d, W] <--U'--- grid [oversample k, W] <--blocks, mix-- z

    Why there are two. An update is white in the image: neighbouring pixels are unrelated hidden
    units, so stacked convolutions have nothing to compress and the literal form ends near the
    zero predictor, as an independent reproduction found and ours confirms. It is here to measure
    that. But the columns of one kind of factor lie in the same subspace over layers, clients and
    time. The working form learns this subspace: a dense map along the rows, one basis per kind;
    then the coefficients fold into the paper's latent grid (64 neighbouring columns are the
    64 channels; at r = 8 they are exactly one layer's q, k, v, o), a 1x1 convolution mixes what
    belongs together there, and the paper's three residual blocks refine it.

    From the paper: ResNet-3's layers and sizes, latent ratios, separate encoder and decoder, MSE
    and Adam at 2e-4. Ours in the literal form: images of anything but uniform matrices,
    normalisation (published is none), everything about the 1-D CNN and the U-Former except latent
    ratio and name. Ours in the working form: row basis and mix in place of the stages; no
    one-channel stem or head, no Tanh, no BN; zero padding; blocks that start as the identity. The
    fit of the working form thus starts at a closed-form linear code, which only a code that
    validates better replaces. On the LoRA updates we tried, none did: all that the working form
    gains is linear, and ``subspace`` is the simpler codec for that, with codes that add.

    Weights: ``encoder.*``, ``decoder.*``, ``shared.scales`` ``[tensors]``; either half works alone.
    The code is not linear; its vector-Jacobian product is autograd's through the decoder.

    Raises:
        ConfigError: there is no spec, or the weights do not fit the network; later, if a half is
            used whose weights are not loaded.
    """

    kind = "autoencoder"
    linear = False

    def __init__(
        self, config: AutoencoderConfig, spec: UpdateSpec | None, weights: Mapping[str, Tensor]
    ) -> None:
        super().__init__(spec, weights)
        if spec is None:
            raise ConfigError("autoencoder: a spec is needed; the image is laid out for it")
        self.config = config
        known = ("encoder.", "decoder.", "shared.scales")
        unknown = sorted(n for n in self.weights if not n.startswith(known))
        if unknown:
            raise ConfigError(f"autoencoder: unknown weights {', '.join(map(shown, unknown[:3]))}")
        for name, tensor in self.weights.items():
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"autoencoder: {shown(name)}: expected float32, got {tensor.dtype}"
                )
        self._nets: dict[str, nn.Module] = {}
        for half in ("encoder", "decoder"):
            given = self._weights_of(half)
            if given:
                self._nets[half] = load(half, config, spec, given)
        scales = self.weights.get("shared.scales")
        if scales is not None and tuple(scales.shape) != (len(spec),):
            raise ConfigError(
                f"autoencoder: expected shared.scales [{len(spec)}], got {list(scales.shape)}"
            )
        if scales is not None and not bool((scales > 0).all()):
            raise ConfigError("autoencoder: expected shared.scales that are positive")

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """Latent elements, including those of the image's padding in the literal form."""
        self.table(spec)
        return self._latent_numel

    def to_code(self, update: Update, spec: UpdateSpec | None = None) -> Tensor:
        """Flatten, normalise, encode; ``z`` ``[m]`` fp32.

        Raises:
            NonFiniteError: the update holds NaN or Inf.
        """
        x = layout.flatten(update, self.table(spec))
        layout.check_finite(x, "autoencoder")
        net = self._net("encoder")
        scales = self._scales()
        with torch.no_grad():
            z: Tensor = net((x.to(scales.device) / self._per_element(scales))[None])
        return z[0].to(x.device)

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """Decode, denormalise, shape; differentiable in ``z``."""
        spec = self.table(spec)
        if z.numel() != self._latent_numel:
            raise UpdateError(f"autoencoder: expected {self._latent_numel} values, got {z.numel()}")
        net = self._net("decoder")
        scales = self._scales()
        x = net(z.to(scales.device, torch.float32).reshape(1, -1))[0] * self._per_element(scales)
        return layout.unflatten(x.to(z.device), spec)

    @cached_property
    def _latent_numel(self) -> int:
        return latent_numel(self.config, self.table())

    def _per_element(self, scales: Tensor) -> Tensor:
        counts = [t.numel for t in self.table()]
        return scales.repeat_interleave(
            torch.tensor(counts, dtype=torch.long, device=scales.device)
        )

    def _weights_of(self, half: str) -> dict[str, Tensor]:
        prefix = half + "."
        return {n.removeprefix(prefix): t for n, t in self.weights.items() if n.startswith(prefix)}

    def _net(self, half: str) -> nn.Module:
        if half not in self._nets:
            here = sorted({n.split(".")[0] for n in self.weights}) or "none"
            raise ConfigError(
                f"autoencoder: the {half}'s weights are needed and not here (loaded: {here}); load "
                f"the whole codec or its {half} half"
            )
        return self._nets[half]

    def _scales(self) -> Tensor:
        if "shared.scales" not in self.weights:
            raise ConfigError("autoencoder: the weight shared.scales is not here")
        return self.weights["shared.scales"]


def weights_of(encoder: nn.Module, decoder: nn.Module, scales: Tensor) -> dict[str, Tensor]:
    """Copies of trained networks' tensors by weight name; ``scales`` ``[tensors]``."""
    weights = {"shared.scales": scales.detach().float().clone()}
    for half, net in (("encoder", encoder), ("decoder", decoder)):
        for name, tensor in state_of(net).items():
            weights[f"{half}.{name}"] = tensor.detach().clone().contiguous()
    return weights
