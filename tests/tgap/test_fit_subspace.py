"""Laws of the closed-form fit: optimal (Eckart-Young), reproducible, within its budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.moments import EXACT_LIMIT, SecondMoments
from gradcodec.transforms.subspace.config import ALLOCATIONS, Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

SPEC = UpdateSpec(
    (
        TensorSpec("q.lora_A", (4, 32)),
        TensorSpec("q.lora_B", (24, 4)),
        TensorSpec("bias", (16,)),
    )
)


def updates(count: int = 6, seed: int = 0, spec: UpdateSpec = SPEC) -> list[dict[str, Tensor]]:
    """Decaying spectra, other scales for other parameters."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        update = {}
        for i, t in enumerate(spec):
            g = torch.randn(t.shape, generator=generator)
            side = max(range(len(t.shape)), key=lambda d: t.shape[d])
            shape = [1] * len(t.shape)
            shape[side] = -1
            update[t.name] = 3.0**i * g * torch.exp(-0.2 * torch.arange(t.shape[side])).view(shape)
        out.append(update)
    return out


def moments_of(
    seen: list[dict[str, Tensor]], config: SubspaceConfig, spec: UpdateSpec = SPEC
) -> SecondMoments:
    moments = SecondMoments(spec, config)
    for update in seen:
        moments.add(update)
    return moments


def lost(codec: Subspace, seen: list[dict[str, Tensor]], name: str) -> float:
    """``sum_t ||G_t - U U^T G_t||^2`` in float64."""
    axis, u = codec.bases()[name]
    u = u.double()
    total = 0.0
    for update in seen:
        g = update[name].double()
        g = g.reshape(len(g), -1)
        g = g if axis.left else g.T
        total += float((g - u @ (u.T @ g)).square().sum())
    return total


def stacked(seen: list[dict[str, Tensor]], name: str, axis: Axis) -> Tensor:
    """All samples of the projected side as columns."""
    parts = [u[name].double().reshape(len(u[name]), -1) for u in seen]
    return torch.cat([p if axis.left else p.T for p in parts], dim=1)


FP32 = SubspaceConfig(ratio=4, basis_dtype="float32", side="long")


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("side", ["long", "short"])
def test_the_error_is_that_of_the_truncated_svd(allocation: str, side: str) -> None:
    config = SubspaceConfig(ratio=2, allocation=allocation, basis_dtype="float32", side=side)
    seen = updates()
    codec = fit_subspace(moments_of(seen, config))
    for name, (axis, u) in codec.bases().items():
        values = torch.linalg.svdvals(stacked(seen, name, axis)) ** 2
        least = float(values[u.shape[1] :].sum())
        # Second moments are summed in fp32: eigenvalues are known to 1e-6 of the largest one.
        assert lost(codec, seen, name) == pytest.approx(least, abs=2e-6 * float(values[0]))


def test_no_random_basis_is_better_and_something_is_lost() -> None:
    seen = updates()
    codec = fit_subspace(moments_of(seen, FP32))
    for name, (axis, u) in codec.bases().items():
        best = lost(codec, seen, name)
        assert best > 0
        for _ in range(20):
            other = torch.linalg.qr(torch.randn(u.shape)).Q
            rival = Subspace.from_bases(FP32, SPEC, {**codec.bases(), name: (axis, other)})
            assert best < lost(rival, seen, name)


def test_bases_are_orthonormal_and_sign_fixed() -> None:
    codec = fit_subspace(moments_of(updates(), FP32))
    for _, u in codec.bases().values():
        assert torch.allclose(u.T @ u, torch.eye(u.shape[1]), atol=1e-6)
        assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_equal_gradients_give_equal_codecs() -> None:
    pair = [fit_subspace(moments_of(updates(), FP32)) for _ in range(2)]
    assert pair[0].digest == pair[1].digest
    assert all(torch.equal(pair[0].weights[n], w) for n, w in pair[1].weights.items())


def test_the_sign_of_gradients_does_not_matter() -> None:
    flipped = [{n: -t for n, t in u.items()} for u in updates()]
    ours, theirs = (fit_subspace(moments_of(u, FP32)) for u in (updates(), flipped))
    assert ours.digest == theirs.digest


def test_one_recording_serves_other_ratios() -> None:
    recorded = moments_of(updates(), FP32)
    for ratio in (2.0, 8.0):
        config = SubspaceConfig(ratio=ratio, basis_dtype="float32", side="long")
        direct = fit_subspace(moments_of(updates(), config))
        assert fit_subspace(recorded, config).digest == direct.digest


@given(
    st.sampled_from(["energy", "tempered"]),
    st.floats(1, 6),
    st.integers(0, 100),
)
def test_the_code_stays_within_its_ratio(allocation: str, ratio: float, seed: int) -> None:
    config = SubspaceConfig(ratio=ratio, allocation=allocation, side="long")
    codec = fit_subspace(moments_of(updates(3, seed), config))
    assert 0 < codec.code_numel(SPEC) <= SPEC.numel / ratio


def test_energy_allocation_loses_least() -> None:
    seen = updates()
    errors = {}
    for allocation in ALLOCATIONS:
        config = SubspaceConfig(ratio=4, allocation=allocation, basis_dtype="float32", side="long")
        codec = fit_subspace(moments_of(seen, config))
        errors[allocation] = sum(lost(codec, seen, n) for n in codec.bases())
    assert errors["energy"] == min(errors.values())


def test_a_sketched_side_is_fitted_near_the_optimum() -> None:
    size, rank = EXACT_LIMIT + 2, 8
    spec = UpdateSpec((TensorSpec("embedding", (size, 2)),))
    seen = updates(30, spec=spec)
    config = SubspaceConfig(ratio=size / rank, basis_dtype="float32", side="long")
    codec = fit_subspace(moments_of(seen, config, spec))
    axis, u = codec.bases()["embedding"]
    assert u.shape == (size, rank)
    values = torch.linalg.svdvals(stacked(seen, "embedding", axis)) ** 2
    tail = float(values[rank:].sum())
    # Frequent Directions with l = 2 k rows: error at most (1 + k / (l - k)) times the best.
    assert 0 < lost(codec, seen, "embedding") <= 2 * tail


def test_nothing_recorded_is_a_training_error() -> None:
    with pytest.raises(TrainingError, match="nothing was recorded"):
        fit_subspace(SecondMoments(SPEC, FP32))


def test_only_zeros_is_a_training_error() -> None:
    zeros = [{t.name: torch.zeros(t.shape) for t in SPEC}] * 3
    with pytest.raises(TrainingError, match="all 3 recorded updates are zero"):
        fit_subspace(moments_of(zeros, FP32))


def test_a_parameter_that_never_moved_does_not_spoil_the_others() -> None:
    seen = [{**u, "bias": torch.zeros(16)} for u in updates()]
    codec = fit_subspace(moments_of(seen, FP32))
    assert lost(codec, seen, "q.lora_A") < sum(float(u["q.lora_A"].square().sum()) for u in seen)
    assert codec.decoder.decode(codec.encoder.encode(seen[0]))["bias"].abs().max() == 0


def test_another_side_than_recorded_is_refused() -> None:
    with pytest.raises(ConfigError, match="record again"):
        fit_subspace(moments_of(updates(), FP32), SubspaceConfig(ratio=4, side="short"))
