"""The model, the data of each node, training and evaluation: nothing here knows of Flower."""

import functools

import torch

from gradcodec.recipes import data, models
from gradcodec.recipes.data import Encoded
from gradcodec.recipes.task import LanguageTask, LocalTraining

NODES = 2
LIMIT, HELD_OUT, LENGTH = 600, 64, 64


@functools.cache
def parts() -> tuple[list[list[Encoded]], list[Encoded], int]:
    """Each node's examples, the held-out ones, and the padding token."""
    _, tokenizer = models.load_base()
    kept, held = data.held_out(data.load_examples("stdlib", limit=LIMIT), HELD_OUT, seed=0)
    shares = data.dirichlet_partition([e.label for e in kept], NODES, alpha=0.5, seed=0)
    encoded = [data.encode_example(tokenizer, e, LENGTH) for e in kept]
    tested = [data.encode_example(tokenizer, e, LENGTH) for e in held]
    return [[encoded[i] for i in share] for share in shares], tested, tokenizer.pad_token_id


@functools.cache
def task(rounds: int, steps: int) -> LanguageTask:
    """The embedded LLaMA with LoRA adapters, the same at every node."""
    torch.set_num_threads(1)
    base, _ = models.load_base()
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapted = models.add_lora(base, r=8, alpha=16, targets=targets, seed=0)
    shards, held, pad = parts()
    return LanguageTask(
        adapted,
        models.adapter_parameters(adapted),
        dict(enumerate(shards)),
        held,
        pad_id=pad,
        rounds=rounds,
        local=LocalTraining(steps=steps),
    )


def load(made: LanguageTask, arrays: dict[str, torch.Tensor]) -> None:
    """Put received values into the adapters."""
    with torch.no_grad():
        for name, parameter in made.parameters.items():
            parameter.copy_(arrays[name])
