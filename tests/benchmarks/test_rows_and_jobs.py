"""Rows survive crashes; finished runs are not run again; one failure is not everyone's."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import jobs, rows
from benchmarks.federated import tune
from benchmarks.federated.scheme import Scheme
from benchmarks.jobs import Job

STARTED: list[str] = []


def play(job: Job) -> Iterator[rows.Row]:
    """Stands in for a federated run."""
    STARTED.append(job.scheme)
    for number in range(1, job.rounds + 1):
        if job.scheme == "broken" and number == 2:
            raise RuntimeError("out of order")
        yield {"round": number, "loss": 5.0 - job.lr * number, "diverged": False}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    STARTED.clear()


def job(scheme: str, lr: float = 0.1, rounds: int = 3) -> Job:
    return Job("tune", scheme, 100, lr, rounds, f"{__name__}:play")


def test_finished_runs_are_skipped_and_broken_ones_start_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    failed = jobs.execute([job("a"), job("broken"), job("b")], path, 1)
    assert len(failed) == 1
    assert "out of order" in failed[0]
    assert len(rows.read(path)) == 3 + 1 + 3
    jobs.execute([job("a"), job("broken"), job("b", 0.2)], path, 1)
    assert STARTED == ["a", "broken", "b", "broken", "b"]
    assert [len(run) for run in rows.runs(path).values()] == [3, 1, 3, 3]


def test_a_run_that_is_made_again_supersedes_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs.execute([job("a")], path, 1)
    jobs.execute([job("a")], path, 1, again=True)
    assert len(rows.read(path)) == 6
    assert [len(run) for run in rows.runs(path).values()] == [3]


def test_rows_say_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs.execute([job("a")], path, 1)
    row = rows.read(path)[0]
    assert {"run", "case", "scheme", "seed", "config", "versions", "commit", "machine"} <= set(row)
    assert row["config"] == {"lr": 0.1, "rounds": 3}


def test_a_line_that_a_crash_cut_off_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"round": 1, "run": "x"}\n{"round": 2, "ru')
    rows.append(path, {"round": 1, "run": "y"})
    assert [row["run"] for row in rows.read(path)] == ["x", "y"]


def test_the_best_rate_of_the_longest_runs_is_taken(tmp_path: Path) -> None:
    def make(world: object) -> object:
        raise AssertionError

    path = tmp_path / "tune.jsonl"
    asked = [job("a", lr) for lr in (0.1, 0.3, 0.2)] + [job("a", 9.0, rounds=1)]
    jobs.execute(asked, path, 1)
    schemes = [Scheme(name, name, "peer", make, grid=(1.0, 2.0, 3.0)) for name in ("a", "b")]
    assert tune.best(schemes, path) == {"a": 0.3, "b": 2.0}


def play_all(asked: tuple[Job, ...]) -> Iterator[tuple[Job, rows.Row]]:
    """Stands in for runs in step; ``"gone"`` ends the whole pass after everyone's first round."""
    STARTED.append("+".join(job.scheme for job in asked))
    for number in range(1, asked[0].rounds + 1):
        for job in asked:
            yield job, {"round": number, "loss": 1.0, "diverged": job.scheme == "blown"}
        if any(job.scheme == "gone" for job in asked):
            raise RuntimeError("out of memory")


def test_neighbours_that_differ_in_scheme_and_rate_alone_are_played_in_step(tmp_path: Path) -> None:
    def one(scheme: str, lr: float = 0.1, seed: int = 0) -> Job:
        source = f"{__name__}:play"
        return Job("x", scheme, seed, lr, 3, source, together=f"{__name__}:play_all")

    asked = [one("a"), one("a", 0.2), one("b"), one("c", seed=1), one("d", seed=1), job("a")]
    assert jobs.execute(asked, lambda job: tmp_path / job.case, 1, together=2) == []
    assert STARTED == ["a+a", "b", "c+d", "a"]  # one alone is played by its own function
    assert len(rows.runs(tmp_path / "x")) == 5
    assert len(rows.runs(tmp_path / "tune")) == 1


def test_a_pass_that_fails_fails_the_runs_that_had_not_ended(tmp_path: Path) -> None:
    asked = [
        Job("x", scheme, 0, 0.1, 3, f"{__name__}:play", together=f"{__name__}:play_all")
        for scheme in ("blown", "gone", "c")
    ]
    failed = jobs.execute(asked, tmp_path / "rows", 1, together=3)
    assert len(failed) == 2
    assert all("out of memory" in line for line in failed)
