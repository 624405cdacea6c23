"""The ops as torch sees them: schemas, compilation, explicit implementations, and their lists."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcodec import native, ops
from gradcodec.errors import ConfigError
from gradcodec.ops import backends
from gradcodec.ops.declare import OPS, on_cuda, op, registered, schema

ROOT = Path(__file__).parents[1]
NUMEL, WORLD = 5000, 3


def coded(bits: int, block: int, rotate: bool, numel: int = NUMEL) -> tuple[Tensor, Tensor]:
    made = [
        ops.encode(torch.randn(numel), bits=bits, block=block, rotate=rotate, impl="reference")
        for _ in range(WORLD)
    ]
    return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])


Call = tuple[tuple[Any, ...], dict[str, Any]]


def samples() -> dict[str, list[Call]]:
    """For each op arguments that take every branch of its schema."""
    x, padded = torch.randn(NUMEL), ops.padded_numel(NUMEL, True)
    packed, scales = coded(4, 256, False)
    rotated, its = coded(2, 4096, True)
    of_gaussian: dict[str, Any] = {"bits": 4, "block": 64, "rotate": True, "levels": "gaussian"}
    fine = [t.expand(3, -1) for t in ops.encode(x, **of_gaussian, impl="reference")]
    kept, index = ops.topk_encode(x, k=8, chunk=64, impl="reference")
    fitted = [t.view(1, -1).expand(3, -1) for t in ops.lloyd_encode(x, block=256, impl="reference")]
    signs, of_rotsign = ops.random_sign_words(5120, 1), {"block": 256, "kept": 64}
    sent = ops.rotsign_encode(x, signs, **of_rotsign, impl="reference")
    three = [t.expand(3, -1) for t in (*sent, signs)]
    weights = torch.rand(WORLD)
    return {
        "encode": [
            ((x,), {"bits": 4, "block": 256}),
            (
                (x.bfloat16(),),
                {"bits": 2, "scale": "rms", "rotate": True, "stochastic": True, "seed": -5}
                | {"residual": torch.zeros(padded)},
            ),
            ((x,), {"bits": 1, "block": 100, "scale": "l1"} | {"residual": x.bfloat16()}),
            ((x,), of_gaussian | {"residual": torch.zeros(padded)}),
        ],
        "decode_mean": [
            ((packed, scales, NUMEL), {"bits": 4, "block": 256}),
            ((*fine, NUMEL), of_gaussian),
            (
                (rotated, its, NUMEL),
                {"bits": 2, "rotate": True, "weights": weights, "dtype": torch.bfloat16},
            ),
        ],
        "lloyd_encode": [
            ((x,), {"block": 256}),
            ((x.half(),), {"block": 100, "residual": torch.zeros(NUMEL)}),
        ],
        "lloyd_mean": [
            ((*fitted, NUMEL), {"block": 256}),
            ((*fitted, NUMEL), {"block": 256, "weights": weights}),
        ],
        "rotsign_encode": [
            ((x, signs), of_rotsign),
            ((x.bfloat16(), signs), of_rotsign | {"residual": torch.zeros(NUMEL)}),
        ],
        "rotsign_mean": [
            ((*three, NUMEL), of_rotsign),
            ((*three, NUMEL), of_rotsign | {"weights": weights}),
        ],
        "topk_encode": [
            ((x,), {"k": 8, "chunk": 64}),
            ((x.bfloat16(),), {"k": 3, "chunk": 100, "residual": torch.zeros(NUMEL)}),
        ],
        "top_rows": [((x,), {}), ((x.half(),), {"k": 2, "residual": torch.zeros(NUMEL)})],
        "sparse_mean": [
            ((kept.expand(3, -1, -1), index.expand(3, -1, -1), NUMEL), {"chunk": 64}),
        ],
    }


BY_NAME = pytest.mark.parametrize("name", OPS)
NATIVE = pytest.mark.skipif(
    not native.available(), reason="a machine with a C compiler and an installed gradcodec runs it"
)


def outputs(function: Callable[..., Any], call: Call) -> list[Tensor]:
    """What an op returns and what it leaves in its arguments."""
    args, settings = call
    mine = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
    settings = {k: v.clone() if isinstance(v, Tensor) else v for k, v in settings.items()}
    came = function(*mine, **settings)
    left = [v for v in settings.values() if isinstance(v, Tensor)]
    return [*(came if isinstance(came, tuple) else (came,)), *left]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# -- torch.library -------------------------------------------------------------------------------


def test_every_op_has_samples() -> None:
    assert set(samples()) == set(OPS)


@BY_NAME
def test_torchs_own_checks_pass(name: str) -> None:
    for args, settings in samples()[name]:
        contiguous = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(registered(name), contiguous, settings)


@BY_NAME
def test_fake_outputs_have_the_shapes_and_dtypes_of_real_ones(name: str) -> None:
    for args, settings in samples()[name]:
        came = outputs(registered(name), (args, settings))
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        of_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in settings.items()}
        fake = OPS[name].declaration(*on_meta, **of_meta)
        for real, guessed in zip(came, fake if isinstance(fake, tuple) else (fake,), strict=False):
            assert (real.shape, real.dtype) == (guessed.shape, guessed.dtype)


def test_a_declaration_is_all_that_an_op_needs() -> None:
    def negated(values: Tensor, *, residual: Tensor | None = None) -> Tensor:
        return -values

    @op(negated)
    def negated_in_a_test(
        values: Tensor, *, residual: Tensor | None = None, impl: ops.Impl | None = None
    ) -> Tensor:
        if values.dim() != 1:
            raise ConfigError("expected one dimension")
        return torch.empty(len(values))

    try:
        for impl in ("reference", None) if backends.CPU == "reference" else ("reference",):
            assert torch.equal(negated_in_a_test(X, impl=impl), -X)
        with pytest.raises(ConfigError, match="one dimension"):
            negated_in_a_test(X.view(10, 10), impl="reference")
        assert "Tensor(a!)? residual" in str(registered("negated_in_a_test")._schema)
        assert schema(negated_in_a_test) == (
            "(Tensor values, *, Tensor(a!)? residual=None) -> Tensor"
        )
    finally:
        del OPS["negated_in_a_test"]


def step(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """What a hook does with a gradient: ops between plain torch."""
    packed, scales = ops.encode(x * 2, bits=4, rotate=True, stochastic=True, seed=3)
    packed = torch.stack([packed, packed.flip(0)])
    mean = ops.decode_mean(packed, torch.stack([scales, scales]), x.numel(), bits=4, rotate=True)
    kept, index = ops.topk_encode(mean, k=4, chunk=64, residual=residual)
    return mean + ops.sparse_mean(kept[None], index[None], x.numel(), chunk=64), residual


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_step_compiles_without_a_break(backend: str) -> None:
    torch._dynamo.reset()  # what was compiled for other backends counts against a limit
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for numel in (5000, 4096):
        x = torch.randn(numel)
        one, two = torch.zeros(numel), torch.zeros(numel)
        assert equal(list(compiled(x, one)), list(step(x, two)))
        assert float(one.abs().max()) > 0
        assert torch.equal(one, two)


# -- implementations -----------------------------------------------------------------------------


@BY_NAME
def test_what_computes_on_the_cpu_gives_the_references_bits(name: str) -> None:
    for call in samples()[name]:
        assert equal(outputs(registered(name), call), outputs(OPS[name].reference, call))


@NATIVE
@BY_NAME
def test_native_gives_the_references_bits(name: str) -> None:
    for call in samples()[name]:
        in_c = OPS[name].on(torch.device("cpu"), "native")
        assert equal(outputs(in_c, call), outputs(OPS[name].reference, call))


def test_status_names_every_implementation_and_the_cpus() -> None:
    assert list(ops.status()) == ["reference", "native", "triton"]
    assert all(ops.status().values())
    assert ops.implementation("cpu") == ("native" if native.available() else "reference")
    assert ops.implementation("cuda") == "triton"
    assert ops.implementation("meta") == "reference"


@pytest.mark.parametrize("impl", ["", "Reference", "cuda", "torch", 1])
def test_an_unknown_implementation_lists_the_known_ones(impl: Any) -> None:
    with pytest.raises(ConfigError, match="'reference', 'native', 'triton'"):
        ops.encode(torch.ones(8), bits=4, impl=impl)


def test_native_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.library, "_current", None)
    monkeypatch.setattr(native.library, "_reason", "off: a test")
    with pytest.raises(ConfigError, match="off: a test"):
        ops.encode(torch.ones(8), bits=4, impl="native")
    # ... and nothing falls back: the reference is there when it is asked for.
    ops.encode(torch.ones(8), bits=4, impl="reference")


def test_native_is_for_cpu_tensors() -> None:
    with pytest.raises(ConfigError, match="got meta"):
        ops.encode(torch.ones(8, device="meta"), bits=4, impl="native")


def beyond_the_kernels() -> dict[str, Call]:
    """Settings that the reference takes and the kernel of the same name does not."""
    x = torch.randn(NUMEL)
    return {
        "rotsign_encode": ((x, ops.random_sign_words(5024, 1)), {"block": 32, "kept": 32}),
        "topk_encode": ((x,), {"k": 8, "chunk": 20000}),
        "lloyd_encode": ((x,), {"block": 32}),
    }


@pytest.mark.parametrize("name", beyond_the_kernels())
def test_what_a_kernel_does_not_take_is_computed_by_torch(name: str) -> None:
    (values, *rest), settings = beyond_the_kernels()[name]
    with pytest.raises(ConfigError, match="impl='reference' takes it"):
        OPS[name].on(torch.device("cpu"), "triton")(values, *rest, **settings)
    residuals = torch.ones(2, NUMEL)
    came = on_cuda(OPS[name])(values, *rest, **settings, residual=residuals[0])
    wanted = OPS[name].by_reference(values, *rest, **settings, residual=residuals[1])
    assert all(torch.equal(a, b) for a, b in zip(came, wanted, strict=True))
    assert torch.equal(residuals[0], residuals[1])
    assert not torch.equal(residuals[0], torch.ones(NUMEL))


def test_triton_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_no_triton", lambda: "not installed: pip install it")
    with pytest.raises(ConfigError, match="pip install it"):
        ops.encode(torch.ones(8), bits=4, impl="triton")
    assert ops.status()["triton"] == "not installed: pip install it"


# -- validation ----------------------------------------------------------------------------------

X = torch.ones(100)
PACKED, SCALES = torch.zeros(2, 50, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.bfloat16)
WORDS = torch.zeros(2, dtype=torch.int64)

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "two dimensions": (lambda: ops.encode(X.view(10, 10), bits=4), "one dimension"),
    "fp64": (lambda: ops.encode(X.double(), bits=4), "float64"),
    "integers": (lambda: ops.encode(X.int(), bits=4), "int32"),
    "3 bits": (lambda: ops.encode(X, bits=3), "bits"),
    "a block of 7": (lambda: ops.encode(X, bits=4, block=7), "block"),
    "a long block": (lambda: ops.encode(X, bits=4, block=(1 << 20) + 1), "block"),
    "rotation of 100": (lambda: ops.encode(X, bits=4, block=100, rotate=True), "rotation"),
    "unknown levels": (lambda: ops.encode(X, bits=4, levels="normal"), "normal"),
    "gaussian at 2 bits": (lambda: ops.encode(X, bits=2, levels="gaussian"), "4 bits"),
    "gaussian dithered": (
        lambda: ops.encode(X, bits=4, levels="gaussian", stochastic=True),
        "stochastic",
    ),
    "an unknown scale": (lambda: ops.encode(X, bits=4, scale="max"), "max"),
    "l1 at 4 bits": (lambda: ops.encode(X, bits=4, scale="l1"), "l1"),
    "a short residual": (lambda: ops.encode(X, bits=4, residual=torch.ones(99)), "residual"),
    "an unpadded residual": (
        lambda: ops.encode(X, bits=4, rotate=True, residual=torch.ones(100)),
        "4096",
    ),
    "a residual with gaps": (
        lambda: ops.encode(X, bits=4, residual=torch.ones(200)[::2]),
        "contiguous",
    ),
    "an integer residual": (
        lambda: ops.encode(X, bits=4, residual=torch.ones(100).long()),
        "residual",
    ),
    "one payload as a vector": (
        lambda: ops.decode_mean(PACKED[0], SCALES, 100, bits=4),
        r"\[W, bytes\]",
    ),
    "no payload": (lambda: ops.decode_mean(PACKED[:0], SCALES[:0], 100, bits=4), "W >= 1"),
    "a byte too few": (lambda: ops.decode_mean(PACKED, SCALES, 101, bits=4), "packed"),
    "scales of one": (lambda: ops.decode_mean(PACKED, SCALES[:1], 100, bits=4), "scales"),
    "signed bytes": (
        lambda: ops.decode_mean(PACKED.to(torch.int8), SCALES, 100, bits=4),
        "uint8",
    ),
    "weights of one": (
        lambda: ops.decode_mean(PACKED, SCALES, 100, bits=4, weights=torch.ones(1)),
        "weights",
    ),
    "fewer values than none": (
        lambda: ops.decode_mean(PACKED, SCALES, -1, bits=4),
        "number of values",
    ),
    "more values than are coded": (
        lambda: ops.decode_mean(PACKED, SCALES, 1 << 40, bits=4),
        "packed",
    ),
    "one level for two": (lambda: ops.lloyd_mean(PACKED[:, :25], SCALES, 100, block=256), "scales"),
    "levels of a block of 7": (lambda: ops.lloyd_encode(X, block=7), "block"),
    "signs of a block of 100": (
        lambda: ops.rotsign_encode(X, WORDS, block=100, kept=1),
        "power of two",
    ),
    "signs of a block of 8192": (
        lambda: ops.rotsign_encode(X, WORDS, block=8192, kept=1),
        "power of two",
    ),
    "more signs than there are": (
        lambda: ops.rotsign_encode(X, WORDS, block=64, kept=65),
        "kept",
    ),
    "a word of signs too few": (
        lambda: ops.rotsign_encode(X, WORDS[:1], block=64, kept=64),
        "signs",
    ),
    "signs of one payload": (
        lambda: ops.rotsign_mean(
            PACKED[:, :16], SCALES.repeat(1, 2), WORDS[None], 100, block=64, kept=64
        ),
        "signs",
    ),
    "k of 0": (lambda: ops.topk_encode(X, k=0), "k=0"),
    "k beyond the chunk": (lambda: ops.topk_encode(X, k=9, chunk=8), "chunk=8"),
    "a chunk of 2^17": (lambda: ops.topk_encode(X, k=9, chunk=1 << 17), "chunk"),
    "3 of a row": (lambda: ops.top_rows(X, k=3), "1 or 2"),
    "lists of other shapes": (
        lambda: ops.sparse_mean(torch.ones(1, 2, 3), torch.zeros(1, 2, 4).long(), 100, chunk=64),
        r"\[W, 2, k\]",
    ),
    "lists of other chunks": (
        lambda: ops.sparse_mean(torch.ones(1, 2, 3), torch.zeros(1, 2, 3).long(), 129, chunk=64),
        r"\[W, 3, k\]",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_by_name(what: str) -> None:
    call, told = BAD[what]
    with pytest.raises(ConfigError, match=told):
        call()


def test_non_contiguous_values_are_as_their_copy() -> None:
    x = torch.randn(2 * NUMEL)[::2]
    for impl in ("reference", None):
        one, two = (ops.encode(v, bits=4, impl=impl) for v in (x, x.clone()))
        assert equal(list(one), list(two))
        one, two = (ops.topk_encode(v, k=3, chunk=64, impl=impl) for v in (x, x.clone()))
        assert equal(list(one), list(two))


@pytest.mark.parametrize("seed", [0, 1 << 63, (1 << 64) - 1, -1])
def test_seeds_have_64_bits_of_either_sign(seed: int) -> None:
    x = torch.randn(100)
    one = ops.encode(x, bits=2, stochastic=True, seed=seed)
    two = ops.encode(x, bits=2, stochastic=True, seed=seed % (1 << 64), impl="reference")
    assert equal(list(one), list(two))


# -- the four lists ------------------------------------------------------------------------------

#: Parts that oracles and kernels are made of.
PARTS = {"bitpack", "gaussian", "grid", "hadamard", "philox"}
KERNEL_PARTS = {"gaussian", "launch", "quantise", "signs", "tiles", "unpack"}
#: Kernels that are no ops: they take no tensor whose device could choose an implementation.
GENERATORS = {"sign_words"}


def stems(folder: str, pattern: str = "*.py") -> set[str]:
    found = {p.stem for p in (ROOT / folder).glob(pattern)}
    return found - {"__init__", "conftest"}


def benchmarked() -> set[str]:
    """First words of the keys of ``benchmarks.kernels.calls.KERNELS``."""
    tree = ast.parse((ROOT / "benchmarks" / "kernels" / "calls.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "KERNELS":
            assert isinstance(node.value, ast.Dict)
            keys = [k.value for k in node.value.keys if isinstance(k, ast.Constant)]
            assert len(keys) == len(node.value.keys)
            return {str(key).replace(",", " ").split()[0] for key in keys}
    raise AssertionError("no KERNELS in benchmarks/kernels/calls.py")


def test_every_op_has_an_oracle_a_kernel_a_test_and_a_benchmark() -> None:
    wanted = set(OPS)
    oracles = {of.reference.__module__.rpartition(".")[2] for of in OPS.values()}
    assert stems("gradcodec/reference") - PARTS == oracles
    wanted |= GENERATORS
    assert stems("kernels/gradcodec_kernels") - KERNEL_PARTS == wanted
    tests = {name.removeprefix("test_") for name in stems("tests/kernels/on_device", "test_*.py")}
    assert tests - {"benchmark_cases"} == wanted
    assert benchmarked() == wanted


@BY_NAME
def test_every_op_is_public_and_names_its_oracle(name: str) -> None:
    oracle = OPS[name].reference
    assert name in ops.__all__
    assert f"``{oracle.__module__}.{oracle.__name__}``" in getattr(ops, name).__doc__
