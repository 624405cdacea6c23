"""Every way of sending updates, side by side: quality under a budget, cost to a target.

    python -m benchmarks.run tune federated      # hours on 2 cores
    python -m benchmarks.run federated --quick   # minutes: one seed, a few schemes

The embedded LLaMA with LoRA on docstrings of the standard library; 40 Dirichlet(0.5) clients, 5 of
them in each of 20 rounds, 8 steps of AdamW each; the same clients, batches and evaluation for all.
Every scheme has its learning rate from the same small grid, found on a seed that is not reported
(``benchmarks.federated.tune``). Every message is bytes, and they are counted in both directions.

Rows: ``federated.jsonl``, one per scheme, seed and round (``fp32`` is the reference); tables and
plots beside it are made of them (``page``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from benchmarks import jobs, report, rows
from benchmarks.federated import fitted, tune
from benchmarks.federated import page as pages
from benchmarks.federated.figures import REFERENCE
from benchmarks.federated.methods import Coded, Method
from benchmarks.federated.scheme import Make, Scheme
from benchmarks.federated.world import World, play, world_of
from benchmarks.jobs import Job
from benchmarks.peers import federated as peers
from benchmarks.run import Options, choose
from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Identity, RotatedSign
from gradcodec.federated import AutoConfig, AutoServer, ServerConfig
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.recipes.settings import Settings
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig

CASE = "federated"
SEEDS = (0, 1, 2)
ROUNDS = 20


def untrained(uplink: str, downlink: str | None = None) -> Make:
    """A codec of this project that needs no fitting, in each direction."""
    return lambda world: Coded(world.initial, make_codec(uplink), make_codec(downlink or uplink))


def summed(world: World) -> Method:
    """The paper's rule: clients' changes are added up, not averaged."""
    return Coded(world.initial, Identity(), config=ServerConfig(aggregation="sum"))


def signal(ratio: float, bits: int, down_bits: int = 2, **storage: str) -> Make:
    """Training in the code space of a subspace that TGAP fitted on what clients agreed on.

    ``storage``: of ``SubspaceConfig``, how bases are shared and stored.
    """
    config = SubspaceConfig(ratio=ratio, allocation="tempered", side="long", **storage)

    def make(world: World) -> Method:
        name = "-".join((f"signal-{ratio:g}", *storage.values()))
        transform, nbytes = fitted.kept(world, name, lambda: fitted.signal(world, config))
        quantiser = RotatedSign() if bits == 1 else BlockQuant(BlockQuantConfig(bits))
        down = Chain(transform, BlockQuant(BlockQuantConfig(down_bits)))
        rule = ServerConfig(mode="latent")
        return Coded(world.initial, Chain(transform, quantiser), down, rule, codec_bytes=nbytes)

    return make


def auto(ratio: float) -> Make:
    """No preparation: rotated signs first, then a subspace fitted on the first three rounds.

    The bases come with the broadcasts and are counted there, so there is no codec to download.
    """
    subspace = SubspaceConfig(ratio=ratio, allocation="tempered", side="long", basis_dtype="int4")
    config = AutoConfig(warmup_rounds=3, subspace=subspace, bits=1, down_bits=2)
    return lambda world: Coded.of(AutoServer(world.initial, config))


def rotated(kept: int, block: int = 256, which: str = "first") -> Make:
    """Signs of some of the rotated values, of finished updates; nothing is fitted."""
    config = RotatedSignConfig(block, kept, which)
    return lambda world: Coded(world.initial, RotatedSign(config), make_codec("int2"))


def paper(name: str) -> Make:
    """The paper's accounting: an autoencoder's fp32 latents up, fp32 values down."""

    def make(world: World) -> Method:
        codec, nbytes = fitted.codec(world, name)
        return Coded(world.initial, codec, Identity(), codec_bytes=nbytes)

    return make


def peer(name: str, **options: Any) -> Make:
    """A published competitor of ``benchmarks.peers.federated``; its settings as ``options``."""
    return lambda world: cast(Method, getattr(peers, name)(world.initial, **options))


def random_subspace(world: World) -> Method:
    """The control of a fitted subspace: the same codes, bases drawn from the seed."""
    return peers.random_subspace(world.initial, seed=world.settings.seed)


_CGFED = "CG-FedLLM, arXiv 2405.13746"
_EDEN = "EDEN, arXiv 2108.08842, by OpenFL's code"
_SIGN_EF = "EF-SignSGD, arXiv 1901.09847"
_FLASC = "FLASC, arXiv 2406.05233"
_NVFLARE = "NVIDIA FLARE's quantisation filters, by bitsandbytes (arXiv 2110.02861, 2305.14314)"

_ALL = (
    Scheme("fp32", "fp32 LoRA FedAvg", "reference", untrained("fp32"), quick=True),
    Scheme("signal-4", "subspace 1/4, 2 bit", "ours", signal(4, 2)),
    Scheme("signal-8", "subspace 1/8, 2 bit", "ours", signal(8, 2)),
    # Ratios of one-bit codes fill whole blocks of 256.
    Scheme("signal-17", "subspace 1/17, 1 bit", "ours", signal(17.46, 1), quick=True),
    Scheme("signal-38", "subspace 1/38, 1 bit", "ours", signal(38.4, 1), quick=True, plotted=False),
    Scheme("signal-128", "subspace 1/128, 1 bit", "ours", signal(128, 1)),
    Scheme("auto-17", "subspace:auto 1/17, 1 bit", "ours", auto(17.46)),
    Scheme(
        "rotsign-64",
        "rotated signs, 1/4 bit; 2 bit down",
        "ours",
        rotated(64),
        quick=True,
        plotted=False,
    ),
    Scheme(
        "peaks-128",
        "largest rotated signs, bytes of 1/4 bit; 2 bit down",
        "ours",
        rotated(128, 4096, "largest"),
    ),
    Scheme(
        "peaks-56",
        "largest rotated signs, bytes of 1/8 bit; 2 bit down",
        "ours",
        rotated(56, 4096, "largest"),
    ),
    Scheme(
        "peaks-25",
        "largest rotated signs, bytes of 1/16 bit; 2 bit down",
        "ours",
        rotated(25, 4096, "largest"),
        grid=(0.003, 0.006, 0.012),
        plotted=False,
    ),
    Scheme(
        "rotsign-512",
        "rotated signs, 1/8 bit in blocks of 4096; 2 bit down",
        "ours",
        rotated(512, 4096),
        plotted=False,
    ),
    Scheme(
        "paper-literal",
        "ResNet-3 AE, literal",
        "paper",
        paper("resnet3-literal"),
        _CGFED,
        plotted=False,
    ),
    Scheme("paper-working", "ResNet-3 AE, working", "paper", paper("resnet3-working"), _CGFED),
    # Steps of five clients add up: from a fifth of fp32's rate, which makes it a mean, to all.
    Scheme(
        "fp32-sum",
        "fp32, summed",
        "paper",
        summed,
        _CGFED,
        grid=(2.4e-3, 6e-3, 1.2e-2),
        plotted=False,
    ),
    Scheme("eden-1", "EDEN 1 bit", "peer", peer("EDEN", bits=1), _EDEN),
    Scheme("eden-2", "EDEN 2 bit", "peer", peer("EDEN", bits=2), _EDEN, plotted=False),
    Scheme("eden-4", "EDEN 4 bit", "peer", peer("EDEN", bits=4), _EDEN, plotted=False),
    Scheme(
        "eden-2-both",
        "EDEN 2 bit, both ways",
        "peer",
        peer("EDEN", bits=2, downlink="eden"),
        _EDEN,
    ),
    Scheme("flasc-8", "FLASC, density 1/8", "peer", peer("FLASC"), _FLASC, quick=True),
    Scheme("ecolora", "EcoLoRA", "peer", peer("EcoLoRA"), "EcoLoRA, arXiv 2506.02001", quick=True),
    Scheme(
        "sparseloco",
        "SparseLoCo, 64 of 4096",
        "peer",
        peer("SparseLoCo"),
        "SparseLoCo, arXiv 2508.15706",
        quick=True,
    ),
    Scheme(
        "sign-ef-both",
        "sign with error feedback, both ways",
        "peer",
        peer("SignEF", downlink="sign"),
        _SIGN_EF,
    ),
    Scheme(
        "random-subspace-32",
        "random subspace 1/32, 2 bit",
        "peer",
        random_subspace,
        "intrinsic dimension, arXiv 1804.08838",
        quick=True,
    ),
    Scheme("ffa", "FFA-LoRA", "peer", peer("FFALoRA"), "FFA-LoRA, arXiv 2403.12313"),
    Scheme("nvflare-nf4", "NF4 cast, both ways", "peer", peer("Cast", kind="normfloat4"), _NVFLARE),
    Scheme("fp16", "fp16 cast", "peer", untrained("fp16"), plotted=False),
)

SCHEMES = {scheme.name: scheme for scheme in _ALL}


def settings(seed: int, rounds: int = ROUNDS) -> Settings:
    """The benchmark's world, as the federated example's settings."""
    return Settings(seed=seed, rounds=rounds)


def job(case: str, scheme: Scheme, seed: int, lr: float, rounds: int) -> Job:
    """One run of this benchmark."""
    s = settings(seed, rounds)
    config = {
        "clients": s.clients,
        "per_round": s.per_round,
        "steps": s.local.steps,
        "batch": s.local.batch,
        "model": s.model,
        "lora_r": s.lora_r,
    }
    return Job(case, scheme.name, seed, lr, rounds, f"{__name__}:play_job", tuple(config.items()))


def play_job(job: Job) -> Iterator[rows.Row]:
    """The rows of one run."""
    here = world_of(settings(job.seed))
    yield from play(here, SCHEMES[job.scheme].make(here), lr=job.lr, rounds=job.rounds)


def main(options: Options) -> list[str]:
    """Run what is missing, then tables and plots of everything that is there."""
    schemes = choose(SCHEMES, options, REFERENCE)
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    rounds = options.rounds or ROUNDS
    rates = tune.best(schemes)
    todo = [
        job(CASE, scheme, seed, rates[scheme.name], rounds) for seed in seeds for scheme in schemes
    ]
    path = options.out / f"{CASE}.jsonl"
    failed = jobs.execute(todo, path, options.workers, again=options.again)
    made = page(path)
    print(f"no finished fp32 run in {path}" if made is None else made.write(path))
    return failed


def page(path: Path) -> report.Page | None:
    """The page of this case's rows."""
    return pages.page(path, list(SCHEMES.values()))
