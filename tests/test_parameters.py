"""One name for a parameter, whatever wraps it; one optimiser, whatever wraps that."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from gradcodec.errors import ConfigError
from gradcodec.parameters import (
    all_parameters,
    named_parameters,
    plain_modules,
    plain_name,
    plain_names,
    unwrap_optimizer,
)


class Block(nn.Module):
    """Has a submodule called ``module``, as a wrapper's is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))


def make_model() -> nn.Sequential:
    return nn.Sequential(Block(), nn.Linear(3, 2))


NAMES = ["0.scale", "0.module.weight", "0.module.bias", "1.weight", "1.bias"]


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def inside(module: nn.Module, wrap: Any) -> nn.Module:
    for name, child in list(module.named_children()):
        setattr(module, name, wrap(child))
    return module


WRAPPED = {
    "plain": make_model,
    "compiled": lambda: compiled(make_model()),
    "compiled inside": lambda: inside(make_model(), compiled),
    "compiled twice": lambda: compiled(inside(make_model(), compiled)),
    "checkpointed": lambda: checkpoint_wrapper(make_model()),
    "checkpointed inside, compiled": lambda: compiled(inside(make_model(), checkpoint_wrapper)),
    "data parallel": lambda: nn.DataParallel(compiled(make_model())),
    "data parallel inside": lambda: compiled(inside(make_model(), nn.DataParallel)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_are_those_of_the_innermost_model(kind: str) -> None:
    model = WRAPPED[kind]()
    assert list(named_parameters(model)) == NAMES
    assert [id(p) for p in named_parameters(model).values()] == [id(p) for p in model.parameters()]


def test_modules_have_plain_names_too() -> None:
    model = compiled(inside(make_model(), checkpoint_wrapper))
    names = [n for n, m in plain_modules(model) if isinstance(m, nn.Linear)]
    assert names == ["0.module", "1"]


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_fsdp_wrapped_module", ""),
        ("_fsdp_wrapped_module.0._fsdp_wrapped_module.linear", "0.linear"),
        ("layers.1._checkpoint_wrapped_module.weight", "layers.1.weight"),
        ("_orig_mod.head", "head"),
        ("head", "head"),
        ("my_orig_mod.module.head", "my_orig_mod.module.head"),
    ],
)
def test_a_bare_name_loses_what_no_model_has_by_itself(wrapped: str, plain: str) -> None:
    assert plain_name(wrapped) == plain


def test_names_in_a_mapping_are_the_callers() -> None:
    model = make_model()
    assert list(named_parameters(dict(model.named_parameters()))) == NAMES
    assert list(named_parameters(model.named_parameters())) == NAMES
    assert list(named_parameters(dict(compiled(model).named_parameters()))) == NAMES
    ddp_like = {f"module.{n}": p for n, p in model.named_parameters()}
    assert list(named_parameters(ddp_like)) == list(ddp_like)


def test_a_leading_module_goes_where_a_codec_or_state_says_so() -> None:
    values = {"module.module.weight": 1, "module.scale": 2}
    assert list(plain_names(values, ["module.weight", "scale"])) == ["module.weight", "scale"]
    assert list(plain_names(values, ["scale"])) == ["module.weight", "scale"]
    for known in (list(values), ["module.scale"], ["other"], []):
        assert list(plain_names(values, known)) == list(values)
    wrapped = {"module._orig_mod.w": 1}
    assert list(plain_names(wrapped, ["w"])) == ["w"]


def test_frozen_and_shared_parameters_come_once_or_not() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    b.bias.requires_grad_(False)
    assert list(named_parameters(nn.Sequential(a, b))) == ["0.weight", "0.bias"]
    assert list(all_parameters(nn.Sequential(a, b))) == ["0.weight", "0.bias", "1.bias"]
    assert list(named_parameters({"a": a.weight, "b": a.weight})) == ["a"]


def test_nothing_to_train_or_two_of_a_name_are_errors() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        named_parameters(nn.Sequential())
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for pairs in ([("a", p), ("a", p)], {"a": p, "_orig_mod.a": q}):
        with pytest.raises(ConfigError, match="'a' came twice"):
            named_parameters(pairs)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (make_model().parameters(), "generator of Parameter"),
        ([{"params": []}], "list of dict"),
        (None, "NoneType"),
        ({"a": 3}, "a int as 'a'"),
        (nn.LazyLinear(3), "'weight' has no shape yet"),
    ],
)
def test_what_is_no_named_parameter_is_refused(source: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        named_parameters(source)


class Wrapper:
    """As Lightning's: no torch optimiser itself."""

    def __init__(self, optimizer: Any, attribute: str) -> None:
        setattr(self, attribute, optimizer)


@pytest.mark.parametrize("attribute", ["optimizer", "_optimizer", "original_optimizer"])
def test_the_inner_optimiser_is_found_through_every_wrapper(attribute: str) -> None:
    inner = torch.optim.SGD(make_model().parameters(), lr=0.1)
    assert unwrap_optimizer(Wrapper(inner, attribute)) is inner


def test_accelerate_is_unwrapped_twice_over_too() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    model = make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(inner)
    assert isinstance(prepared, AcceleratedOptimizer)
    assert unwrap_optimizer(prepared) is inner
    assert unwrap_optimizer(AcceleratedOptimizer(prepared)) is inner


def test_what_wraps_no_optimiser_comes_back_as_it_is() -> None:
    itself = Wrapper(None, "optimizer")
    around = torch.optim.SGD(make_model().parameters(), lr=0.1)
    around.optimizer = around  # type: ignore[attr-defined]
    for thing in ({"w": torch.zeros(1)}, itself, Wrapper(3, "optimizer"), around, None):
        assert unwrap_optimizer(thing) is thing
