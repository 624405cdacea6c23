"""Multiple-choice questions made of examples; random choices come from the seed in the call."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradcodec.errors import ConfigError
from gradcodec.recipes.examples import Example


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice question; ``options[correct]`` is the right answer."""

    prompt: str
    options: tuple[str, ...]
    correct: int


def multiple_choice(
    examples: Sequence[Example],
    pool: Sequence[Example],
    count: int,
    options: int = 4,
    seed: int = 0,
) -> list[Choice]:
    """Turn `count` examples into multiple-choice questions.

    An example that lists its own options keeps them. For any other, the wrong options are distinct
    answers drawn at random from `pool`, and the right one is put at a random place.

    Raises:
        ConfigError: There are fewer than `count` examples, or the pool has too few answers.
    """
    if not 0 <= count <= len(examples):
        raise ConfigError(f"cannot ask {count} questions from {len(examples)} examples")
    if options < 2:
        raise ConfigError(f"a question needs at least 2 options, got {options}")
    rng = np.random.default_rng(seed)
    answers = sorted({example.answer for example in pool})
    choices: list[Choice] = []
    for index in rng.permutation(len(examples))[:count]:
        example = examples[index]
        if example.options:
            right = example.options.index(example.answer)
            choices.append(Choice(example.prompt, example.options, right))
            continue
        # One draw more than needed, in case the right answer itself comes up.
        if len(answers) < options:
            raise ConfigError(
                f"{options} options need {options} distinct answers in the pool, "
                f"there are {len(answers)}"
            )
        drawn = [answers[i] for i in rng.choice(len(answers), size=options, replace=False)]
        wrong = [answer for answer in drawn if answer != example.answer][: options - 1]
        place = int(rng.integers(options))
        wrong.insert(place, example.answer)
        choices.append(Choice(example.prompt, tuple(wrong), place))
    return choices
