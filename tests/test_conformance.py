"""Every codec obeys every law of ``conformance.py``."""

import inspect
from collections.abc import Callable

import conformance
import pytest
import torch
from conformance import CASES, CODEC_LAWS, UPDATE_LAWS, UPDATES, Case

from gradcodec.codecs import BlockQuant, Identity
from gradcodec.encodable import DTYPE_CODES
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import CODEC_IDS

BY_NAME = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def test_every_registered_codec_has_a_case() -> None:
    kinds = {c.for_(conformance.model()).config.kind for c in CASES}
    assert kinds == set(CODEC_IDS)


def test_case_names_are_unique() -> None:
    assert len({c.name for c in CASES}) == len(CASES)


def test_every_law_is_run() -> None:
    written = {
        f
        for f in vars(conformance).values()
        if inspect.isfunction(f)
        and f.__annotations__.get("case") == "Case"
        and f is not conformance.int_table
    }
    assert written == {*CODEC_LAWS, *UPDATE_LAWS}


@BY_NAME
@pytest.mark.parametrize("law", CODEC_LAWS, ids=lambda f: f.__name__)
def test_law(law: Callable[[Case], None], case: Case) -> None:
    law(case)


@BY_NAME
@pytest.mark.parametrize("law", UPDATE_LAWS, ids=lambda f: f.__name__)
def test_law_of_updates(law: Callable[..., None], case: Case) -> None:
    for name, make in UPDATES.items():
        try:
            law(case, make())
        except BaseException as err:
            err.add_note(f"with the update {name!r}")
            raise


def test_identity_keeps_every_bit_of_every_dtype() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(8)
    update = {str(d): every.view(d) for d in DTYPE_CODES if d is not torch.bool}
    update["bool"] = torch.tensor([True, False])
    assert conformance.differing(update, conformance.over_the_wire(Identity(), update)) == []


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_blockquant_in_segments_equals_the_whole(bits: int, blocks: int) -> None:
    codec = BlockQuant(BlockQuantConfig(bits, block=64))
    whole = conformance.vector(5 * 64 + 17)["v"]
    parts = [conformance.over_the_wire(codec, {"v": p})["v"] for p in whole.split(blocks * 64)]
    assert conformance.same(torch.cat(parts), conformance.over_the_wire(codec, {"v": whole})["v"])


@pytest.mark.gpu
@BY_NAME
def test_a_codec_on_the_gpu_decodes_there(case: Case) -> None:
    update = conformance.model()
    codec = case.make(UpdateSpec.of(update))
    payload, there = codec.encoder.encode(update), codec.to("cuda")
    for decoded in (
        there.decoder.decode(payload),
        there.decoder.decode_mean([payload, payload], [1.0, 3.0]),
        there.bind(UpdateSpec.of(update), codec.base).decoder.decode(
            codec.bind(UpdateSpec.of(update), codec.base).encoder.encode(update)
        ),
    ):
        assert {t.device.type for t in decoded.values()} == {"cuda"}
        on_host = {n: t.cpu() for n, t in decoded.items()}
        assert conformance.distance(codec.decoder.decode(payload), on_host) < 0.1


@pytest.mark.gpu
@BY_NAME
def test_an_update_on_the_gpu_travels_as_well(case: Case) -> None:
    update = conformance.model()
    there = {n: t.cuda() for n, t in update.items()}
    codec = case.make(UpdateSpec.of(update))
    # Payloads name no device: they decode on the CPU, wherever the update was.
    decoded = conformance.over_the_wire(codec, there)
    assert {t.device.type for t in decoded.values()} == {"cpu"}
    # TF32 and other orders of summation may move a code to its neighbour.
    assert conformance.distance(conformance.over_the_wire(codec, update), decoded) < 0.1
