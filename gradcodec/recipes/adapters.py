"""LoRA adapters as folders: what `peft` saves, and a base model with one of them for a while."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import nn

from gradcodec.errors import ConfigError

__all__ = ["adapted", "save_adapter"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapter of a `peft` model, as any program that uses `peft` reads it.

    Args:
        model: What `gradcodec.recipes.models.add_lora` returned.
        folder: Is made; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    import peft

    assert isinstance(model, peft.PeftModel)  # the model inside would save all of its weights
    # "auto" would ask the Hub whether the vocabulary was resized; it was not.
    model.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def adapted(model: nn.Module, place: str) -> Iterator[nn.Module]:
    """Put an adapter into `model`, in place; after the block it is the base model again.

    Args:
        model: A `transformers` model.
        place: Folder or Hugging Face id of the adapter. Only safetensors are read.

    Yields:
        `model`, in evaluation mode.

    Raises:
        ConfigError: `peft` is missing; the adapter is missing, unreachable or damaged; or it
            belongs to another model: other modules, other shapes, other layers.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA adapters need: pip install peft") from error
    folder = _folder(place)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        tensors = safetensors.torch.load_file(folder / _WEIGHTS)
    except Exception as error:  # missing, damaged, of a newer peft: each raises another class
        raise ConfigError(f"cannot load the adapter {place!r}: {error}") from error
    config.inference_mode = True
    kind = type(model).__name__
    try:
        with warnings.catch_warnings():
            # peft still asks transformers by a name that transformers renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped: Any = peft.get_peft_model(cast(Any, model), config)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"the adapter {place!r} does not fit this {kind}: {error}") from error
    try:
        own = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        # Looked at here, because peft leaves out without a word what has no place in the model.
        different = _difference(own, tensors)
        if different:
            raise ConfigError(f"the adapter {place!r} does not fit this {kind}: {different}")
        peft.set_peft_model_state_dict(wrapped, tensors)
        model.eval()
        yield model
    finally:
        wrapped.unload()


def _folder(place: str) -> Path:
    """The folder itself, or a Hub repository's copy in the cache."""
    if Path(place).is_dir():
        missing = [name for name in (_CONFIG, _WEIGHTS) if not (Path(place) / name).is_file()]
        if missing:
            raise ConfigError(
                f"expected the folder of an adapter, with {_CONFIG} and {_WEIGHTS}; {place} has no "
                f"{' and no '.join(missing)}"
            )
        return Path(place)
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(place, _CONFIG)
        return Path(hf_hub_download(place, _WEIGHTS)).parent
    except Exception as error:  # a bad name, nobody there, no such repository, no such file
        raise ConfigError(
            f"cannot load the adapter {place!r}: it is no folder, and from the Hub: {error}"
        ) from error


def _difference(own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor that the model has and the adapter lacks, or the other way, in words."""
    for name, tensor in own.items():
        if name not in given:
            return f"expected a tensor {name}, which it lacks"
        if given[name].shape != tensor.shape:
            return f"expected {name} of shape {tuple(tensor.shape)}, got {tuple(given[name].shape)}"
    beyond = [name for name in given if name not in own]
    return f"it has {beyond[0]}, for which the model has no place" if beyond else None
