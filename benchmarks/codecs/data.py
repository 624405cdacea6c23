"""The data that codecs are tried on: gradients and updates of the embedded LLaMA, and noise."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from gradcodec.recipes import data, models
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LanguageTask

Snapshot = dict[str, Tensor]

SETS = ("gradient", "update", "gaussian")

TITLES = {
    "gradient": "gradients of all parameters",
    "update": "LoRA updates of clients",
    "gaussian": "Gaussian noise",
}

SHORT = {"gradient": "gradients", "update": "updates", "gaussian": "noise"}


def load(name: str, count: int) -> list[Snapshot]:
    """``count`` snapshots of a set, each named tensors; seeded, in the order of training.

    ``"gradient"``: of every parameter, over batches of 8 examples, 4 steps of AdamW apart.
    ``"update"``: what 8 local steps on a shard of 64 examples change in a LoRA adapter.
    ``"gaussian"``: matrices of 1024 x 1024 standard normal values.
    """
    if name == "gaussian":
        generator = torch.Generator().manual_seed(0)
        return [{"v": torch.randn(1024, 1024, generator=generator)} for _ in range(count)]
    settings = Settings()
    model, tokenizer = models.load_base(settings.model)
    examples = _examples(settings.dataset, 64 * count)
    encoded = [data.encode_example(tokenizer, e, settings.max_length) for e in examples]
    parameters = (
        dict(model.named_parameters())
        if name == "gradient"
        else models.adapter_parameters(
            models.add_lora(
                model,
                r=settings.lora_r,
                alpha=settings.lora_alpha,
                targets=settings.targets,
                seed=settings.seed,
            )
        )
    )
    shards = {i: encoded[64 * i : 64 * (i + 1)] for i in range(count)}
    task = LanguageTask(
        model,
        parameters,
        shards,
        [],
        pad_id=tokenizer.pad_token_id,
        rounds=count,
        local=settings.local,
    )
    return _gradients(task) if name == "gradient" else _updates(task)


@functools.cache
def _examples(dataset: str, limit: int) -> list[data.Example]:
    """Making them of a library's sources takes longer than anything that is done with them."""
    return data.load_examples(dataset, limit=limit)


def _gradients(task: LanguageTask) -> list[Snapshot]:
    for parameter in task.parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(task.parameters.values()), lr=3e-4)
    found = []
    for shard in task.shards.values():
        for step in range(4):
            optimizer.zero_grad(set_to_none=True)
            output = task.model(**data.collate(list(shard[8 * step : 8 * step + 8]), task.pad_id))
            output.loss.backward()
            if not step:
                # Tied or unused parameters have no gradient of their own.
                found.append(
                    {n: p.grad.clone() for n, p in task.parameters.items() if p.grad is not None}
                )
            optimizer.step()
    return found


def _updates(task: LanguageTask) -> list[Snapshot]:
    start = {n: p.detach().clone() for n, p in task.parameters.items()}
    found = []
    for client in task.shards:
        _restore(task.parameters, start)
        task.train(client, 0, torch.optim.AdamW(list(task.parameters.values()), lr=task.local.lr))
        found.append({n: p.detach() - start[n] for n, p in task.parameters.items()})
    return found


def _restore(parameters: dict[str, nn.Parameter], start: Snapshot) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])


def flat(snapshot: Snapshot) -> Tensor:
    """All values, fp32 ``[n]``."""
    return torch.cat([t.reshape(-1).float() for t in snapshot.values()])
