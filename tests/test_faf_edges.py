"""LatentOptimizer in other hands: copied, pickled, scheduled, wrapped; and what it refuses."""

import copy
import pickle  # noqa: TID251 - users pickle optimisers; the library never does
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faf_toy import batches, equal, loss_of, make_model, nonlinear, spec_of, state, subspace, train
from torch import nn
from torch.optim import lr_scheduler

from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.faf import LatentOptimizer

Pair = tuple[nn.Module, LatentOptimizer]


def make_pair(**options: Any) -> Pair:
    model = make_model()
    settings = {"lr": 0.02, **options}
    return model, LatentOptimizer(model, subspace(model), torch.optim.AdamW, **settings)


def deep_copied(pair: Pair) -> Pair:
    return copy.deepcopy(pair)


def pickled(pair: Pair) -> Pair:
    made: Pair = pickle.loads(pickle.dumps(pair))
    return made


COPIES = [deep_copied, pickled]


@pytest.mark.parametrize("change", [None, "clamped before copying"])
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_along_with_its_model_trains_on(
    copied: Callable[[Pair], Pair], change: str | None
) -> None:
    data = list(batches(6))
    model, opt = make_pair()
    train(model, opt, data[:3])
    if change:
        with torch.no_grad():
            model[0].weight.clamp_(-0.1, 0.1)  # type: ignore[index,operator]
    other, its = copied((model, opt))
    assert not set(map(id, other.parameters())) & set(map(id, model.parameters()))
    kept = state(model)
    train(other, its, data[3:])
    assert equal(state(model), kept)  # the original has not moved
    train(model, opt, data[3:])
    assert equal(state(other), state(model))
    assert torch.equal(its.code, opt.code)
    assert its.payload().to_bytes() == opt.payload().to_bytes()


@pytest.mark.parametrize("copied", COPIES)
def test_a_nonlinear_codec_is_copied_too(copied: Callable[[Pair], Pair]) -> None:
    model, codec = nonlinear("working")
    opt = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)
    other, its = copied((model, opt))
    for m, o in ((model, opt), (other, its)):
        m(torch.ones(2, 128)).square().mean().backward()
        o.step()
    assert equal(state(model), state(other))
    assert opt.code.any()


def test_a_copy_of_the_optimiser_alone_has_parameters_of_its_own_as_torch_has() -> None:
    model, opt = make_pair()
    train(model, opt)
    start, its = state(model), copy.deepcopy(opt)
    for p in its.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    code = its.code
    its.step()
    assert not torch.equal(its.code, code)
    assert equal(state(model), start)
    assert torch.equal(opt.code, code)


@pytest.mark.parametrize("copied", COPIES)
def test_a_scheduler_on_the_copy_acts_as_on_the_original(copied: Callable[[Pair], Pair]) -> None:
    data = list(batches(6))
    model, opt = make_pair()
    schedule = lr_scheduler.CosineAnnealingLR(opt, 6)
    for x in data[:3]:
        train(model, opt, [x])
        schedule.step()
    other, its = copied((model, opt))
    again = lr_scheduler.CosineAnnealingLR(its, 6, last_epoch=2)
    again.load_state_dict(schedule.state_dict())
    for m, o, s in ((model, opt, schedule), (other, its, again)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            for x in data[3:]:
                train(m, o, [x])
                s.step()
    assert its.param_groups[0]["lr"] == opt.param_groups[0]["lr"] < 0.02
    assert equal(state(model), state(other))


def test_a_scheduler_may_change_other_settings_than_the_rate() -> None:
    """OneCycleLR moves Adam's betas, too, and the inner optimiser must hear of it."""
    model, opt = make_pair()
    schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=5)
    seen = []
    for x in batches(4):
        train(model, opt, [x])
        seen.append(opt.inner.param_groups[0]["betas"][0])
        schedule.step()
    assert len(set(seen)) == 4
    plain = make_model()
    its = torch.optim.AdamW(plain.parameters(), lr=0.02)
    twin = lr_scheduler.OneCycleLR(its, max_lr=0.1, total_steps=5)
    for beta in seen:
        assert its.param_groups[0]["betas"][0] == beta
        train(plain, its, batches(1))
        twin.step()


