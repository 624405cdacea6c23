"""Laws of training in code space: what is sent is what was trained, and the loop stays."""

import copy
from typing import Any

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
    outside,
    spec_of,
    state,
    subspace,
    train,
)
from torch import Tensor, nn

from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import ConfigError, NonFiniteError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.packers.blockquant import BlockQuantConfig


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_a_complete_basis_is_sgd_on_parameters(momentum: float) -> None:
    exact, plain, latent = make_model(torch.float64), make_model(), make_model()
    start = state(plain)
    options = {"lr": 0.1, "momentum": momentum}
    train(exact, torch.optim.SGD(exact.parameters(), **options), batches(dtype=torch.float64))
    train(plain, torch.optim.SGD(plain.parameters(), **options))
    train(latent, LatentOptimizer(latent, subspace(latent, 1.0), torch.optim.SGD, **options))
    # float64 models have their own initial rounding; the distance of fp32 SGD is the yardstick.
    yardstick = distance(state(plain), state(exact))
    assert distance(state(latent), state(exact)) <= 8 * yardstick
    assert distance(start, state(exact)) > 1e4 * yardstick


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_parameters_never_leave_the_span_of_the_bases(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    model = make_model()
    codec, start = subspace(model), state(model)
    opt = LatentOptimizer(model, codec, optimizer, lr=0.02)
    for x in batches():
        train(model, opt, [x])
        moved = {n: t - start[n] for n, t in state(model).items()}
        size = distance(state(model), start)
        assert size > 1e-3
        assert outside(codec, moved) <= 4 * EPS * sum(float(t.norm()) for t in start.values())


def test_the_payload_is_what_was_trained() -> None:
    model = make_model()
    codec, start = subspace(model), state(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    train(model, opt)
    decoded = codec.decoder.decode(opt.payload())
    moved = {n: t - start[n] for n, t in state(model).items()}
    # Only the rounding of theta_0 + Dec(z) and of its difference is between them.
    assert distance(decoded, moved) <= 2 * EPS * distance(
        state(model), {n: 0 * t for n, t in start.items()}
    )
    assert distance(decoded, {n: 0 * t for n, t in moved.items()}) > 1e-2


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_quantised_payload_loses_only_quantisation(bits: int) -> None:
    model = make_model()
    codec = Chain(subspace(model), BlockQuant(BlockQuantConfig(bits, block=16)))
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    train(model, opt)
    sent = codec.read_code(opt.payload())
    by_hand = codec.read_code(codec.write_code(opt.code))
    assert torch.equal(sent, by_hand)
    error = float((sent - opt.code).norm() / opt.code.norm())
    assert 0 < error < {8: 0.02, 4: 0.2, 2: 0.8}[bits]


@pytest.mark.parametrize("kind", ["linear", "lambda", "cosine"])
def test_schedulers_act_as_ever(kind: str) -> None:
    def scheduler(opt: torch.optim.Optimizer) -> Any:
        if kind == "linear":
            return torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=4)
        if kind == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (step + 1))

    plain, latent = make_model(), make_model()
    codec = subspace(latent, 1.0)
    pair = [
        (plain, torch.optim.SGD(plain.parameters(), lr=0.2)),
        (latent, LatentOptimizer(latent, codec, torch.optim.SGD, lr=0.2)),
    ]
    rates: list[list[float]] = [[], []]
    for i, (model, opt) in enumerate(pair):
        schedule = scheduler(opt)
        for x in batches():
            train(model, opt, [x])
            schedule.step()
            rates[i].append(opt.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    size = distance(state(plain), {n: 0 * t for n, t in state(plain).items()})
    assert distance(state(plain), state(latent)) <= 50 * EPS * size


def test_clipping_acts_on_parameter_gradients() -> None:
    plain, latent = make_model(), make_model()
    codec = subspace(latent, 1.0)
    start = state(plain)
    for model, opt in (
        (plain, torch.optim.SGD(plain.parameters(), lr=1.0)),
        (latent, LatentOptimizer(latent, codec, torch.optim.SGD, lr=1.0)),
    ):
        (100 * loss_of(model, next(batches()))).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        assert float(norm) > 1
        opt.step()
        assert distance(state(model), start) == pytest.approx(0.25, rel=1e-5)
    assert distance(state(plain), state(latent)) < 1e-6


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_the_parameters(to_none: bool) -> None:
    model = make_model()
    opt = LatentOptimizer(model, subspace(model), torch.optim.AdamW, lr=0.1)
    loss_of(model, next(batches())).backward()
    opt.zero_grad(set_to_none=to_none)
    for p in model.parameters():
        assert p.grad is None if to_none else not p.grad.any()


def test_accumulated_gradients_are_one_step_of_their_sum() -> None:
    parts, whole = make_model(), make_model()
    data = list(batches(4))
    codec = subspace(parts)
    a = LatentOptimizer(parts, codec, torch.optim.SGD, lr=0.1)
    b = LatentOptimizer(whole, codec, torch.optim.SGD, lr=0.1)
    for x in data:
        (loss_of(parts, x) / 4).backward()
    a.step()
    loss_of(whole, torch.cat(data)).backward()
    b.step()
    assert torch.allclose(a.code, b.code, atol=1e-7)
    assert float(a.code.norm()) > 1e-3


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    model, twin = make_model(), make_model()
    codec = subspace(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.05)
    reference = LatentOptimizer(twin, codec, torch.optim.AdamW, lr=0.05)
    for x in batches():

        def closure(x: Tensor = x) -> float:
            opt.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss.item()

        expected = loss_of(model, x).item()
        assert opt.step(closure) == expected
    train(twin, reference)
    assert equal(state(model), state(twin))


def test_gradient_scaling_is_undone_and_overflow_skipped() -> None:
    scaled, plain = make_model(), make_model()
    codec = subspace(scaled)
    opt = LatentOptimizer(scaled, codec, torch.optim.AdamW, lr=0.05)
    reference = LatentOptimizer(plain, codec, torch.optim.AdamW, lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for i, x in enumerate(batches()):
        opt.zero_grad()
        scaler.scale(loss_of(scaled, x) * (torch.inf if i == 2 else 1.0)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e6)
        before = opt.code.clone()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(opt.code, before) == (i == 2)
        if i != 2:
            reference.zero_grad()
            loss_of(plain, x).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1e6)
            reference.step()
    assert equal(state(scaled), state(plain))  # a power of two scales without rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_low_precision_parameters(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    codec = Identity().bind(spec_of(model))
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=1e-4)
    plain = torch.ones((), dtype=dtype)
    for _ in range(400):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        plain = plain - 1e-4 * torch.ones((), dtype=dtype)
    unit = torch.finfo(dtype).eps
    assert plain == 1  # without the anchor every step would have been rounded away
    assert all(float((p.detach() - 0.96).abs().max()) <= unit for p in model.parameters())


