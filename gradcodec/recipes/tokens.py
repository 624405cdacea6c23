"""Examples as the token ids and labels that a language model is trained on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from gradcodec.errors import ConfigError
from gradcodec.recipes.examples import Example

IGNORED = -100  # the label that cross-entropy skips


class Encoded(NamedTuple):
    """Token ids and labels of one example, both of the same length in tokens."""

    input_ids: list[int]
    labels: list[int]


def encode_example(tokenizer: Any, example: Example, max_length: int) -> Encoded:
    """Return the tokens of prompt, answer and end of text, with the prompt's labels ignored.

    An example that is too long first loses the start of its prompt, down to half of `max_length`,
    then the end of its answer. So there is always an answer to learn from, and the end-of-text
    token is taught only where the answer really ends.

    Args:
        tokenizer: A `transformers` tokenizer with an end-of-text token.
        example: What to encode.
        max_length: Most tokens to return, at least 2.

    Raises:
        ConfigError: `max_length` is below 2 or the tokenizer has no end-of-text token.
    """
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 (prompt and answer), got {max_length}")
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token (eos_token_id is None)")
    prompt: list[int] = list(tokenizer(example.prompt)["input_ids"])
    answer: list[int] = list(tokenizer(example.answer, add_special_tokens=False)["input_ids"])
    answer.append(tokenizer.eos_token_id)
    room = max(max_length - len(answer), max_length // 2)
    if len(prompt) > room:
        # A model that expects a start token expects it first, whatever was cut behind it.
        starts = room > 1 and prompt[0] == tokenizer.bos_token_id
        prompt = [prompt[0], *prompt[1 - room :]] if starts else prompt[-room:]
    answer = answer[: max_length - len(prompt)]
    return Encoded(prompt + answer, [IGNORED] * len(prompt) + answer)


def collate(batch: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad a batch on the right to its longest member.

    Returns:
        ``input_ids``, ``attention_mask`` (1 on tokens, 0 on padding) and ``labels`` (`IGNORED`
        on padding), each int64 of shape ``(batch, longest)``.

    Raises:
        ConfigError: The batch is empty.
    """
    if not batch:
        raise ConfigError("cannot collate an empty batch")
    shape = (len(batch), max(len(ids) for ids, _ in batch))
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, (ids, targets) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.tensor(targets, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
