"""Laws of means, standard errors and paired differences."""

import math
import statistics

import pytest

from gradcodec.errors import ConfigError
from gradcodec.recipes.eval_scores import Answer
from gradcodec.recipes.eval_table import ALL, differences, figures, markdown


def answers(
    scores: str, *, group: str | None = None, options: int = 4, begin: int = 0
) -> list[Answer]:
    """One answer for each character: ``"1"`` is right."""
    return [
        Answer("mmlu", f"mmlu_{group}", group, "acc", begin + number, float(score), options, False)
        for number, score in enumerate(scores)
    ]


def only(rows: list[dict[str, object]], **which: object) -> dict[str, object]:
    (found,) = [r for r in rows if all(r[k] == v for k, v in which.items())]
    return found


def test_means_and_standard_errors_are_the_textbooks() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    row = only(figures({"base": answers("10011")}), group=ALL)
    assert row["mean"] == pytest.approx(0.6)
    assert row["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert (row["questions"], row["chance"]) == (5, 0.25)


def test_groups_are_those_that_occur_and_all_weighs_questions_not_groups() -> None:
    own = answers("1111", group="other") + answers("0", group="STEM")
    rows = figures({"base": own})
    assert [(r["group"], r["questions"], r["mean"]) for r in rows] == [
        (ALL, 5, 0.8),
        ("STEM", 1, 0.0),
        ("other", 4, 1.0),
    ]
    assert rows[1]["stderr"] is None


def test_a_free_answer_has_no_chance_level() -> None:
    assert only(figures({"base": answers("10", options=0)}), group=ALL)["chance"] is None
    assert "Guessing" not in markdown({"base": answers("10", options=0)}, {"mmlu": 0}, {})


def test_differences_are_paired_by_question_in_whatever_order() -> None:
    base, tuned = answers("11110000"), answers("11111100")
    (row,) = differences({"base": base, "tuned": tuned[::-1]})
    assert (row["model"], row["minus"], row["changed"], row["questions"]) == (
        "tuned",
        "base",
        2,
        8,
    )
    assert row["difference"] == pytest.approx(0.25)
    assert row["stderr"] == pytest.approx(statistics.stdev([0.0] * 6 + [1.0] * 2) / math.sqrt(8))


def test_models_that_agree_are_told_apart_by_fewer_questions_than_independent_ones() -> None:
    """Ten more right of 200: beyond two standard errors only because all others are answered alike.

    Of independent samples the standard error would be 5 %, as large as the difference.
    """
    base = answers("10" * 100)
    close = answers("1" * 20 + "10" * 90)
    far = answers("1" * 20 + "01" * 90)
    paired, loose = (
        differences({"base": base, "close": close}),
        differences({"base": base, "far": far}),
    )
    assert paired[0]["difference"] == loose[0]["difference"] == pytest.approx(0.05)
    assert (paired[0]["beyond_two_stderr"], loose[0]["beyond_two_stderr"]) == (True, False)


def test_each_pair_is_compared_once_later_minus_earlier() -> None:
    rows = differences({name: answers("10") for name in ("base", "fp32", "subspace")})
    pairs = [(r["model"], r["minus"]) for r in rows]
    assert pairs == [("fp32", "base"), ("subspace", "base"), ("subspace", "fp32")]
    assert {r["beyond_two_stderr"] for r in rows} == {False}


def test_other_questions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"same questions of mmlu .*2 in common"):
        differences({"base": answers("101"), "tuned": answers("101", begin=1)})


def test_the_words_say_who_is_no_better_than_guessing() -> None:
    guessing, right, wrong = answers("1000" * 25), answers("1" * 99 + "0"), answers("0" * 99 + "1")
    text = markdown({"a": guessing, "b": right, "c": wrong}, {"mmlu": 5}, {"mmlu": 3})
    assert "**mmlu**: acc, 5 examples before each question" in text
    assert "| all | 100 | 25.0 % ± 4.4 | 99.0 % ± 1.0 | 1.0 % ± 1.0 |" in text
    assert "Guessing gives 25.0 %." in text
    assert "Better than that by more than two standard errors: b." in text
    assert "Worse than that by more than two standard errors: c." in text
    assert "Within two standard errors of guessing: a." in text
    assert "3 prompts had more tokens than the model takes" in text
    assert "| b minus a | +74.0 % ± 4.4 | 74 | yes |" in text


def test_one_model_is_compared_with_nothing() -> None:
    assert "compared" not in markdown({"base": answers("10")}, {"mmlu": 0}, {})