def test_bf16_parameters_are_the_anchor_plus_the_decoded_code() -> None:
    model = make_model(torch.bfloat16)
    codec, start = subspace(model), state(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    train(model, opt, batches(dtype=torch.bfloat16))
    decoded = codec.decoder.decode(opt.payload())
    for name, p in model.named_parameters():
        assert p.dtype == torch.bfloat16
        wanted = (start[name].float() + decoded[name].float()).bfloat16()
        assert torch.equal(p, wanted)


def test_float64_parameters_keep_their_digits() -> None:
    model = make_model(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    start = state(model)
    opt = LatentOptimizer(model, subspace(model), torch.optim.SGD, lr=0.1)
    opt.step()
    assert equal(state(model), start)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_resuming_mid_training_is_bit_exact(optimizer: type[torch.optim.Optimizer]) -> None:
    data = list(batches(8))
    options: dict[str, Any] = {"lr": 0.02}
    if optimizer is torch.optim.SGD:
        options["momentum"] = 0.9
    whole = make_model()
    codec = subspace(whole)
    opt = LatentOptimizer(whole, codec, optimizer, **options)
    train(whole, opt, data[:3])
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    train(whole, opt, data[3:])

    torch.manual_seed(9)
    again = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))  # another start
    resumed = LatentOptimizer(again, codec, optimizer, **{**options, "lr": 1.0})
    resumed.load_state_dict(saved)
    train(again, resumed, data[3:])
    assert torch.equal(resumed.code, opt.code)
    assert equal(state(again), state(whole))
    assert resumed.payload().to_bytes() == opt.payload().to_bytes()
    # And neither training after it nor loading it has changed what was saved.
    assert torch.equal(saved["w"], kept["w"])
    for was, now in zip(
        kept["inner"]["state"].values(), saved["inner"]["state"].values(), strict=True
    ):
        for key, value in was.items():
            assert (
                value is None
                if now[key] is None
                else torch.equal(torch.as_tensor(now[key]), torch.as_tensor(value))
            )


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_a_nonlinear_codec_at_rest_leaves_parameters_bitwise_unchanged(variant: str) -> None:
    model, codec = nonlinear(variant)
    zero = codec.from_code(torch.zeros(codec.code_numel(spec_of(model))))
    assert any(bool(t.any()) for t in zero.values()) == (variant == "literal")
    start = state(model)
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=0.1)
    assert equal(state(model), start)
    opt.step()  # no gradient: the code stays zero
    assert equal(state(model), start)


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_a_nonlinear_codec_moves_by_the_difference_to_its_zero(variant: str) -> None:
    model, codec = nonlinear(variant)
    start = state(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        x = torch.randn(16, 128, generator=generator)
        opt.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    there, zero = codec.from_code(opt.code), codec.from_code(torch.zeros_like(opt.code))
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), start[name] + (there[name] - zero[name]))
    assert distance(state(model), start) > 1e-3


