"""Which parameters share a basis, that it is stored once, and how it is fitted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.moments import EXACT_LIMIT, SecondMoments
from gradcodec.transforms.subspace.allocate import allocate
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.transforms.subspace.groups import SHARES, group_names, groups
from gradcodec.types import TensorSpec, UpdateSpec


def names_of(share: str, **shapes: tuple[int, ...]) -> dict[str, str]:
    return group_names(UpdateSpec(tuple(TensorSpec(n, s) for n, s in shapes.items())), share)


def adapter(layers: int = 2, d: int = 32, r: int = 4) -> UpdateSpec:
    """LoRA factors of q, k, v and o, named as ``peft`` does."""
    return UpdateSpec(
        tuple(
            TensorSpec(f"model.layers.{i}.self_attn.{m}_proj.lora_{f}.weight", s)
            for i in range(layers)
            for m in "qkvo"
            for f, s in (("A", (r, d)), ("B", (d, r)))
        )
    )


SPEC = adapter()
KIND = SubspaceConfig(8.0, side="long", basis_dtype="float32", share="kind")
INPUTS = SubspaceConfig(8.0, side="long", basis_dtype="float32", share="inputs")
BOTH = pytest.mark.parametrize("config", [KIND, INPUTS], ids=lambda c: c.share)


# -- names ---------------------------------------------------------------------------------------


def test_alone_every_parameter_is_its_own_group() -> None:
    assert group_names(SPEC, "none") == {t.name: t.name for t in SPEC}


def test_kinds_are_names_without_numbers() -> None:
    assert set(group_names(SPEC, "kind").values()) == {
        f"model.layers.*.self_attn.{m}_proj.lora_{f}.weight" for m in "qkvo" for f in "AB"
    }


def test_inputs_are_q_k_and_v_of_one_layer() -> None:
    found = {g: m for g, m in groups(SPEC, "inputs").items() if len(m) > 1}
    assert found == {
        f"model.layers.{i}.self_attn.q_proj+k_proj+v_proj.lora_A.weight": [
            f"model.layers.{i}.self_attn.{m}_proj.lora_A.weight" for m in "qkv"
        ]
        for i in range(2)
    }


@pytest.mark.parametrize(
    ("share", "name", "group"),
    [
        ("kind", "h.0.attn.c_attn.lora_A.default.weight", "h.*.attn.c_attn.lora_A.default.weight"),
        ("kind", "blocks.12.experts.3.w1", "blocks.*.experts.*.w1"),
        ("kind", "0.weight", "*.weight"),
        # Numbers inside a word are the word's.
        ("kind", "conv1.weight", "conv1.weight"),
        ("inputs", "l.0.mlp.up_proj.lora_A.default.weight", None),
        ("inputs", "query.lora_A", "query+key+value.lora_A"),
        # Other inputs, other factors, names that only look alike.
        ("inputs", "l.0.mlp.down_proj.lora_A.weight", "l.0.mlp.down_proj.lora_A.weight"),
        ("inputs", "l.0.attn.q_proj.lora_B.weight", "l.0.attn.q_proj.lora_B.weight"),
        ("inputs", "l.0.attn.my_q_proj.lora_A", "l.0.attn.my_q_proj.lora_A"),
        ("inputs", "l.0.attn.q_proj.lora_Ax", "l.0.attn.q_proj.lora_Ax"),
    ],
)
def test_the_group_of(share: str, name: str, group: str | None) -> None:
    expected = group or "l.0.mlp.gate_proj+up_proj.lora_A.default.weight"
    assert names_of(share, **{name: (4, 8)}) == {name: expected}


def test_other_shapes_are_other_groups() -> None:
    assert names_of("kind", **{"a.0.w": (4, 8), "a.1.w": (4, 8), "a.2.w": (4, 9)}) == {
        "a.0.w": "a.*.w 4x8",
        "a.1.w": "a.*.w 4x8",
        "a.2.w": "a.*.w 4x9",
    }


# -- codecs --------------------------------------------------------------------------------------


def drawn(config: SubspaceConfig, spec: UpdateSpec = SPEC) -> dict[str, tuple[Axis, Tensor]]:
    """One random basis of four columns for each group."""
    out = {}
    generator = torch.Generator().manual_seed(0)
    for members in groups(spec, config.share).values():
        axis = Axis.choose({t.name: t for t in spec}[members[0]], config)
        u = torch.linalg.qr(torch.randn(axis.size, 4, generator=generator))[0]
        out.update(dict.fromkeys(members, (axis, u)))
    return out


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_shared_bases_are_stored_once_and_equal(
    config: SubspaceConfig, dtype: str, tmp_path: Path
) -> None:
    config = SubspaceConfig(8.0, side="long", basis_dtype=dtype, share=config.share)
    codec = Subspace.from_bases(config, SPEC, drawn(config))
    apart = SubspaceConfig(8.0, side="long", basis_dtype=dtype)
    alone = Subspace.from_bases(apart, SPEC, drawn(config))
    count = len(groups(SPEC, config.share))
    assert count == {"kind": 8, "inputs": 12}[config.share]
    assert len(codec.weights) == count * (2 if dtype.startswith("int") else 1)
    assert codec.weight_nbytes * len(SPEC) == alone.weight_nbytes * count
    codec.save_pretrained(tmp_path)
    loaded = Codec.from_pretrained(tmp_path)
    assert isinstance(loaded, Subspace)
    assert loaded.digest == codec.digest != alone.digest
    for members in groups(SPEC, config.share).values():
        assert {id(loaded.bases()[n][1]) for n in members} == {id(loaded.bases()[members[0]][1])}
    update = {t.name: torch.randn(t.shape) for t in SPEC}
    assert torch.equal(loaded.to_code(update), alone.to_code(update))
    z = torch.randn(codec.code_numel(SPEC))
    for name, tensor in loaded.from_code(z).items():
        assert torch.equal(tensor, alone.from_code(z)[name])


@BOTH
def test_a_group_with_several_bases_is_refused(config: SubspaceConfig) -> None:
    name = SPEC.tensors[0].name
    bases = drawn(config)
    axis, u = bases[name]
    with pytest.raises(ConfigError, match="another basis than the rest of"):
        Subspace.from_bases(config, SPEC, {**bases, name: (axis, -u)})
    del bases[name]
    with pytest.raises(ConfigError, match=f"{name} lacks the basis of"):
        Subspace.from_bases(config, SPEC, bases)


def test_configs_from_before_sharing_keep_their_digest() -> None:
    assert "share" not in SubspaceConfig().to_dict()
    for share in SHARES:
        config = SubspaceConfig(share=share)
        assert SubspaceConfig.from_dict(config.to_dict()) == config
    # Saved and published before `share` was there; `from_pretrained` checks the digest.
    codec = Codec.from_pretrained("stdlib-llama-lora-r8-32x")
    assert "share" not in str(codec.config.to_dict())


# -- fitting -------------------------------------------------------------------------------------


def recorded(config: SubspaceConfig, spec: UpdateSpec = SPEC, count: int = 6) -> SecondMoments:
    """Moments of decaying random updates; later parameters are louder."""
    generator = torch.Generator().manual_seed(0)
    moments = SecondMoments(spec, config)
    for _ in range(count):
        moments.add(
            {
                t.name: torch.randn(t.shape, generator=generator)
                * (1 + i)
                * torch.exp(-0.1 * torch.arange(t.shape[1]))
                for i, t in enumerate(spec)
            }
        )
    return moments


@BOTH
def test_a_shared_basis_is_the_best_of_the_normalised_sum(config: SubspaceConfig) -> None:
    moments = recorded(config)
    codec = fit_subspace(moments)
    for members in groups(SPEC, config.share).values():
        parts = [moments._moments[n].sum.double() for n in members]  # type: ignore[attr-defined]
        total = sum(p / p.trace() for p in parts)
        values, _ = torch.linalg.eigh(total)
        u = codec.bases()[members[0]][1].double()
        k = u.shape[1]
        held = float((u.T @ total @ u).trace())
        assert held == pytest.approx(float(values[-k:].sum()), rel=1e-5)
        assert held < 0.999 * len(members)


@BOTH
def test_merged_spectra_have_the_members_mean_energy(config: SubspaceConfig) -> None:
    moments = recorded(config)
    spectra = moments.merged(config.share)
    for members in groups(SPEC, config.share).values():
        mean = sum(moments._moments[n].energy for n in members) / len(members)
        for name in members:
            assert float(spectra[name][0].sum()) == pytest.approx(mean, rel=1e-6)
            assert spectra[name] is spectra[members[0]]


def test_merging_nothing_changes_nothing() -> None:
    moments = recorded(KIND)
    merged = moments.merged("none")
    for name, (values, vectors) in moments.spectra().items():
        assert torch.equal(merged[name][0], values)
        assert torch.equal(merged[name][1], vectors)


def test_a_silent_member_does_not_count() -> None:
    moments = SecondMoments(SPEC, KIND)
    name = SPEC.tensors[0].name
    moments.add({name: torch.randn(4, 32)})
    codec = fit_subspace(moments)
    own = fit_subspace(moments, SubspaceConfig(8.0, side="long", basis_dtype="float32"))
    ours, theirs = (c.bases()[name][1] for c in (codec, own))
    assert torch.allclose(ours, theirs, atol=1e-4)


@BOTH
def test_sketched_sides_are_merged_as_well(config: SubspaceConfig) -> None:
    spec = adapter(d=EXACT_LIMIT + 2, r=2)
    config = SubspaceConfig(
        (EXACT_LIMIT + 2) / 4, side="long", basis_dtype="float32", share=config.share
    )
    codec = fit_subspace(recorded(config, spec, count=3))
    for members in groups(spec, config.share).values():
        u = codec.bases()[members[0]][1]
        assert u.shape == (EXACT_LIMIT + 2, 4)
        assert torch.allclose(u.T @ u, torch.eye(4), atol=1e-5)


@BOTH
@pytest.mark.parametrize("allocation", ["uniform", "energy", "tempered"])
def test_members_get_the_same_rank_within_the_budget(
    config: SubspaceConfig, allocation: str
) -> None:
    config = SubspaceConfig(8.0, allocation, side="long", share=config.share)
    moments = recorded(config)
    ranks = allocate(SPEC, {n: v for n, (v, _) in moments.merged(config.share).items()}, config)
    for members in groups(SPEC, config.share).values():
        assert len({ranks[n] for n in members}) == 1
    assert SPEC.numel / 8 * 0.8 < 4 * sum(ranks.values()) <= SPEC.numel / 8
    assert fit_subspace(moments).code_numel(SPEC) == 4 * sum(ranks.values())
