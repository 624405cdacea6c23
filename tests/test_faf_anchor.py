"""Laws of the anchor: what is found in the parameters is what training goes on from."""

import copy
from collections.abc import Callable

import pytest
import torch
from faf_toy import (
    EPS,
    batches,
    distance,
    equal,
    loss_of,
    make_model,
    nonlinear,
    spec_of,
    state,
    subspace,
    train,
)
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.faf import LatentOptimizer

Change = Callable[[nn.Module], None]


def loaded(model: nn.Module) -> None:
    model.load_state_dict({n: torch.full_like(t, 5.0) for n, t in model.state_dict().items()})


def clamped(model: nn.Module) -> None:
    for p in model.parameters():
        p.clamp_(-0.1, 0.1)


def one_value(model: nn.Module) -> None:
    next(model.parameters())[0, 0] += 1


def replaced(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = 0.5 * p.data


def behind_the_version_counter(model: nn.Module) -> None:
    next(model.parameters()).data.mul_(2)


def through_numpy(model: nn.Module) -> None:
    model[2].weight.detach().numpy()[:] = 0.25  # type: ignore[index]


CHANGES: list[Change] = [
    loaded,
    clamped,
    one_value,
    replaced,
    behind_the_version_counter,
    through_numpy,
]


def linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Codec]:
    model = make_model(dtype)
    return model, subspace(model)


def rest(optimizer: LatentOptimizer) -> None:
    """A step that moves nothing."""
    optimizer.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_write_is_still_there_after_a_step(change: Change) -> None:
    model, codec = linear()
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.1)
    train(model, opt)
    before, code = state(model), opt.code
    with torch.no_grad():
        change(model)
    wanted = state(model)
    rest(opt)
    assert equal(state(model), wanted)
    assert not equal(state(model), before)
    assert torch.equal(opt.code, code)  # it is what was learned


@pytest.mark.parametrize("change", CHANGES)
def test_training_goes_on_from_there_as_on_parameters(change: Change) -> None:
    """With a complete basis, SGD in code space is SGD, interrupted as often as you like."""
    exact, plain, latent = make_model(torch.float64), make_model(), make_model()
    options = {"lr": 0.1, "momentum": 0.9}
    for model, opt in (
        (exact, torch.optim.SGD(exact.parameters(), **options)),
        (plain, torch.optim.SGD(plain.parameters(), **options)),
        (latent, LatentOptimizer(latent, subspace(latent, 1.0), torch.optim.SGD, **options)),
    ):
        for x in batches(6, next(model.parameters()).dtype):
            train(model, opt, [x])
            with torch.no_grad():
                change(model)
    # The changes magnify early rounding, in plain fp32 as much as here.
    yardstick = distance(state(plain), state(exact))
    assert distance(state(latent), state(exact)) <= 16 * yardstick + EPS


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_a_nonlinear_codec_goes_on_from_there(variant: str) -> None:
    model, codec = nonlinear(variant)
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.5)
    x = torch.randn(16, 128)
    for _ in range(2):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert opt.code.any()
    loaded(model)
    there, code = state(model), opt.code
    rest(opt)
    assert equal(state(model), there)
    opt.zero_grad()
    model(x).square().mean().backward()
    opt.step()
    moved, was = codec.from_code(opt.code), codec.from_code(code)
    assert not torch.equal(opt.code, code)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), there[name] + (moved[name] - was[name]))


def constant_gradient(model: nn.Module, opt: LatentOptimizer, steps: int) -> None:
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()


def ones(dtype: torch.dtype) -> tuple[nn.Module, LatentOptimizer]:
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    codec = Identity().bind(spec_of(model))
    return model, LatentOptimizer(model, codec, torch.optim.SGD, lr=1e-4)


def test_untouched_values_keep_the_progress_that_bf16_does_not_show() -> None:
    model, opt = ones(torch.bfloat16)
    start = torch.ones((), dtype=torch.bfloat16)
    for _ in range(20):  # 10 steps are less than half a unit in the last place
        constant_gradient(model, opt, 10)
        with torch.no_grad():
            next(model.parameters())[0, 0] = 3.0
    assert start - 10 * torch.tensor(1e-4, dtype=torch.bfloat16) == 1
    values = torch.cat([p.detach().flatten() for p in model.parameters()])[1:]
    assert float((values.float() - 0.98).abs().max()) <= torch.finfo(torch.bfloat16).eps
    assert next(model.parameters())[0, 0] == 3.0


def test_a_loaded_value_has_nothing_left_of_the_one_before() -> None:
    """What bf16 does not show of 1e4 is larger than the value that is loaded over it."""
    model, opt = ones(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1e4)
    opt.rebase()
    constant_gradient(model, opt, 1)
    opt.param_groups[0]["lr"] = 10.0
    constant_gradient(model, opt, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    wanted = state(model)
    rest(opt)
    assert equal(state(model), wanted)


def test_a_value_that_became_nan_is_no_change_by_others() -> None:
    model, codec = linear()
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.1)
    loss_of(model, next(batches())).backward()
    next(model.parameters()).grad[0, 0] = torch.nan  # type: ignore[index]
    opt.step()
    assert next(model.parameters()).isnan().any()
    assert not opt._anchor.touched()


