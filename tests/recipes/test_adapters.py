"""Laws of adapter folders: what was saved comes back, and nothing else goes into a model."""

import json
from pathlib import Path

import pytest
import torch
from recipes import rigged_llama
from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.adapters import adapted, save_adapter
from gradcodec.recipes.models import adapter_parameters, add_lora, load_base

pytest.importorskip("transformers")
pytest.importorskip("peft")

IDS = torch.arange(3, 35).view(2, 16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def put_in(model: nn.Module, place: Path | str) -> None:
    with adapted(model, str(place)):
        pass


def test_a_saved_adapter_gives_the_tuned_model_back_and_then_the_base(tmp_path: Path) -> None:
    tuned = add_lora(load_base()[0], r=4, alpha=8, targets=["q_proj", "down_proj"], seed=0)
    with torch.no_grad():
        for parameter in adapter_parameters(tuned).values():
            parameter.add_(0.05)
    save_adapter(tuned, tmp_path / "lora")
    base = load_base()[0]
    before, names = logits(base), [name for name, _ in base.named_parameters()]
    with adapted(base, str(tmp_path / "lora")) as model:
        assert torch.equal(logits(model), logits(tuned.eval()))
        assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(base), before)
    assert [name for name, _ in base.named_parameters()] == names


def test_the_base_comes_back_after_an_error_too(tmp_path: Path) -> None:
    rigged_llama.save_adapter(tmp_path / "lora")
    base = rigged_llama.llama("B")
    with pytest.raises(KeyError), adapted(base, str(tmp_path / "lora")):
        raise KeyError
    assert not any("lora" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"width": 32}, r"lora_A.weight of shape \(4, 32\), got \(4, 16\)"),
        ({"layers": 2}, r"layers.1.self_attn.o_proj.lora_A.weight, which it lacks"),
    ],
)
def test_an_adapter_of_another_model_is_named(
    options: dict[str, int], named: str, tmp_path: Path
) -> None:
    rigged_llama.save_adapter(tmp_path / "lora")
    base = rigged_llama.llama("B", **options)
    with pytest.raises(ConfigError, match="does not fit this LlamaForCausalLM: .*" + named):
        put_in(base, tmp_path / "lora")
    assert not any("lora" in name for name, _ in base.named_parameters())


def test_an_adapter_of_a_deeper_model_is_not_cut_to_fit(tmp_path: Path) -> None:
    rigged_llama.save_adapter(tmp_path / "lora", layers=3)
    with pytest.raises(ConfigError, match=r"layers.1.*for which the model has no place"):
        put_in(rigged_llama.llama("B"), tmp_path / "lora")


def test_an_adapter_for_modules_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    rigged_llama.save_adapter(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["c_attn"]}))
    with pytest.raises(ConfigError, match=r"does not fit .*c_attn"):
        put_in(rigged_llama.llama("B"), tmp_path / "lora")


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("adapter_config.json", "has no adapter_config.json"),
        ("adapter_model.safetensors", "has no adapter_model.safetensors"),
        (None, "cannot load the adapter"),
    ],
)
def test_a_folder_that_is_not_whole_is_named(lost: str | None, named: str, tmp_path: Path) -> None:
    folder = rigged_llama.save_adapter(tmp_path / "lora")
    if lost is None:
        (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    else:
        (folder / lost).unlink()
    with pytest.raises(ConfigError, match=named), adapted(rigged_llama.llama("B"), str(folder)):
        pass


def test_a_name_that_is_no_folder_and_no_repository_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot load the adapter 'a/b/c': it is no folder"):
        put_in(rigged_llama.llama("B"), "a/b/c")
