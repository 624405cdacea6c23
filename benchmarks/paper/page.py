"""The page of ``paper.jsonl``: a section for each analysis that has rows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import errors_page, fits_page, shapes_page
from benchmarks.paper.results import Form, Results
from benchmarks.paper.setup import EMBEDDED, Setup
from benchmarks.report import Page


def page(path: Path) -> Page:
    """The page of these rows."""
    results = Results(path)
    quick = " --quick" * (results.forms != [_full(results.model)])
    name, more = "the embedded LLaMA", ""
    if results.model != EMBEDDED:
        name, more = results.model, " --model FILE.gguf --data FOLDER"
    command = f"python -m benchmarks.run paper{quick}{more}"
    out = Page(f"The analyses of CG-FedLLM, rerun on {name}", command)
    _about(out, results)
    errors_page.snr(out, results)
    errors_page.size(out, results)
    errors_page.aggregation(out, results)
    errors_page.noise(out, results)
    shapes_page.shapes(out, results)
    shapes_page.entropy(out, results)
    shapes_page.trained(out, results)
    fits_page.transfer(out, results, path)
    fits_page.ablations(out, results)
    fits_page.geometry(out, results)
    fits_page.readings(out, results)
    return out


def _full(model: str) -> Form:
    """The full form of a model."""
    setup = Setup(model=model)
    return Form(setup.rounds, setup.tgap_rounds, setup.steps, setup.rate, model)


def _about(out: Page, results: Results) -> None:
    played = "federated.md" if results.model == EMBEDDED else "llama-gsm8k.md"
    spent = []
    if results.seconds:
        spent.append(f"the rows took {results.seconds / 60:.0f} min of a core")
    out.lines(
        [
            "clients fine-tune the model by LoRA, uncompressed: codecs are fitted on rounds on one "
            "part of their data (D1) and tried on rounds on the other (D2); each section ends with "
            "how many rounds, steps of Adam and seeds; figures are means over rounds and seeds",
            "*error* is the relative squared error: 0 is perfect, 1 is what sending nothing gives",
            "*in italics*: controls; a codec that is no better than these has learned nothing",
            f"no codec takes part in the recorded training: [{played}]({played}) says what they do "
            "to a model",
            *spent,
        ]
    )
