"""One world of this benchmark: which model, which seed, how long; and its recordings and coders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from benchmarks.federated import case as federated
from benchmarks.federated import generalise
from benchmarks.jobs import Job
from benchmarks.llama import tasks
from benchmarks.paper import coders
from benchmarks.paper.coders import Decodes, Fitting
from benchmarks.paper.recordings import Recording, folder, recorded
from benchmarks.run import Options
from gradcodec.recipes.settings import Settings

EMBEDDED = "embedded"
LOCAL_STEPS = 4
"""Of the clients of a real LLaMA; one of four examples takes seconds on a core."""


SHORT: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        EMBEDDED: {"rounds": 6, "tgap_rounds": 4, "steps": 120},
        tasks.MODEL: {"rounds": 3, "tgap_rounds": 3, "steps": 100},
    }
)
"""What the short form of a model changes in a ``Setup``."""


@dataclass(frozen=True)
class Setup:
    """What all rows of a run depend on.

    Attributes:
        model: ``"embedded"``, or the model of the ``llama`` benchmark.
        rounds: on D2, where codecs are tried.
        tgap_rounds: on D1, where they are fitted.
        steps, rate: of an autoencoder's training by Adam; the paper's rate is 2e-4.
        seed: of the world, of weights and bases.
    """

    model: str = EMBEDDED
    rounds: int = 10
    tgap_rounds: int = 10
    steps: int = 600
    rate: float = 2e-3
    seed: int = 0

    @classmethod
    def asked(cls, options: Options, seed: int) -> Setup:
        """The setup of these options; the short form has fewer rounds and steps."""
        model = EMBEDDED if options.model is None else tasks.MODEL
        setup = cls(model=model, seed=seed)
        if options.quick:
            setup = replace(setup, **SHORT[model])
        return setup if options.rounds is None else replace(setup, rounds=options.rounds)

    @classmethod
    def of(cls, job: Job) -> Setup:
        """The setup that a job was made with."""
        known = dict(job.config)
        names = ("model", "tgap_rounds", "steps", "rate")
        return cls(rounds=known["played"], seed=job.seed, **{n: known[n] for n in names})

    def config(self) -> dict[str, Any]:
        """The part of a row's config that it is."""
        out = dataclasses.asdict(self)
        del out["seed"]
        out["played"] = out.pop("rounds")  # `rounds` of a job are its rows
        return out

    def settings(self, source: str = "own") -> Settings:
        """Model, data and clients; ``source`` is a key of ``sources``."""
        if self.model != EMBEDDED:
            task = "gsm8k" if source == "own" else source
            found = tasks.settings(task, self.seed, self.rounds)
            return replace(found, local=replace(found.local, steps=LOCAL_STEPS))
        make = generalise.SOURCES[source][1]
        assert make is not None
        return make(federated.settings(self.seed, self.rounds))

    def sources(self) -> tuple[str, ...]:
        """Where a codec may be fitted: the clients' own D1 first."""
        if self.model != EMBEDDED:
            return ("own", *(task for task in tasks.TASKS if task != "gsm8k"))
        return tuple(name for name, (_, make) in generalise.SOURCES.items() if make is not None)

    def test(self) -> Recording:
        """What codecs are tried on."""
        return recorded(self.settings(), "d2", self.rounds)

    def train(self, reading: str = "federated", source: str = "own") -> Recording:
        """What codecs are fitted on."""
        return recorded(self.settings(source), "d1", self.tgap_rounds, reading)

    def coder(
        self, name: str, what: str = "update", reading: str = "federated", source: str = "own"
    ) -> Decodes:
        """A coder, fitted on what TGAP recorded."""
        train = self.train(reading, source)
        given = Fitting(train.of(what).flatten(0, 1), train.spec, self.steps, self.rate, self.seed)
        kept = folder(self.settings(source)) / f"codecs-{reading}-{self.tgap_rounds}"
        return coders.fitted(name, given, kept / f"{name}-{what}-{self.steps}-{self.rate:g}")
