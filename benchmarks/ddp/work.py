"""The models that the DDP benchmark trains: the embedded LLaMA, and a small residual network.

Both are functions of a seed and nothing else, and the global batch of a step is the same for any
number of ranks, each of which takes its share: plain DDP walks the same path with 2 and with 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.corpus import docstring_pairs
from gradcodec.recipes.models import load_base

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a work is trained, by every scheme that is not an optimiser of its own.

    Attributes:
        optimizer: ``"adamw"`` or ``"sgd"`` (momentum 0.9).
        lr: peak; from a small grid, tuned for plain DDP (``results/ddp-tune.jsonl``).
        steps: of the full form.
        batch: examples per step, of all ranks together.
    """

    optimizer: str
    lr: float
    steps: int
    batch: int

    def rate(self, step: int, steps: int) -> float:
        """Share of the peak in a step (from 0): linear over the first tenth, then a cosine to 0."""
        warm = max(1, steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def optimiser(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Over these parameters, at the peak rate."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        return torch.optim.SGD(parameters, self.lr, momentum=0.9, weight_decay=1e-4)


class Work(Protocol):
    """Something to train."""

    name: str
    title: str
    recipe: Recipe

    def data(self, seed: int) -> Data:
        """Training and held-out examples; the first dimension counts them."""

    def model(self, seed: int) -> nn.Module:
        """A module whose ``forward(*batch)`` is the mean loss; the same on every rank."""


class Llama:
    """All 5.8 M parameters of the embedded LLaMA, fine-tuned on docstrings it has not seen.

    It starts from the trained weights: from scratch, the few steps that two cores allow learn token
    frequencies only, and half a percent of that loss is more than a percent of what was learnt.
    Fine-tuned, half of the loss goes, in gradients of every layer. 64 tokens per sequence; the
    64 held-out sequences are of pairs that are not trained on.
    """

    name = "llama"
    title = "embedded LLaMA, full-parameter fine-tuning"
    recipe = Recipe("adamw", lr=5e-4, steps=120, batch=8)
    length = 64
    held_out = 64

    def data(self, seed: int) -> Data:
        """Questions and answers, shuffled, joined by the end token and cut."""
        _, tokenizer = load_base("embedded")
        pairs = [f"{pair.prompt}{pair.answer}" for pair in docstring_pairs()]
        order = torch.randperm(len(pairs), generator=_generator(seed)).tolist()
        ids: list[int] = []
        for i in order:
            ids += [*tokenizer.backend_tokenizer.encode(pairs[i]).ids, tokenizer.eos_token_id]
        whole = len(ids) // self.length * self.length
        rows = torch.tensor(ids[:whole], dtype=torch.int64).view(-1, self.length)
        return {
            "held_out.0": rows[: self.held_out].clone(),
            "train.0": rows[self.held_out :].clone(),
        }

    def model(self, seed: int) -> nn.Module:
        """The trained weights, whatever the seed: it deals the examples."""
        return _LanguageLoss(load_base("embedded")[0])


class Scratch(Llama):
    """The same architecture and text, from random weights: for methods that exchange seldom.

    One pass over 2048 of the 3292 training sequences, so that nothing is seen twice.
    """

    name = "scratch"
    title = "embedded LLaMA from scratch"
    recipe = Recipe("adamw", lr=3e-3, steps=256, batch=8)

    def model(self, seed: int) -> nn.Module:
        """Weights drawn once, the same for all seeds, which deal the examples."""
        return _LanguageLoss(load_base("embedded-untrained")[0])


class _LanguageLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss


class Vision:
    """A residual network with group norm (1.2 M parameters) on glyphs drawn from a seed.

    The images are synthetic: ten 5x7 digits, turned, scaled, sheared and shifted at random on 32x32
    pixels, with a fainter second glyph and noise over them. That is learnable, not separable by
    eye in every case, and needs no download.
    """

    name = "vision"
    title = "residual network on synthetic glyphs"
    recipe = Recipe("sgd", lr=0.005, steps=120, batch=32)
    train, held_out = 4096, 512

    def data(self, seed: int) -> Data:
        """Images ``[n, 1, 32, 32]`` and their classes."""
        generator = _generator(seed)
        images, labels = glyphs(self.train + self.held_out, generator)
        return {
            "train.0": images[self.held_out :].clone(),
            "train.1": labels[self.held_out :].clone(),
            "held_out.0": images[: self.held_out].clone(),
            "held_out.1": labels[: self.held_out].clone(),
        }

    def model(self, seed: int) -> nn.Module:
        """Fresh weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _ClassLoss(ResNet())


class _ClassLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv 1512.03385), with group norm.

    It has no running statistics as batch norm has: nothing but gradients is to be exchanged.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(8, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, outputs)
        same = inputs == outputs and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, inputs, h, w]`` to ``[n, outputs, h / stride, w / stride]``."""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.short(x))


class ResNet(nn.Module):
    """A stem and a block per width, each halving the image; then 4x4 means and a linear map.

    One mean over the whole image would forget where strokes are, and spend the few steps that there
    are on a plateau.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, 2, padding=1, bias=False)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if a == b else 2) for a, b in pairs))
        self.head = nn.Linear(16 * widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """``[n, 1, 32, 32]`` to class scores ``[n, classes]``."""
        places = nn.functional.adaptive_avg_pool2d(self.blocks(self.stem(images)), 4)
        scores: Tensor = self.head(places.flatten(1))
        return scores


_FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


def glyphs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``[count, 1, 32, 32]`` of mean near 0 and spread near 1, and classes ``[count]``."""
    font = torch.tensor([[[float(c) for c in row] for row in g.split()] for g in _FONT])
    labels = torch.randint(0, 10, (count,), generator=generator)
    others = torch.randint(0, 10, (count,), generator=generator)
    images = _drawn(font[labels], generator) + 0.3 * _drawn(font[others], generator)
    noise = torch.randn(images.shape, generator=generator)
    return (images - 0.2) / 0.4 + 0.5 * noise, labels


def _drawn(shapes: Tensor, generator: torch.Generator) -> Tensor:
    """Each shape under an affine map of its own."""
    count = len(shapes)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, scale, shear = uniform(-0.4, 0.4), uniform(1.2, 1.8), uniform(-0.3, 0.3)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    across = torch.stack([cos, -sin + shear, uniform(-0.4, 0.4)], 1)
    down = torch.stack([sin, cos, uniform(-0.4, 0.4)], 1)
    grid = nn.functional.affine_grid(
        torch.stack([across, down], 1), [count, 1, 32, 32], align_corners=False
    )
    return nn.functional.grid_sample(shapes[:, None], grid, align_corners=False)


WORKS: dict[str, Work] = {work.name: work for work in (Llama(), Vision(), Scratch())}


def work_named(name: str) -> Work:
    """The work of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORKS:
        raise ConfigError(f"unknown work {name!r}; expected one of {list(WORKS)}")
    return WORKS[name]


def kept_data(work: Work, seed: int, folder: Path) -> Path:
    """The file of a work's data, made if it is not there: ranks read it, and parse nothing."""
    path = folder / f"{work.name}-{seed}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file(work.data(seed), path)
    return path


class Batches:
    """The examples of a work, dealt out by step and rank."""

    def __init__(self, path: Path, recipe: Recipe, seed: int, rank: int, world: int) -> None:
        if recipe.batch % world:
            raise ConfigError(
                f"expected ranks that divide the batch of {recipe.batch}, got {world}"
            )
        data = load_file(path)
        self._train, self._held_out = (
            [data[f"{part}.{i}"] for i in range(len(data) // 2)] for part in ("train", "held_out")
        )
        self._batch, self._seed, self._rank, self._world = recipe.batch, seed, rank, world

    def step(self, step: int) -> list[Tensor]:
        """This rank's share of a step's batch; passes over the examples, each in a new order."""
        count = len(self._train[0])
        per_pass = count // self._batch
        order = torch.randperm(count, generator=_generator(self._seed, 1 + step // per_pass))
        start = step % per_pass * self._batch
        mine = order[start : start + self._batch][self._rank :: self._world]
        return [t[mine] for t in self._train]

    def held_out(self, size: int = 32) -> Iterator[list[Tensor]]:
        """This rank's share of the held-out examples, in batches of equal size."""
        mine = [t[self._rank :: self._world] for t in self._held_out]
        size = min(size, len(mine[0]))
        for start in range(0, len(mine[0]) - size + 1, size):
            yield [t[start : start + size] for t in mine]


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed)
