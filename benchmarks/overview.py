"""``docs/report.md``: each case's question, the figures that answer it, its plot and its page.

Everything is taken from the cases' pages, hence from rows. The columns that are shown here are the
key figures: ``python -m benchmarks.report --base REF`` compares them with those of the rows that
were committed at ``REF``.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Page, Table, markdown
from benchmarks.run import CASES, RESULTS, ROOT
from gradcodec.errors import ConfigError

DOCS = ROOT / "docs" / "report.md"
_UP = "../benchmarks/results"


@dataclass(frozen=True)
class Headline:
    """What the report shows of a page.

    Attributes:
        stem: name of the rows and of the page.
        title: of the section.
        question: that the figures answer.
        table: how the title of the page's table begins.
        columns: of that table, by number; the first is the names.
        rows: first cells of the rows that are shown; all if empty.
        plot: end of the name of the plot that is shown, if the page has one of it.
    """

    stem: str
    title: str
    question: str
    table: str
    columns: tuple[int, ...]
    rows: tuple[str, ...] = ()
    plot: str = ""

    def figures(self, page: Page) -> Table:
        """The key figures of every row, the heading first.

        Raises:
            ConfigError: the page has no such table.
        """
        for title, table in page.tables.items():
            if title.startswith(self.table):
                return [tuple(row[i] for i in self.columns) for row in table]
        raise ConfigError(f"the page {self.stem} has no table {self.table!r}: {list(page.tables)}")

    def shown(self, page: Page) -> Table:
        """The part of the figures that the report shows.

        Raises:
            ConfigError: a row is not there.
        """
        head, *body = self.figures(page)
        missing = set(self.rows) - {row[0] for row in body}
        if missing:
            raise ConfigError(f"the page {self.stem} has no rows {sorted(missing)}")
        return [head, *(row for row in body if not self.rows or row[0] in self.rows)]


_QUALITY = "Quality, and bytes of one participation"

HEADLINES = (
    Headline(
        "ddp",
        "Data-parallel training",
        "How much sooner does a training reach plain DDP's loss when its gradients are compressed?",
        "Time: embedded LLaMA, full-parameter fine-tuning, 2 ranks",
        (0, 1, 2, 3, 4, 5, 6),
        (
            "plain DDP",
            "int4",
            "int4, rotated",
            "int2, rotated",
            "sign, rotated",
            "auto",
            "torch's fp16 hook",
            "epfml's PowerSGD, rank 4",
            "DeMo",
        ),
        "-time",
    ),
    Headline(
        "ddp_auto",
        "A codec chosen by the link",
        "Does `auto` find the fastest way on links of four rates?",
        "Speed",
        (0, 1, 2, 3, 4, 5, 6),
        plot="-speed",
    ),
    Headline(
        "ddp_buckets",
        "Smaller buckets",
        "Does more go on behind the backward pass if DDP's buckets are smaller?",
        "Speed",
        (0, 1, 2, 3, 4, 5, 6),
        plot="-speed",
    ),
    Headline(
        "fsdp2",
        "Sharded training",
        "What does `fully_shard` gain if its reduce-scatters are compressed?",
        "Speed",
        (0, 1, 2, 3, 4),
        plot="-speed",
    ),
    Headline(
        "local",
        "Exchanging seldom",
        "What does pretraining lose if ranks exchange every H steps, and how many bytes are saved?",
        "Loss and bytes",
        (0, 3, 4, 5, 6),
        plot="-bytes",
    ),
    Headline(
        "llama-gsm8k",
        "Federated fine-tuning of a real LLaMA: GSM8K",
        "How much of fp32's gain is left for how many times fewer bytes?",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "llama-gsm8k-all",
        "All of GSM8K, twice the rounds",
        "Do more rounds make up for fewer bits?",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "llama-gsm8k-cpu",
        "The same on two cores",
        "Do rotated signs of less than a bit reach 100x on the uplink?",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "llama-mmlu",
        "Federated fine-tuning of a real LLaMA: MMLU",
        "Does it hold on another task?",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "llama-mmlu-cpu",
        "A codec of the package on a task that it was not fitted on",
        "What does a subspace fitted on GSM8K keep on MMLU?",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "federated",
        "Federated fine-tuning of a small model, beside peers",
        "The same question for twenty schemes, tuned alike.",
        _QUALITY,
        (0, 3, 5, 7, 8, 10),
        plot="-both",
    ),
    Headline(
        "paper",
        "CG-FedLLM's own analyses",
        "What does the paper's SNR say, beside errors that can be compared?",
        "1. The paper's SNR",
        (0, 1, 2, 3, 4),
        plot="-snr",
    ),
    Headline(
        "paper-smollm2",
        "The same on a real LLaMA",
        "Does it look alike on SmolLM2-135M?",
        "1. The paper's SNR",
        (0, 1, 2, 3, 4),
        plot="-snr",
    ),
    Headline(
        "generalise",
        "Where a fitted codec carries over",
        "Which data may a subspace be fitted on?",
        "By what it was fitted on",
        (0, 1),
    ),
    Headline(
        "flower",
        "In Flower",
        "What does TCP carry in a deployment, and is the loss the same?",
        "embedded",
        (0, 1, 2, 3, 4, 5),
        plot="-embedded",
    ),
    Headline(
        "nvflare",
        "In NVFLARE",
        "The same, beside NVFLARE's own quantisers.",
        "10 rounds",
        (0, 1, 2, 3, 4, 5, 6),
    ),
    Headline(
        "codecs",
        "Codecs alone",
        "How large is the error at so many bits a value?",
        "Error at so many bits a value",
        (0, 1, 2, 4),
        (
            "int8",
            "int8-rotated",
            "bitsandbytes 8 bit of 256 (peer)",
            "int4",
            "int4-rotated",
            "gauss4",
            "gauss4-64",
            "bitsandbytes nf4 of 64 (peer)",
            "int2",
            "int2-rotated",
            "sign",
            "sign-rotated",
            "rotsign",
            "topk 64 of 4096, 8 bit",
            "torch.topk 1 % (peer)",
        ),
    ),
    Headline(
        "kernels",
        "Kernels on a GPU",
        "How near to the bandwidth of a copy do the kernels come?",
        "Speed",
        (0, 1, 4, 5),
        (
            "encode 4 bits, rotated, dithered, EF, bf16",
            "encode 4 bits, nearest, fp32",
            "encode 1 bit, rotated, l1, EF",
            "decode_mean of 8, 4 bits, rotated",
            "lloyd_encode of 256",
            "rotsign_encode 256 of 256",
            "topk_encode 64 of 4096, EF, fp32",
            "torch: encode 4 bits, nearest, fp32 (reference)",
        ),
    ),
    Headline(
        "speed",
        "A LLaMA-7B adapter",
        "How long do encoding and decoding 8,388,608 values take on a CPU, and in how much memory?",
        "Encoding",
        (0, 1, 2, 3, 4, 6, 7),
        plot="-seconds",
    ),
    Headline(
        "growth",
        "How it grows",
        "How do time, in copies of the update, and memory grow with the number of values?",
        "By the largest update",
        (0, 1, 2, 3, 4, 5, 6, 7),
        plot="-values",
    ),
    Headline(
        "growth",
        "More clients",
        "How does a server's memory grow with the clients of a round?",
        "Clients",
        (0, 1, 2, 3),
    ),
    Headline(
        "growth",
        "More ranks, computed",
        "How does compression pay with more ranks than were measured? A model; its assumptions and "
        "how far it is from measurements are on the page.",
        "Ranks",
        (0, 1, 2, 3, 4, 5, 6, 7, 8),
        plot="-ranks",
    ),
    Headline(
        "privacy",
        "What privacy costs",
        "What is the loss at a given epsilon?",
        "Held-out loss",
        (0, 3, 4, 5, 6),
    ),
    Headline(
        "leakage",
        "What a message gives away",
        "How many of a sentence's tokens does an attacker read out of one message?",
        "Tokens of a client's only sentence",
        (0, 1, 2, 3),
    ),
)


def pages(results: Path) -> dict[str, Page]:
    """The page of every file of rows that has one, by name."""
    found = {}
    for case in CASES.values():
        for stem in case.pages():
            made: Page | None = case.load_page()(results / f"{stem}.jsonl")
            if made is not None:
                found[stem] = made
    return found


def document(results: Path = RESULTS) -> str:
    """The text of ``docs/report.md``.

    Raises:
        ConfigError: a headline is not on its page.
    """
    found = pages(results)
    blocks = [
        "# What is measured",
        "Made by `python -m benchmarks.report` from the rows in `benchmarks/results` alone. A "
        "section has a question, the figures that answer it, and a link to the page, which has all "
        "schemes and says how they were measured. Figures compare within a table, never between "
        "two: they are from other machines, models and days.",
    ]
    for headline in HEADLINES:
        page = found.get(headline.stem)
        if page is None:
            continue
        target = f"{_UP}/{headline.stem}"
        blocks += [
            f"## {headline.title}",
            headline.question,
            "\n".join(markdown(headline.shown(page))),
            f"[All of it]({target}.md), made by `{page.command}`.",
        ]
        if headline.plot in page.ends:
            plot = f"{headline.stem}{headline.plot}"
            blocks.append(f"![{headline.title}]({_UP}/{plot}.png)")
    return "\n\n".join(blocks) + "\n"


def differences(before: Page | None, after: Page | None, headline: Headline) -> Iterator[str]:
    """The key figures that differ, a line each."""
    if before is None or after is None:
        yield "all of it is new" if before is None else "all of it is gone"
        return
    try:
        old_head, *old = headline.figures(before)
    except ConfigError:
        yield "all of it is new"
        return
    head, *new = headline.figures(after)
    was = _named(old_head, old)
    now = _named(head, new)
    for name in [*now, *(n for n in was if n not in now)]:
        if name not in was or name not in now:
            yield f"{name}: {'new' if name not in was else 'gone'}"
            continue
        for column, figure in now[name].items():
            if was[name].get(column) != figure:
                yield f"{name}: {column}: {was[name].get(column, '-')} -> {figure}"


def _named(head: tuple[str, ...], body: Table) -> dict[str, dict[str, str]]:
    """Figures by row and column; what has the name of an earlier one is numbered."""
    columns = _distinct(list(head))
    names = _distinct([row[0] for row in body])
    return {
        name: dict(zip(columns[1:], row[1:], strict=True))
        for name, row in zip(names, body, strict=True)
    }


def _distinct(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out


def compared(base: str, results: Path = RESULTS) -> str:
    """Key figures before and after, of the rows at a git revision and of those here.

    Raises:
        ConfigError: the revision has no rows, or git does not know it.
    """
    with tempfile.TemporaryDirectory() as folder:
        old = pages(_rows_at(base, Path(folder)))
        new = pages(results)
    lines = []
    for headline in HEADLINES:
        sides = (old.get(headline.stem), new.get(headline.stem))
        if sides == (None, None):
            continue
        found = list(differences(*sides, headline))
        lines += [headline.title, *(f"  {line}" for line in found or ["as before"])]
    return "\n".join(lines)


def _rows_at(base: str, folder: Path) -> Path:
    """The rows of a revision, in a folder of their own."""
    place = RESULTS.relative_to(ROOT).as_posix()
    done = subprocess.run(["git", "archive", base, place], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ConfigError(f"expected a git revision with {place}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        members = [m for m in archive.getmembers() if m.name.endswith(".jsonl")]
        archive.extractall(folder, members, filter="data")
    return folder / place
