"""Recorder, fit and latent training ask for named tensors, not for LLaMA and not for LoRA."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.codecs import Subspace
from gradcodec.faf import LatentOptimizer
from gradcodec.recipes.models import adapter_parameters
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.transforms.subspace.config import ALLOCATIONS, SubspaceConfig

Named = dict[str, nn.Parameter]
Loss = Callable[[], Tensor]


def language_model(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **options,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def next_token_loss(model: nn.Module) -> Loss:
    ids = (torch.arange(0, 64, 8)[:, None] + torch.arange(10)) % 64  # counting
    return lambda: model(input_ids=ids, labels=ids).loss


def full_parameters() -> tuple[Named, Loss]:
    model = language_model()
    return dict(model.named_parameters()), next_token_loss(model)


def with_peft(config: Any) -> tuple[Named, Loss]:
    from peft import get_peft_model

    model = get_peft_model(language_model(), config)
    return adapter_parameters(model), next_token_loss(model)


def ia3() -> tuple[Named, Loss]:
    from peft import IA3Config

    return with_peft(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    )


def prompt_tuning() -> tuple[Named, Loss]:
    from peft import PromptTuningConfig

    return with_peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))


def prefix_tuning() -> tuple[Named, Loss]:
    from peft import PrefixTuningConfig

    return with_peft(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def dora() -> tuple[Named, Loss]:
    from peft import LoraConfig

    return with_peft(
        LoraConfig(
            task_type="CAUSAL_LM", r=3, use_dora=True, target_modules=["q_proj", "down_proj"]
        )
    )


def convolutions() -> tuple[Named, Loss]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    x, y = torch.randn(32, 3, 4, 4), torch.randint(0, 4, (32,))
    return dict(model.named_parameters()), lambda: nn.functional.cross_entropy(model(x), y)


def odd_shapes() -> tuple[Named, Loss]:
    g = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "one": (1,), "vector": (7,), "cube": (2, 3, 5), "row": (1, 9)}
    named = {n: nn.Parameter(torch.randn(s, generator=g)) for n, s in shapes.items()}
    return named, lambda: sum((p.square().sum() for p in named.values()), torch.zeros(()))


KINDS = {
    f.__name__: f
    for f in (full_parameters, ia3, prompt_tuning, prefix_tuning, dora, convolutions, odd_shapes)
}


def fit(named: Named, loss: Loss, config: SubspaceConfig, steps: int = 12) -> Subspace:
    """Record a plain run, put the parameters back, fit."""
    start = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    with GradientRecorder(named, config) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    assert recorder.moments is not None
    assert recorder.moments.count == steps
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(start[name])
    return fit_subspace(recorder.moments, config)


@pytest.mark.parametrize("kind", KINDS)
def test_anything_can_be_recorded_fitted_trained_and_sent(kind: str) -> None:
    named, loss = KINDS[kind]()
    codec = fit(named, loss, SubspaceConfig(ratio=2, basis_dtype="float32"))
    assert codec.spec is not None
    assert [t.name for t in codec.spec] == list(named)

    start = {n: p.detach().clone() for n, p in named.items()}
    optimizer = LatentOptimizer(named, codec, torch.optim.AdamW, lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]

    decoded = codec.decoder.decode(optimizer.payload())
    for name, p in named.items():
        assert torch.equal(p.detach(), start[name] + decoded[name]), name
    assert any(bool(t.any()) for t in decoded.values())


@pytest.mark.parametrize("side", ["auto", "long", "short"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_full_parameters_fit_under_every_rule(side: str, allocation: str) -> None:
    named, loss = full_parameters()
    # Vectors have a short side of one, whose only basis keeps them whole.
    ratio = 2 if side == "short" else 8
    config = SubspaceConfig(ratio=ratio, side=side, allocation=allocation)
    codec: Codec = fit(named, loss, config, steps=3)
    assert codec.spec is not None
    update = {n: p.detach() for n, p in named.items()}
    decoded = codec.decoder.decode(codec.encoder.encode(update))
    assert [(n, t.shape) for n, t in decoded.items()] == [(n, p.shape) for n, p in named.items()]
