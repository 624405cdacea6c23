"""Laws of base models and adapters."""

from pathlib import Path

import pytest
import torch
from recipes import gguf_llama
from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.models import (
    EMBEDDED_FOLDER,
    adapter_parameters,
    add_lora,
    load_base,
    resolve_device,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")

IDS = torch.arange(3, 35).view(2, 16)


def base() -> nn.Module:
    return load_base("embedded")[0]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def adapted(seed: int = 0) -> nn.Module:
    return add_lora(base(), r=4, alpha=8, targets=["q_proj", "v_proj"], seed=seed)


def test_the_shipped_weights_stay_small_and_are_safetensors() -> None:
    files = {path.name: path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()}
    assert files["model.safetensors"] <= 13_000_000
    assert files["tokenizer.json"] <= 1_000_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]


def test_the_shipped_model_loads_in_fp32_in_training_mode() -> None:
    model = base()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


def test_the_tokenizer_gives_any_text_back() -> None:
    tokenizer = load_base("embedded")[1]
    text = 'def f(x):\n    return "é 漢字 \\t"  # ok'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_untrained_weights_are_the_same_each_time_and_not_the_shipped_ones() -> None:
    first, again = load_base("embedded-untrained")[0], load_base("embedded-untrained")[0]
    assert torch.equal(logits(first), logits(again))
    assert not torch.allclose(logits(first), logits(base()))


def test_an_unknown_folder_raises(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_base(f"{tmp_path}/nothing-here")


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_gguf_file_is_the_model_that_it_was_written_from(by: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    expected = gguf_llama.tiny_llama()
    gguf_llama.write(tmp_path / "tiny.gguf", expected)
    model, tokenizer = load_base(str(tmp_path / "tiny.gguf" if by == "file" else tmp_path))
    assert torch.equal(logits(model), logits(expected))
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("name", ["./gone", "~/gone", "gone.gguf", "models/llama/gone"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        load_base(name)


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a config\.json nor a GGUF file"):
        load_base(str(tmp_path))


def test_of_two_gguf_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"a\.gguf, b\.gguf: name the file"):
        load_base(str(tmp_path))


def test_a_damaged_gguf_file_raises(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_base(str(tmp_path / "x.gguf"))


def test_a_fresh_adapter_changes_nothing() -> None:
    assert torch.allclose(logits(adapted()), logits(base()), atol=1e-5)


def test_a_moved_adapter_changes_the_output() -> None:
    model = adapted()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.05)
    assert not torch.allclose(logits(model), logits(base()), atol=1e-3)


def test_adapters_come_from_their_seed() -> None:
    first, again, other = (adapter_parameters(adapted(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_making_models_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    adapted()
    load_base("embedded-untrained")
    assert torch.equal(before, torch.random.get_rng_state())


def test_only_the_adapter_is_trainable_under_clean_names_in_model_order() -> None:
    parameters = adapter_parameters(adapted())
    expected = [
        f"model.layers.{layer}.self_attn.{target}.lora_{side}.weight"
        for layer in range(6)
        for target in ("q_proj", "v_proj")
        for side in "AB"
    ]
    assert list(parameters) == expected
    assert parameters[expected[0]].shape == (4, 256)
    assert parameters[expected[1]].shape == (256, 4)


def test_a_missing_target_raises_naming_the_modules_there_are() -> None:
    with pytest.raises(ConfigError, match=r"c_attn; LlamaForCausalLM has q_proj, k_proj, v_proj"):
        add_lora(base(), r=4, alpha=8, targets=["q_proj", "c_attn"], seed=0)


def test_a_rank_below_one_raises() -> None:
    with pytest.raises(ConfigError, match="r >= 1"):
        add_lora(base(), r=0, alpha=8, targets=["q_proj"], seed=0)


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_takes_cuda_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto").type == expected


def test_an_absent_cuda_raises_naming_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is: cpu"):
        resolve_device("cuda")


def test_an_unknown_device_raises() -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        resolve_device("tpu")


@pytest.mark.parametrize("place", ["embedded", str(EMBEDDED_FOLDER)])
def test_a_revision_of_what_is_in_no_repository_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="only a Hub repository has a revision='v1'"):
        load_base(place, revision="v1")
