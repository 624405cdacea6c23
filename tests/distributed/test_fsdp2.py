"""Compressed ``fully_shard`` beside the native one, in real gloo worlds."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from distributed.sharded_world import Results, world

QUICK = (
    "trained_fsdp2__native",
    "trained_fsdp2__fp32",
    "trained_fsdp2__int8",
    "trained_fsdp2__int4",
    "fsdp2_premul_sum",
    "fsdp2_varying__native",
    "fsdp2_varying__fp32",
    "fsdp2_varying__feedback",
    "fsdp2_resumed__feedback",
    "fsdp2_resumed__dither",
    "fsdp2_ruled",
    "fsdp2_not_a_number",
    "fsdp2_refusals",
    "fsdp2_behind__late",
    "fsdp2_behind__waited",
    "fsdp2_goes_on",
    "fsdp2_added__native",
    "fsdp2_added__fp32",
    "fsdp2_failed_pass__native",
    "fsdp2_failed_pass__fp32",
)
SLOW = (
    "trained_fsdp2__native",
    "trained_fsdp2__int2",
    "trained_fsdp2__bf16_native",
    "trained_fsdp2__bf16_fp32",
    "trained_fsdp2__bf16_int8",
    "trained_fsdp2__reduce_fp32_native",
    "trained_fsdp2__reduce_fp32_int8",
    "trained_fsdp2__reduce_fp16_native",
    "trained_fsdp2__reduce_fp16_fp32",
    "fsdp2_divided__native",
    "fsdp2_divided__fp32",
    "fsdp2_divided__int8",
    "fsdp2_accumulated__native",
    "fsdp2_accumulated__fp32",
    "fsdp2_frozen",
    "fsdp2_signs__off",
    "fsdp2_signs__on",
    "fsdp2_signs__dense",
    "fsdp2_started_late",
    "fsdp2_grouped",
    "fsdp2_compiled",
    "fsdp2_other_world",
    "fsdp2_behind__late_by_three",
    "fsdp2_behind__waited_by_three",
    "fsdp2_twice__native",
    "fsdp2_twice__fp32",
    "fsdp2_failed_reduction",  # the last: nothing is compressed after it
)
THREE = (
    "trained_fsdp2__native",
    "trained_fsdp2__fp32",
    "trained_fsdp2__int8",
    "fsdp2_behind__late",
    "fsdp2_behind__waited",
)
HSDP = (
    "hsdp_native",
    "hsdp_by_hand__fp32",
    "hsdp_by_hand__int4",
    "hsdp_by_hand__int2",
    "hsdp_divided__native",
    "hsdp_divided__fp32",
    "hsdp_by_backend__fp32",
    "hsdp_by_backend__int8",
    "hsdp_refusals",
)

slow = pytest.mark.slow


@lru_cache
def results(size: int, cases: tuple[str, ...]) -> Results:
    """One world for all laws of a list of cases."""
    return world(size, cases)


@pytest.fixture
def quick() -> Results:
    return results(2, QUICK)


@pytest.fixture
def more() -> Results:
    return results(2, SLOW)


@pytest.fixture
def hsdp() -> Results:
    return results(4, HSDP)


def weights(of: list[Any], rank: int = 0) -> torch.Tensor:
    return torch.tensor(of[rank]["weights"], dtype=torch.float64)


def distance(one: list[Any], other: list[Any]) -> float:
    """Largest over ranks of the relative distance of the parameters."""
    pairs = [(weights(one, r), weights(other, r)) for r in range(len(one))]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def test_identity_trains_as_native(quick: Results) -> None:
    assert distance(quick["trained_fsdp2__fp32"], quick["trained_fsdp2__native"]) < 1e-6


# Measured: int8 1.5e-3, int4 2.8e-2.
@pytest.mark.parametrize(("codec", "low", "high"), [("int8", 1e-4, 4e-3), ("int4", 3e-3, 8e-2)])
def test_quantised_training_is_close_but_not_equal(
    quick: Results, codec: str, low: float, high: float
) -> None:
    coded = quick[f"trained_fsdp2__{codec}"]
    assert low < distance(coded, quick["trained_fsdp2__native"]) < high


@pytest.mark.parametrize(("codec", "least"), [("int8", 2.5), ("int4", 5.0)])
def test_fewer_bytes_are_sent(quick: Results, codec: str, least: float) -> None:
    for rank in quick[f"trained_fsdp2__{codec}"]:
        stats = rank["stats"]
        assert stats["dense_wire_bytes"] > least * stats["wire_bytes"] > 0


def test_every_module_is_compressed(quick: Results) -> None:
    for rank in quick["trained_fsdp2__int8"]:
        assert set(rank["stats"]["codecs"]) == {"(root)", "0", "1", "2"}
        assert set(rank["stats"]["codecs"].values()) == {"int8-unbiased"}
        assert set(rank["stats"]["nmse"]) == {"(root)", "0", "1", "2"}
        assert all(1e-6 < e < 1e-3 for e in rank["stats"]["nmse"].values())


def test_no_residual_is_kept_by_default(quick: Results) -> None:
    for codec in ("int8", "int4"):
        assert [r["stats"]["residual_bytes"] for r in quick[f"trained_fsdp2__{codec}"]] == [0, 0]


def test_premul_sum_is_refused_with_the_way_out(quick: Results) -> None:
    for name, message in quick["fsdp2_premul_sum"]:
        assert name == "ConfigError"
        assert "PREMUL_SUM" in message
        assert "set_force_sum_reduction_for_comms(True)" in message


def test_parameters_may_lack_gradients_in_some_steps(quick: Results) -> None:
    native = quick["fsdp2_varying__native"]
    assert distance(quick["fsdp2_varying__fp32"], native) < 1e-6
    assert 5e-3 < distance(quick["fsdp2_varying__feedback"], native) < 0.15


def test_residuals_wait_while_parameters_lack_gradients(quick: Results) -> None:
    for rank in quick["fsdp2_varying__feedback"]:
        assert rank["stats"]["partial"] == {"(root)": 4}
        assert rank["stats"]["residual_bytes"] > 0


@pytest.mark.parametrize("kind", ["feedback", "dither"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(quick: Results, kind: str) -> None:
    for rank in quick[f"fsdp2_resumed__{kind}"]:
        assert rank["equal"]
        assert rank["resumed"] == rank["whole"]
        assert (rank["residual_bytes"] > 0) == (kind == "feedback")


def test_rules_name_modules_and_parameters(quick: Results) -> None:
    codecs = quick["fsdp2_ruled"][0]["codecs"]
    assert codecs["0"] == "int4-unbiased"
    assert codecs["1"] == "fp32"
    assert codecs["2"] == "int8-unbiased"


def test_nan_is_seen_by_all_and_kept_out_of_residuals(quick: Results) -> None:
    assert quick["fsdp2_not_a_number"] == [{"bad": True, "finite": True}] * 2


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("taken", "already"),
        ("codec", "int5"),
        ("auto", "for DistributedDataParallel"),
        ("feedback", "'yes'"),
        ("start", "-1"),
    ],
)
def test_refusals_say_why(quick: Results, case: str, says: str) -> None:
    for rank in quick["fsdp2_refusals"]:
        name, message = rank[case]
        assert name == "ConfigError"
        assert says in message


# -- slow ----------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("coded", "native", "low", "high"),
    [
        # gloo adds bf16 and fp16 in their own precision, we in fp32: native is the worse one.
        ("bf16_fp32", "bf16_native", -1, 2e-3),
        ("bf16_int8", "bf16_native", 1e-6, 5e-3),
        ("reduce_fp32_int8", "reduce_fp32_native", 1e-6, 5e-3),
        ("reduce_fp16_fp32", "reduce_fp16_native", -1, 1e-3),
        ("int2", "native", 1e-3, 1e-1),
    ],
)
def test_mixed_precision_policies(
    more: Results, coded: str, native: str, low: float, high: float
) -> None:
    far = distance(more[f"trained_fsdp2__{coded}"], more[f"trained_fsdp2__{native}"])
    assert low < far < high


@slow
def test_a_divide_factor_divides_as_natively(more: Results) -> None:
    native = more["fsdp2_divided__native"]
    assert distance(native, more["trained_fsdp2__native"]) > 1e-2
    assert distance(more["fsdp2_divided__fp32"], native) < 1e-6
    assert 1e-4 < distance(more["fsdp2_divided__int8"], native) < 4e-3


@slow
def test_accumulation_without_sync_sends_nothing(more: Results) -> None:
    coded, native = more["fsdp2_accumulated__fp32"], more["fsdp2_accumulated__native"]
    assert distance(coded, native) < 1e-6
    assert [r["counts"] for r in coded] == [[0, 1, 1, 2]] * 2


@slow
def test_frozen_parameters_do_not_keep_feedback_waiting(more: Results) -> None:
    for rank in more["fsdp2_frozen"]:
        assert set(rank["stats"]["partial"].values()) == {0}
        assert rank["stats"]["residual_bytes"] > 0


@slow
def test_error_feedback_makes_one_bit_enough(more: Results) -> None:
    dense = more["fsdp2_signs__dense"]
    on, off = (distance(more[f"fsdp2_signs__{k}"], dense) for k in ("on", "off"))
    assert 1e-4 < on < 0.7 * off


@slow
def test_steps_before_the_start_are_dense(more: Results) -> None:
    for rank in more["fsdp2_started_late"]:
        first, second, third, fourth, fifth = rank["sent"]
        # In the first step, and where another codec begins, ranks agree on each unit: 48 bytes.
        agreed = 4 * 48
        assert first - agreed == second == third > 4 * fourth
        assert fourth - agreed == fifth > 0


@slow
@pytest.mark.parametrize("case", ["fsdp2_grouped", "fsdp2_compiled"])
def test_grouped_and_compiled_modules_train_as_native(more: Results, case: str) -> None:
    assert distance(more[case], more["trained_fsdp2__native"]) < 1e-5


@slow
def test_a_group_of_modules_is_one_unit(more: Results) -> None:
    assert len(more["fsdp2_grouped"][0]["stats"]["codecs"]) == 2
    assert set(more["fsdp2_compiled"][0]["stats"]["codecs"]) == {"(root)", "0", "1", "2"}


@slow
def test_state_of_another_world_keeps_counts_and_drops_residuals(more: Results) -> None:
    for rank in more["fsdp2_other_world"]:
        assert (rank["steps"], rank["residual_bytes"]) == (2, 0)
        name, message = rank["unknown"]
        assert name == "ConfigError"
        assert "'0'" in message
        assert "strict=False" in message
        assert rank["loose"] == {"(root)": 2, "0": 0, "1": 2, "2": 2}


@slow
def test_three_ranks_and_sizes_that_they_do_not_divide() -> None:
    found = results(3, THREE)
    native = found["trained_fsdp2__native"]
    assert distance(found["trained_fsdp2__fp32"], native) < 1e-5
    assert 1e-4 < distance(found["trained_fsdp2__int8"], native) < 4e-3


# -- HSDP ----------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("case", ["hsdp_by_hand__fp32", "hsdp_by_backend__fp32"])
def test_hsdp_with_identity_trains_as_native(hsdp: Results, case: str) -> None:
    assert distance(hsdp[case], hsdp["hsdp_native"]) < 1e-6


@slow
@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ("hsdp_by_hand__int4", 1e-3, 5e-2),
        ("hsdp_by_hand__int2", 5e-3, 2e-1),
        ("hsdp_by_backend__int8", 1e-4, 6e-3),
    ],
)
def test_hsdp_quantised_is_close_but_not_equal(
    hsdp: Results, case: str, low: float, high: float
) -> None:
    assert low < distance(hsdp[case], hsdp["hsdp_native"]) < high


@slow
@pytest.mark.parametrize("case", [c for c in HSDP if c.startswith("hsdp_by")])
def test_hsdp_replicas_are_bit_identical(hsdp: Results, case: str) -> None:
    first, second, third, fourth = (rank["digest"] for rank in hsdp[case])
    assert (first, second) == (third, fourth)
    assert first != second


@slow
def test_hsdp_feedback_is_as_large_as_the_shard(hsdp: Results) -> None:
    shard = len(hsdp["hsdp_native"][0]["weights"])
    for rank in hsdp["hsdp_by_hand__int4"]:
        # The first residual and, of the half that it owns, the second; padding of four units.
        assert 4 * shard < rank["stats"]["residual_bytes"] < 4 * (2 * shard + 4000)


@slow
def test_hsdp_divide_factor_divides_as_natively(hsdp: Results) -> None:
    assert distance(hsdp["hsdp_divided__native"], hsdp["hsdp_native"]) > 1e-2
    assert distance(hsdp["hsdp_divided__fp32"], hsdp["hsdp_divided__native"]) < 1e-6


@slow
@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("native", "register_compressed_backend"),
        ("both", "one dimension only"),
        ("unequal", "different parameters"),
        ("twice", "already"),
        ("set", "hsdp_set"),
    ],
)
def test_hsdp_refusals_say_why(hsdp: Results, case: str, says: str) -> None:
    for rank in hsdp["hsdp_refusals"]:
        name, message = rank[case]
        assert name == "ConfigError"
        assert says in message


# -- reductions behind the backward pass --------------------------------------------------------


def test_reductions_go_on_behind_the_backward_pass(quick: Results) -> None:
    assert quick["fsdp2_goes_on"] == [True, True]


def check_late_is_waited(of: Results, kind: str = "") -> None:
    late, waited = of[f"fsdp2_behind__late{kind}"], of[f"fsdp2_behind__waited{kind}"]
    assert [rank["digest"] for rank in late] == [rank["digest"] for rank in waited]
    assert [rank["losses"] for rank in late] == [rank["losses"] for rank in waited]


def test_a_late_gradient_has_the_bits_of_one_waited_for(quick: Results) -> None:
    check_late_is_waited(quick)


def test_gradients_are_added_to_those_that_are_there(quick: Results) -> None:
    assert distance(quick["fsdp2_added__fp32"], quick["fsdp2_added__native"]) < 1e-6


def test_training_goes_on_after_a_failed_pass_as_natively(quick: Results) -> None:
    ours, native = quick["fsdp2_failed_pass__fp32"], quick["fsdp2_failed_pass__native"]
    assert distance(ours, native) < 1e-6


@slow
def test_a_late_gradient_is_divided_as_one_waited_for(more: Results) -> None:
    check_late_is_waited(more, "_by_three")


@slow
def test_a_late_gradient_has_the_bits_of_one_waited_for_on_three_ranks() -> None:
    check_late_is_waited(results(3, THREE))


@slow
def test_a_block_may_be_used_twice_and_behind_a_checkpoint(more: Results) -> None:
    assert distance(more["fsdp2_twice__fp32"], more["fsdp2_twice__native"]) < 1e-6


@slow
def test_a_workers_error_reaches_the_caller(more: Results) -> None:
    for told in more["fsdp2_failed_reduction"]:
        assert told == [["NonFiniteError", "as coding would"]] * 2
