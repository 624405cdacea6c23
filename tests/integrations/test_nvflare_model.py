"""Filters of tasks: every site trains from the copy that the server knows it to have."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")

from integrations.nvflare_toy import context, tensors, through
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext

import gradcodec as gc
from gradcodec.errors import CodecMismatchError, ConfigError, NonFiniteError, WireError
from gradcodec.integrations.nvflare import DecodeModel, EncodeModel
from gradcodec.integrations.nvflare.model import HELD

Model = dict[str, Tensor]


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    random = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(64, 32, generator=random).to(dtype),
        "frozen": torch.randn(500, generator=random).to(dtype),
        "bn.running_var": torch.rand(32, generator=random),
        "bn.num_batches_tracked": torch.tensor(seed),
    }


def moved(before: Model, seed: int, size: float = 0.01) -> Model:
    """The model after a round; ``frozen`` stays."""
    random = torch.Generator().manual_seed(1000 + seed)
    step = size * torch.randn(before["w"].shape, generator=random)
    return {
        **before,
        "w": (before["w"].float() + step).to(before["w"].dtype),
        "bn.running_var": torch.rand(32, generator=random),
        "bn.num_batches_tracked": before["bn.num_batches_tracked"] + 1,
    }


@dataclass
class Site:
    """A site that asks the server for tasks, and says in each request what it holds."""

    codec: str | dict[str, Any] = "int4"
    at: FLContext = field(default_factory=context)

    def __post_init__(self) -> None:
        self.decode = DecodeModel(self.codec)

    def task(self, encode: EncodeModel, state: Model) -> DXO:
        """The task as the server sends it."""
        dxo = DXO(DataKind.WEIGHTS, dict(state), {})
        return through(dxo, encode, at=context("server", peer=self.at))

    def ask(self, encode: EncodeModel, state: Model) -> tuple[Model, int]:
        """The model that arrives, and the bytes of its message."""
        task = self.task(encode, state)
        nbytes = sum(part.nbytes for part in task.data.values())
        return through(task, self.decode, at=self.at).data, nbytes


def equal(a: Model, b: Model) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def distance(a: Model, b: Model) -> float:
    return float((a["w"].float() - b["w"].float()).norm())


def whole_nbytes(state: Model) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


# -- what arrives ------------------------------------------------------------------------------


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "torch"])
def test_the_first_model_arrives_bit_for_bit_in_its_kind(numpy: bool) -> None:
    state: Any = {n: t.numpy() for n, t in model().items()} if numpy else model()
    got, _ = Site().ask(EncodeModel("int4"), state)
    assert all(type(got[n]) is type(state[n]) for n in state)
    assert equal(tensors(DXO(DataKind.WEIGHTS, got, {})), model())


def test_later_ones_cost_their_code_and_no_frozen_tensor() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    _, first = site.ask(encode, state)
    got, later = site.ask(encode, moved(state, 1))
    body = gc.make_codec("int4").nbytes(gc.UpdateSpec.of({"w": state["w"]}))
    assert first > whole_nbytes(state)
    assert body < later < body + 500
    assert torch.equal(got["frozen"], state["frozen"])


def test_errors_do_not_add_up() -> None:
    encode, site, state = EncodeModel("int2-rotated"), Site("int2-rotated"), model()
    site.ask(encode, state)
    distances = []
    for number in range(30):
        state = moved(state, number)
        distances.append(distance(site.ask(encode, state)[0], state))
    assert max(distances[10:]) < 2 * distances[0]
    assert distances[0] > 0


def test_counters_and_batch_norm_statistics_are_always_exact() -> None:
    encode, site, state = EncodeModel("sign-rotated"), Site("sign-rotated"), model()
    for number in range(4):
        got, _ = site.ask(encode, state)
        for name in ("bn.running_var", "bn.num_batches_tracked"):
            assert torch.equal(got[name], state[name])
        state = moved(state, number)


def test_counters_stay_exact_and_out_of_the_weights_way_though_nvflare_averages_them() -> None:
    """An average of differences is a float, and so is the counter that it is added to."""
    encode, site, state = EncodeModel("int4"), Site(), model()
    for number in range(3):
        got, nbytes = site.ask(encode, state)
        assert all(torch.equal(got[n], state[n]) for n in state if n.startswith("bn"))
        assert distance(got, state) < 0.1
        assert (nbytes < whole_nbytes(state)) == (number > 0)  # the model comes once
        state = moved(state, number)
        tracked = state["bn.num_batches_tracked"].double() + 1000.5
        state["bn.num_batches_tracked"] = tracked


@pytest.mark.parametrize("kept", ["{}", "[1]", "[", 7])
def test_a_note_that_names_nothing_is_refused(kept: Any) -> None:
    site = Site()
    task = site.task(EncodeModel("int4"), model())
    task.meta["gradcodec"]["kept"] = kept
    with pytest.raises(WireError, match="expected names in JSON"):
        through(task, site.decode, at=site.at)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_step_of_half_precision_is_a_change(dtype: torch.dtype) -> None:
    encode, site, state = EncodeModel("int4"), Site(), model(dtype=dtype)
    site.ask(encode, state)
    state["w"] = state["w"] * (1 + torch.finfo(dtype).eps)
    got, _ = site.ask(encode, state)
    assert not torch.equal(got["w"], model(dtype=dtype)["w"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_come_as_near_as_one_step_allows(dtype: torch.dtype) -> None:
    encode, site, state = EncodeModel("int4"), Site(), model(dtype=dtype)
    site.ask(encode, state)
    state = moved(state, 1, size=0.1)
    first = distance(site.ask(encode, state)[0], state)
    nudged = {**state, "bn.num_batches_tracked": torch.tensor(99)}
    got, _ = site.ask(encode, nudged)
    assert got["w"].dtype is dtype
    assert distance(got, state) < first / 4


def test_an_unchanged_model_costs_its_version() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    got, nbytes = site.ask(encode, state)
    assert nbytes == 8
    assert equal(got, state)


def test_a_zero_that_changes_its_sign_is_no_change() -> None:
    encode, site, state = EncodeModel("int4"), Site(), {"w": torch.zeros(5)}
    site.ask(encode, state)
    got, _ = site.ask(encode, {"w": -torch.zeros(5)})
    assert torch.equal(got["w"], torch.zeros(5))


def test_a_trained_codec_moves_models(tmp_path: Any) -> None:
    parameter = torch.nn.Linear(32, 64, bias=False)
    recorder = gc.GradientRecorder(parameter, gc.SubspaceConfig(ratio=2))
    optimizer = torch.optim.SGD(parameter.parameters(), lr=0.1)
    with recorder:
        for _ in range(4):
            optimizer.zero_grad()
            parameter(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
    subspace = gc.fit_subspace(recorder.moments)
    gc.Chain(subspace, gc.make_codec("int4")).save_pretrained(tmp_path / "codec")
    code = torch.randn(subspace.code_numel())
    state = {"weight": parameter.weight.detach().clone()}
    encode, site = EncodeModel(str(tmp_path / "codec")), Site(str(tmp_path / "codec"))
    site.ask(encode, state)
    step = subspace.from_code(code)["weight"]
    got, nbytes = site.ask(encode, {"weight": state["weight"] + step})
    assert float((got["weight"] - state["weight"] - step).norm() / step.norm()) < 0.2
    assert nbytes < whole_nbytes(state) / 8


def test_a_codec_that_is_bound_to_bf16_moves_bf16_models(tmp_path: Any) -> None:
    state = {"w": torch.randn(64, 32).bfloat16(), "still": torch.ones(8).bfloat16()}
    gc.make_codec("int4").bind(gc.UpdateSpec.of(state)).save_pretrained(tmp_path / "codec")
    encode, site = EncodeModel(str(tmp_path / "codec")), Site(str(tmp_path / "codec"))
    site.ask(encode, state)
    after = {**state, "w": state["w"] + 0.5}
    got, nbytes = site.ask(encode, after)
    assert got["w"].dtype is torch.bfloat16
    assert distance(got, after) < 0.2 * distance(state, after)
    assert nbytes < whole_nbytes(state) / 3


# -- who holds what ----------------------------------------------------------------------------


def test_sites_that_ask_in_one_round_train_from_the_same_bits() -> None:
    encode, early, state = EncodeModel("int4"), Site(), model()
    early.ask(encode, state)
    for number in range(3):
        state = moved(state, number)
        late = Site()
        a, b = early.ask(encode, state)[0], late.ask(encode, state)[0]
        assert equal(a, b)
        assert equal(late.ask(encode, state)[0], a)


def test_a_site_that_missed_rounds_gets_what_it_missed() -> None:
    encode, steady, absent, state = EncodeModel("int4"), Site(), Site(), model()
    for site in (steady, absent):
        site.ask(encode, state)
    one = 0
    for number in range(3):
        state = moved(state, number)
        expected, one = steady.ask(encode, state)
    got, three = absent.ask(encode, state)
    assert equal(got, expected)
    assert 2 * one < three < 4 * one


def test_what_was_missed_costs_at_most_about_the_model() -> None:
    encode, steady, absent, state = EncodeModel("int8"), Site("int8"), Site("int8"), model()
    for site in (steady, absent):
        site.ask(encode, state)
    for number in range(20):
        state = moved(state, number)
        expected, _ = steady.ask(encode, state)
    got, nbytes = absent.ask(encode, state)
    assert equal(got, expected)
    assert nbytes < 1.2 * whole_nbytes(state)


def test_after_a_restart_of_the_server_the_whole_model_comes() -> None:
    site, state = Site(), model()
    site.ask(EncodeModel("int4"), state)
    state = moved(state, 1)
    assert equal(site.ask(EncodeModel("int4"), state)[0], state)


def test_after_a_restart_of_the_site_the_whole_model_comes() -> None:
    encode, state = EncodeModel("int4"), model()
    Site().ask(encode, state)
    assert Site().ask(encode, moved(state, 1))[1] > whole_nbytes(state)


def test_another_table_begins_anew() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    grown = {**state, "more": torch.ones(3)}
    assert equal(site.ask(encode, grown)[0], grown)


@pytest.mark.parametrize("held", [None, "", "zz", 7, "00" * 8, ["x"]])
def test_a_site_that_says_something_odd_gets_the_whole_model(held: Any) -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    site.at.set_prop(HELD, held, private=False, sticky=True)
    assert site.ask(encode, state)[1] > whole_nbytes(state)


def test_many_sites_at_once_get_one_model() -> None:
    encode, state = EncodeModel("int4"), model()
    sites = [Site() for _ in range(8)]
    for number in range(3):
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda site, now=state: site.ask(encode, now)[0], sites))
        assert all(equal(one, got[0]) for one in got)
        state = moved(state, number)


def test_training_in_place_does_not_move_the_copy() -> None:
    encode, site, other, state = EncodeModel("int4"), Site(), Site(), model()
    for one in (site, other):
        got, _ = one.ask(encode, state)
    got["w"].zero_()
    state = moved(state, 1)
    assert equal(other.ask(encode, state)[0], site.ask(encode, state)[0])


# -- what is refused ---------------------------------------------------------------------------


def test_a_damaged_message_costs_a_task_and_the_next_brings_the_whole_model() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    state = moved(state, 1)
    task = site.task(encode, state)
    task.data["0/coded"] = np.roll(task.data["0/coded"], 1)
    with pytest.raises(WireError):
        through(task, site.decode, at=site.at)
    got, nbytes = site.ask(encode, state)
    assert nbytes > whole_nbytes(state)
    assert distance(got, state) < 0.1


def test_an_increment_to_another_version_is_refused() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    task = site.task(encode, moved(state, 1))
    through(copy.deepcopy(task), site.decode, at=site.at)
    with pytest.raises(CodecMismatchError, match="they apply to another one"):
        through(task, site.decode, at=site.at)


def test_parts_of_no_message_are_refused() -> None:
    site, state = Site(), model()
    task = site.task(EncodeModel("int4"), state)
    task.data["5/coded"] = task.data["version"]
    with pytest.raises(WireError, match="numbered increments"):
        through(task, site.decode, at=site.at)


@pytest.mark.parametrize("codec", [{"kind": "rotsign", "block": 256, "kept": 64}, "int2-unbiased"])
def test_a_codec_whose_errors_would_grow_is_refused(codec: Any) -> None:
    with pytest.raises(ConfigError, match="error is smaller than its input"):
        Site().ask(EncodeModel(codec), model())


def test_a_rule_that_matches_no_tensor_is_refused() -> None:
    encode = EncodeModel("int4", rules=[("w", "fp32"), ("head.*", "fp32")])
    with pytest.raises(ConfigError, match=r"rule 'head\.\*' matches no tensor; there are w, "):
        Site().ask(encode, model())


def test_nan_is_refused_and_the_next_model_follows_the_last_good_one() -> None:
    encode, site, state = EncodeModel("int4"), Site(), model()
    site.ask(encode, state)
    bad = {**state, "w": torch.full((64, 32), torch.nan)}
    with pytest.raises(NonFiniteError, match="'w'"):
        site.task(encode, bad)
    state = moved(state, 1)
    assert distance(site.ask(encode, state)[0], state) < 0.1


def test_an_encrypted_model_is_refused() -> None:
    dxo = DXO(DataKind.WEIGHTS, dict(model()), {MetaKey.PROCESSED_ALGORITHM: "CKKS"})
    with pytest.raises(ConfigError, match="EncodeModel: expected plain tensors"):
        through(dxo, EncodeModel("int4"))


def test_a_plain_task_passes() -> None:
    dxo = DXO(DataKind.WEIGHTS, dict(model()), {})
    assert equal(through(dxo, DecodeModel("int4")).data, model())