def test_the_anchor_is_the_state_until_somebody_else_writes() -> None:
    model, codec = linear()
    start = state(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    assert opt.anchored_at(start)
    train(model, opt)
    assert opt.anchored_at(start)
    assert not opt.anchored_at(state(model))
    clamped_at = 0.5 * float(next(model.parameters()).detach().abs().max())
    with torch.no_grad():
        next(model.parameters()).clamp_(-clamped_at, clamped_at)
    assert not opt.anchored_at(start)  # before the next step has looked
    train(model, opt)
    assert not opt.anchored_at(start)


def test_a_state_loaded_before_the_first_step_is_the_anchor() -> None:
    model, codec = linear()
    start = state(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    loaded(model)
    there = state(model)
    assert opt.anchored_at(there)
    assert not opt.anchored_at(start)
    train(model, opt)
    assert opt.anchored_at(there)
    decoded = codec.decoder.decode(opt.payload())
    assert all(torch.equal(p, there[n] + decoded[n]) for n, p in model.named_parameters())


def test_a_state_loaded_later_is_the_anchor_from_rebase_on() -> None:
    model, codec = linear()
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    train(model, opt)
    loaded(model)
    there = state(model)
    assert not opt.anchored_at(there)  # the code has earlier progress in it
    opt.rebase()
    assert opt.anchored_at(there)
    train(model, opt)
    assert opt.anchored_at(there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_state_is_compared_in_its_own_dtype_by_name(dtype: torch.dtype) -> None:
    model, codec = linear(dtype)
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.1)
    mine = state(model)
    assert opt.anchored_at({"buffer": torch.zeros(3), **mine})
    name = next(iter(mine))
    nearly = {n: t.clone() for n, t in mine.items()}
    nearly[name].view(-1)[-1] = torch.nextafter(
        nearly[name].view(-1)[-1], torch.ones((), dtype=dtype)
    )
    assert not opt.anchored_at(nearly)
    assert not opt.anchored_at({n: t for n, t in mine.items() if n != name})
    assert not opt.anchored_at({**mine, name: mine[name].T})
    wider = {n: t.double() for n, t in mine.items()}
    assert opt.anchored_at(wider)
    wider[name].view(-1)[0] += 1e-12  # no other value once it is rounded to the parameter's dtype
    assert not opt.anchored_at(wider)


@pytest.mark.parametrize("when", ["before the step", "after the step"])
def test_resuming_after_a_change_is_bit_exact(when: str) -> None:
    data = list(batches(8))
    whole, codec = linear()
    opt = LatentOptimizer(whole, codec, torch.optim.AdamW, lr=0.02)
    train(whole, opt, data[:3])
    with torch.no_grad():
        clamped(whole)
    if when == "after the step":
        train(whole, opt, data[3:4])
    saved = copy.deepcopy(opt.state_dict())
    there = state(whole)
    rest_of_data = data[4:]
    train(whole, opt, rest_of_data)

    again = make_model()
    resumed = LatentOptimizer(again, codec, torch.optim.AdamW, lr=1.0)
    resumed.load_state_dict(saved)
    assert equal(state(again), there)
    train(again, resumed, rest_of_data)
    assert equal(state(again), state(whole))
    assert torch.equal(resumed.code, opt.code)
    assert not resumed.anchored_at(there)


def test_a_state_dict_of_earlier_versions_is_read() -> None:
    model, codec = linear()
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    start = state(model)
    train(model, opt)
    saved = opt.state_dict()
    del saved["since"]
    again = make_model()
    resumed = LatentOptimizer(again, codec, torch.optim.AdamW, lr=0.02)
    resumed.load_state_dict(saved)
    assert equal(state(again), state(model))
    assert resumed.anchored_at(start)


def test_an_average_of_weights_can_be_swapped_in_and_out() -> None:
    model, codec = linear()
    twin = make_model()
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    reference = LatentOptimizer(twin, codec, torch.optim.AdamW, lr=0.02)
    for x in batches(6):
        train(model, opt, [x])
        train(twin, reference, [x])
        mine = state(model)
        loaded(model)  # evaluated with other weights
        model.load_state_dict(mine)
        assert equal(state(model), state(twin))
    assert torch.equal(opt.code, reference.code)
    assert not opt._since.any()


def test_tied_weights_are_one_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    opt = LatentOptimizer(model, subspace(model, 1.0), torch.optim.SGD, lr=0.1)
    twin = copy.deepcopy(model)
    train_tied(model, opt)
    train_tied(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert torch.allclose(model[0].weight, twin[0].weight, atol=1e-6)


def train_tied(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    for x in batches():
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


def test_what_is_remembered_is_eight_bytes_for_a_float32_and_six_for_a_bfloat16() -> None:
    def remembered(*tensors: dict[str, Tensor]) -> int:
        return sum(t.nbytes for d in tensors for t in d.values())

    for dtype, each in ((torch.float32, 8), (torch.bfloat16, 6)):
        model, codec = linear(dtype)
        opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.1)
        train(model, opt, batches(2, dtype))
        kept = [
            d
            for d in vars(opt._anchor).values()
            if isinstance(d, dict) and d is not opt._anchor.named
        ]
        assert remembered(*kept) == each * spec_of(model).numel
