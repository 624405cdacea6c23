"""Laws of mean loss and multiple-choice accuracy."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradcodec.errors import ConfigError
from gradcodec.recipes.data import IGNORED, Choice, collate, encode_example, load_examples
from gradcodec.recipes.evaluate import choice_accuracy, mean_loss
from gradcodec.recipes.models import load_base

VOCABULARY = 8


class Next(nn.Module):
    """Puts `weight` on "the next token is this one plus one", nothing on all others."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        following = (input_ids + 1) % VOCABULARY
        logits = self.weight * nn.functional.one_hot(following, VOCABULARY)
        return SimpleNamespace(logits=self.dropout(logits))


class Digits:
    """A tokenizer of the digits 1 to 6; 7 ends a text."""

    bos_token_id, eos_token_id, pad_token_id = None, 7, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(digit) for digit in text]}


def test_a_model_that_knows_nothing_loses_the_log_of_the_vocabulary() -> None:
    batch = collate([([1, 2, 3], [IGNORED, 2, 3])], 0)
    assert mean_loss(Next(0.0), [batch]) == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_a_model_that_knows_the_answer_loses_nothing() -> None:
    batch = collate([([1, 2, 3], [IGNORED, 2, 3])], 0)
    assert mean_loss(Next(50.0), [batch]) < 1e-6


def test_each_answer_token_weighs_the_same_however_it_is_batched() -> None:
    rows = [([1, 2, 3, 4, 5], [IGNORED, 2, 3, 4, 5]), ([1, 5], [IGNORED, 5])]
    together = mean_loss(Next(3.0), [collate(rows, 0)])
    apart = mean_loss(Next(3.0), [collate([row], 0) for row in rows])
    right = -math.log(math.exp(3.0) / (math.exp(3.0) + VOCABULARY - 1))
    assert together == pytest.approx(apart, rel=1e-6)
    assert together == pytest.approx((5 * right + 3.0) / 5, rel=1e-6)  # one of five is off by 3


def test_mean_loss_runs_without_dropout_and_gives_each_module_its_mode_back() -> None:
    model = Next(3.0).train()
    model.dropout.eval()
    batch = collate([([1, 2, 3], [IGNORED, 2, 3])], 0)
    assert mean_loss(model, [batch]) == mean_loss(model, [batch])
    assert (model.training, model.dropout.training) == (True, False)


def test_unlabelled_batches_raise() -> None:
    with pytest.raises(ConfigError, match="no token is labelled"):
        mean_loss(Next(0.0), [collate([([1, 2], [IGNORED, IGNORED])], 0)])


@pytest.mark.parametrize(("weight", "accuracy"), [(5.0, 1.0), (-5.0, 0.0)])
def test_the_likeliest_option_is_chosen(weight: float, accuracy: float) -> None:
    choices = [Choice("1", ("31", "23", "52"), 1), Choice("12", ("345", "513", "26", "6"), 0)]
    assert choice_accuracy(Next(weight), Digits(), choices, 16) == accuracy


def test_a_long_right_option_is_not_at_a_disadvantage() -> None:
    # In sum the long option loses (six likely tokens against two unlikely ones); per token it
    # wins.
    choice = Choice("1", ("23456", "3"), 0)
    assert choice_accuracy(Next(0.5), Digits(), [choice], 16) == 1.0


def test_no_questions_raise() -> None:
    with pytest.raises(ConfigError, match="no questions"):
        choice_accuracy(Next(0.0), Digits(), [], 16)


def test_the_shipped_model_starts_far_below_the_untrained_one() -> None:
    pytest.importorskip("transformers")
    examples = load_examples("stdlib")[::60]

    def loss(name: str) -> float:
        model, tokenizer = load_base(name)
        rows = [encode_example(tokenizer, example, 64) for example in examples]
        batches = [
            collate(rows[begin : begin + 16], tokenizer.pad_token_id)
            for begin in range(0, len(rows), 16)
        ]
        return mean_loss(model, batches)

    trained, untrained = loss("embedded"), loss("embedded-untrained")
    assert untrained == pytest.approx(math.log(4096), abs=0.5)  # knows nothing
    assert 1.0 < trained < untrained - 2.0  # knows English, not the answers
