"""Parts of the state that need no other process: names, residuals, the auto mode's choice."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from gradcodec.codecs import BlockQuant
from gradcodec.distributed import CompressState, LowRank, Residuals
from gradcodec.distributed.coding import CodecCoder
from gradcodec.distributed.meter import Traffic
from gradcodec.errors import ConfigError
from gradcodec.packers.blockquant import BlockQuantConfig


def residuals_of(world: int, rank: int) -> Residuals:
    kept = Residuals()
    coder = CodecCoder(BlockQuant(BlockQuantConfig(4)))
    first, second = kept.of("w", torch.zeros(10_000), coder, rank, world)
    for part in first:
        part += 1
    for part in second:
        part += 2
    return kept


def test_in_another_world_owned_parts_are_dropped() -> None:
    state = residuals_of(2, 0).state_dict()
    assert set(state) == {"world", "rank", "first.w", "second.w"}
    same, other = Residuals(), Residuals()
    same.load_state_dict(state, rank=0, world=2)
    other.load_state_dict(state, rank=0, world=3)
    assert torch.equal(same.second["w"], torch.full_like(same.second["w"], 2.0))
    assert other.second == {}
    assert torch.equal(other.first["w"], torch.ones(10_000))


def test_residuals_belong_to_one_rank_of_one_world() -> None:
    kept = residuals_of(2, 0)
    coder = CodecCoder(BlockQuant(BlockQuantConfig(4)))
    with pytest.raises(ConfigError, match="rank 0 of 2 cannot serve rank 1 of 2"):
        kept.of("w", torch.zeros(10_000), coder, 1, 2)


def test_a_state_dict_is_plain_and_safetensors_can_hold_it() -> None:
    model = nn.Linear(80, 80)
    state = CompressState(model, LowRank(rank=2), error_feedback=True)
    plain: dict[str, torch.Tensor | int] = {"first.weight": torch.rand(6400), "world": 2, "rank": 0}
    state.reducer.residuals.load_state_dict(plain, rank=0, world=2)
    kept = state.state_dict()
    assert all(type(v) in (int, torch.Tensor) for v in kept.values())
    tensors = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in kept.items()}
    back = load(save(tensors))
    other = CompressState(model, LowRank(rank=2))
    other.load_state_dict(back)
    other._rank, other._world = 0, 2
    other._load(back, True)
    assert torch.equal(other.reducer.residuals.first["weight"], kept["first.weight"])  # type: ignore[arg-type]
    assert torch.equal(
        other.reducer.adaptive["weight"].start, state.reducer.adaptive["weight"].start
    )
    assert other.step == state.step


def test_states_of_other_models_are_refused() -> None:
    state = CompressState(nn.Linear(80, 80))
    with pytest.raises(ConfigError, match="'step' and 'seed'"):
        state.load_state_dict({})
    with pytest.raises(ConfigError, match="not of this model"):
        state.load_state_dict({"step": 1, "seed": 0, "first.other": torch.zeros(3)})


def test_traffic_adds_up() -> None:
    total = Traffic(1, 2, 0.5, 0.25, 0.125) + Traffic(10, 20, 1, 2, 3)
    assert total == Traffic(11, 22, 1.5, 2.25, 3.125)
