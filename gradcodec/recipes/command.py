"""The command lines of the recipes: ``gradcodec run-federated`` and ``gradcodec tgap``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gradcodec import describe
from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, RotatedSign
from gradcodec.errors import ConfigError
from gradcodec.hub.local import check_place
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.recipes import report, schemes
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.results import summarise
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.settings import PRESETS, Settings
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.basis import BASIS_DTYPES
from gradcodec.transforms.subspace.config import ALLOCATIONS, SubspaceConfig
from gradcodec.transforms.subspace.groups import SHARES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; one that is not given keeps the value of the preset or the default."""
    add = parser.add_argument
    add("--out", default="runs/demo", help="the run's folder")
    add("--resume", action="store_true", help="go on with the run in --out")
    add(
        "--preset",
        choices=sorted(PRESETS),
        help="settings to start from: the paper's, a small LLaMA, quick",
    )
    add("--full", action="store_true", help="compare all schemes, for 20 rounds")
    add("--schemes", help=f"comma-separated, of: {', '.join(schemes.SCHEMES)}")
    add(
        "--codecs",
        help="comma-separated codecs to compare too: names, folders or Hub ids; with :relay behind "
        "a name, its replies go down as they came",
    )
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser, leave_out: Container[str] = ()) -> None:
    settings = parser.add_argument_group("settings", "In brackets: the default without --preset.")
    for field in (*dataclasses.fields(Settings), *_local_fields()):
        if field.name in ("local", "schemes", "codecs") or field.name in leave_out:
            continue
        flag, text = "--" + field.name.replace("_", "-"), f"{_HELP[field.name]}{_default(field)}"
        if field.type == "bool":
            settings.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=text
            )
        else:
            kind = {"int": int, "int | None": int, "float": float}.get(str(field.type), str)
            settings.add_argument(flag, type=kind, help=text)


def _default(field: dataclasses.Field[Any]) -> str:
    """In brackets, for a person; a setting that is ``None`` is off."""
    value = field.default
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return "" if value is None else f" ({text})"


_HELP = {
    "model": "embedded, a folder, a GGUF file or a Hub id",
    "revision": "branch, tag or commit of the model on the Hub",
    "dataset": "stdlib, a .jsonl or .json file, or a Hub id, id:configuration:split",
    "limit": "use this many examples, from the start (all)",
    "lora_r": "rank of the adapter",
    "lora_alpha": "scale of the adapter, before division by its rank",
    "targets": "comma-separated modules that get an adapter",
    "dtype": "of the weights: float32, bfloat16 or float16",
    "device": "auto, cpu or cuda",
    "gradient_checkpointing": "less memory, longer steps",
    "max_length": "most tokens of an example",
    "clients": "how many there are",
    "fraction": "share of the clients in each round",
    "rounds": "of each scheme",
    "dirichlet": "how alike clients are; with small values each has few labels",
    "min_client": "fewest examples of a client",
    "d1": "share of each client's examples that TGAP may see",
    "held_out": "examples that no client has, for the loss",
    "questions": "how many of those are asked with four options",
    "tgap_rounds": "rounds in which TGAP gathers",
    "tgap_reading": "who trains meanwhile: federated or local",
    "tgap_records": "what subspaces are fitted on: auto, signal, gradient, update, state, balanced",
    "representation": "what autoencoders encode: update, state or balanced",
    "aggregation": "of the paper's schemes: mean, sum, trimmed or median",
    "server_lr": "the server's learning rate",
    "server_momentum": "the server's momentum",
    "ae_steps": "training steps of each autoencoder",
    "seed": "of adapter, clients, sampling and batches",
    "lr": "a client's learning rate in the first round; it falls to 0",
    "batch": "examples of a step",
    "micro_batch": "examples of a forward pass",
    "steps": "of a client in a round; 0: whole epochs",
    "epochs": "of a client in a round, with --steps 0",
    "clip": "largest norm of a gradient",
    "weight_decay": "AdamW's",
}


#: Settings that only the comparison of schemes reads, not ``gradcodec tgap``.
_OF_THE_SCHEMES = ("rounds", "questions", "aggregation", "server_lr", "server_momentum")

#: The options of ``gradcodec tgap`` that are of a subspace, and their defaults.
_SUBSPACE: dict[str, Any] = {
    "ratio": 32.0,
    "allocation": "tempered",
    "basis_dtype": "bfloat16",
    "share": "none",
}


def run(options: argparse.Namespace) -> int:
    """Run the example; prints progress, the table and the paths of the files."""
    settings = settings_of(options)
    _check_epochs(options, settings)
    out = _out(options.out)
    report.require_matplotlib()  # fail now, not after the run
    with _Bars() as bars, RunFolder(out, settings.to_dict(), resume=options.resume) as folder:
        results = Experiment(settings, folder, bars.update).run()
        summary = summarise(settings, results, folder.load("tgap.json"))
        files = [folder.write_json("summary.json", summary), *report.plot(summary, folder.path)]
        histories = {n: folder.load(f"{n}.json") for n in schemes.TRAINED}
        present = {n: found["rows"] for n, found in histories.items() if found}
        if present:
            files.append(report.plot_training(present, folder.path / "autoencoders.png"))
    print("\n" + report.table(summary) + "\n")
    print("files:", ", ".join(map(str, files)))
    return 0


