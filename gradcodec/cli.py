"""The ``gradcodec`` command: fit, run, inspect, publish."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gradcodec.errors import GradcodecError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; a ``GradcodecError`` becomes one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="gradcodec", description="Gradient-compression codecs for PyTorch."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    inspect = commands.add_parser(
        "inspect", help="what is in a payload, a codec or an architecture"
    )
    inspect.add_argument(
        "target",
        help="payload file, codec (bundled name, folder, Hub id), or resnet3, cnn1d, uformer",
    )
    inspect.add_argument("--revision", help="of a Hub repository")
    inspect.add_argument("--image", default="4096x2048", help="input of an architecture, HxW")

    push = commands.add_parser("push", help="publish a codec folder on the Hugging Face Hub")
    push.add_argument("folder")
    push.add_argument("repo_id", help="user/name")
    push.add_argument("--private", action="store_true")
    push.add_argument("--message", default="Upload codec")

    commands.add_parser("info", help="versions, codec families, bundled codecs, who computes")

    # The recipes need transformers and peft; their options are declared without importing those.
    from gradcodec.recipes import command

    federated = commands.add_parser(
        "run-federated", help="TGAP and FAF end to end, several codecs compared"
    )
    command.add_arguments(federated)
    tgap = commands.add_parser("tgap", help="gather gradients of a model and fit a codec")
    command.add_tgap_arguments(tgap)

    options = parser.parse_args(arguments)
    try:
        if options.command == "run-federated":
            return command.run(options)
        if options.command == "tgap":
            return command.run_tgap(options)
        if options.command == "push":
            return _push(options)
        if options.command == "info":
            return _info()
        return _inspect(options)
    except GradcodecError as err:
        print(f"gradcodec: {type(err).__name__}: {err}", file=sys.stderr)
        return 2


def _push(options: argparse.Namespace) -> int:
    from gradcodec.codecs.base import Codec

    codec = Codec.from_pretrained(options.folder)
    print(codec.push_to_hub(options.repo_id, private=options.private, message=options.message))
    return 0


def _info() -> int:
    import torch

    from gradcodec import describe, hub, ops
    from gradcodec.wire import CODEC_IDS, WIRE_VERSION

    rows = {name: version or "not installed" for name, version in describe.versions().items()}
    rows["wire version"] = str(WIRE_VERSION)
    rows["families"] = ", ".join(CODEC_IDS)
    rows["bundled"] = ", ".join(hub.bundled()) or "none"
    # Who computes the ops, and what is chosen for tensors of a device if nobody asks.
    rows |= {f"ops: {name}": state for name, state in ops.status().items()}
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows |= {f"ops on {device}": ops.implementation(device) for device in devices}
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from gradcodec import describe

    path = Path(options.target)
    if options.target in describe.ARCHITECTURES:
        rows = describe.architecture(options.target, options.image)
    elif path.is_file():
        rows = describe.payload(path.read_bytes())
    else:
        rows = describe.codec(options.target, options.revision)
    width = max(len(k) for k in rows)
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")
    return 0
