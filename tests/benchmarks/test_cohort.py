"""The cohort's fast LLaMA is transformers' with peft's adapters, client by client."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.federated.cohort import CohortLlama
from gradcodec.errors import ConfigError
from gradcodec.recipes.data import IGNORED, Encoded, collate
from gradcodec.recipes.models import adapter_parameters, add_lora, load_base

pytest.importorskip("transformers")
pytest.importorskip("peft")

ALPHA, RANK = 16.0, 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_MAPS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def batch(seed: int, count: int) -> list[Encoded]:
    """Examples of random tokens and lengths; the first part of each is the prompt."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        size = int(rng.integers(6, 40))
        ids = rng.integers(3, 4096, size).tolist()
        prompt = int(rng.integers(1, size - 2))
        out.append(Encoded(ids, [IGNORED] * prompt + ids[prompt:]))
    return out


BATCHES = [batch(0, 8), batch(1, 5)]


def adapted(targets: Sequence[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = load_base("embedded")[0]
    add_lora(model, r=RANK, alpha=ALPHA, targets=targets, seed=0)
    return model, adapter_parameters(model)


def drawn(parameters: Mapping[str, Tensor], seed: int) -> dict[str, nn.Parameter]:
    """Other adapters of the same shapes; B is not zero, or A would get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: nn.Parameter(0.05 * torch.randn(p.shape, generator=generator))
        for n, p in parameters.items()
    }


def transformers_loss(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    values: Mapping[str, Tensor],
    examples: list[Encoded],
) -> tuple[float, dict[str, Tensor]]:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    model.zero_grad()
    loss = model(**collate(examples, 2)).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in parameters.items()}


@pytest.mark.parametrize("targets", [ATTENTION, ("q_proj", "v_proj"), ALL_MAPS])
def test_losses_and_gradients_are_those_of_transformers_and_peft(targets: Sequence[str]) -> None:
    model, parameters = adapted(targets)
    clients = [drawn(parameters, seed) for seed in (1, 2)]
    cohort = CohortLlama(load_base("embedded")[0], scale=ALPHA / RANK, compute=torch.float32)
    losses = cohort(clients, BATCHES)
    losses.sum().backward()
    for mine, examples, loss in zip(clients, BATCHES, losses.tolist(), strict=True):
        expected, gradients = transformers_loss(model, parameters, mine, examples)
        assert loss == pytest.approx(expected, rel=1e-4)
        for name, gradient in gradients.items():
            difference = (mine[name].grad - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), name


def test_bf16_products_change_the_loss_by_less_than_one_percent() -> None:
    parameters = adapted(ATTENTION)[1]
    clients = [drawn(parameters, seed) for seed in (1, 2)]
    base = load_base("embedded")[0]
    exact = CohortLlama(base, scale=ALPHA / RANK, compute=torch.float32)(clients, BATCHES)
    rounded = CohortLlama(base, scale=ALPHA / RANK)(clients, BATCHES)
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    assert not torch.equal(rounded, exact)


def test_shared_key_and_value_heads_are_understood() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        expected = model(**collate(BATCHES[0], 2)).loss
        loss = CohortLlama(model, scale=1.0, compute=torch.float32)([{}], BATCHES[:1])
    torch.testing.assert_close(loss[0], expected, rtol=1e-4, atol=0)


def test_a_batch_without_answers_is_refused() -> None:
    cohort = CohortLlama(load_base("embedded")[0], scale=1.0)
    with pytest.raises(ConfigError, match="no token to learn from"):
        cohort([{}], [[Encoded([5, 6], [IGNORED, IGNORED])]])
