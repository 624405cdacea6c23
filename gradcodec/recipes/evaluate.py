"""How well a language model answers: mean loss and multiple-choice accuracy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.data import IGNORED, Choice, Example, collate, encode_example

__all__ = ["choice_accuracy", "mean_loss"]

_BATCH = 32


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    r"""Return the mean negative log-likelihood of the answer tokens, in nats per token.

    .. math:: -\frac{1}{|T|} \sum_{t \in T} \log p(x_t \mid x_{<t})

    with T all labelled tokens of all batches, so long batches weigh more than short ones. The
    model runs in evaluation mode without gradients; after that each module has its mode again.

    Args:
        model: A causal language model.
        batches: What `gradcodec.recipes.data.collate` returns, on any device.

    Raises:
        ConfigError: No token is labelled.
    """
    total, count = 0.0, 0
    with _evaluating(model):
        for batch in batches:
            sums, counts = _log_likelihoods(model, batch)
            total -= float(sums.sum())
            count += int(counts.sum())
    if count == 0:
        raise ConfigError("no token is labelled: there is nothing to take the mean of")
    return total / count


def choice_accuracy(
    model: nn.Module, tokenizer: Any, choices: Sequence[Choice], max_length: int
) -> float:
    """Return the share of questions, in [0, 1], whose right option the model finds likeliest.

    The score of an option is its mean log-likelihood per token given the prompt (end of text
    included), so that long options are not at a disadvantage.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        choices: The questions.
        max_length: Most tokens of prompt and option together.

    Raises:
        ConfigError: There are no questions, or `max_length` is too small.
    """
    if not choices:
        raise ConfigError("no questions: there is nothing to take the mean of")
    encoded = [
        encode_example(tokenizer, Example(choice.prompt, option), max_length)
        for choice in choices
        for option in choice.options
    ]
    # Similar lengths together: less padding, same scores.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].input_ids))
    scores = [0.0] * len(encoded)
    with _evaluating(model):
        for begin in range(0, len(order), _BATCH):
            members = order[begin : begin + _BATCH]
            batch = collate([encoded[index] for index in members], tokenizer.pad_token_id)
            sums, counts = _log_likelihoods(model, batch)
            for index, score in zip(members, (sums / counts).tolist(), strict=True):
                scores[index] = score
    right, begin = 0, 0
    for choice in choices:
        own = scores[begin : begin + len(choice.options)]
        right += own.index(max(own)) == choice.correct
        begin += len(own)
    return right / len(choices)


def _log_likelihoods(
    model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, per row, the sum of labelled log-likelihoods and the number of labelled tokens."""
    device = next(model.parameters()).device
    labels = batch["labels"][:, 1:].to(device)  # the logits at t predict token t + 1
    output: Any = model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
    )
    counted = labels != IGNORED
    # Only the labelled rows are widened to fp32: a large vocabulary makes logits the peak.
    picked = output.logits[:, :-1][counted].float()
    loss = nn.functional.cross_entropy(picked, labels[counted], reduction="none")
    sums = torch.zeros(labels.shape, device=device).masked_scatter(counted, -loss).sum(dim=1)
    return sums, counted.sum(dim=1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
