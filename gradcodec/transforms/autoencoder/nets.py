"""The networks of the autoencoder codecs; nothing here knows tensors' names or the wire.

Literal pairs take the image of an update, ``[N, 1, H, W]`` with H and W multiples of 64 and at
least 128, and give its latent:

    ResNet-3   [N, 64, H/64, W/64]    1/64   CG-FedLLM (arXiv 2405.13746), layer by layer
    1-D CNN    [N, 64, H*W/2048]      1/32   interpretation: only the latent's size is published
    U-Former   [N, 4, H/16, W/16]     1/64   interpretation: only the name is published

Working trunks take the grid of coefficients, ``[N, oversample * k, W]``, and are the identity on
its first ``k`` rows until they are fitted (see ``AutoencoderTransform``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcodec.errors import ConfigError

STAGES = (1, 2, 4, 8, 16, 32, 64)
"""Channels of ResNet-3's six stride-2 stages."""
WAVE = (1, 2, 4, 8, 16, 32, 64, 64, 64, 64, 64, 64)
"""Channels of the 1-D CNN's eleven stride-2 stages: 2^11 / 64 = 32."""
WIDTHS = (8, 16, 32, 64)
"""Channels of the U-Former's four stages; its bottleneck has twice the last."""
FOLD = 64
"""Image columns that share one cell of ResNet-3's latent grid: its 64 channels."""


# -- ResNet-3, as published ---------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """``x + [ReflPad, Conv3x3, BN, ReLU, ReflPad, Conv3x3, BN](x)``, no biases."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> the same; h and w at least 2."""
        out: Tensor = x + self.body(x)
        return out


class ResNetEncoder(nn.Sequential):
    """ResNet-3, client half: 246,785 parameters, ``[N, 1, H, W] -> [N, 64, H/64, W/64]``.

    The stem has one channel and a ReLU, so half of a signed input is lost there. That is the only
    reading that gives the published size; it is kept because this is the literal form.
    """

    def __init__(self) -> None:
        stem = [nn.ReflectionPad2d(1), nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1), nn.ReLU()]
        down: list[nn.Module] = []
        for before, after in pairwise(STAGES):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            down += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*stem, *down, *(ResidualBlock(STAGES[-1]) for _ in range(3)))


class ResNetDecoder(nn.Sequential):
    """ResNet-3, server half: 246,698 parameters, ``[N, 64, h, w] -> [N, 1, 64 h, 64 w]``.

    One non-negative channel feeds the 7x7 head and its Tanh; outputs lie within -1..1.
    """

    def __init__(self) -> None:
        up: list[nn.Module] = []
        for before, after in pairwise(reversed(STAGES)):
            conv = nn.ConvTranspose2d(
                before, after, 3, stride=2, padding=1, output_padding=1, bias=False
            )
            up += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        head = [nn.ReflectionPad2d(3), nn.Conv2d(1, 1, 7), nn.Tanh()]
        super().__init__(*(ResidualBlock(STAGES[-1]) for _ in range(3)), *up, *head)


# -- 1-D CNN, interpretation ----------------------------------------------------------------------


