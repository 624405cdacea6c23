"""Base models and their LoRA adapters.

`transformers` and `peft` are imported where they are used, so that the package imports without
them.
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gradcodec.errors import ConfigError

__all__ = [
    "EMBEDDED_FOLDER",
    "adapter_parameters",
    "add_lora",
    "linear_names",
    "load_base",
    "resolve_device",
]

EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "stdlib-llama"
_UNTRAINED_SEED = 0


def load_base(
    name: str = "embedded",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> tuple[nn.Module, Any]:
    """Return a causal language model and its tokenizer, ready to train.

    Args:
        name: ``"embedded"`` for the model shipped with the package; ``"embedded-untrained"`` for
            the same architecture with weights drawn from a fixed seed; otherwise a folder, a
            Hugging Face model id, or a GGUF file (or a folder with one), whose weights are
            dequantised.
        dtype: Floating-point type of the weights in memory.
        device: Where the weights go.
        revision: Branch, tag or commit of a Hugging Face model; pin it for repeatable runs.

    Returns:
        The model in training mode and its tokenizer, which has a padding token.

    Raises:
        ConfigError: `transformers` is missing, the model cannot be loaded, or there is a revision
            of a model that is here.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "loading a model needs: pip install transformers tokenizers safetensors"
        ) from error
    library: Any = transformers  # annotated only in part
    embedded = name in ("embedded", "embedded-untrained")
    if not embedded:
        _check_place(name)
    if revision is not None and (embedded or Path(name).exists()):
        raise ConfigError(f"only a Hub repository has a {revision=}, got the model {name!r}")
    gguf = None if embedded else _gguf_file(Path(name))
    place = str(EMBEDDED_FOLDER) if embedded else name if gguf is None else str(gguf.parent)
    options: dict[str, Any] = {"revision": revision}
    if embedded:
        options = {"local_files_only": True}
    elif gguf is not None:
        options = {"local_files_only": True, "gguf_file": gguf.name}
    try:
        tokenizer: Any = library.AutoTokenizer.from_pretrained(place, **options)
        # Loading draws random numbers as well, for weights that a checkpoint lacks.
        with _seeded(_UNTRAINED_SEED), _without_bar(library, embedded):
            if name == "embedded-untrained":
                config = library.AutoConfig.from_pretrained(place, **options)
                model = library.AutoModelForCausalLM.from_config(config, dtype=dtype)
            else:
                if gguf is None:
                    options["use_safetensors"] = True  # a pickle is never read
                model = library.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    except Exception as error:  # missing, unreachable, damaged, torn: each raises another class
        if gguf is not None and importlib.util.find_spec("gguf") is None:
            raise ConfigError("reading a GGUF file needs: pip install gguf") from error
        raise ConfigError(f"cannot load the model {name!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(nn.Module, model).to(device).train(), tokenizer


def _check_place(name: str) -> None:
    """Raise ``ConfigError`` for what can only be a path, and has no model; else it may be an id."""
    place = Path(name)
    path = name.startswith((".", "/", "~")) or name.endswith(".gguf") or len(place.parts) > 2
    why = ""
    if path and not place.exists():
        why = "there is no such file or folder"
    elif place.is_dir() and not (place / "config.json").exists() and not any(place.glob("*.gguf")):
        why = "the folder has neither a config.json nor a GGUF file"
    if why:
        raise ConfigError(f"cannot load the model {name!r}: {why}")


def _gguf_file(place: Path) -> Path | None:
    """The GGUF file that this is, or the only one in this folder if it has no other weights."""
    if place.suffix == ".gguf" and place.is_file():
        return place
    found = sorted(place.glob("*.gguf")) if place.is_dir() else []
    if not found or any(place.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ConfigError(f"expected one GGUF file in {place}, got {names}: name the file")
    return found[0]


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    dropout: float = 0.0,
) -> nn.Module:
    r"""Freeze `model` and put low-rank adapters beside its linear maps, in place.

    A map :math:`W` becomes :math:`W + (\alpha / r) B A` with :math:`A` of shape ``(r, inputs)``
    drawn from `seed` and :math:`B` of shape ``(outputs, r)`` zero, so at first the output is that
    of the base model. The global random state is left as it was.

    Args:
        model: A `transformers` model.
        r: Rank, at least 1.
        alpha: Scale before division by `r`.
        targets: Last parts of module names, such as ``q_proj``; each must occur.
        seed: Seed of the initial :math:`A`.
        dropout: Probability of dropping an adapter input in training.

    Returns:
        The `peft` model around `model`.

    Raises:
        ConfigError: `peft` is missing, a number is out of range, or a target names no module.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("LoRA adapters need: pip install peft") from error
    if r < 1 or not (0 < alpha < math.inf and 0.0 <= dropout < 1.0):
        raise ConfigError(
            "expected r >= 1, a finite alpha > 0 and 0 <= dropout < 1, "
            f"got r={r}, alpha={alpha}, dropout={dropout}"
        )
    wanted = [targets] if isinstance(targets, str) else list(targets)
    there = linear_names(model)
    missing = [target for target in wanted if target not in there]
    if missing or not wanted:
        raise ConfigError(
            f"no linear module is named {', '.join(missing) or '(no target given)'}; "
            f"{type(model).__name__} has {', '.join(there)}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=cast(int, alpha),  # declared int, used as a factor
        lora_dropout=dropout,
        target_modules=wanted,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _seeded(seed), warnings.catch_warnings():
        # peft still asks transformers by a name that transformers renamed; nothing for users to do.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            return cast(nn.Module, get_peft_model(cast(Any, model), config))
        except (RuntimeError, ValueError) as error:  # for example more than fits into memory
            raise ConfigError(f"cannot add adapters of rank {r}: {error}") from error


def linear_names(model: nn.Module) -> list[str]:
    """Return the distinct last parts of the names of `model`'s linear modules, in model order."""
    names = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        # GPT-2's linear maps are of class Conv1D.
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return list(names)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters in model order, under names free of `peft` wrapping.

    ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`` becomes
    ``model.layers.0.self_attn.q_proj.lora_A.weight``.
    """
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def resolve_device(name: str) -> torch.device:
    """Return the device called ``"auto"`` (CUDA if there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        ConfigError: `name` is none of these, or CUDA is asked for and absent.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be one of auto, cpu, cuda; got {name!r}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError(
            f"device 'cuda' was asked for, but torch {torch.__version__} sees no CUDA device; "
            "there is: cpu"
        )
    return torch.device("cuda" if there and name != "cpu" else "cpu")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and restore every generator after it."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _without_bar(library: Any, wanted: bool) -> Iterator[None]:
    """No "Loading weights" bar inside the block: reading 12 MB from disk takes no time."""
    bars = library.utils.logging
    hidden = wanted and bars.is_progress_bar_enabled()
    if hidden:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            bars.enable_progress_bar()