def _check_epochs(options: argparse.Namespace, settings: Settings) -> None:
    if options.epochs is not None and settings.local.steps:
        raise ConfigError(
            f"--epochs {options.epochs} is not read beside {settings.local.steps} steps a round: "
            "add --steps 0"
        )


def _out(name: str) -> Path:
    """The path of ``--out``; refuses ``.``, ``..`` and the empty text of an unset variable."""
    path = Path(name)
    if not name or path.name in ("", ".."):
        raise ConfigError(f"expected a name of a folder (--out), got {name!r}")
    return path


def add_tgap_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``gradcodec tgap``: the codec to fit, then the settings of the run it watches."""
    add = parser.add_argument
    add(
        "--out",
        required=True,
        help="folder for the codec; OUT.run keeps what was gathered, and a run goes on from it",
    )
    add("--family", choices=("subspace", "resnet3", "cnn1d", "uformer"), default="subspace")
    add("--ratio", type=float, help="subspace: update elements per code value (32)")
    add(
        "--allocation",
        choices=ALLOCATIONS,
        help="subspace: sharing out of dimensions (tempered)",
    )
    add(
        "--bits",
        type=int,
        choices=(0, 1, 2, 4, 8),
        default=2,
        help="bits of a code value: 1 sends rotated signs, 0 leaves them fp32",
    )
    add(
        "--basis-dtype",
        choices=BASIS_DTYPES,
        help="subspace: how the bases are stored, hence what a client downloads (bfloat16)",
    )
    add(
        "--share",
        choices=SHARES,
        help="subspace: a basis for one kind of factor in all layers, or for all of one input "
        "(none)",
    )
    add(
        "--preset",
        choices=sorted(PRESETS),
        help="settings to start from: the paper's, a small LLaMA, quick",
    )
    _add_settings(parser, leave_out=_OF_THE_SCHEMES)


def run_tgap(options: argparse.Namespace) -> int:
    """Gather on D1, fit one codec, save it and print what it is."""
    out = _out(options.out)
    check_place(out)  # now, not after the run
    settings = dataclasses.replace(settings_of(options), schemes=("fp32",), codecs=())
    _check_epochs(options, settings)
    config = _config_of(options)
    work = out.with_name(out.name + ".run")
    described = {**settings.to_dict(), "codec": config.to_dict(), "bits": options.bits}
    with _Bars() as bars, RunFolder(work, described, resume=True) as folder:
        # A name that does not depend on --out, so that the folders can be moved.
        codec = Experiment(settings, folder, bars.update).fit({"codec": config}, ".")["codec"]
        if options.bits:
            one = options.bits == 1
            inner = RotatedSign() if one else BlockQuant(BlockQuantConfig(options.bits))
            quantised = Chain(codec, inner)
            quantised.notes = codec.notes
            codec = quantised
        codec.save_pretrained(out)
    for key, value in describe.codec(str(out.resolve())).items():
        print(f"{key:10} {value}")
    return 0


def _config_of(options: argparse.Namespace) -> SubspaceConfig | AutoencoderConfig:
    """The settings of the codec to fit; options of the other family are refused."""
    subspace = options.family == "subspace"
    names = ("ae_steps", "representation") if subspace else (*_SUBSPACE, "tgap_records")
    unread = [name for name in names if getattr(options, name) is not None]
    if unread:
        flag = "--" + unread[0].replace("_", "-")
        raise ConfigError(f"{flag} is not read by --family {options.family}")
    if not subspace:
        return AutoencoderConfig(arch=options.family)
    given = {name: getattr(options, name) for name in _SUBSPACE}
    return SubspaceConfig(**{n: d if given[n] is None else given[n] for n, d in _SUBSPACE.items()})


def settings_of(options: argparse.Namespace) -> Settings:
    """The preset, changed by ``--full``, then by single options, so the latter win."""
    settings = PRESETS[options.preset] if options.preset else Settings()
    if getattr(options, "full", False):
        settings = dataclasses.replace(settings, schemes=schemes.FULL, rounds=20)
    given = {k: v for k, v in vars(options).items() if v is not None}
    for several in ("targets", "schemes", "codecs"):
        if several in given:
            given[several] = _names(given[several])
    local = {f.name: given[f.name] for f in _local_fields() if f.name in given}
    own = {f.name: given[f.name] for f in dataclasses.fields(Settings) if f.name in given}
    return dataclasses.replace(settings, **own, local=dataclasses.replace(settings.local, **local))


def _names(text: str) -> tuple[str, ...]:
    names = tuple(n.strip() for n in text.split(",") if n.strip())
    if not names:
        raise ConfigError(f"expected comma-separated names, got {text!r}")
    return names


def _local_fields() -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(type(Settings().local))


class _Bars:
    """One progress bar per phase, on stderr."""

    def __init__(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError as err:
            raise ConfigError("progress bars need tqdm: pip install 'gradcodec[examples]'") from err
        self._tqdm = tqdm
        self._bar: tqdm[None] | None = None
        self._phase = ""

    def __enter__(self) -> _Bars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, phase: str, done: int, total: int, figures: Mapping[str, str]) -> None:
        """Move the phase's bar; a new phase closes the one before."""
        if phase != self._phase or self._bar is None:
            if self._bar is not None:
                self._bar.close()
            self._bar = self._tqdm(total=total, desc=f"{phase:36}", file=sys.stderr)
            self._phase = phase
        self._bar.set_postfix(figures, refresh=False)
        self._bar.n = done
        self._bar.refresh()
