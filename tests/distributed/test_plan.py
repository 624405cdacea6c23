"""Which parameter is coded how."""

import pytest

from gradcodec.codecs import BlockQuant, Cast, Identity, RotatedSign, TopK
from gradcodec.distributed.coding import flat_route, wants_feedback
from gradcodec.distributed.lowrank import LowRank
from gradcodec.distributed.plan import Plan, UnitPlan
from gradcodec.errors import ConfigError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.cast import CastConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.types import TensorSpec, UpdateSpec

SHAPES = {"embed.weight": (500, 64), "h.0.weight": (128, 128), "h.0.bias": (128,), "n": (9000,)}


def test_the_first_rule_that_matches_wins() -> None:
    plan = Plan(SHAPES, "int4", 4096, [("h.*", "int8"), ("*.weight", "int2")])
    assert plan.labels() == {
        "embed.weight": "int2",
        "h.0.weight": "int8",
        "h.0.bias": "int8",
        "n": "int4",
    }


def test_small_parameters_are_raw_unless_a_rule_names_them() -> None:
    assert Plan(SHAPES, "int4", 4096, []).labels()["h.0.bias"] == "fp32"
    assert Plan(SHAPES, "int4", 0, []).labels()["h.0.bias"] == "int4"
    assert Plan(SHAPES, "int4", 4096, [("*bias", "sign")]).labels()["h.0.bias"] == "sign"


@pytest.mark.parametrize("pattern", ["*.baias", "H.*", ""])
def test_a_rule_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        Plan(SHAPES, "int4", 4096, [(pattern, "fp32")])


def test_a_rule_behind_another_is_no_error() -> None:
    plan = Plan(SHAPES, "int4", 4096, [("*", "int8"), ("n", "fp32")])
    assert set(plan.labels().values()) == {"int8"}


def test_low_rank_is_for_matrices_that_gain() -> None:
    plan = Plan(SHAPES, LowRank(rank=4, other="int8"), 100, [])
    assert {n for n, e in plan.entries.items() if e.lowrank} == {"embed.weight", "h.0.weight"}
    assert plan.labels()["n"] == "int8"
    high = Plan(SHAPES, LowRank(rank=60), 100, []).entries
    assert {n for n, e in high.items() if e.lowrank} == {"h.0.weight"} - {
        n for n, s in SHAPES.items() if len(s) == 2 and 60 * sum(s) >= s[0] * s[1]
    }


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"refresh": 0}, {"rank": 1.5}])
def test_low_rank_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LowRank(**wrong)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="int4"):
        Plan(SHAPES, "int3", 0, [])
    with pytest.raises(ConfigError, match="expected a codec name"):
        Plan(SHAPES, LowRank(code="int3"), 0, [])


def test_codecs_that_need_a_table_are_refused() -> None:
    bound = TopK().bind(UpdateSpec((TensorSpec("n", (9000,)),)))
    with pytest.raises(ConfigError, match="needs no tensor table"):
        flat_route(bound)
    assert AutoencoderConfig.kind == "autoencoder"


def test_feedback_is_on_where_something_is_lost_and_comes_back() -> None:
    assert not wants_feedback(Identity())
    assert not wants_feedback(Cast(CastConfig("bfloat16")))
    assert wants_feedback(BlockQuant(BlockQuantConfig(4)))
    assert wants_feedback(TopK())
    assert wants_feedback(RotatedSign())
    assert not wants_feedback(RotatedSign(RotatedSignConfig(256, 64)))


@pytest.mark.parametrize("stochastic", [False, True])
def test_no_feedback_where_more_may_be_lost_than_there_was(stochastic: bool) -> None:
    one_bit = BlockQuantConfig(1, 64, scale="absmax", stochastic=stochastic)
    assert not wants_feedback(BlockQuant(one_bit))


@pytest.mark.parametrize("feedback", ["auto", True, False])
@pytest.mark.parametrize("scattered", [True, False])
def test_names_are_replaced_in_a_reduce_scatter_that_keeps_no_residual(
    feedback: bool | str, scattered: bool
) -> None:
    rules = [("a", "int8"), ("b", "int2"), ("c", BlockQuant(BlockQuantConfig(4)))]
    plan = UnitPlan("int4", rules, error_feedback=feedback, scattered=scattered)
    replaced = scattered and feedback == "auto"
    assert plan.substituted == (
        {"int4": "int4-unbiased", "int8": "int8-unbiased"} if replaced else {}
    )
    assert plan.codec_of("x", []).label == ("int4-unbiased" if replaced else "int4")
    assert plan.codec_of("x", []).feedback == (feedback is True or not (replaced or not feedback))
    assert plan.codec_of("c", []).codec.digest == BlockQuant(BlockQuantConfig(4)).digest


@pytest.mark.parametrize("scattered", [True, False])
def test_feedback_that_is_asked_for_is_kept_by_whatever_loses_something(scattered: bool) -> None:
    rules = [("half", "fp16"), ("whole", "fp32")]
    plan = UnitPlan("int4", rules, error_feedback=True, scattered=scattered)
    kept = {unit: plan.codec_of(unit, []).feedback for unit in ("half", "whole", "x")}
    assert kept == {"half": True, "whole": False, "x": True}


def test_only_a_plan_that_codes_nothing_is_exact() -> None:
    assert Plan(SHAPES, "fp32", 0, []).exact
    assert not Plan(SHAPES, "fp32", 0, [("n", "int8")]).exact
    assert not Plan(SHAPES, LowRank(rank=1, code="fp32"), 0, []).exact
