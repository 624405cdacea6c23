"""Filters of results: what the server gets of an update, and what is refused by which side."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")

from integrations.nvflare_toy import context, tensors, through, update
from nvflare.apis.dxo import DXO, DataKind, MetaKey

import gradcodec as gc
from gradcodec.errors import ConfigError, GradcodecError, UpdateError
from gradcodec.integrations.nvflare import DecodeUpdate, EncodeUpdate

BUNDLED = "stdlib-llama-lora-r8-32x"
QUARTER_BIT = {"kind": "rotsign", "block": 256, "kept": 64}


def diff(*, numpy: bool = True, seed: int = 0) -> DXO:
    random = torch.Generator().manual_seed(seed)
    values: dict[str, Any] = {
        "w": torch.randn(40, 30, generator=random),
        "bn.running_var": torch.rand(30, generator=random),
        "bn.num_batches_tracked": torch.tensor(7),
    }
    return update(**({n: t.numpy() for n, t in values.items()} if numpy else values))


def error(got: DXO, sent: DXO, name: str = "w") -> float:
    x, y = tensors(sent)[name], tensors(got)[name]
    return float((x - y).norm() / x.norm())


# -- what arrives ------------------------------------------------------------------------------


@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "torch"])
def test_an_update_arrives_in_its_kind_with_its_names_shapes_and_dtypes(numpy: bool) -> None:
    sent = diff(numpy=numpy)
    got = through(sent, EncodeUpdate("int8"), DecodeUpdate("int8"))
    assert list(got.data) == list(sent.data)
    for name, value in sent.data.items():
        assert type(got.data[name]) is type(value)
        assert (got.data[name].dtype, got.data[name].shape) == (value.dtype, value.shape)
    assert error(got, sent) < 0.01
    assert got.data_kind == DataKind.WEIGHT_DIFF


def test_counters_and_batch_norm_statistics_arrive_bit_for_bit() -> None:
    sent = diff()
    got = through(sent, EncodeUpdate("sign"), DecodeUpdate("sign"))
    for name in ("bn.running_var", "bn.num_batches_tracked"):
        assert np.array_equal(got.data[name], sent.data[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floating_dtypes_come_back(dtype: torch.dtype) -> None:
    sent = update(w=torch.randn(64, 64).to(dtype))
    got = through(sent, EncodeUpdate("int8"), DecodeUpdate("int8"))
    assert got.data["w"].dtype is dtype
    assert torch.allclose(got.data["w"].float(), sent.data["w"].float(), atol=0.05)


def test_numpy_values_of_any_layout_are_read() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)[::-1]
    array.flags.writeable = False
    sent = update(w=array, scalar=np.float64(2.5))
    got = through(sent, EncodeUpdate("fp32"), DecodeUpdate("fp32"))
    assert np.array_equal(got.data["w"], array)
    assert got.data["scalar"] == 2.5


def test_what_was_sent_is_not_changed() -> None:
    sent = diff()
    before = copy.deepcopy((sent.data, sent.meta))
    through(sent, EncodeUpdate("int4"), DecodeUpdate("int4"))
    assert sent.meta == before[1]
    assert all(np.array_equal(sent.data[n], v) for n, v in before[0].items())


def test_nvflares_meta_passes_and_no_mark_of_ours_is_left() -> None:
    got = through(diff(), EncodeUpdate("int4"), DecodeUpdate("int4"))
    assert got.meta == {
        "NUM_STEPS_CURRENT_ROUND": 3,
        MetaKey.FILTER_HISTORY: ["EncodeUpdate", "DecodeUpdate"],
    }


def test_a_rule_gives_tensors_another_codec() -> None:
    sent = update(body=torch.randn(128, 64), head=torch.randn(64, 8))
    rules = [("head", "fp32")]
    got = through(sent, EncodeUpdate("sign", rules=rules), DecodeUpdate("sign", rules=rules))
    assert torch.equal(got.data["head"], sent.data["head"])
    assert error(got, sent, "body") > 0.1


def test_frozen_tensors_cost_a_bit_and_arrive_as_zeros() -> None:
    trained = {"lora": torch.randn(64, 32), "bn.running_var": torch.rand(4)}
    frozen = {f"base.{i}": torch.zeros(1000, 1000) for i in range(3)}
    frozen["steps"] = torch.zeros(2, dtype=torch.int64)
    got, alone = (
        through(update(**values), EncodeUpdate("int4"))
        for values in ({**frozen, **trained}, trained)
    )
    assert bytes(got.data["coded"]) == bytes(alone.data["coded"])
    assert got.data["still"].nbytes == 1
    back = through(got, DecodeUpdate("int4")).data
    assert list(back) == [*frozen, *trained]
    assert all(torch.equal(back[name], zeros) for name, zeros in frozen.items())


def test_a_tensor_that_has_moved_once_keeps_its_residual_when_it_rests() -> None:
    encode, decode = EncodeUpdate("sign"), DecodeUpdate("sign")
    sent = torch.randn(16, 16)
    got = torch.zeros(16, 16)
    for tensor in (sent, *[torch.zeros(16, 16)] * 20):
        got += through(update(w=tensor, other=torch.ones(3)), encode, decode).data["w"]
    assert float((got - sent).norm() / sent.norm()) < 0.2


def test_an_update_of_zeros_arrives() -> None:
    got = through(update(w=np.zeros((3, 4), np.float32)), EncodeUpdate("int4"))
    assert set(got.data) == {"table", "still"}
    back = through(got, DecodeUpdate("int4")).data["w"]
    assert np.array_equal(back, np.zeros((3, 4)))


# -- the codec ---------------------------------------------------------------------------------


def test_a_config_and_its_dict_are_the_codec_of_that_name() -> None:
    config = gc.make_codec("int4").config
    sent = diff()
    first, *others = (through(sent, EncodeUpdate(c)) for c in ("int4", config, config.to_dict()))
    for other in others:
        assert bytes(other.data["coded"]) == bytes(first.data["coded"])


def test_a_folder_is_a_codec(tmp_path: Path) -> None:
    gc.make_codec("int4-rotated").save_pretrained(tmp_path / "codec")
    name = str(tmp_path / "codec")
    sent = diff()
    assert error(through(sent, EncodeUpdate(name), DecodeUpdate("int4-rotated")), sent) < 0.2


def test_a_trained_codec_sends_no_table() -> None:
    spec = gc.Codec.from_pretrained(BUNDLED).spec
    sent = update(**{t.name: torch.randn(t.shape) * 1e-3 for t in spec})
    coded = through(sent, EncodeUpdate(BUNDLED))
    assert list(coded.data) == ["coded"]
    assert coded.data["coded"].nbytes < spec.nbytes / 400
    assert list(through(coded, DecodeUpdate(BUNDLED)).data) == list(sent.data)


def test_a_trained_codec_leaves_out_frozen_tensors_that_it_was_not_made_for() -> None:
    spec = gc.Codec.from_pretrained(BUNDLED).spec
    frozen = {"base": torch.zeros(300, 300)}
    sent = update(**frozen, **{t.name: torch.randn(t.shape) * 1e-3 for t in spec})
    coded = through(sent, EncodeUpdate(BUNDLED))
    assert sum(part.nbytes for part in coded.data.values()) < spec.nbytes / 200
    back = through(coded, DecodeUpdate(BUNDLED)).data
    assert list(back) == list(sent.data)
    assert torch.equal(back["base"], frozen["base"])


def test_a_trained_codec_names_tensors_that_it_was_not_made_for() -> None:
    with pytest.raises(UpdateError, match=r"not expected: w: float32\[3\]; missing: model"):
        through(update(w=torch.randn(3)), EncodeUpdate(BUNDLED))


@pytest.mark.parametrize("codec", [None, 4, "", {}, {"bits": 4}, gc.make_codec("int4")])
def test_what_is_no_codecs_name_or_config_is_refused_at_once(codec: Any) -> None:
    with pytest.raises(ConfigError, match="name, config, folder or Hub id"):
        EncodeUpdate(codec)


@pytest.mark.parametrize("codec", ["int5", {"kind": "blockquant", "bits": 3}, {"kind": "zip"}])
def test_a_codec_that_cannot_be_is_refused_at_once(codec: Any) -> None:
    """And not in the job, by every site, when its first update is ready."""
    with pytest.raises(GradcodecError, match=r"int4|bits|blockquant"):
        EncodeUpdate(codec)


@pytest.mark.parametrize("codec", ["/srv/codecs/mine", "./mine", "user/mine"])
def test_a_codec_that_only_the_sites_may_have_is_not_looked_for(codec: str) -> None:
    assert EncodeUpdate(codec).codec == codec


def test_a_rules_codec_that_cannot_be_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fp32'"):
        DecodeUpdate("int4", rules=[("head.*", "fp3")])


@pytest.mark.parametrize("rules", [["head"], [("head",)], [("head", 4)], ["ab"]])
def test_what_is_no_rule_is_refused_at_once(rules: Any) -> None:
    with pytest.raises(ConfigError, match="pattern, codec name"):
        DecodeUpdate("int4", rules=rules)


# -- error feedback ----------------------------------------------------------------------------


def sum_error(encode: EncodeUpdate, codec: str, rounds: int) -> float:
    """Relative error of the sum of as many different updates."""
    decode = DecodeUpdate(codec)
    sent, got = torch.zeros(40, 30), torch.zeros(40, 30)
    for number in range(rounds):
        dxo = update(w=torch.randn(40, 30, generator=torch.Generator().manual_seed(number)) + 1)
        sent += dxo.data["w"]
        got += through(dxo, encode, decode).data["w"]
    return float((sent - got).norm() / sent.norm())


def test_what_a_round_loses_is_sent_in_later_ones() -> None:
    with_it = sum_error(EncodeUpdate("int2"), "int2", 30)
    without = sum_error(EncodeUpdate("int2", error_feedback=False), "int2", 30)
    assert with_it < without / 3


@pytest.mark.parametrize("codec", ["int8-unbiased", "rotsign"])
def test_codecs_that_are_right_on_average_get_no_feedback_unless_asked(codec: str) -> None:
    encodes = [EncodeUpdate(codec, error_feedback=e) for e in (None, False, True)]
    rounds = [[bytes(through(diff(), e).data["coded"]) for _ in range(2)] for e in encodes]
    assert rounds[0] == rounds[1]
    assert rounds[2][0] == rounds[0][0]
    assert rounds[2][1] != rounds[0][1]


def test_sites_and_rounds_round_differently() -> None:
    def coded(encode: EncodeUpdate, site: str) -> bytes:
        return bytes(through(diff(), encode, at=context(site)).data["coded"])

    first, second = EncodeUpdate("rotsign"), EncodeUpdate("rotsign")
    assert len({coded(first, "a"), coded(first, "a"), coded(second, "b")}) == 3


def test_feedback_that_diverges_is_refused() -> None:
    with pytest.raises(ConfigError, match="error feedback diverges"):
        through(diff(), EncodeUpdate(QUARTER_BIT, error_feedback=True))


def test_feedback_starts_again_when_the_tensors_change() -> None:
    encode = EncodeUpdate("sign")
    through(update(w=torch.randn(8, 8)), encode)
    sent = update(w=torch.randn(9, 9))
    fresh = through(sent, EncodeUpdate("sign"))
    assert bytes(through(sent, encode).data["coded"]) == bytes(fresh.data["coded"])


# -- what the client refuses --------------------------------------------------------------------


def test_nan_costs_the_site_one_update_and_no_residual(caplog: pytest.LogCaptureFixture) -> None:
    encode, other = EncodeUpdate("int2"), EncodeUpdate("int2")
    for one in (encode, other):
        through(diff(seed=1), one)
    bad = diff(seed=2)
    bad.data["w"][3, 4] = np.nan
    with caplog.at_level(logging.ERROR):
        assert through(bad, encode).data == {}
    assert "'w': expected finite values, 1 of 1200 are NaN or Inf" in caplog.text
    after, without = (through(diff(seed=3), one).data["coded"] for one in (encode, other))
    assert bytes(after) == bytes(without)


def test_weights_instead_of_differences_are_refused() -> None:
    weights = DXO(DataKind.WEIGHTS, {"w": torch.randn(3)}, {})
    with pytest.raises(ConfigError, match=r"params_transfer_type=TransferType\.DIFF"):
        through(weights, EncodeUpdate("int4"))


def test_metrics_pass() -> None:
    metrics = DXO(DataKind.METRICS, {"loss": 0.5}, {})
    assert through(metrics, EncodeUpdate("int4")).data == {"loss": 0.5}


@pytest.mark.parametrize("by", ["CKKS", "FLOAT16", "gradcodec"])
def test_data_that_a_filter_has_processed_is_refused(by: str) -> None:
    dxo = diff()
    dxo.set_meta_prop(MetaKey.PROCESSED_ALGORITHM, by)
    with pytest.raises(ConfigError, match=f"expected plain tensors, got data processed by '{by}'"):
        through(dxo, EncodeUpdate("int4"))


def test_partly_encrypted_data_is_refused() -> None:
    dxo = diff()
    dxo.set_meta_prop(MetaKey.PROCESSED_KEYS, {"w": True})
    with pytest.raises(ConfigError, match="encrypted"):
        through(dxo, EncodeUpdate("int4"))


def encryptor() -> Any:
    """NVFLARE's filter for homomorphic encryption, with keys."""
    ts = pytest.importorskip("tenseal", reason="pip install 'nvflare[he]'")
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor

    keys = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 40, 60])
    keys.global_scale = 2**40
    made = HEModelEncryptor()
    made.tenseal_context, made.encrypt_layers = keys, [True]
    return made


