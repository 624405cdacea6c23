"""Laws of ``LocalSteps``, run by every rank of a world; see ``test_local_steps.py``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.toy import assert_replicas_equal, batch, everywhere, net, sgd, weights
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradcodec.codecs import TopK
from gradcodec.distributed import LocalSteps, OuterSGD
from gradcodec.distributed.meter import ring_nbytes
from gradcodec.errors import AgreementError, ConfigError, TrainingError
from gradcodec.packers.topk import TopKConfig

AVERAGE = OuterSGD(lr=1.0, momentum=0.0)

#: Settings of the methods that the docstring names, and of every kind of exchange.
METHODS: dict[str, dict[str, Any]] = {
    "local sgd": {"codec": "fp32", "outer": AVERAGE},
    "diloco": {"codec": "fp32"},
    "streaming": {"codec": "int4", "fragments": 2, "overlap": 1, "error_feedback": False},
    "sparseloco": {
        "codec": TopK(TopKConfig(k=64, bits=2)),
        "decay": 0.95,
        "outer": AVERAGE,
        "exchange": "gather",
    },
    "sign": {"codec": "sign-rotated", "decay": 0.9},
    "sign, gathered": {"codec": "sign", "exchange": "gather", "fragments": 4},
    "subset overlapped": {"codec": "topk", "fragments": 4, "overlap": 3},
    "offloaded": {"codec": "int8", "offload": True},
}


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, local: Any, step: int) -> float:
    x, y = batch(dist.get_rank(), step)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    local.step()
    return loss.item()


def made(every: int = 4, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, LocalSteps]:
    model = net()
    optimizer = sgd(model, 0.05)
    return model, optimizer, LocalSteps(model, optimizer, every=every, **options)


def anchors(local: LocalSteps) -> Tensor:
    return torch.cat([t.reshape(-1) for t in local.anchors.tensors().values()])


def through_a_file(state: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    """As a checkpoint keeps it: tensors only."""
    return dict(load(save({k: torch.as_tensor(v) for k, v in state.items()})))


# -- what is computed -------------------------------------------------------------------------


def every_step_with_rate_one_is_averaging(rank: int, world: int) -> None:
    model, optimizer, local = made(1, codec="fp32", outer=AVERAGE)
    mine = copy.deepcopy(model)
    own = sgd(mine, 0.05)
    for step in range(4):
        one_step(model, optimizer, local, step)
        x, y = batch(rank, step)
        own.zero_grad()
        nn.functional.cross_entropy(mine(x), y).backward()
        own.step()
        mean = torch.stack(everywhere(weights(mine))).double().mean(0).float()
        with torch.no_grad():
            nn.utils.vector_to_parameters(mean, mine.parameters())
        # Anchor minus difference is rounded once more than the mean itself.
        torch.testing.assert_close(weights(model), mean, rtol=0, atol=1e-6)
        assert_replicas_equal(model)


def the_outer_step_is_torch_sgd_on_the_mean_difference(rank: int, world: int) -> None:
    for outer in (OuterSGD(), OuterSGD(0.5, 0.8, nesterov=False)):
        model, optimizer, local = made(3, codec="fp32", outer=outer)
        anchor = weights(model).clone().requires_grad_()
        reference = torch.optim.SGD(
            [anchor], outer.lr, momentum=outer.momentum, nesterov=outer.nesterov
        )
        for step in range(9):
            before = None
            if local.schedule.sent(step + 1) is not None:
                # What the inner step makes of it, without the exchange.
                x, y = batch(rank, step)
                twin, inner = _twin(model, optimizer)
                nn.functional.cross_entropy(twin(x), y).backward()
                inner.step()
                before = weights(twin)
            one_step(model, optimizer, local, step)
            if before is not None:
                anchor.grad = anchor.detach() - torch.stack(everywhere(before)).mean(0)
                reference.step()
                torch.testing.assert_close(weights(model), anchor.detach(), rtol=0, atol=3e-6)


def _twin(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    twin = copy.deepcopy(model)
    twin.zero_grad()
    inner = sgd(twin, 0.05)
    inner.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, inner


def anchors_are_equal_to_the_bit(rank: int, world: int) -> None:
    for name, options in METHODS.items():
        model, optimizer, local = made(4, **options)
        start = anchors(local).clone()
        for step in range(9):
            one_step(model, optimizer, local, step)
        local.state_dict()  # waits for what is under way
        mine = anchors(local)
        assert not torch.equal(mine, start), name
        for other in everywhere(mine):
            assert torch.equal(mine, other), name
        apart = weights(model)
        assert any(not torch.equal(apart, other) for other in everywhere(apart)), name
        local.finish()
        assert_replicas_equal(model)
        local.close()


def an_overlapped_exchange_is_merged_later(rank: int, world: int) -> None:
    model, optimizer, local = made(4, codec="fp32", overlap=2, mixing=0.25, outer=AVERAGE)
    start = anchors(local).clone()
    for step in range(4):
        one_step(model, optimizer, local, step)
    sent = torch.stack(everywhere(weights(model))).mean(0)
    one_step(model, optimizer, local, 4)
    assert torch.equal(anchors(local), start)  # nothing is merged before its time
    x, y = batch(rank, 5)
    twin, inner = _twin(model, optimizer)
    nn.functional.cross_entropy(twin(x), y).backward()
    inner.step()
    one_step(model, optimizer, local, 5)
    expected = 0.25 * weights(twin) + 0.75 * sent
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=3e-6)
    local.close()


def error_feedback_sends_what_was_lost(rank: int, world: int) -> None:
    """Without training, decay 1 sends the whole difference in the end; decay 0 forgets it."""
    left = {}
    for decay in (1.0, 0.0):
        model = net()
        local = LocalSteps(model, None, every=1, codec="topk", decay=decay, outer=AVERAGE)
        start = weights(model).clone()
        torch.manual_seed(5)
        target = start + 0.01 * torch.randn_like(start)
        with torch.no_grad():
            nn.utils.vector_to_parameters(target.clone(), model.parameters())
        for _ in range(150):
            with torch.no_grad():  # zeros would not take part in error feedback
                for p in model.parameters():
                    p += 1e-8
            local.step()
        left[decay] = float((weights(model) - target).square().sum())
        left["all"] = float((start - target).square().sum())
    # With decay 0 only what the first exchange sent has arrived.
    assert left[1.0] < 0.02 * left["all"], left
    assert left[0.0] > 0.5 * left["all"], left


def bytes_are_counted_as_they_are(rank: int, world: int) -> None:
    model, optimizer, local = made(4, codec="fp32", outer=AVERAGE)
    for step in range(8):
        one_step(model, optimizer, local, step)
    stats = local.stats()
    dense = 4 * weights(model).numel()
    assert stats["dense_bytes"] == 2 * dense
    assert stats["dense_wire_bytes"] == 8 * ring_nbytes(dense, world)
    # Two exchanges of 2 (W - 1) / W of everything; shards differ by one value, and there are tags.
    share = stats["wire_bytes"] / (2 * ring_nbytes(dense, world))
    assert 0.99 < share < 1.05, share
    model, optimizer, local = made(4, codec="sign", exchange="gather")
    for step in range(8):
        one_step(model, optimizer, local, step)
    coded = local.stats()["wire_bytes"] / (world - 1) / 2
    assert dense / 40 < coded < dense / 10, coded


# -- resuming, coming back ----------------------------------------------------------------------


def resume_is_exact(rank: int, world: int) -> None:
    for name, options in METHODS.items():
        model, optimizer, local = made(4, **options)
        for step in range(5):
            one_step(model, optimizer, local, step)
        state = through_a_file(local.state_dict())
        parts = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for step in range(5, 13):
            one_step(model, optimizer, local, step)
        local.finish()
        expected = anchors(local)
        local.close()
        again, inner, resumed = made(4, **options)
        again.load_state_dict(parts[0])
        inner.load_state_dict(parts[1])
        resumed.load_state_dict(state)
        assert resumed.stats()["steps"] == 5
        for step in range(5, 13):
            one_step(again, inner, resumed, step)
        resumed.finish()
        assert torch.equal(anchors(resumed), expected), name
        resumed.close()


def a_padded_residual_that_is_gathered_resumes_exactly(rank: int, world: int) -> None:
    for codec in ("int2-rotated", "sign-rotated"):
        options = {"codec": codec, "exchange": "gather", "decay": 0.9, "min_numel": 1}
        options["error_feedback"] = True
        model, optimizer, local = made(2, **options)
        for step in range(5):
            one_step(model, optimizer, local, step)
        state = through_a_file(local.state_dict())
        sizes = {n: (state[f"first.{n}"].numel(), p.numel()) for n, p in model.named_parameters()}
        assert any(kept > values for kept, values in sizes.values()), (
            sizes
        )  # else nothing is padded
        parts = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for step in range(5, 9):
            one_step(model, optimizer, local, step)
        expected = anchors(local)
        local.close()
        again, inner, resumed = made(2, **options)
        again.load_state_dict(parts[0])
        inner.load_state_dict(parts[1])
        resumed.load_state_dict(state)
        for step in range(5, 9):
            one_step(again, inner, resumed, step)
        assert torch.equal(anchors(resumed), expected), codec
        resumed.close()


def a_rank_that_lost_everything_comes_back(rank: int, world: int) -> None:
    for options in (METHODS["sign"], METHODS["streaming"]):
        model, optimizer, local = made(4, **options)
        for step in range(9):
            one_step(model, optimizer, local, step)
        if rank == world - 1:  # its process is new
            local.close()
            model = net(seed=7)
            optimizer = sgd(model, 0.05)
            local = LocalSteps(model, optimizer, every=4, joining=True, **options)
            with pytest.raises(ConfigError, match="call join"):
                local.step()
        local.join()
        assert local.stats()["steps"] == 9
        mine = anchors(local)
        for other in everywhere(mine):
            assert torch.equal(mine, other)
        for step in range(9, 14):
            one_step(model, optimizer, local, step)
        local.finish()
        assert_replicas_equal(model)
        local.close()


def ranks_leave_and_come_back(rank: int, world: int) -> None:
    some = dist.new_group(list(range(world - 1)))
    model, optimizer, local = made(2, codec="int4")
    for step in range(4):
        one_step(model, optimizer, local, step)
    before = anchors(local).clone()
    if rank < world - 1:
        local.join(some)
        for step in range(4, 8):
            one_step(model, optimizer, local, step)
        assert not torch.equal(anchors(local), before)
    dist.barrier()
    local.join()
    assert local.stats()["steps"] == (8 if world > 1 else 4)
    for step in range(8, 10):
        one_step(model, optimizer, local, step)
    local.finish()
    assert_replicas_equal(model)


def sharded_modules_take_local_steps(rank: int, world: int) -> None:
    """``fully_shard`` over two ranks, local steps over the other two: as plain replicas do it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = net()
    for layer in model:
        fully_shard(layer, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    with pytest.raises(ConfigError, match="replicas="):
        LocalSteps(model, None)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    local = LocalSteps(
        model, optimizer, every=2, codec="fp32", outer=AVERAGE, replicas=mesh["replicate"]
    )
    plain = net()
    replica = rank // 2
    for step in range(4):
        x, y = batch(replica, step)  # both shards of a replica see the same data
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        local.step()
    ends = [copy.deepcopy(plain) for _ in range(2)]
    for start in (0, 2):
        for r, each in enumerate(ends):
            inner = torch.optim.SGD(each.parameters(), 0.05)
            for step in (start, start + 1):
                x, y = batch(r, step)
                inner.zero_grad()
                nn.functional.cross_entropy(each(x), y).backward()
                inner.step()
        mean = (weights(ends[0]) + weights(ends[1])) / 2
        with torch.no_grad():
            for each in ends:
                nn.utils.vector_to_parameters(mean.clone(), each.parameters())
    whole = torch.cat([p.full_tensor().detach().reshape(-1) for p in model.parameters()])
    torch.testing.assert_close(whole, weights(ends[0]), rtol=0, atol=1e-5)


# -- errors -------------------------------------------------------------------------------------


def other_settings_are_refused_by_all(rank: int, world: int) -> None:
    with pytest.raises(AgreementError, match="schedule"):
        LocalSteps(net(), None, every=2 + rank)
    with pytest.raises(AgreementError, match="value of"):
        LocalSteps(net(seed=rank), None)
    with pytest.raises(ConfigError, match="averages gradients in every step"):
        LocalSteps(DistributedDataParallel(net()), None)
    for options, match in (
        ({"every": 0}, "every"),
        ({"fragments": 3}, "multiple of fragments"),
        ({"overlap": 32}, "overlap under every"),
        ({"decay": 1.5}, "decay"),
        ({"mixing": 1}, "mixing"),
        ({"exchange": "ring"}, "exchange"),
        ({"codec": "none such"}, "none such"),
        ({"outer": 0.7}, "OuterSGD"),
        ({"offload": 1}, "offload"),
        ({"every": 64, "fragments": 64}, "fragment"),
    ):
        with pytest.raises(ConfigError, match=match):
            LocalSteps(net(), None, **options)  # type: ignore[arg-type]


def states_of_others_are_refused(rank: int, world: int) -> None:
    _, _, local = made(4, codec="int4")
    state = local.state_dict()
    _, _, other = made(2, codec="int4")
    with pytest.raises(ConfigError, match="every=4, expected 2"):
        other.load_state_dict(state)
    _, _, plain = made(4, codec="int4", outer=AVERAGE)
    with pytest.raises(ConfigError, match="another outer step"):
        plain.load_state_dict(state)
    del state["anchor.0.weight"]
    with pytest.raises(ConfigError, match=r"anchor\.0\.weight"):
        local.load_state_dict(state)
    local.close()
    with pytest.raises(TrainingError, match="closed"):
        local.step()


def a_diverged_rank_stops_all_and_spares_anchors(rank: int, world: int) -> None:
    for overlap in (0, 1):
        model, optimizer, local = made(2, codec="int8", overlap=overlap)
        for step in range(4 + overlap):
            one_step(model, optimizer, local, step)
        before = anchors(local).clone()
        if rank == 0:
            with torch.no_grad():
                next(model.parameters()).view(-1)[3] = torch.nan
        on = range(5, 8)
        kept = local.reducer.residuals.first
        with pytest.raises(TrainingError, match="not finite"):
            [one_step(model, optimizer, local, step) for step in on]
        assert torch.equal(anchors(local), before)
        after = local.reducer.residuals.first
        assert kept
        assert all(torch.equal(kept[name], after[name]) for name in kept)
        local.close()


def finish_exchanges_only_what_was_trained(rank: int, world: int) -> None:
    """An outer step along zeros would still follow its momentum."""
    for fragments in (1, 2):
        model, optimizer, local = made(4, fragments=fragments)
        for step in range(8):
            one_step(model, optimizer, local, step)
        resumed_model, _, resumed = made(4, fragments=fragments)
        resumed_model.load_state_dict(model.state_dict())
        resumed.load_state_dict(local.state_dict())
        before, sent = weights(model).clone(), local.stats()["wire_bytes"]
        for one in (local, resumed):
            one.finish()
        assert_replicas_equal(model)
        assert torch.equal(weights(model), weights(resumed_model))
        # With two fragments the other one has steps of its own since it was exchanged.
        assert torch.equal(weights(model), before) == (fragments == 1)
        assert (local.stats()["wire_bytes"] == sent) == (fragments == 1)
        done, sent = weights(model).clone(), local.stats()["wire_bytes"]
        local.finish()
        assert torch.equal(weights(model), done)
        assert local.stats()["wire_bytes"] == sent
        resumed.close()
        local.close()