class Cnn1dEncoder(nn.Module):
    """Eleven stride-2 convolutions down the concatenated columns; latent ``[N, 64, H*W/2048]``.

    Interpretation: the paper's tables and drawing disagree and give no kernels or channels; the
    latent's size, 1/32, is the paper's and the stages follow ResNet-3's.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(WAVE):
            conv = nn.Conv1d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm1d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])  # a signed latent

    def forward(self, image: Tensor) -> Tensor:
        """Columns of ``[N, 1, H, W]`` one after another, then the stages."""
        wave: Tensor = self.body(image.transpose(2, 3).flatten(2))
        return wave


class Cnn1dDecoder(nn.Module):
    """Mirror of ``Cnn1dEncoder`` with the kernel-7 Tanh head of ResNet-3.

    Args:
        height: rows of the image; the latent alone does not tell where a column ends.
    """

    def __init__(self, height: int) -> None:
        super().__init__()
        self.height = height
        layers: list[nn.Module] = []
        for before, after in pairwise(reversed(WAVE)):
            conv = nn.ConvTranspose1d(
                before, after, 3, stride=2, padding=1, output_padding=1, bias=False
            )
            layers += [conv, nn.BatchNorm1d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Conv1d(1, 1, 7, padding=3), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        """``[N, 64, l] -> [N, 1, H, W]`` with ``H * W = 2048 l``."""
        wave: Tensor = self.body(latent)
        return wave.reshape(wave.shape[0], 1, -1, self.height).transpose(2, 3)


# -- U-Former, interpretation ---------------------------------------------------------------------


class LeWinBlock(nn.Module):
    """Window attention and a locally enhanced feed-forward, pre-norm (Wang et al. 2022).

    Args:
        channels: of the map, in heads of 8.
        window: side of the square windows; maps are zero-padded to a multiple of it.
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.window, self.heads = window, max(1, channels // 8)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.zeros(self.heads, (2 * window - 1) ** 2))
        self.widen = nn.Linear(channels, 4 * channels)
        self.local = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def silence(self) -> None:
        """Zero both branches' last layers: the block becomes the identity."""
        for layer in (self.proj, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> the same."""
        x = x + self._attend(x)
        y = functional.gelu(self.widen(self.norm2(x.movedim(1, -1)))).movedim(-1, 1)
        y = functional.gelu(self.local(y)).movedim(1, -1)
        out: Tensor = x + self.narrow(y).movedim(-1, 1)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.window
        x = functional.pad(x, (0, -w % s, 0, -h % s))
        rows, cols = x.shape[2] // s, x.shape[3] // s
        tokens = x.reshape(n, c, rows, s, cols, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, c)
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, dim=-1)
        seen = functional.scaled_dot_product_attention(
            self._split(q), self._split(k), self._split(v), attn_mask=self._offsets()
        )
        mixed: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        out = mixed.reshape(n, rows, cols, s, s, c).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(n, c, rows * s, cols * s)[:, :, :h, :w]

    def _split(self, tokens: Tensor) -> Tensor:
        """``[B, T, C] -> [B, heads, T, C / heads]``."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)

    def _offsets(self) -> Tensor:
        """Relative position bias ``[heads, s*s, s*s]`` out of its table."""
        s = self.window
        at = torch.arange(s * s, device=self.bias.device)
        down = at.div(s, rounding_mode="floor")[:, None] - at.div(s, rounding_mode="floor")
        right = (at % s)[:, None] - at % s
        index = (down + s - 1) * (2 * s - 1) + right + s - 1
        return self.bias[:, index.flatten()].reshape(self.heads, s * s, s * s)


class UFormerEncoder(nn.Sequential):
    """Uformer's encoder without its skips, which cannot cross the wire; ``[N, 4, H/16, W/16]``.

    Interpretation: the paper names a U-Former and nothing more. From Uformer: input projection,
    four stages of LeWin blocks with stride-2 convolutions, bottleneck. Ours: one block a stage,
    the 1x1 projection to four latent channels.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, WIDTHS[0], 3, padding=1), nn.LeakyReLU(0.01)]
        for width in WIDTHS:
            layers += [LeWinBlock(width, 8), nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)]
        deep = 2 * WIDTHS[-1]
        super().__init__(*layers, LeWinBlock(deep, 4), nn.Conv2d(deep, 4, 1))


class UFormerDecoder(nn.Sequential):
    """Mirror of ``UFormerEncoder``, upsampling by 2x2 transposed convolutions."""

    def __init__(self) -> None:
        deep = 2 * WIDTHS[-1]
        layers: list[nn.Module] = [nn.Conv2d(4, deep, 1), LeWinBlock(deep, 4)]
        for width in reversed(WIDTHS):
            layers += [nn.ConvTranspose2d(2 * width, width, 2, stride=2), LeWinBlock(width, 8)]
        super().__init__(*layers, nn.Conv2d(WIDTHS[0], 1, 3, padding=1))


# -- working trunks: signed, without BN, identity until trained ------------------------------------


class SignedBlock(nn.Module):
    """``x + Conv(ReLU(Conv(x)))`` without biases or norms.

    Positively homogeneous, ``f(a x) = a f(x)`` for ``a >= 0``, so an update's scale does not
    matter and zero stays zero.
    """

    def __init__(self, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, size, padding="same", bias=False)
        self.last = nn.Conv2d(channels, channels, size, padding="same", bias=False)

    def silence(self) -> None:
        """Zero the branch's last layer: the block becomes the identity."""
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, h, w]`` -> the same."""
        out: Tensor = x + self.last(functional.relu(self.first(x)))
        return out


class Trunk(nn.Module):
    """The convolutional part of a working half, on the grid of coefficients.

    The grid is folded as the paper's latent is, 64 neighbouring columns into channels, and its
    bands become further channels: ``[N, oversample * k, W] <-> [N, oversample * 64, k, W/64]``.

    Args:
        arch: what follows the 1x1 ``mix`` of channels: ``"resnet3"``: three residual blocks of
            3x3 convolutions, as in the paper; ``"cnn1d"``: three of width 5 along the grid's
            columns; ``"uformer"``: two LeWin blocks.
        k: grid rows that cross the wire.
        oversample: multiple of ``k`` that the encoder sees and the decoder writes.
        encoder: narrows ``oversample * k`` rows to ``k``, otherwise widens.
    """

    def __init__(self, arch: str, k: int, oversample: int, *, encoder: bool) -> None:
        super().__init__()
        self.k = k
        sizes = (oversample * FOLD, FOLD)
        self.mix = nn.Conv2d(*(sizes if encoder else sizes[::-1]), 1, bias=False)
        self.blocks = nn.Sequential()
        for _ in range(2 if arch == "uformer" else 3):
            kernel = (1, 5) if arch == "cnn1d" else (3, 3)
            block = LeWinBlock(FOLD, 4) if arch == "uformer" else SignedBlock(FOLD, kernel)
            block.silence()
            self.blocks.append(block)
        self.encoder = encoder
        # On the CPU even if the rest is on the meta device, where torch.eye takes a second.
        self.start_at(torch.eye(sizes[0], FOLD, device="cpu"))

    @torch.no_grad()
    def start_at(self, basis: Tensor) -> None:
        """Set ``mix`` to a projection on orthonormal columns ``[oversample * 64, 64]``."""
        self.mix.weight.copy_((basis.T if self.encoder else basis)[:, :, None, None])

    def fold(self, grid: Tensor) -> Tensor:
        """``[N, rows, W] -> [N, rows / k * 64, k, W/64]``; W a multiple of 64."""
        n, _, w = grid.shape
        folded = grid.reshape(n, -1, self.k, w // FOLD, FOLD).permute(0, 1, 4, 2, 3)
        return folded.reshape(n, -1, self.k, w // FOLD)

    def forward(self, grid: Tensor) -> Tensor:
        """``[N, rows, W]`` -> ``[N, rows', W]``."""
        x = self.fold(grid)
        x = self.blocks(self.mix(x)) if self.encoder else self.mix(self.blocks(x))
        n, _, _, w = x.shape
        out: Tensor = x.reshape(n, -1, FOLD, self.k, w).permute(0, 1, 3, 4, 2)
        return out.reshape(n, -1, w * FOLD)


# -- arithmetic ------------------------------------------------------------------------------------


def count_macs(module: nn.Module, input_shape: Sequence[int], convention: str = "input") -> int:
    """Multiply-accumulates of one forward pass, by hooks on the meta device.

    Convolutions, transposed convolutions and linear layers are counted; norms, activations and
    the products inside attention are not.

    Args:
        module: not modified; a copy is run.
        input_shape: shape of its one input.
        convention: what a transposed convolution costs: ``"input"``, every input value meets
            every kernel tap once, which is the true arithmetic, or ``"output"``, kernel taps
            times output values, which is what the paper's counter must have used.

    Raises:
        ConfigError: the convention is neither.
    """
    if convention not in ("input", "output"):
        raise ConfigError(f"expected a convention of ('input', 'output'), got {convention!r}")
    total = 0

    def count(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        if isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        elif isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
            # Weight is [in, out/groups, taps]: per input value out/groups * taps products.
            values = inputs[0].numel() if convention == "input" else output.numel()
            side = weight.shape[1] if convention == "input" else weight.shape[0] // layer.groups
            total += values * side * math.prod(weight.shape[2:])
        else:
            total += output.numel() * math.prod(weight.shape[1:])

    counted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    twin = copy.deepcopy(module).to("meta").eval()
    for layer in twin.modules():
        if isinstance(layer, counted):
            layer.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(*input_shape, device="meta"))
    return total
