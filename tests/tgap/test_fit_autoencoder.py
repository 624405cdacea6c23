"""Laws of fitting autoencoders, on synthetic updates with known structure."""

import math
from collections.abc import Iterable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from gradcodec.codecs import Autoencoder
from gradcodec.errors import ConfigError, NonFiniteError, TrainingError, UpdateError
from gradcodec.metrics import rse
from gradcodec.tgap.fit_autoencoder import AutoencoderFit, FitRow, fit_autoencoder, fit_scales
from gradcodec.transforms.autoencoder.config import RATIOS, AutoencoderConfig
from gradcodec.types import TensorSpec, UpdateSpec

SIDE, RANK, DIRECTIONS, NOISE, COUNT = 128, 8, 2, 0.3, 20
SPEC = UpdateSpec(
    tuple(
        TensorSpec(f"layers.{i}.{m}.lora_{f}", (RANK, SIDE) if f == "A" else (SIDE, RANK))
        for i in range(2)
        for m in "qkvo"
        for f in "AB"
    )
)
NOISE_SHARE = NOISE**2 / (NOISE**2 + 1)
"""Share of the energy that no code of two numbers a column can keep, nearly."""


@lru_cache
def snapshots(count: int = COUNT) -> tuple[dict[str, Tensor], ...]:
    """Columns in two directions per kind, shared by layers and time; noise; heavy tails; scales."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shared = {
        m + f: torch.linalg.qr(draw(SIDE, DIRECTIONS))[0] * math.sqrt(SIDE / DIRECTIONS)
        for m in "qkvo"
        for f in "AB"
    }
    out = []
    for _ in range(count):
        update = {}
        for t in SPEC:
            kind = t.name.split(".")[2] + t.name[-1]
            x = shared[kind] @ draw(DIRECTIONS, RANK) + NOISE * draw(SIDE, RANK)
            x = x * (0.5 + draw(1, RANK).abs() ** 3) * (2e-2 if kind[1] == "A" else 1e-3)
            update[t.name] = x.T.contiguous() if kind[1] == "A" else x
        out.append(update)
    return tuple(out)


def fit(variant: str = "working", arch: str = "resnet3", **options: object) -> AutoencoderFit:
    settings: dict[str, object] = {"steps": 10, "evaluations": 2, **options}
    return fit_autoencoder(
        snapshots(),
        AutoencoderConfig(arch, variant),
        SPEC,
        **settings,  # type: ignore[arg-type]
    )


@lru_cache
def fitted(variant: str) -> AutoencoderFit:
    return fit(variant, steps=30)


def unseen_rse(codec: Autoencoder) -> float:
    late = snapshots()[COUNT * 4 // 5 :]
    found = [rse(x, codec.decoder.decode(codec.encoder.encode(x))) for x in late]
    return sum(found) / len(found)


def test_the_literal_form_does_not_beat_sending_nothing() -> None:
    assert 0.9 <= unseen_rse(fitted("literal").codec) <= 1.2


def test_the_working_form_keeps_what_is_shared_and_only_that() -> None:
    assert 0.5 * NOISE_SHARE < unseen_rse(fitted("working").codec) < 2.5 * NOISE_SHARE


@pytest.mark.parametrize("arch", RATIOS)
def test_every_working_architecture_reconstructs(arch: str) -> None:
    codec, _ = fit(arch=arch, steps=2)
    assert 0.01 < unseen_rse(codec) < 0.3


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_the_result_is_the_best_row_of_the_history(variant: str) -> None:
    codec, history = fitted(variant)
    error = energy = 0.0
    scales = codec.weights["shared.scales"]
    for update in snapshots()[COUNT * 4 // 5 :]:
        out = codec.decoder.decode(codec.encoder.encode(update))
        for name, scale in zip(update, scales, strict=True):
            error += float(((out[name] - update[name]) / scale).double().square().sum())
            energy += float((update[name] / scale).double().square().sum())
    assert math.isclose(error / energy, min(row.val_rse for row in history), rel_tol=1e-4)


def test_training_lowers_the_literal_loss() -> None:
    history = fitted("literal").history
    assert history[-1].train_mse < history[1].train_mse


def test_the_working_form_starts_at_the_best_linear_code_of_its_rows() -> None:
    start = fit(steps=0).history[0].val_rse
    # Top two eigenvectors per kind are the two shared directions: the projection error is noise.
    assert start < 1.5 * NOISE_SHARE


@pytest.mark.parametrize("bases", ["kind", "tensor"])
def test_mixing_columns_is_never_worse_than_row_bases_alone(bases: str) -> None:
    config = AutoencoderConfig(normalise="none", bases=bases)
    codec = fit_autoencoder(snapshots(), config, SPEC, steps=0).codec
    early, late = snapshots()[: COUNT * 4 // 5], snapshots()[COUNT * 4 // 5 :]

    def key(name: str) -> str:
        return name.split(".", 2)[2] if bases == "kind" else name

    moments: dict[str, Tensor] = {}
    for update in early:
        for name, g in update.items():
            tall = (g.T if name.endswith("A") else g).double()
            moments[key(name)] = moments.get(key(name), 0) + tall @ tall.T
    tops = {k: torch.linalg.eigh(m)[1][:, -SIDE // 64 :] for k, m in moments.items()}
    lost = gone = 0.0
    for update in late:
        out = codec.decoder.decode(codec.encoder.encode(update))
        for name, g in update.items():
            tall, top = (g.T if name.endswith("A") else g).double(), tops[key(name)]
            lost += float((tall - top @ (top.T @ tall)).square().sum())
            gone += float((out[name] - g).double().square().sum())
    assert gone <= lost * (1 + 1e-4)


def test_columns_that_move_together_share_their_code() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = UpdateSpec(tuple(TensorSpec(f"layers.{i}.w", (SIDE, RANK)) for i in range(8)))
    basis = torch.linalg.qr(torch.randn(SIDE, 8, generator=generator))[0]
    made = [
        {t.name: (basis @ torch.randn(8, 1, generator=generator)).expand(-1, RANK) for t in spec}
        for _ in range(COUNT)
    ]
    start = fit_autoencoder(made, AutoencoderConfig(), spec, steps=0).history[0].val_rse
    # Two of eight directions a column would leave 0.75; all eight fit into a tensor's 16 numbers.
    assert start < 0.1


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_equal_seeds_give_equal_codecs(variant: str) -> None:
    assert fit(variant, steps=2).codec.digest == fit(variant, steps=2).codec.digest


def test_another_seed_gives_another_codec() -> None:
    assert fit("literal", steps=1).codec.digest != fit("literal", steps=1, seed=1).codec.digest


def test_fitting_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fit("literal", steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_function_that_starts_passes_is_read_in_order() -> None:
    passes: list[int] = []

    def start() -> Iterable[dict[str, Tensor]]:
        passes.append(1)
        return iter(snapshots())

    codec, history = fit_autoencoder(start, AutoencoderConfig(), SPEC, steps=2)
    same = fit_autoencoder(start, AutoencoderConfig(), SPEC, steps=2).codec
    assert codec.digest == same.digest
    assert len(passes) > 1
    assert [row.step for row in history] == [0, 1, 2]


def test_a_single_snapshot_trains_and_validates() -> None:
    fitted = fit_autoencoder(snapshots()[:1], AutoencoderConfig(), SPEC, steps=1)
    assert 0 < fitted.history[0].val_rse < 1


def test_rows_are_logged_as_they_are_made() -> None:
    rows: list[FitRow] = []
    assert fit(steps=4, loss_log=rows.append).history == rows
    assert [row.step for row in rows] == [0, 2, 4]


def test_tensors_of_unlike_lengths_are_fitted_too() -> None:
    generator = torch.Generator().manual_seed(0)
    table = {"layers.0.A": (4, 200), "layers.0.B": (70, 4), "bias": (70,), "scalar": ()}
    made = [{n: torch.randn(s, generator=generator) for n, s in table.items()} for _ in range(5)]
    spec = UpdateSpec.of(made[0])
    codec, history = fit_autoencoder(made, AutoencoderConfig(), spec, steps=2)
    spec.check(codec.decoder.decode(codec.encoder.encode(made[0])))
    assert history[0].train_mse < 1


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("global_rms", [math.sqrt((1 + 9 + 9) * 8 / 40)] * 4),
        ("factor_rms", [5**0.5, 3**0.5, 5**0.5, 3**0.5]),
        ("tensor_rms", [1, 3, 3, 1]),
    ],
)
def test_scales_are_the_root_mean_squares_of_their_pool(
    normalise: str, expected: list[float]
) -> None:
    shapes = {"0.A": (2, 4), "0.B": (4, 2), "1.A": (2, 4), "1.B": (4, 4)}
    sizes = [1.0, 3.0, 3.0, 0.0]
    update = {n: torch.full(s, v) for (n, s), v in zip(shapes.items(), sizes, strict=True)}
    spec = UpdateSpec.of(update)
    vector = torch.cat([t.flatten() for t in update.values()])
    scales = fit_scales([vector, -vector], AutoencoderConfig(normalise=normalise), spec)
    assert torch.allclose(scales, torch.tensor(expected, dtype=torch.float32))


def test_no_snapshots_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no snapshots"):
        fit_autoencoder([], AutoencoderConfig(), SPEC)


def test_snapshots_of_zeros_are_an_error() -> None:
    zeros = [{t.name: torch.zeros(t.shape) for t in SPEC}] * 3
    with pytest.raises(TrainingError, match="zero"):
        fit_autoencoder(zeros, AutoencoderConfig(), SPEC)


def test_a_diverging_fit_is_an_error() -> None:
    with pytest.raises(TrainingError, match="not finite"):
        fit(steps=4, lr=1e30)


def test_a_snapshot_that_is_not_finite_is_refused() -> None:
    bad = [{n: t / 0 for n, t in snapshots()[0].items()}]
    with pytest.raises(NonFiniteError):
        fit_autoencoder(bad, AutoencoderConfig(), SPEC)


def test_a_snapshot_of_another_model_is_refused() -> None:
    with pytest.raises(UpdateError):
        fit_autoencoder([{"w": torch.ones(2)}], AutoencoderConfig(), SPEC)


@pytest.mark.parametrize(
    "options", [{"steps": -1}, {"batch": 0}, {"lr": 0.0}, {"lr": math.nan}, {"evaluations": 0}]
)
def test_a_number_out_of_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        fit(**options)
