"""All that ``gradcodec inspect`` says about a target: rows of text, and charts where it has any.

target                    rows                        charts
architecture              its arithmetic              none
codec                     config, sizes, digest       allocation, bases
codec and update          and bytes, error, cosine    and spectrum, error per tensor
update                    tensors, norm               spectrum
payload                   header                      allocation, spectrum of what it decodes to
payload and update        and error, cosine           and error per tensor
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gradcodec.codec import Codec
from gradcodec.describe import facts, fidelity, sources
from gradcodec.describe.allocation import allocation
from gradcodec.describe.chart import Chart
from gradcodec.describe.spectrum import bases, spectrum
from gradcodec.errors import ConfigError
from gradcodec.metrics import flat64
from gradcodec.registry import find_codec
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload

IMAGE = "4096x2048"


@dataclass
class Report:
    """Rows of text by label, and charts, in the order in which they are to be shown."""

    rows: dict[str, str]
    charts: list[Chart] = field(default_factory=list)

    def add(self, *charts: Chart | None) -> Report:
        """Append charts; ``None`` is one that there is no data for."""
        self.charts += [c for c in charts if c is not None]
        return self


def report(
    target: str,
    *,
    revision: str | None = None,
    image: str | None = None,
    update: str | None = None,
    codec: str | None = None,
    each: bool = False,
) -> Report:
    """Describe a target.

    Args:
        target: a literal architecture; a payload's or an update's file; an untrained codec; or
            what ``Codec.from_pretrained`` finds.
        revision: of a Hub repository.
        image: ``HxW``, the input of an architecture; ``IMAGE`` by default.
        update: safetensors file of the update to measure the target with.
        codec: what wrote the payload; bundled and untrained codecs are found without it.
        each: a line for each tensor instead of each kind of tensor.

    Raises:
        ConfigError: options that do not go together, a file that cannot be read, or an update that
            a payload cannot be compared with because its codec is not known.
        UpdateError: the update's file holds no update, or not one of this codec.
        NonFiniteError: the update holds NaN or Inf.
        WireError: the bytes are no payload of this codec.
        HubError: there is no such codec.
    """
    path = Path(target)
    is_update = path.suffix == ".safetensors" and path.is_file()
    architecture = target in facts.ARCHITECTURES
    if image is not None and not architecture:
        raise ConfigError(f"--image is the input of an architecture; {target} is none")
    if each and architecture:
        raise ConfigError(f"--tensors is for codecs, updates and payloads; {target} has no tensors")
    if revision is not None and (architecture or (codec is None and path.is_file())):
        raise ConfigError(f"--revision is of a Hub repository; {target} is none")
    if codec is not None and (is_update or not path.is_file()):
        raise ConfigError(f"--codec says what wrote a payload; {target} is none")
    if update is not None and (is_update or architecture):
        what = "an update itself" if is_update else "an architecture"
        raise ConfigError(f"--update is for codecs and payloads; {target} is {what}")
    if architecture:
        return Report(facts.architecture(target, image or IMAGE))
    if is_update:
        return of_update(sources.read_update(path), each)
    given = None if update is None else sources.read_update(update)
    if path.is_file():
        known = None if codec is None else find_codec(codec, revision)
        return of_payload(path.read_bytes(), known, given, each)
    return of_codec(find_codec(target, revision), given, each)


def of_update(update: Update, each: bool = False) -> Report:
    """An update on its own."""
    spec = UpdateSpec.of(update)
    rows = {
        "update": f"{len(spec)} tensors, {spec.numel:,} elements, {spec.nbytes:,} bytes",
        "norm": f"{float(flat64(update).norm()):.6g}",
    }
    return Report(rows).add(spectrum(update, each))


def of_codec(codec: Codec, update: Update | None = None, each: bool = False) -> Report:
    """A codec, and what it does to an update."""
    out, spec = Report(facts.codec_itself(codec)), codec.spec
    if update is not None:
        if spec is not None:
            spec.check(update)
            update = {t.name: update[t.name] for t in spec}
        payload = codec.encoder.encode(update)
        decoded = codec.decoder.decode(payload)
        out.rows |= fidelity.facts(update, decoded, codec, len(payload.to_bytes()))
        spec = UpdateSpec.of(update)
    if spec is not None:
        out.add(allocation(codec, spec, each))
    out.add(bases(codec, each))
    if update is not None:
        out.add(spectrum(update, each), fidelity.fidelity(update, decoded, each))
    return out


def of_payload(
    blob: bytes, codec: Codec | None = None, update: Update | None = None, each: bool = False
) -> Report:
    """A payload, what it decodes to, and how near that is to an update."""
    payload = Payload.from_bytes(blob)
    out = Report(facts.payload_itself(payload, len(blob)))
    found = (None, codec) if codec is not None else sources.writer_of(payload, update)
    if found is None:
        if update is not None:
            raise ConfigError(
                f"the payload's codec {payload.digest.hex()} is not bundled, so it cannot be "
                "compared with an update; say where the codec is with --codec"
            )
        out.rows["values"] = "not decoded: no bundled codec has this digest (--codec FOLDER)"
        return out
    name, writer = found
    if writer.spec is None and not payload.has_table and update is not None:
        writer = writer.bind(UpdateSpec.of(update))
    decoded = writer.decoder.decode(payload)
    spec = UpdateSpec.of(decoded)
    if update is not None:
        spec.check(update)
        update = {t.name: update[t.name] for t in spec}
    out.rows["written by"] = str(writer) if name is None else name
    if update is not None:
        out.rows |= fidelity.facts(update, decoded, writer, len(blob))
    out.add(allocation(writer, spec, each))
    out.add(spectrum(decoded, each, of="the decoded update"))
    if update is not None:
        out.add(fidelity.fidelity(update, decoded, each))
    return out