def test_encrypted_updates_are_refused() -> None:
    at = context(peer=context("server"))
    with pytest.raises(ConfigError, match="processed by 'CKKS'"):
        through(update(w=np.ones(8)), encryptor(), EncodeUpdate("int4"), at=at)


def test_what_was_encrypted_after_encoding_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    at = context(peer=context("site-3"))
    filters = EncodeUpdate("int4"), encryptor(), DecodeUpdate("int4")
    assert through(update(w=np.ones(8, np.float32)), *filters, at=at).data == {}
    assert "dropped the reply of site-3: ConfigError: " in caplog.text


def test_nvflares_quantiser_before_ours_is_refused() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'gradcodec[bench]'")
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    with pytest.raises(ConfigError, match="processed by 'float16'"):
        through(update(w=torch.randn(64, 64)), ModelQuantizer("float16"), EncodeUpdate("int4"))


@pytest.mark.parametrize("value", [b"ciphertext", [1.0, 2.0], 0.5, "text", None])
def test_values_that_are_no_tensors_are_named(value: Any) -> None:
    with pytest.raises(UpdateError, match="'w': expected a numpy array or a torch tensor"):
        through(update(w=value), EncodeUpdate("int4"))


@pytest.mark.parametrize("dtype", ["complex64", "U3", "object"])
def test_dtypes_that_have_no_code_are_named(dtype: str) -> None:
    with pytest.raises(UpdateError, match="'w'"):
        through(update(w=np.zeros(3, dtype)), EncodeUpdate("int4"))