class Counting(torch.optim.SGD):
    """Keeps numbers in its group, as Prodigy and schedule-free optimisers do."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def test_what_the_inner_optimiser_keeps_in_its_group_stays() -> None:
    model = make_model()
    opt = LatentOptimizer(model, subspace(model), Counting, lr=0.1)
    train(model, opt, batches(3))
    assert opt.inner.param_groups[0]["k"] == opt.param_groups[0]["k"] == 3


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"maximize": True}])
def test_implementations_of_the_inner_optimiser_are_the_users_choice(options: Any) -> None:
    model, opt = make_pair()
    twin, other = make_pair(**options)
    train(model, opt)
    train(twin, other)
    same = max(float((a - b).abs().max()) for a, b in zip(*map(values, (model, twin)), strict=True))
    assert (same < 1e-5) == ("maximize" not in options)


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters()]


def test_a_fused_optimiser_under_gradient_scaling_skips_overflow() -> None:
    model, opt = make_pair(fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for factor in (1.0, torch.inf, 1.0):
        opt.zero_grad()
        scaler.scale(loss_of(model, next(batches())) * factor).backward()
        before = opt.code
        scaler.step(opt)
        scaler.update()
        assert torch.equal(opt.code, before) == (factor == torch.inf)
        assert not opt.code.isnan().any()


def test_a_sparse_gradient_is_the_dense_one() -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=sparse)
        codec = Identity().bind(spec_of(table))
        opt = LatentOptimizer(table, codec, torch.optim.AdamW, lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            table(torch.tensor([1, 1, 5])).square().sum().backward()
            opt.step()
        ends.append(state(table))
    assert equal(*ends)


def test_a_nan_gradient_makes_nan_parameters_as_with_adamw() -> None:
    model, opt = make_pair()
    plain = make_model()
    reference = torch.optim.AdamW(plain.parameters(), lr=0.02)
    for m, o in ((model, opt), (plain, reference)):
        loss_of(m, next(batches())).backward()
        m[2].bias.grad[0] = torch.nan  # type: ignore[index]
        o.step()
        assert m[2].bias.isnan().any()  # type: ignore[index]
        assert m[0].weight.isfinite().all()  # type: ignore[index]


def test_a_parameter_frozen_later_only_lacks_gradients() -> None:
    model, opt = make_pair(weight_decay=0.0)
    start = state(model)
    model[0].requires_grad_(False)  # type: ignore[index]
    train(model, opt)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {"2.weight", "2.bias"}


def test_accelerate_wraps_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, reference = make_pair()
    model, opt = make_pair()
    train(plain, reference)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_model, prepared = accelerator.prepare(model, opt)
    for x in batches():
        prepared.zero_grad()
        accelerator.backward(loss_of(prepared_model, x))
        prepared.step()
    assert equal(state(model), state(plain))
    assert torch.equal(opt.code, reference.code)


def test_a_wrapped_model_has_the_codecs_names() -> None:
    _, opt = make_pair()
    twin = make_model()
    compiled = torch.compile(twin, backend="eager")
    other = LatentOptimizer(compiled, subspace(twin), torch.optim.AdamW, lr=0.02)
    assert list(other.named) == list(opt.named)
    named = {f"module.{n}": p for n, p in twin.named_parameters()}  # dict(ddp.named_parameters())
    assert list(LatentOptimizer(named, subspace(twin), torch.optim.SGD).named) == list(opt.named)


# -- what is refused, by name, when it is handed over --------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        (torch.optim.LBFGS, {}, "LBFGS evaluates the loss at points of its own"),
        (torch.optim.SparseAdam, {}, "SparseAdam takes sparse gradients only"),
        (torch.optim.Muon, {}, "Muon does not take one vector of"),
        (torch.optim.AdamW, {"lr": -1.0}, "AdamW .* Invalid learning rate: -1"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(1))]), {}, "class .* got an instance of SGD"),
        ("adamw", {}, "class .* got an instance of str"),
        (dict, {}, "dict .*makes|dict does not take"),
    ],
)
def test_optimisers_that_cannot_work_are_refused(optimizer: Any, options: Any, says: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=says):
        LatentOptimizer(model, subspace(model), optimizer, **options)


@pytest.mark.parametrize("codec", [BlockQuant, "int4", None])
def test_what_is_no_codec_is_refused(codec: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a codec .*bind"):
        LatentOptimizer(make_model(), codec, torch.optim.AdamW)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), True, None])
def test_scales_that_are_no_positive_number_are_refused(scale: Any) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="scale"):
        LatentOptimizer(model, subspace(model), torch.optim.AdamW, scale=scale)


def test_parameters_on_several_devices_or_without_values_are_refused() -> None:
    model = make_model()
    codec = subspace(model)
    elsewhere = {
        n: nn.Parameter(p.to("meta")) if n == "0.bias" else p for n, p in model.named_parameters()
    }
    with pytest.raises(UpdateError, match=r"'0.bias': .* a meta tensor, which has no values"):
        LatentOptimizer(elsewhere, codec, torch.optim.AdamW)
    with pytest.raises(UpdateError, match="which has no values"):
        LatentOptimizer(make_model().to("meta"), codec, torch.optim.AdamW)


def test_frozen_parameters_are_named() -> None:
    model = make_model()
    codec = subspace(model)
    model[2].requires_grad_(False)  # type: ignore[index]
    with pytest.raises(UpdateError, match=r"2 of the codec's are frozen: \['2.weight', '2.bias'\]"):
        LatentOptimizer(model, codec, torch.optim.AdamW)


def test_a_complex_parameter_is_refused() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    codec = Identity().bind(spec_of(nn.Linear(4, 4, bias=False)))
    with pytest.raises(UpdateError):
        LatentOptimizer(model, codec, torch.optim.AdamW)


@pytest.mark.parametrize("known", [True, False])
def test_no_group_can_be_added(known: bool) -> None:
    model, opt = make_pair()
    p = next(model.parameters()) if known else nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match="make a new LatentOptimizer"):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1
    with pytest.raises(ConfigError, match="make a new"):
        copy.deepcopy(opt).add_param_group({"params": [p]})


def test_groups_that_were_exchanged_are_noticed() -> None:
    _, opt = make_pair()
    opt.param_groups[0]["params"] = list(make_model().parameters())
    for use in (opt.step, opt.rebase, opt.state_dict):
        with pytest.raises(ConfigError, match="param_groups hold other parameters"):
            use()


def test_a_model_in_another_dtype_is_noticed() -> None:
    model, opt = make_pair()
    model.half()
    for use in (opt.step, opt.rebase, opt.state_dict):
        with pytest.raises(UpdateError, match="make a new optimiser after"):
            use()
    model.float()
    train(model, opt)


def test_the_state_of_another_optimiser_is_refused_and_nothing_changed() -> None:
    model, opt = make_pair()
    train(model, opt)
    kept, code = state(model), opt.code
    good = opt.state_dict()
    other = nn.Sequential(nn.Linear(6, 9))
    narrow = LatentOptimizer(other, subspace(other), torch.optim.AdamW).state_dict()
    for bad, kind in (
        (torch.optim.AdamW(model.parameters()).state_dict(), ConfigError),
        (narrow, ConfigError),
        ({**good, "anchor": narrow["anchor"]}, UpdateError),
        ({**good, "since": torch.zeros(3)}, ConfigError),
        ({**good, "groups": []}, ConfigError),
    ):
        with pytest.raises(kind):
            opt.load_state_dict(bad)
        assert equal(state(model), kept)
        assert torch.equal(opt.code, code)
