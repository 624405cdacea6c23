"""What there is to say in words about payloads, codecs and architectures, as label -> text."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from torch import nn

from gradcodec.codec import Codec
from gradcodec.errors import ConfigError
from gradcodec.transforms.autoencoder import nets
from gradcodec.transforms.autoencoder.config import RATIOS
from gradcodec.wire import WIRE_VERSION, Payload

ARCHITECTURES = tuple(RATIOS)

Rows = dict[str, str]


def payload(blob: bytes) -> Rows:
    """Header fields and sizes of a payload's bytes.

    Raises:
        WireError: the bytes are not a payload.
    """
    return payload_itself(Payload.from_bytes(blob), len(blob))


def payload_itself(p: Payload, size: int) -> Rows:
    """Header fields and sizes of a payload of so many bytes.

    Raises:
        WireError: its tensor table is not valid.
    """
    rows = {
        "payload": f"wire version {WIRE_VERSION}, codec {p.codec!r}",
        "codec digest": p.digest.hex(),
        "base digest": p.base.hex() if p.base else "none",
        "wire bytes": f"{size:,}: {len(p.body):,} body, {size - len(p.body):,} around it",
    }
    if p.spec is None:
        rows["tensor table"] = "pinned by the codec digest"
    else:
        rows["tensor table"] = f"{len(p.spec)} tensors, {p.spec.numel:,} elements, inline"
        rows["ratio"] = f"{p.spec.nbytes / size:.2f}x of {p.spec.nbytes:,} raw bytes"
    return rows


def codec(name: str, revision: str | None = None) -> Rows:
    """Config, sizes and provenance of a codec, by the name it is loaded under."""
    return codec_itself(Codec.from_pretrained(name, revision=revision))


def codec_itself(c: Codec) -> Rows:
    """Config, sizes and provenance of a codec; sizes only if it is bound to a tensor table."""
    rows = {"codec": repr(c), "digest": c.digest.hex()}
    if c.spec is not None:
        m = c.code_numel(c.spec)
        rows["update"] = (
            f"{len(c.spec)} tensors, {c.spec.numel:,} elements, {c.spec.nbytes:,} bytes"
        )
        rows["code"] = f"{m:,} values, 1/{c.spec.numel / max(m, 1):.4g} of the elements"
        rows["body"] = f"{c.nbytes():,} bytes, {c.spec.nbytes / max(c.nbytes(), 1):.4g}x"
    rows["linear"] = "yes: codes add" if c.linear else "no"
    rows["weights"] = f"{len(c.weights)} tensors, {c.weight_nbytes:,} bytes, fetched once"
    rows["fitted on"] = c.notes or "not stated"
    return rows


def architecture(name: str, image: str) -> Rows:
    """Parameters, latent shape and multiply-accumulates of one of the paper's literal pairs."""
    try:
        height, width = (int(x) for x in image.lower().split("x"))
    except ValueError as err:
        raise ConfigError(
            f"expected an image as HxW, for example 4096x2048, got {image!r}"
        ) from err
    if height < 128 or width < 128 or height % 64 or width % 64:
        raise ConfigError(f"expected sides that are multiples of 64, at least 128, got {image}")
    with torch.device("meta"):
        encoder: nn.Module
        decoder: nn.Module
        if name == "resnet3":
            encoder, decoder = nets.ResNetEncoder(), nets.ResNetDecoder()
        elif name == "cnn1d":
            encoder, decoder = nets.Cnn1dEncoder(), nets.Cnn1dDecoder(height)
        else:
            encoder, decoder = nets.UFormerEncoder(), nets.UFormerDecoder()
        shape = (1, 1, height, width)
        latent = encoder.eval()(torch.empty(shape)).shape
    rows = {"architecture": f"{name}, literal, input [1, {height}, {width}]"}
    for half, module in (("encoder", encoder), ("decoder", decoder)):
        count = sum(p.numel() for p in module.parameters())
        rows[f"{half} parameters"] = f"{count:,} ({4 * count / 2**20:.4f} MiB fp32)"
    rows["latent"] = f"{list(latent[1:])}, {latent.numel():,} values"
    rows["ratio"] = f"1/{height * width / latent.numel():g} ({latent.numel() / height / width:.4%})"
    rows["encoder MACs"] = f"{nets.count_macs(encoder, shape):,}"
    for convention, meaning in (("input", "true arithmetic"), ("output", "as the paper counted")):
        macs = nets.count_macs(decoder, latent, convention)
        rows[f"decoder MACs, {convention} grid"] = f"{macs:,} ({meaning})"
    return rows


def versions() -> dict[str, str | None]:
    """Versions of gradcodec and of what it uses; ``None`` where something is not installed."""
    packages = (
        "gradcodec",
        "torch",
        "numpy",
        "safetensors",
        "huggingface-hub",
        "triton",
        "transformers",
        "peft",
    )
    out: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            out[package] = None
    out["machine"] = f"{platform.machine()} {platform.system()}"
    return out
