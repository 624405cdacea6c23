"""Laws of the recorder: it sees what an optimiser sees, and nothing else changes."""

import copy
import pickle  # noqa: TID251 - users pickle what they hold; the library never does
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError, NonFiniteError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.moments import ExactMoment, SecondMoments
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.tgap.snapshots import SnapshotStore
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

EPS = torch.finfo(torch.float32).eps
CONFIG = SubspaceConfig(ratio=2, side="long")

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(count: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        yield torch.randn(7, 6, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def second_moment(seen: list[dict[str, Tensor]], name: str) -> tuple[Tensor, Tensor]:
    """The naive sum on the long side, in float64, and the bound of what fp32 sums may differ by."""
    total = bound = torch.zeros(())
    for g in (s[name].double() for s in seen if name in s):
        g = g.reshape(len(g), -1)
        g = g if g.shape[0] >= g.shape[1] else g.T
        total, bound = total + g @ g.T, bound + g.abs() @ g.abs().T
    return total, bound * (len(seen) * 8 + 2) * EPS


def assert_recorded(recorder: GradientRecorder, seen: list[dict[str, Tensor]]) -> None:
    assert recorder.moments is not None
    for name, moment in recorder.moments._moments.items():
        assert isinstance(moment, ExactMoment)
        total, bound = second_moment(seen, name)
        assert bool(((moment.sum.double() - total).abs() <= bound).all()), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_of_an_unknown_loop_is_recorded(kind: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[kind](model.parameters())
    recorder = GradientRecorder(model, CONFIG)
    seen = []
    with recorder:
        for x in batches():
            optimizer.zero_grad()
            loss_of(model, x).backward()
            seen.append(gradients(model))
            optimizer.step()
    assert (recorder.steps, recorder.moments.count) == (4, 4)
    assert_recorded(recorder, seen)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_with_a_recorder_is_bitwise_equal_to_training_without(kind: str) -> None:
    ends = []
    for watched in (False, True):
        model = make_model()
        optimizer = OPTIMIZERS[kind](model.parameters())
        recorder = GradientRecorder(model, CONFIG)
        torch.manual_seed(3)
        if watched:
            recorder.__enter__()
        for x in batches():
            optimizer.zero_grad()
            loss_of(model, x + torch.randn_like(x)).backward()
            optimizer.step()
        if watched:
            recorder.__exit__(None, None, None)
        ends.append(dict(model.named_parameters()))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_accumulated_gradients_are_recorded_as_their_sum() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientRecorder(model, CONFIG) as recorder:
        for x in batches(3):
            (loss_of(model, x) / 3).backward()
        seen = gradients(model)
        optimizer.step()
    assert recorder.moments.count == 1
    assert_recorded(recorder, [seen])


def test_clipped_gradients_are_recorded_as_clipped() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with GradientRecorder(model, CONFIG) as recorder:
        (1e3 * loss_of(model, next(batches()))).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.5) > 1
        seen = gradients(model)
        optimizer.step()
    assert_recorded(recorder, [seen])
    energy = sum(float(m.sum.trace()) for m in recorder.moments._moments.values())
    assert energy == pytest.approx(0.25, rel=1e-4)  # clip_grad_norm_ divides by norm + 1e-6


def test_gradient_scaling_is_undone_and_skipped_steps_are_not_recorded() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = []
    with GradientRecorder(model, CONFIG) as recorder:
        for i, x in enumerate(batches()):
            optimizer.zero_grad()
            factor = torch.inf if i == 1 else 1.0  # an overflow: the scaler skips this step
            scaler.scale(factor * loss_of(model, x)).backward()
            scaler.unscale_(optimizer)
            if i != 1:
                seen.append(gradients(model))
            scaler.step(optimizer)
            scaler.update()
    assert recorder.moments.count == 3
    assert_recorded(recorder, seen)


def test_a_foreign_optimiser_is_not_recorded() -> None:
    model, other = make_model(), make_model()
    foreign = torch.optim.AdamW(other.parameters())
    with GradientRecorder(model, CONFIG) as recorder:
        loss_of(other, next(batches())).backward()
        foreign.step()
    assert (recorder.steps, recorder.moments.count) == (0, 0)


@pytest.mark.parametrize("every", [1, 2])
def test_two_optimisers_of_one_model_contribute_what_they_hold(every: int) -> None:
    model = make_model()
    pair = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    seen = []
    with GradientRecorder(model, CONFIG, every=every) as recorder:
        for i, x in enumerate(batches()):
            model.zero_grad()
            loss_of(model, x).backward()
            if i % every == 0:
                seen.append(gradients(model))
            for optimizer in pair:
                optimizer.step()
    assert_recorded(recorder, seen)


@pytest.mark.parametrize("positional", [False, True])
def test_what_a_closure_computes_is_recorded(positional: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen, losses = [], []
    with GradientRecorder(model, CONFIG) as recorder:
        for x in batches():

            def closure(x: Tensor = x) -> float:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                seen.append(gradients(model))
                return loss.item()

            losses.append(
                optimizer.step(closure) if positional else optimizer.step(closure=closure)
            )
    assert len(seen) == recorder.moments.count == 4
    assert all(isinstance(x, float) for x in losses)
    assert_recorded(recorder, seen)


def test_the_latent_optimizer_is_recorded_once_a_step() -> None:
    model = make_model()
    spec = UpdateSpec.of(dict(model.named_parameters()))
    moments = SecondMoments(spec, CONFIG)
    moments.add({t.name: torch.randn(t.shape) for t in spec})
    codec = fit_subspace(moments)
    assert isinstance(codec, Subspace)
    optimizer = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)
    seen = []
    with GradientRecorder(model, CONFIG) as recorder:
        for x in batches():
            optimizer.zero_grad()
            loss_of(model, x).backward()
            seen.append(gradients(model))
            optimizer.step()
    assert recorder.moments.count == 4
    assert_recorded(recorder, seen)


@pytest.mark.parametrize("representation", ["gradient", "update"])
@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_after_the_block(representation: str, fails: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    before = [dict(h) for h in hooks]
    recorder = GradientRecorder(model, CONFIG, representation=representation)
    try:
        with recorder:
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [dict(h) for h in hooks] == before
    count = recorder.moments.count
    loss_of(model, next(batches())).backward()
    optimizer.step()
    assert recorder.moments.count == count == (representation == "update" and not fails)


@pytest.mark.parametrize("representation", ["gradient", "state"])
def test_blocks_do_not_nest(representation: str) -> None:
    recorder = GradientRecorder(make_model(), CONFIG, representation=representation)
    with recorder, pytest.raises(ConfigError, match="nested"), recorder:
        pass


def test_a_recorder_can_be_entered_again() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = GradientRecorder(model, CONFIG)
    for x in batches():
        with recorder:
            loss_of(model, x).backward()
            optimizer.step()
    assert recorder.moments.count == 4


def test_parameters_without_a_gradient_count_as_zero(tmp_path: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = SnapshotStore(tmp_path)
    with GradientRecorder(model, CONFIG, snapshots=store) as recorder:
        loss_of(model[0], next(batches())).backward()
        optimizer.step()
    assert not recorder.moments._moments["2.weight"].sum.any()
    assert recorder.moments._moments["0.weight"].sum.any()
    assert list(store[0])
    assert not store[0]["2.weight"].any()
    assert store[0]["0.weight"].any()


def test_every_thins_the_steps() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with GradientRecorder(model, CONFIG, every=3) as recorder:
        for i, x in enumerate(batches(7)):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            if i % 3 == 0:
                seen.append(gradients(model))
            optimizer.step()
    assert (recorder.steps, recorder.moments.count) == (7, 3)
    assert_recorded(recorder, seen)


@pytest.mark.parametrize("representation", ["update", "state"])
def test_a_block_records_its_end_once(representation: str, tmp_path: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    store = SnapshotStore(tmp_path)
    with GradientRecorder(model, representation=representation, snapshots=store):
        for x in batches():
            loss_of(model, x).backward()
            optimizer.step()
    (only,) = store
    for name, p in model.named_parameters():
        wanted = p.detach() - start[name] if representation == "update" else p.detach()
        assert torch.equal(only[name], wanted)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_of_it_kept(bad: float) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    recorder = GradientRecorder(model, CONFIG)
    loss_of(model, next(batches())).backward()
    model[2].weight.grad[0, 0] = bad
    with recorder, pytest.raises(NonFiniteError, match=r"2\.weight"):
        optimizer.step()
    assert recorder.moments.count == 0
    assert not any(m.sum.any() for m in recorder.moments._moments.values())
    assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_is_no_snapshot(tmp_path: Any) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = SnapshotStore(tmp_path)
    loss_of(model, next(batches())).backward()
    model[0].bias.grad[1] = torch.nan
    with GradientRecorder(model, snapshots=store), pytest.raises(NonFiniteError, match=r"0\.bias"):
        optimizer.step()
    assert len(store) == 0


def test_frozen_parameters_are_left_out() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    assert [t.name for t in GradientRecorder(model, CONFIG).spec] == ["2.weight", "2.bias"]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="trainable"):
        GradientRecorder(make_model().requires_grad_(False), CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every >= 1"),
        ({"every": 1.5}, "got 1.5"),
        ({"representation": "weights"}, "'weights'"),
        ({"representation": "update", "every": 2}, "counts optimiser steps"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradientRecorder(make_model(), CONFIG, **options)


class Around(torch.optim.Optimizer):
    """An optimiser that steps by another one with the same parameters, as Lookahead does."""

    def __init__(self, model: nn.Module) -> None:
        self.inner = torch.optim.SGD(model.parameters(), lr=0.1)
        super().__init__(model.parameters(), {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


@pytest.mark.parametrize("by_closure", [False, True])
def test_a_step_by_an_optimiser_inside_another_is_recorded_once(by_closure: bool) -> None:
    model = make_model()
    optimizer = Around(model)
    seen = []
    with GradientRecorder(model, CONFIG) as recorder:
        for x in batches():

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                seen.append(gradients(model))
                return loss

            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    assert (recorder.steps, recorder.moments.count) == (4, 4)
    assert_recorded(recorder, seen)


def test_a_step_that_failed_does_not_hide_the_next() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def fails() -> float:
        raise MemoryError

    loss_of(model, next(batches())).backward()
    with GradientRecorder(model, CONFIG) as recorder:
        with pytest.raises(MemoryError):
            optimizer.step(fails)
        optimizer.step()
        optimizer.step()
    assert recorder.moments.count == 2


def test_accelerate_steps_are_recorded_once_each_and_accumulated_ones_as_their_sum() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    seen = []
    with GradientRecorder(prepared, CONFIG) as recorder:
        for x in batches(4):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, x))
                if accelerator.sync_gradients:
                    seen.append(gradients(model))
                optimizer.step()
                optimizer.zero_grad()
    assert (recorder.steps, recorder.moments.count, len(seen)) == (2, 2, 2)
    assert_recorded(recorder, seen)


def test_names_are_those_of_the_model_inside() -> None:
    model = make_model()
    plain = [t.name for t in GradientRecorder(model, CONFIG).spec]
    compiled = torch.compile(model, backend="eager")
    assert [t.name for t in GradientRecorder(compiled, CONFIG).spec] == plain
    assert plain == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_a_sparse_gradient_is_recorded_as_the_dense_one(tmp_path: Any) -> None:
    table = nn.Embedding(9, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    store = SnapshotStore(tmp_path)
    with GradientRecorder(table, CONFIG, snapshots=store) as recorder:
        table(torch.tensor([1, 1, 5])).sum().backward()
        optimizer.step()
    wanted = torch.zeros(9, 4)
    wanted[1], wanted[5] = 2, 1
    assert torch.equal(store[0]["weight"], wanted)
    assert_recorded(recorder, [{"weight": wanted}])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("representation", ["gradient", "update"])
def test_a_copy_records_the_copied_model(copied: Any, representation: str) -> None:
    model = make_model()
    recorder = GradientRecorder(model, CONFIG, representation=representation)
    other, its = copied((model, recorder))
    for m, r in ((model, recorder), (other, its)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        with r:
            loss_of(m, next(batches())).backward()
            optimizer.step()
        assert r.moments.count == 1
    for name, moment in recorder.moments._moments.items():
        assert torch.equal(moment.sum, its.moments._moments[name].sum)
        assert moment.sum.any()


@pytest.mark.parametrize("representation", ["gradient", "state"])
def test_a_recorder_is_not_copied_while_it_records(representation: str) -> None:
    recorder = GradientRecorder(make_model(), CONFIG, representation=representation)
    with recorder, pytest.raises(ConfigError, match="leave its block first"):
        copy.deepcopy(recorder)


def test_moments_of_other_parameters_are_refused_at_once() -> None:
    other = SecondMoments(UpdateSpec.of({"0.weight": torch.zeros(5, 5)}), CONFIG)
    with pytest.raises(UpdateError, match=r"0\.weight: float32\[5, 6\] is not in the moments"):
        GradientRecorder(make_model(), other)
    with pytest.raises(ConfigError, match=r"expected SecondMoments.* got str"):
        GradientRecorder(make_model(), "subspace")