@pytest.mark.parametrize("variant", ["literal", "working"])
def test_a_nonlinear_step_follows_the_vector_jacobian_product(variant: str) -> None:
    model, codec = nonlinear(variant)
    opt = LatentOptimizer(model, codec, torch.optim.SGD, lr=1.0)
    x = torch.randn(16, 128)
    model(x).square().mean().backward()
    start = state(model)
    leaf = torch.zeros(codec.code_numel(spec_of(model)), requires_grad=True)
    out, zero = codec.from_code(leaf), codec.from_code(leaf.detach())
    moved = {n: start[n] + out[n] - zero[n] for n in out}
    torch.func.functional_call(model, moved, (x,)).square().mean().backward()
    opt.step()
    assert leaf.grad is not None
    scale = float(leaf.grad.norm())
    assert scale > 0
    assert float((opt.code + leaf.grad).norm()) <= 1e-5 * scale


def test_rebase_starts_again_from_here() -> None:
    model = make_model()
    codec = subspace(model)
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.02)
    train(model, opt)
    middle = state(model)
    opt.rebase()
    assert not opt.code.any()
    assert equal(state(model), middle)
    train(model, opt)
    decoded = codec.decoder.decode(opt.payload())
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), middle[name] + decoded[name])


@pytest.mark.parametrize("scale", ["auto", 1.0, 3])
def test_an_adaptive_step_has_the_norm_of_a_step_without_codec(scale: Any) -> None:
    model, plain = make_model(), make_model()
    start = state(model)
    for m, opt in (
        (plain, torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0)),
        (
            model,
            LatentOptimizer(
                model, subspace(model), torch.optim.AdamW, scale=scale, lr=0.01, weight_decay=0
            ),
        ),
    ):
        train(m, opt, batches(1))
    ratio = distance(state(model), start) / distance(state(plain), start)
    # One Adam step moves each value by lr: norms are lr sqrt(n) here, lr s sqrt(m) there.
    wanted = 1.0 if scale == "auto" else scale * 0.5**0.5
    assert ratio == pytest.approx(wanted, rel=1e-3)


def test_the_scale_is_part_of_the_chain_rule() -> None:
    """With ``z = s w``, gradient descent on ``w`` moves ``z`` by ``s^2`` times its gradient."""
    codes = []
    for scale in (1.0, 3.0):
        model = make_model()
        opt = LatentOptimizer(model, subspace(model), torch.optim.SGD, scale=scale, lr=0.01)
        train(model, opt, batches(1))
        codes.append(opt.code)
    assert float(codes[0].norm()) > 1e-3
    assert torch.allclose(codes[1], 9 * codes[0], rtol=1e-5, atol=0)


def test_parameters_stay_in_the_groups_and_settings_reach_the_inner_optimiser() -> None:
    model = make_model()
    opt = LatentOptimizer(model, subspace(model), torch.optim.AdamW, lr=0.02, betas=(0.5, 0.6))
    assert [id(p) for g in opt.param_groups for p in g["params"]] == [
        id(p) for p in model.parameters()
    ]
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[0]["weight_decay"] = 0.0
    start = state(model)
    train(model, opt)
    assert equal(state(model), start)
    assert opt.inner.param_groups[0]["betas"] == (0.5, 0.6)


def test_parameters_may_come_by_name_and_in_any_order() -> None:
    model = make_model()
    named = dict(reversed(list(model.named_parameters())))
    codec = subspace(model)
    opt = LatentOptimizer(named, codec, torch.optim.SGD, lr=0.1)
    twin = make_model()
    reference = LatentOptimizer(twin, codec, torch.optim.SGD, lr=0.1)
    train(model, opt)
    train(twin, reference)
    assert equal(state(model), state(twin))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)),
        nn.Sequential(nn.Linear(6, 8)),
        make_model(torch.bfloat16),
        make_model().requires_grad_(False),
    ],
    ids=["shape", "names", "dtype", "frozen"],
)
def test_another_model_is_refused(model: nn.Module) -> None:
    with pytest.raises(UpdateError, match="expected"):
        LatentOptimizer(model, subspace(make_model()), torch.optim.AdamW, lr=0.1)


@pytest.mark.parametrize("scale", ["none", 0, -1.0])
def test_a_bad_scale_is_named(scale: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="scale"):
        LatentOptimizer(model, subspace(model), torch.optim.AdamW, scale=scale, lr=0.1)


def test_an_unbound_codec_is_refused() -> None:
    with pytest.raises(ConfigError, match="bind"):
        LatentOptimizer(make_model(), Identity(), torch.optim.AdamW, lr=0.1)


def test_a_diverged_code_is_not_sent() -> None:
    model = make_model()
    opt = LatentOptimizer(model, subspace(model), torch.optim.SGD, lr=0.1)
    loss_of(model, next(batches())).backward()
    next(model.parameters()).grad[0, 0] = torch.nan
    opt.step()
    with pytest.raises(NonFiniteError, match="code"):
        opt.payload()
