"""The case `paper`: its metrics on made data, its controls, and its page from rows."""

import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.federated.world import world_of
from benchmarks.llama.tasks import PLACES
from benchmarks.paper import (
    case,
    coders,
    fidelity,
    fits,
    measures,
    recordings,
    results,
    robustness,
    shapes,
    trained,
)
from benchmarks.paper import page as pages
from benchmarks.paper.coders import CODERS, Fitting, Through
from benchmarks.paper.recordings import Recording, weighted
from benchmarks.paper.setup import Setup
from benchmarks.run import Options
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining
from gradcodec.registry import make_codec
from gradcodec.types import TensorSpec, UpdateSpec

SPEC = UpdateSpec(
    tuple(
        TensorSpec(f"model.layers.{layer}.q_proj.lora_{half}.weight", shape)
        for layer in range(2)
        for half, shape in (("A", (4, 64)), ("B", (64, 4)))
    )
)


SMALL = Settings(
    limit=300,
    clients=4,
    fraction=0.5,
    min_client=12,
    held_out=20,
    local=LocalTraining(steps=2),
    device="cpu",
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recording(rounds: int = 2, clients: int = 3) -> Recording:
    shape = (rounds, clients, SPEC.numel)
    starts = drawn(rounds, 1, SPEC.numel, seed=1).expand(shape).clone()
    return Recording(
        SPEC,
        starts,
        0.1 * drawn(*shape, seed=2),
        drawn(*shape, seed=3),
        torch.arange(clients).expand(rounds, clients),
        torch.tensor([10, 20, 70]).expand(rounds, clients),
    )


# -- metrics ---------------------------------------------------------------------------------------


def test_sending_nothing_scores_n_by_the_papers_snr_and_0_db() -> None:
    x = drawn(3, SPEC.numel)
    found = measures.errors(x, torch.zeros_like(x))
    assert found["snr_paper"] == pytest.approx(SPEC.numel)
    assert (found["rse"], found["snr_db"], found["cosine"]) == (1, 0, 0)


def test_a_perfect_copy_has_an_infinite_snr() -> None:
    x = drawn(SPEC.numel)
    found = measures.errors(x, x)
    assert (found["rse"], found["snr_db"], found["snr_paper"]) == (0, None, None)


def test_the_factors_share_out_all_values_by_name() -> None:
    masks = measures.factors(SPEC)
    x = torch.where(masks["A"], 1.0, 0.0)
    assert int(masks["A"].sum()) == int(masks["B"].sum()) == 512
    assert bool((masks["A"] ^ masks["B"]).all())
    found = measures.by_factor(x, 0 * x, masks)
    assert (found["A"]["rse"], found["B"]["rse"]) == (1, 0)


@pytest.mark.parametrize(
    ("decode", "expected"),
    [(lambda x: x, 1.0), (lambda x: 0 * x + 7, 0.0), (lambda x: x / 2, 0.25)],
    ids=["identity", "constant", "half"],
)
def test_gain_is_the_share_of_a_difference_that_comes_through(
    decode: measures.Decode, expected: float
) -> None:
    x, other = drawn(2, SPEC.numel)
    assert measures.gain(decode(x) - decode(other), x - other) == pytest.approx(expected)


def test_a_shuffled_update_has_the_values_of_each_tensor_in_another_order() -> None:
    x = drawn(SPEC.numel)
    y = measures.shuffled(x, SPEC, seed=0)
    sizes = [t.numel for t in SPEC]
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        assert torch.equal(a.sort().values, b.sort().values)
        assert not torch.equal(a, b)


# -- controls --------------------------------------------------------------------------------------


def made(name: str) -> coders.Decodes:
    coder = CODERS[name]
    given = Fitting(drawn(6, SPEC.numel), SPEC, steps=1, rate=2e-4, seed=0)
    if coder.codec is None:
        assert coder.control is not None
        return coder.control(given)
    return Through(coder.codec(given).bind(SPEC), SPEC)


@pytest.mark.parametrize("name", ["zero", "train-mean"])
def test_a_constant_control_does_not_depend_on_its_input(name: str) -> None:
    decode = made(name)
    x, other = drawn(2, SPEC.numel, seed=5)
    assert measures.gain(decode(x) - decode(other), x - other) == 0


def test_the_noise_control_has_the_norm_of_its_input_and_nothing_else_of_it() -> None:
    x = drawn(SPEC.numel, seed=5)
    y = made("noise")(x, seed=1)
    assert float(y.norm()) == pytest.approx(float(x.norm()))
    assert abs(float(measures.errors(x, y)["cosine"] or 0)) < 4 / math.sqrt(SPEC.numel)


def test_identity_loses_nothing() -> None:
    x = drawn(SPEC.numel, seed=5)
    assert torch.equal(made("identity")(x), x)


@pytest.mark.parametrize(("name", "ratio"), [("ae-cnn1d", 32), ("ae-uformer", 64)])
def test_the_papers_other_autoencoders_code_as_it_states_and_learn(name: str, ratio: int) -> None:
    x = drawn(1, SPEC.numel)
    same = Fitting(x.expand(6, -1), SPEC, steps=2, rate=2e-3, seed=0)
    make = CODERS[name].codec
    assert make is not None
    fitted, untrained = (
        Through(make(replace(same, steps=steps)).bind(SPEC), SPEC) for steps in (2, 0)
    )
    # The picture of these tensors is 128 x 128.
    assert fitted.codec.code_numel(SPEC) == 128 * 128 // ratio
    errors = [measures.errors(x, decode(x[0]))["rse"] or 0 for decode in (fitted, untrained)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["prior", "random-subspace", "subspace"])
def test_codes_of_a_64th_have_no_more_values_than_that(name: str) -> None:
    through = made(name)
    assert isinstance(through, Through)
    # One direction of each tensor: its four columns.
    assert through.codec.code_numel(SPEC) == 4 * len(SPEC)


def test_every_analysis_of_coders_has_every_control() -> None:
    units = case.units(Setup())
    controls = {"identity", "train-mean", "noise", "zero"}
    for kind, of in (*(("snr", what) for what in recordings.OBJECTS), ("entropy", "update")):
        assert controls <= {name for k, name, o in units if (k, o) == (kind, of)}
    assert controls <= {name for k, name, _ in units if k == "noise"}
    for kind in ("transfer", "reading"):
        by_source = {(of, name) for k, name, of in units if k == kind}
        sources = {of for of, _ in by_source}
        assert {(of, name) for of in sources for name in ("train-mean", "subspace")} <= by_source


def test_noise_on_a_code_of_all_values_is_noise_on_the_update() -> None:
    x = drawn(SPEC.numel, seed=5)
    noisy = Through(make_codec("fp32").bind(SPEC), SPEC).with_noise(x, sigma=0.5)
    assert float(measures.errors(x, noisy)["rse"] or 0) == pytest.approx(0.25, rel=0.2)


# -- analyses --------------------------------------------------------------------------------------


def test_errors_of_a_state_hide_those_of_the_innovation() -> None:
    test = recording()
    decode = lambda x, seed=0: test.starts[0, 0]  # noqa: E731
    found = fidelity.one_round(test, 0, "state", decode)
    assert float(found["client"]["all"]["rse"] or 0) < 0.02
    assert found["innovation"]["all"]["rse"] == pytest.approx(1)
    assert found["mean"]["all"]["rse"] == pytest.approx(1)


def test_the_mean_is_weighted_by_examples_and_the_sum_is_not() -> None:
    test = recording()
    expected = torch.tensor([0.1, 0.2, 0.7]) @ test.updates[0]
    assert torch.allclose(weighted(test.updates[0], test.examples[0]), expected, atol=1e-6)
    sign = torch.tensor([1.0, 1.0, -1.0])[:, None]

    def decode(x: Tensor, seed: int = 0) -> Tensor:
        return x * sign[seed % 3]

    found = fidelity.one_round(test, 0, "update", decode)
    heavy, whole = test.updates[0, 2], test.updates[0].sum(0)
    energy = 4 * float(heavy.square().sum())
    assert found["sum"]["all"]["rse"] == pytest.approx(energy / float(whole.square().sum()), 1e-4)
    assert found["mean"]["all"]["rse"] == pytest.approx(
        0.49 * energy / float(expected.square().sum()), 1e-4
    )


class Fixed:
    """A setup around a made recording."""

    rounds = 2

    def test(self) -> Recording:
        return recording()

    def coder(self, name: str, what: str = "update") -> coders.Decodes:
        return made(name)


def test_equal_clients_aggregate_exactly_and_their_sum_is_three_times_as_long() -> None:
    class Equal(Fixed):
        def test(self) -> Recording:
            test = recording()
            test.updates[:] = test.updates[:, :1].clone()
            return test

    (first, _) = fidelity.aggregation(Equal())["rounds"]  # type: ignore[arg-type]
    assert first["mean"] == pytest.approx(0, abs=1e-9)
    assert first["length"] == pytest.approx(3, rel=1e-4)
    assert first["sum"] > 0.001


def test_sizes_are_those_of_the_bytes() -> None:
    row = fidelity.size(Fixed(), "identity")  # type: ignore[arg-type]
    assert row["payload_bytes"] == 4 * SPEC.numel
    assert 0 < row["wire_bytes"] - row["payload_bytes"] < 64


def test_the_identity_lets_clients_and_noise_through_and_a_constant_neither() -> None:
    whole = robustness.noise(Fixed(), "identity")  # type: ignore[arg-type]
    assert whole["client_gain"] == whole["shuffled_gain"] == 1
    for level in whole["levels"]:
        assert level["noise_gain"] == pytest.approx(1, rel=1e-4)
        assert level["rse"] == pytest.approx(level["level"] ** 2, rel=0.2)
        assert level["client_gain"] == pytest.approx(1, rel=1e-2)
    constant = robustness.noise(Fixed(), "train-mean")  # type: ignore[arg-type]
    assert constant["client_gain"] == constant["shuffled_gain"] == 0
    assert constant["swapped"]["rse"] == constant["rse"]
    assert all(level["noise_gain"] == 0 for level in constant["levels"])
    assert {level["rse"] for level in constant["levels"]} == {constant["rse"]}


def test_noise_of_the_same_norm_decodes_any_message_equally_badly() -> None:
    found = robustness.noise(Fixed(), "noise")  # type: ignore[arg-type]
    assert found["rse"] == pytest.approx(2, abs=0.2)
    assert found["swapped"]["rse"] == pytest.approx(found["rse"], abs=0.2)
    assert found["client_gain"] < 0.01


def test_a_projection_on_a_64th_lets_a_64th_of_the_noise_through() -> None:
    found = robustness.noise(Fixed(), "random-subspace")  # type: ignore[arg-type]
    assert found["levels"][1]["noise_gain"] == pytest.approx(1 / 64, rel=0.5)


def test_snapshots_of_a_constant_decoder_have_no_entropy_together() -> None:
    assert shapes.entropy(Fixed(), "train-mean")["ensemble"] < 1e-6  # type: ignore[arg-type]
    whole = shapes.entropy(Fixed(), "identity")  # type: ignore[arg-type]
    assert whole["ensemble"] == pytest.approx(math.log(6), abs=0.05)  # six snapshots, independent
    assert whole["ensemble"] <= whole["most"]
    assert shapes.entropy(Fixed(), "zero")["ensemble"] == 0  # type: ignore[arg-type]


def test_histograms_of_gaussian_values_are_gaussian() -> None:
    found = shapes.shape(Fixed(), "gradient")["rounds"][0]["A"]  # type: ignore[arg-type]
    assert abs(found["excess"]) < 0.5
    assert found["rms"] == pytest.approx(1, rel=0.1)
    assert sum(found["counts"]) == pytest.approx(3 * 512, rel=0.01)
    assert found["quantiles"][3] == pytest.approx(0, abs=0.1)
    assert sum(found["spectrum"]) == pytest.approx(1)


def test_a_change_of_a_product_has_twice_the_rank() -> None:
    found = shapes.product(Fixed())["rounds"][0]  # type: ignore[arg-type]
    assert len(found["spectrum"]) == 8
    assert sum(found["spectrum"]) == pytest.approx(1)


def test_the_entropy_of_a_product_is_the_logarithm_of_its_equal_directions() -> None:
    b, a = torch.zeros(64, 4), torch.eye(4, 64)
    b[:2, :2] = torch.eye(2)
    names = [f"layers.0.q_proj.lora_{half}.weight" for half in "AB"]
    (found,) = trained.layers(dict(zip(names, (a, b), strict=True)))
    assert found["entropy"] == pytest.approx(math.log(2))
    assert found["spectrum"] == pytest.approx([0.5, 0.5, 0, 0])
    assert found["norm"] == pytest.approx(math.sqrt(2))


def test_an_adapter_of_noise_has_the_norms_of_the_federations() -> None:
    setup: Any = SimpleNamespace(test=recording, seed=0)
    noise, real = (
        trained.TRAININGS[name].adapter(setup) for name in ("noise-adapter", "federation")
    )
    assert list(noise) == list(real)
    for name, tensor in real.items():
        assert float(noise[name].norm()) == pytest.approx(float(tensor.norm()), rel=1e-4)
        assert (
            abs(float(measures.errors(tensor.flatten(), noise[name].flatten())["cosine"] or 0))
            < 0.3
        )


@pytest.mark.parametrize("name", list(fits.VARIANTS))
def test_variants_of_the_autoencoder_keep_its_shapes(name: str) -> None:
    variant = fits.VARIANTS[name]
    encoder, decoder = fits.networks(SPEC, variant.depth, variant.up, seed=0)
    x = drawn(1, SPEC.numel)
    code = encoder.eval()(x)
    assert code.shape == (1, 128 * 128 // 64)
    assert decoder.eval()(code).shape == x.shape


def test_the_papers_autoencoder_has_the_sizes_that_the_paper_states() -> None:
    found = fits.geometry("resnet3")
    assert found["parameters"] == {"encoder": 246_785, "decoder": 246_698}
    assert found["code_numel"] * 64 == found["numel"] == 8_388_608
    assert fits.geometry("cnn1d")["code_numel"] * 32 == found["numel"]


def test_smooth_pictures_are_smooth_and_differ() -> None:
    spec = fits.llama_7b()
    one = UpdateSpec(spec.tensors[:2])
    pictures = fits.smooth(one, 2, seed=0)
    a = pictures[0, : 8 * 4096].reshape(8, 4096)  # lora_A stands on its long side
    assert float((a[:, 1:] - a[:, :-1]).abs().max()) < 0.01
    assert not torch.allclose(pictures[0], pictures[1], atol=0.1)


def test_another_model_changes_recordings_and_sources_and_trains_fewer_autoencoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACES[0], "small.gguf")
    monkeypatch.setenv(PLACES[1], str(tmp_path))
    own = Setup.asked(Options(tmp_path, quick=True), seed=0)
    other = Setup.asked(Options(tmp_path, quick=True, model=Path("small.gguf")), seed=0)
    assert other.settings().model == "small.gguf"
    assert other.settings("mmlu").dataset == str(tmp_path / "mmlu-test.jsonl")
    assert own.settings().model == "embedded"
    analyses = [{u for u in case.units(s) if u[0] != "transfer"} for s in (own, other)]
    assert analyses[0] > analyses[1]
    assert {u[:2] for u in analyses[0] - analyses[1]} == {
        ("snr", "ae-literal"),
        *((kind, name) for kind in ("snr", "size") for name in ("ae-cnn1d", "ae-uformer")),
        *(("trained", name) for name in trained.TRAININGS),
    }
    ids = [{case.job(s, u).stamp()["run"] for u in case.units(s)} for s in (own, other)]
    assert not ids[0] & ids[1]


def test_other_seeds_repeat_what_trains_few_autoencoders() -> None:
    first, other = (case.units(Setup(seed=seed)) for seed in (0, 1))
    assert set(other) < set(first)
    assert {unit[0] for unit in other} == set(case.REPEATED)
    assert {unit[2] for unit in other} == {"update"}


def test_a_job_gives_back_the_setup_that_it_was_made_with() -> None:
    setup = Setup(rounds=3, tgap_rounds=2, steps=7, rate=1e-3, seed=5)
    assert Setup.of(case.job(setup, ("snr", "zero", "update"))) == setup


@pytest.mark.slow
def test_a_recording_that_was_broken_off_goes_on_as_it_would_have() -> None:
    pytest.importorskip("peft")
    world = world_of(SMALL)
    for reading in recordings.READINGS:
        earlier, whole = recordings.record(world, "d1", 2, reading)
        _, again = recordings.record(world, "d1", 2, reading, earlier)
        assert torch.equal(again.starts, whole.starts)
        assert torch.equal(again.updates, whole.updates)
        assert not torch.equal(whole.starts[0], whole.starts[1])


@pytest.mark.slow
def test_a_codec_that_loses_nothing_trains_what_was_recorded() -> None:
    pytest.importorskip("peft")
    *_, played = recordings.record(world_of(SMALL), "d2", 2)
    codec = make_codec("fp32").bind(played.spec)
    setup: Any = SimpleNamespace(
        settings=lambda: SMALL,
        rounds=2,
        test=lambda: played,
        coder=lambda name: Through(codec, played.spec),
    )
    names = ("federation", "compressed", "centralised")
    own, coded, pooled = (trained.TRAININGS[name].adapter(setup) for name in names)
    assert list(own) == list(coded) == list(pooled)
    for name, tensor in own.items():
        assert torch.allclose(coded[name], tensor, atol=1e-6)
        assert not torch.allclose(pooled[name], tensor, atol=1e-4)


# -- the page --------------------------------------------------------------------------------------


def row(kind: str, scheme: str, of: str = "update", **found: object) -> dict[str, object]:
    config = {"kind": kind, "of": of, "model": "embedded", "played": 1, "tgap_rounds": 4}
    return {
        "run": f"{kind} {scheme} {of}",
        "scheme": scheme,
        "seed": 0,
        "config": {**config, "steps": 300, "rate": 2e-4},
        **found,
    }


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def snr_row(scheme: str, rse: float, kind: str = "snr", of: str = "update") -> dict[str, object]:
    one = {"rse": rse, "snr_db": 0.0, "cosine": 0.5, "snr_paper": 8.0 / rse}
    whole = dict.fromkeys(("A", "B", "all"), one)
    return row(
        kind, scheme, of, rounds=[{"number": 1, "client": whole, "mean": whole, "sum": whole}]
    )


def test_page_shows_the_metrics_of_each_coder_and_the_last_row_of_each(tmp_path: Path) -> None:
    path = write(
        tmp_path / "paper.jsonl", snr_row("zero", 5.0), snr_row("int4", 0.01), snr_row("zero", 1.0)
    )
    pages.page(path).write(path)
    text = path.with_suffix(".md").read_text()
    assert "| int4 | 800 | 20.00 | 0.0100 | 0.500 |" in text
    assert "| *nothing (zero)* | 8.00 | 0.00 | 1.00 | 0.500 |" in text
    assert (tmp_path / "paper-snr.png").stat().st_size > 1000


def test_a_control_that_was_not_run_has_no_columns_and_one_without_a_row_a_dash(
    tmp_path: Path,
) -> None:
    codecs = [snr_row(n, 0.5, "transfer", "own") for n in fits.CODERS[:2]]
    mean = snr_row("train-mean", 0.5, "transfer", "shuffled")
    before, after = (
        pages.page(write(tmp_path / "paper.jsonl", *lines)).tables[
            "5. A codec fitted on one task, applied to another"
        ]
        for lines in (codecs, [*codecs, mean])
    )
    assert len(before[0]) == 7
    assert after[0][7:] == tuple(
        f"*always the training mean*: {end}" for end in ("error", "cosine", "cosine of the mean")
    )
    assert after[1][7:] == ("-", "-", "-")


@pytest.mark.parametrize("what", recordings.OBJECTS)
def test_page_tells_the_factors_apart(tmp_path: Path, what: str) -> None:
    whole = snr_row("int4", 0.5, of=what)
    errors = {"A": 0.1, "B": 0.01, "all": 0.05}
    one = {f: {**whole["rounds"][0]["client"]["all"], "rse": e} for f, e in errors.items()}  # type: ignore[index]
    whole["rounds"] = [{"number": 1, "client": one, "mean": one, "sum": one, "innovation": one}]
    text = pages.page(write(tmp_path / "paper.jsonl", whole)).markdown("paper")
    found = re.search(r"factors apart, (\w+)s \|.*\n.*\n\| int4 \|(.*) \|", text)
    assert found is not None
    cells = ["0.100", "10.00", "0.0100", "20.00"]
    assert found[1] == what
    assert [c.strip() for c in found[2].split("|")] == cells * (2 if what == "state" else 1)


def test_a_metric_over_rounds_is_that_of_each_round() -> None:
    one, two = (snr_row("zero", rse)["rounds"][0] for rse in (0.1, 0.01))  # type: ignore[index]
    rows: Any = [{"rounds": [one, {**two, "number": 2}]}]
    assert results.over_rounds(rows, "client", "snr_db") == ([1, 2], pytest.approx([10, 20]))


def test_page_names_coders_that_were_run_on_fewer_seeds(tmp_path: Path) -> None:
    other = {**snr_row("int4", 0.1), "run": "another", "seed": 1}
    rows = [snr_row("int4", 0.1), snr_row("ae-cnn1d", 1.0)]
    path = tmp_path / "paper.jsonl"
    told = "of fewer seeds: 1-D CNN AE 1/32, literal, scaled\n"
    assert told in pages.page(write(path, *rows, other)).markdown("paper")
    assert "of fewer seeds" not in pages.page(write(path, *rows)).markdown("paper")


def test_page_says_how_long_its_rows_took_if_all_of_them_do(tmp_path: Path) -> None:
    rows = [{**snr_row(name, 1.0), "seconds": 90.0} for name in ("zero", "int4")]
    path = tmp_path / "paper.jsonl"
    told = "the rows took 3 min of a core"
    assert told in pages.page(write(path, *rows)).markdown("paper")
    old = pages.page(write(path, *rows, snr_row("noise", 2.0))).markdown("paper")
    assert "the rows took" not in old
    assert "| *noise of the same norm* |" in old


def test_a_row_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> dict[str, float]:
        time.sleep(0.2)
        return {"loss": 7.0}

    monkeypatch.setattr(case, "KINDS", {"snr": slow})
    (made,) = case.play_job(case.job(Setup(), ("snr", "zero", "update")))
    assert made["loss"] == 7
    assert 0.2 <= made["seconds"] < 5


def test_page_shows_the_longest_form_of_each_analysis(tmp_path: Path) -> None:
    short, longer = snr_row("zero", 5.0), snr_row("zero", 1.0)
    longer["run"], longer["config"] = "longer", {**short["config"], "steps": 600}  # type: ignore[dict-item]
    size = row("size", "identity", **fidelity.size(Fixed(), "identity"))  # type: ignore[arg-type]
    found = results.Results(write(tmp_path / "paper.jsonl", longer, short, size))
    assert [r["run"] for r in found("snr", "zero")] == ["longer"]
    assert found.source("snr") == (
        "1 rounds, codecs fitted on 4, autoencoders for 600 steps at 0.0002; seed 0"
    )
    assert [form.steps for form in found.forms] == [600, 300]
    assert len(found("size", "identity")) == 1


def test_many_rounds_are_shown_by_some_of_them() -> None:
    assert results.some(range(1, 7)) == [1, 2, 3, 4, 5, 6]
    assert results.some(range(1, 21)) == [1, 2, 4, 8, 16, 20]
    assert results.some(range(1, 17)) == [1, 2, 4, 8, 16]


def test_page_has_a_section_and_a_plot_for_each_analysis(tmp_path: Path) -> None:
    setup: Any = Fixed()
    history = [{"step": s, "train_mse": 1.0, "val_rse": e} for s, e in ((0, 2.0), (10, 0.5))]
    sizes = {"parameters": {"encoder": 10, "decoder": 20}}
    rank_one = {"name": "q", "entropy": 0.0, "spectrum": [1.0, 0.0, 0.0, 0.0], "norm": 0.5}
    macs = {"macs": {"encoder": 1e6, "decoder": 2e6, "decoder_on_output": 3e6}}
    path = write(
        tmp_path / "paper.jsonl",
        snr_row("zero", 1.0),
        snr_row("zero", 1.0, of="gradient"),
        snr_row("prior", 0.98),
        snr_row("random-subspace", 0.98),
        row("size", "identity", **fidelity.size(setup, "identity")),
        row("aggregation", "none", **fidelity.aggregation(setup)),
        *(row("noise", n, **robustness.noise(setup, n)) for n in ("identity", "train-mean")),
        row("shape", "none", **shapes.shape(setup, "update")),
        row("product", "none", **shapes.product(setup)),
        row("entropy", "identity", **shapes.entropy(setup, "identity")),
        row("trained", "federation", layers=[rank_one], held_out=4.5),
        *(snr_row(n, 0.5, "transfer", "own") for n in fits.CODERS),
        *(snr_row(n, 0.6, "reading", "local") for n in fits.CODERS),
        row(
            "ablation",
            "depth-3",
            history=history,
            rse=1.1,
            mean_rse=1.2,
            client_gain=0,
            **sizes,
            **macs,
        ),
        row("geometry", "resnet3", **fits.geometry("resnet3")),
    )
    page = pages.page(path)
    page.write(path)
    text = path.with_suffix(".md").read_text()
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == list("1234567")
    assert "| identity, fp32 |" not in text  # controls are in italics
    assert "| rounds of a federation |" not in text  # it has no row here
    assert "| the clients' D1 |" + 9 * " 0.500 |" + "\n" in text  # two codecs and the mean
    assert re.search(r"\| \*always the training mean\* \| (\S+) \| \1 \| 0 \| 0 \|", text)
    assert "| a federation, fp32 | 4.500 | 0.000 | 1.00 | 100% | 100% | 0.500 |" in text
    assert "| resnet3 | 64 x 64 x 32 | 1.5625% | 1.56% | 524,288 | 246,785 | 246,698 |" in text
    assert all((tmp_path / f"paper{end}.png").stat().st_size > 1000 for end in page._plots)


def test_figures_keep_three_digits() -> None:
    values = (None, 0.0, 1.0, 0.0123456, 123.4, 98304.0, 1e-9)
    shown = ["inf", "0", "1.00", "0.0123", "123", "9.83e+04", "1.00e-09"]
    assert [results.number(v) for v in values] == shown
    assert results.shown("cosine", -0.0001) == "0.000"
    assert results.shown("snr_db", -3.0103) == "-3.01"


def asked(monkeypatch: pytest.MonkeyPatch, options: Options) -> list[Any]:
    """The jobs that the command would run."""
    found: list[Any] = []
    monkeypatch.setattr(case.jobs, "execute", lambda todo, *_, **__: found.extend(todo) or [])
    monkeypatch.setattr(case, "page", lambda path: SimpleNamespace(write=lambda path: ""))
    case.main(options)
    return found


def test_the_short_form_leaves_the_slowest_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, there in (
        (Options(tmp_path, quick=True), False),
        (Options(tmp_path, quick=True, schemes=(case.SLOW,)), True),
        (Options(tmp_path), True),
    ):
        assert (case.SLOW in {job.scheme for job in asked(monkeypatch, options)}) == there


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("size/", "geometry/"), {"size", "geometry"}),
        (("zero",), {"snr", "noise", "entropy"}),
    ],
)
def test_an_analysis_or_a_coder_can_be_run_alone(
    names: tuple[str, ...], kinds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = asked(monkeypatch, Options(tmp_path, quick=True, schemes=names))
    assert {dict(job.config)["kind"] for job in jobs} == kinds
