"""The ``gradcodec`` command: fit, run, evaluate, inspect, publish."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from gradcodec.errors import GradcodecError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run.

    Returns:
        The exit status: 0 for success, 2 for an error that the user can fix (one of this library,
        or a file that cannot be read or written), 130 for Ctrl-C. Errors and Ctrl-C are reported
        as one line on stderr.
    """
    options = argparse.Namespace(command=None)
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        options = _parser(whole=not RECIPES.isdisjoint(words)).parse_args(words)
        status = _run(options)
        sys.stdout.flush()  # here, where a closed pipe can still be reported
    except GradcodecError as err:
        return _fail(f"{type(err).__name__}: {err}", 2)
    except BrokenPipeError:
        _drop_output()
        return _fail("nobody reads the output any more", 2)
    except OSError as err:
        _drop_output()
        return _fail(f"{type(err).__name__}: {err}{_how_to_go_on(options)}", 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_how_to_go_on(options)}", 130)
    return status


RECIPES = frozenset({"run-federated", "tgap", "eval"})


def _parser(*, whole: bool = True) -> argparse.ArgumentParser:
    """The command line; ``whole``: with the options of the recipes, whose modules load torch."""
    parser = argparse.ArgumentParser(
        prog="gradcodec", description="Gradient-compression codecs for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    inspect = commands.add_parser(
        "inspect",
        help="what is in a payload, a codec, an update or an architecture, and what is lost",
    )
    inspect.add_argument(
        "target",
        help="payload file, update (.safetensors), codec (int4, ..., bundled name, folder, Hub "
        "id), or resnet3, cnn1d, uformer",
    )
    inspect.add_argument(
        "--update", metavar="FILE", help="what is lost of this update (.safetensors)"
    )
    inspect.add_argument("--codec", help="what wrote a payload, if that is not bundled")
    inspect.add_argument(
        "--tensors", action="store_true", help="a line for each tensor, not for each kind"
    )
    inspect.add_argument("--plot", metavar="FILE.png", help="draw the charts (needs matplotlib)")
    inspect.add_argument("--revision", help="of a Hub repository")
    inspect.add_argument("--image", help="input of an architecture, HxW (4096x2048)")

    push = commands.add_parser("push", help="publish a codec folder on the Hugging Face Hub")
    push.add_argument("folder")
    push.add_argument("repo_id", help="user/name")
    push.add_argument("--private", action="store_true", help="a repository that nobody else sees")
    push.add_argument("--message", default="Upload codec", help="of the commit")
    push.add_argument(
        "--replace", action="store_true", help="also the files of a repository without a codec"
    )

    commands.add_parser("info", help="versions, codec families, bundled codecs, who computes")

    federated = commands.add_parser(
        "run-federated", help="TGAP and FAF end to end, several codecs compared"
    )
    tgap = commands.add_parser("tgap", help="gather gradients of a model and fit a codec")
    evaluated = commands.add_parser(
        "eval", help="a model and its adapters on MMLU, C-Eval, GSM8K, ... by lm-eval"
    )
    if whole:
        # They need transformers and peft; their options are declared without importing those.
        from gradcodec.recipes import command, eval_command

        command.add_arguments(federated)
        command.add_tgap_arguments(tgap)
        eval_command.add_eval_arguments(evaluated)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.command in RECIPES:
        from gradcodec.recipes import command, eval_command

        recipes = {"run-federated": command.run, "tgap": command.run_tgap}
        return recipes.get(options.command, eval_command.run_eval)(options)
    if options.command == "push":
        return _push(options)
    if options.command == "info":
        return _info()
    return _inspect(options)


def _fail(line: str, status: int) -> int:
    """Say what is wrong on one line."""
    with suppress(OSError):  # stderr may be closed as well
        print("gradcodec:", " ".join(line.split("\n")), file=sys.stderr, flush=True)
    return status


def _how_to_go_on(options: argparse.Namespace) -> str:
    if options.command == "run-federated":
        return f"; what is finished is in {options.out}: go on with the same options and --resume"
    if options.command == "tgap":
        return f"; what is finished is in {options.out}.run: go on with the same command"
    return ""


def _drop_output() -> None:
    """Let the interpreter's last flush succeed if stdout is closed or full."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _push(options: argparse.Namespace) -> int:
    from gradcodec.codec import Codec

    codec = Codec.from_pretrained(options.folder)
    given = {name: getattr(options, name) for name in ("private", "message", "replace")}
    print(codec.push_to_hub(options.repo_id, **given))
    return 0


def _info() -> int:
    import torch

    from gradcodec import describe, hub, ops
    from gradcodec.registry import UNTRAINED
    from gradcodec.wire import CODEC_IDS, WIRE_VERSION

    rows = {name: version or "not installed" for name, version in describe.versions().items()}
    rows["wire version"] = str(WIRE_VERSION)
    rows["families"] = ", ".join(CODEC_IDS)
    rows["codecs"] = ", ".join(UNTRAINED)
    rows["under DDP also"] = "lowrank, auto"
    rows["bundled"] = ", ".join(hub.bundled()) or "none"
    # The state of each implementation of the ops, and the default one for each device.
    rows |= {f"ops: {name}": state for name, state in ops.status().items()}
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows |= {f"ops on {device}": ops.implementation(device) for device in devices}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from gradcodec import describe, picture

    if options.plot is not None:
        picture.check(options.plot)  # now, not after the work
    found = describe.report(
        options.target,
        revision=options.revision,
        image=options.image,
        update=options.update,
        codec=options.codec,
        each=options.tensors,
    )
    if options.plot is not None:
        of = "" if options.update is None else f" --update {options.update}"
        said = [f"{k}: {found.rows[k]}" for k in ("sent", "error", "cosine") if k in found.rows]
        title = f"gradcodec inspect {options.target}{of}"
        picture.save(found.charts, title, said, options.plot)
        found.rows["picture"] = options.plot
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars, on a terminal that cannot show them
    width = max(len(k) for k in found.rows)
    for key, value in found.rows.items():
        print(f"{key:{width}}  {value}")
    for chart in found.charts:
        print("", *describe.draw(chart), sep="\n")
    return 0
