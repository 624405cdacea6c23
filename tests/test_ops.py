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
from gradcodec.ops import adapters, backends
from gradcodec.ops.schemas import FAKES, NAMES, NAMESPACE

ROOT = Path(__file__).parents[1]
NUMEL, WORLD = 5000, 3


def coded(bits: int, block: int, rotate: bool, numel: int = NUMEL) -> tuple[Tensor, Tensor]:
    made = [
        ops.encode(torch.randn(numel), bits=bits, block=block, rotate=rotate, impl="reference")
        for _ in range(WORLD)
    ]
    return torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """For each op positional arguments that take every branch of its schema."""
    x, padded = torch.randn(NUMEL), ops.padded_numel(NUMEL, True)
    packed, scales = coded(4, 256, False)
    turned, its = coded(2, 4096, True)
    kept, index = ops.topk_encode(x, k=8, chunk=64, impl="reference")
    left, right = torch.randn(40, 8), torch.randn(30, 6)
    return {
        "encode": [
            (x, 4, 256, "absmax", False, False, 0, None, None),
            (x.bfloat16(), 2, 4096, "rms", True, True, -5, torch.zeros(padded), None),
            (x, 1, 100, "l1", False, False, 0, torch.zeros(NUMEL).bfloat16(), None),
            (x, 4, 256, "absmax", False, False, 0, None, scales[0]),
        ],
        "decode_mean": [
            (packed, scales, NUMEL, 4, 256, False, None, torch.float32),
            (turned, its, NUMEL, 2, 4096, True, torch.rand(WORLD), torch.bfloat16),
        ],
        "decode_sum_shared": [
            (packed, scales[0], NUMEL, 4, 256, False, torch.float32),
            (turned, its[0], NUMEL, 2, 4096, True, torch.float16),
        ],
        "reduce_requant": [
            (packed, scales, NUMEL, 4, 256, "absmax", True, 7, None),
            (turned, its, padded, 2, 4096, "rms", False, 0, torch.zeros(padded)),
        ],
        "chunk_absmax": [(x, 256, False, None), (x, 4096, True, torch.zeros(padded))],
        "topk_encode": [(x, 8, 64, None), (x.bfloat16(), 3, 100, torch.zeros(NUMEL))],
        "top_rows": [(x, 1, None), (x.half(), 2, torch.zeros(NUMEL))],
        "sparse_mean": [(kept.expand(3, -1, -1), index.expand(3, -1, -1), NUMEL, 64)],
        "project_quantise": [
            (torch.randn(40, 30), left, None, 4, 64, "absmax"),
            (torch.randn(40, 30).bfloat16(), left.bfloat16(), right.bfloat16(), 8, 64, "rms"),
        ],
    }


BY_NAME = pytest.mark.parametrize("name", NAMES)
NATIVE = pytest.mark.skipif(
    not native.available(), reason="a machine with a C compiler and an installed gradcodec runs it"
)


def registered(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in args)


def outputs(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What an op returns and what it leaves in its arguments."""
    mine = copied(args)
    came = function(*mine)
    left = [a for a in mine if isinstance(a, Tensor)]
    return [*(came if isinstance(came, tuple) else (came,)), *left]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# -- torch.library -------------------------------------------------------------------------------


def test_every_op_has_samples_that_fit_its_schema() -> None:
    found = samples()
    assert tuple(found) == NAMES
    for name, calls in found.items():
        for args in calls:
            assert len(args) == len(registered(name)._schema.arguments)


@BY_NAME
def test_torchs_own_checks_pass(name: str) -> None:
    for args in samples()[name]:
        torch.library.opcheck(registered(name), args)


@BY_NAME
def test_fake_outputs_have_the_shapes_and_dtypes_of_real_ones(name: str) -> None:
    for args in samples()[name]:
        came = outputs(registered(name), args)
        on_meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        fake = FAKES[name](*on_meta)
        for real, guessed in zip(came, fake if isinstance(fake, tuple) else (fake,), strict=False):
            assert (real.shape, real.dtype) == (guessed.shape, guessed.dtype)


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
    for args in samples()[name]:
        assert equal(outputs(registered(name), args), outputs(adapters.REFERENCE[name], args))


@NATIVE
@BY_NAME
def test_native_gives_the_references_bits(name: str) -> None:
    for args in samples()[name]:
        op = backends.pick(name, torch.device("cpu"), "native")
        assert equal(outputs(op, args), outputs(adapters.REFERENCE[name], args))


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


def test_triton_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_no_triton", lambda: "not installed: pip install it")
    with pytest.raises(ConfigError, match="pip install it"):
        ops.encode(torch.ones(8), bits=4, impl="triton")
    assert ops.status()["triton"] == "not installed: pip install it"


# -- validation ----------------------------------------------------------------------------------

X = torch.ones(100)
PACKED, SCALES = torch.zeros(2, 50, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.bfloat16)

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "two dimensions": (lambda: ops.encode(X.view(10, 10), bits=4), "one dimension"),
    "fp64": (lambda: ops.encode(X.double(), bits=4), "float64"),
    "integers": (lambda: ops.chunk_absmax(X.int()), "int32"),
    "3 bits": (lambda: ops.encode(X, bits=3), "bits"),
    "a block of 7": (lambda: ops.encode(X, bits=4, block=7), "block"),
    "a long block": (lambda: ops.encode(X, bits=4, block=(1 << 20) + 1), "block"),
    "rotation of 256": (lambda: ops.encode(X, bits=4, block=256, rotate=True), "rotation"),
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
    "too many scales": (lambda: ops.encode(X, bits=4, scales=SCALES.view(-1)), "scales"),
    "fp32 scales": (lambda: ops.encode(X, bits=4, scales=torch.ones(1)), "bfloat16"),
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
    "scales of each, shared": (
        lambda: ops.decode_sum_shared(PACKED, SCALES, 100, bits=4),
        "scales",
    ),
    "unpadded codes": (lambda: ops.reduce_requant(PACKED, SCALES, 90, bits=4), "packed"),
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
    "bases of another side": (
        lambda: ops.project_quantise(torch.ones(4, 5), torch.ones(5, 2), bits=4),
        r"\[m, n\]",
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
PARTS = {"bitpack", "grid", "hadamard", "philox", "two_means"}
KERNEL_PARTS = {"launch", "quantise", "tiles", "unpack"}


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
    wanted = set(NAMES)
    assert stems("gradcodec/reference") - PARTS == wanted
    assert stems("kernels/gradcodec_kernels") - KERNEL_PARTS == wanted
    tests = {name.removeprefix("test_") for name in stems("tests/kernels/on_device", "test_*.py")}
    assert tests - {"benchmark_cases"} == wanted
    assert benchmarked() == wanted


def test_every_op_is_public_under_its_name() -> None:
    for name in NAMES:
        assert name in ops.__all__
        assert getattr(ops, name).__doc__.startswith(f"See ``gradcodec.reference.{name}.{name}``")
