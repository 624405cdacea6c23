"""CG-FedLLM end to end: base model, LoRA, TGAP on D1, codecs, FAF on D2, scheme by scheme.

examples --Dirichlet--> clients --3:7--> D1 | D2
D1: federated LoRA, watched --> second moments, snapshots --fit--> codecs
D2: for each scheme: federated LoRA from the same start, coded both ways --> losses and bytes
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from gradcodec import files
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, GradcodecError, TrainingError
from gradcodec.federated import checkpoint
from gradcodec.federated.collect import collect
from gradcodec.federated.loop import Federation, LoopConfig, RoundReport
from gradcodec.federated.server import Server
from gradcodec.recipes import data, models, pretrained
from gradcodec.recipes.adapters import save_adapter
from gradcodec.recipes.centralised import load_training, save_training
from gradcodec.recipes.evaluate import choice_accuracy
from gradcodec.recipes.results import Result
from gradcodec.recipes.run_folder import ADAPTERS, SNAPSHOTS, RunFolder
from gradcodec.recipes.schemes import TRAINED, Scheme, choose
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LanguageTask, LocalTraining
from gradcodec.tgap import (
    GradientRecorder,
    SecondMoments,
    SignalMoments,
    SnapshotStore,
    fit_autoencoder,
    fit_subspace,
)
from gradcodec.tgap.fit_autoencoder import FitRow
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

Progress = Callable[[str, int, int, Mapping[str, str]], None]
"""Called after each round: phase, rounds done, rounds in all, a few figures."""


class Experiment:
    """A run of the example; finished pieces are on disk and are not made again.

    Args:
        settings: what to run.
        folder: where it goes.
        progress: called after each round.
    """

    def __init__(self, settings: Settings, folder: RunFolder, progress: Progress) -> None:
        self.settings, self.folder, self.progress = settings, folder, progress
        s = settings
        self.device = models.resolve_device(s.device)
        self.model, self.tokenizer = models.load_base(
            s.model, dtype=getattr(torch, s.dtype), device=self.device, revision=s.revision
        )
        self.model = models.add_lora(
            self.model, r=s.lora_r, alpha=s.lora_alpha, targets=s.targets, seed=s.seed
        )
        if s.gradient_checkpointing:
            model: Any = self.model  # transformers' methods, reached through peft's wrapper
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        self.parameters = models.adapter_parameters(self.model)
        self.initial = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}
        self.codecs = pretrained.load(s.codecs, UpdateSpec.of(self.initial))
        more = [pretrained.scheme_of(key, codec) for key, codec in self.codecs.items()]
        self.schemes = [*choose(s.schemes), *more]
        self._deal()

    def _deal(self) -> None:
        """Hold examples out, deal the rest to clients, split each client's into D1 and D2."""
        s = self.settings
        examples = data.load_examples(s.dataset, limit=s.limit)
        kept, held = data.held_out(examples, s.held_out, s.seed)
        self.encoded = [data.encode_example(self.tokenizer, e, s.max_length) for e in kept]
        self.held = [data.encode_example(self.tokenizer, e, s.max_length) for e in held]
        self.questions = data.multiple_choice(held, kept, min(s.questions, len(held)), seed=s.seed)
        parts = data.dirichlet_partition(
            [e.label for e in kept], s.clients, s.dirichlet, s.seed, s.min_client
        )
        splits = [data.split_d1_d2(part, s.d1, seed=s.seed + c) for c, part in enumerate(parts)]
        self.d1 = {c: [self.encoded[i] for i in d1] for c, (d1, _) in enumerate(splits)}
        self.d2 = {c: [self.encoded[i] for i in d2] for c, (_, d2) in enumerate(splits)}

    def _task(
        self, shards: Mapping[int, Any], rounds: int, local: LocalTraining | None = None
    ) -> LanguageTask:
        self._reset()
        return LanguageTask(
            self.model,
            self.parameters,
            shards,
            self.held,
            pad_id=self.tokenizer.pad_token_id,
            rounds=rounds,
            local=local or self.settings.local,
            seed=self.settings.seed,
            device=self.device,
        )

    @torch.no_grad()
    def _reset(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.initial[name])

    # -- TGAP -----------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> dict[str, Codec]:
        """The codecs that the chosen schemes need, fitted on D1 or loaded from the run's folder."""
        for key, chosen in self.codecs.items():  # a run holds what it used
            if chosen.codec.config.learned:
                chosen.codec.save_pretrained(self.folder.fresh(f"codecs/{key}"))
        names = list(dict.fromkeys(n for s in self.schemes for n in s.needs if n in TRAINED))
        return self.fit({n: TRAINED[n] for n in names}, "codecs") if names else {}

    def fit(
        self, configs: Mapping[str, SubspaceConfig | AutoencoderConfig], place: str
    ) -> dict[str, Codec]:
        """TGAP: gather on D1 once, then fit every codec; saved in the run as ``place/<name>``.

        A run that is killed loses at most one round of gathering (with the local reading, one
        client), or the training of one autoencoder.
        """
        done = self.folder.load("tgap.json") or self._tgap(configs, place)
        self._gathered.unlink(missing_ok=True)
        files.previous(self._gathered).unlink(missing_ok=True)
        return {n: self._fitted(place, n, done["digests"].get(n)) for n in configs}

    @property
    def _gathered(self) -> Path:
        """The file with what TGAP has gathered so far."""
        return self.folder.path / "tgap.safetensors"

    def _fitted(self, place: str, name: str, digest: str | None) -> Codec:
        """Load a codec that was fitted in this run."""
        folder = self.folder.path / place / name
        again = f"delete {self.folder.path / 'tgap.json'} and resume to fit it again"
        try:
            codec = Codec.from_pretrained(folder.resolve())  # never a Hub id
        except GradcodecError as err:
            raise ConfigError(f"{err}; {again}") from err
        if codec.digest.hex() != digest:
            raise ConfigError(
                f"{folder}: expected the codec {digest} that was fitted in this run, got "
                f"{codec.digest.hex()}; {again}"
            )
        return codec

    def _tgap(
        self, configs: Mapping[str, SubspaceConfig | AutoencoderConfig], place: str
    ) -> dict[str, Any]:
        s = self.settings
        linear = {n: c for n, c in configs.items() if isinstance(c, SubspaceConfig)}
        nets = {n: c for n, c in configs.items() if isinstance(c, AutoencoderConfig)}
        spec = UpdateSpec.of(self.parameters)
        with self._or_gather_again():
            resumed = self._gathered.exists()
            store = SnapshotStore(
                self.folder.path / SNAPSHOTS if resumed else self.folder.fresh(SNAPSHOTS), limit=512
            )
        moments: dict[str, SecondMoments] = {}
        # The smallest ratio first: it needs the most directions, so its moments serve the others.
        for config in sorted(linear.values(), key=lambda c: c.ratio):
            records = s.records_for(config.ratio)
            kind = SignalMoments if records == "signal" else SecondMoments
            moments.setdefault(records, kind(spec, config))
        signal = moments.get("signal")
        watchers = [
            GradientRecorder(self.parameters, m, representation=r)
            for r, m in moments.items()
            if m is not signal
        ]
        if nets:
            watchers.append(
                GradientRecorder(self.parameters, snapshots=store, representation=s.representation)
            )
        gathered = collect(
            self._task(self.d1, s.tgap_rounds),
            lambda: _all_of(watchers),
            LoopConfig(s.tgap_rounds, range(s.clients), s.per_round, seed=s.seed + 1),
            s.tgap_reading,
            lambda done, total: self.progress("TGAP: collect", done, total, {}),
            signal.add_round if isinstance(signal, SignalMoments) else None,
            path=self._gathered,
            filled={**moments, SNAPSHOTS: store},
        )
        began = time.perf_counter()
        digests = {}
        for name, config in linear.items():
            records = s.records_for(config.ratio)
            codec: Codec = fit_subspace(moments[records], config)
            codec.notes = self._notes(records)
            codec.save_pretrained(self.folder.fresh(f"{place}/{name}"))
            digests[name] = codec.digest.hex()
        for name, net in nets.items():
            digests[name] = self._train_autoencoder(store, name, net, spec, place)
        done = {
            "uplink_bytes": gathered.uplink_bytes,
            "downlink_bytes": gathered.downlink_bytes,
            # Updates reach the server anyway; statistics of gradients would have to be sent.
            "statistics_bytes_per_client": sum(
                m.nbytes for records, m in moments.items() if records == "gradient"
            ),
            "collect_s": gathered.seconds,
            "fit_s": time.perf_counter() - began,
            "digests": digests,
        }
        self.folder.save("tgap.json", done)
        return done

    def _train_autoencoder(
        self, store: SnapshotStore, name: str, net: AutoencoderConfig, spec: UpdateSpec, place: str
    ) -> str:
        """Train one autoencoder and save it, unless that is done already; returns its digest."""
        history = f"{name}.json"
        done = self.folder.load(history)
        if done is not None:
            with suppress(GradcodecError):  # it is gone or damaged: train it again
                self._fitted(place, name, done["digest"])
                return str(done["digest"])
        with self._or_gather_again():
            fit = fit_autoencoder(
                store,
                net,
                spec,
                steps=self.settings.ae_steps,
                seed=self.settings.seed,
                loss_log=partial(self._ae_progress, name),
            )
        fit.codec.notes = self._notes(self.settings.representation)
        fit.codec.save_pretrained(self.folder.fresh(f"{place}/{name}"))
        digest = fit.codec.digest.hex()
        self.folder.save(history, {"digest": digest, "rows": [asdict(r) for r in fit.history]})
        return digest

    @contextmanager
    def _or_gather_again(self) -> Iterator[None]:
        """Add to an error about damaged snapshots how to gather them again, with all the rest."""
        try:
            yield
        except ConfigError as err:
            raise ConfigError(f"{err}: delete {self._gathered} and resume") from err

    def _notes(self, records: str) -> str:
        """What a codec was fitted on, for its card."""
        s = self.settings
        gathered = "common part of updates" if records == "signal" else f"{records}s"
        return (
            f"{gathered} of {s.model} (LoRA r={s.lora_r}, {', '.join(s.targets)}, seed {s.seed}) "
            f"on {s.dataset}: D1 of {s.clients} clients, {s.tgap_rounds} {s.tgap_reading} rounds."
        )

    def _ae_progress(self, name: str, row: FitRow) -> None:
        figures = {"RSE": f"{row.val_rse:.3g}"}
        self.progress(f"TGAP: train {name}", row.step, self.settings.ae_steps, figures)

    # -- FAF ------------------------------------------------------------------------------------

    def run(self) -> list[Result]:
        """Run the schemes that have no result yet, and return the results of all.

        Raises:
            TrainingError: the base model itself has no finite loss.
            ConfigError: a file of the run is damaged.
            OSError: a file cannot be written; finished pieces are intact.
        """
        trained = self.trained
        self._reset()
        start = self._task(self.d2, self.settings.rounds).evaluate()
        if not math.isfinite(start):
            raise TrainingError(
                f"the held-out loss of {self.settings.model} before any training is {start}; where "
                "its values leave the range of --dtype, choose float32"
            )
        self.folder.log("start", loss=start)
        return [self._scheme(scheme, trained, start) for scheme in self.schemes]

    def _scheme(self, scheme: Scheme, trained: Mapping[str, Codec], start: float) -> Result:
        name = f"schemes/{scheme.name}.json"
        done = self.folder.load(name)
        if done is not None:
            result = Result.from_dict(scheme, done)
            for report in result.reports:  # in case its events were damaged
                self.folder.log("round", scheme=scheme.name, **report.to_dict())
            return result
        task = self._task(self.d2, self.settings.rounds)
        if scheme.kind == "federated":
            reports, distinct = self._federate(scheme, task, trained)
        elif scheme.kind == "centralised":
            reports, distinct = self._centralise(scheme), 0
        else:
            reports, distinct = [], 0
        result = Result(
            scheme,
            start,
            reports,
            accuracy=choice_accuracy(
                self.model, self.tokenizer, self.questions, self.settings.max_length
            ),
            codec_bytes=sum(self._download(n) for n in scheme.needs),
            participants=distinct,
        )
        if scheme.kind != "base":
            save_adapter(self.model, self.folder.fresh(f"{ADAPTERS}/{scheme.name}"))
        self.folder.save(name, result.to_dict())
        files.previous(self._checkpoint(scheme)).unlink(missing_ok=True)
        return result

    def _checkpoint(self, scheme: Scheme) -> Path:
        return self.folder.path / "checkpoints" / f"{scheme.name}.safetensors"

    def _federate(
        self, scheme: Scheme, task: LanguageTask, trained: Mapping[str, Codec]
    ) -> tuple[list[RoundReport], int]:
        s = self.settings
        server_config = replace(scheme.server, lr=s.server_lr, momentum=s.server_momentum)
        if scheme.server.mode == "post":
            # These two settings are readings of the paper's scheme; the others send updates.
            paper = any(isinstance(TRAINED.get(n), AutoencoderConfig) for n in scheme.needs)
            server_config = replace(
                server_config,
                representation=s.representation if paper else "update",
                aggregation=s.aggregation if paper else "mean",
            )
        uplink, downlink = scheme.codecs(trained)
        federation = Federation(
            task,
            Server(self.initial, uplink, downlink, server_config),
            LoopConfig(s.rounds, range(s.clients), s.per_round, seed=s.seed),
        )
        path = self._checkpoint(scheme)
        reports = checkpoint.load(path, federation) if path.exists() else []
        for report in reports:
            self._note(scheme, report)
        try:
            for report in federation.run():
                reports.append(report)
                checkpoint.save(path, federation, reports)
                self._note(scheme, report)
        except TrainingError as err:
            # A codec that destroys the model is a result, not a reason to lose the other schemes.
            self.folder.log(
                "diverged", scheme=scheme.name, round=federation.finished, error=str(err)
            )
        federation.load_global()
        return reports, len(federation.versions)

    def _centralise(self, scheme: Scheme) -> list[RoundReport]:
        """One model, one optimiser, pooled data; as many steps as all federated clients together.

        The learning rate is divided by the number of clients in a round, because here their steps
        follow one another instead of being averaged.
        """
        s = self.settings
        local = replace(s.local, lr=s.local.lr / s.per_round)
        pool = [e for shard in self.d2.values() for e in shard]
        task = self._task(dict.fromkeys(range(s.per_round), pool), s.rounds, local)
        optimizer = task.optimizer(list(task.parameters.values()), **task.optimizer_options)
        path = self._checkpoint(scheme)
        reports = load_training(path, task.parameters, optimizer) if path.exists() else []
        for report in reports:
            self._note(scheme, report)
        for number in range(len(reports), s.rounds):
            began = time.perf_counter()
            losses = [task.train(k, number, optimizer).loss for k in range(s.per_round)]
            report = RoundReport(number, task.evaluate(), sum(losses) / len(losses), [], {})
            report.seconds = time.perf_counter() - began
            reports.append(report)
            save_training(path, task.parameters, optimizer, reports)
            self._note(scheme, report)
        return reports

    def _note(self, scheme: Scheme, report: RoundReport) -> None:
        self.folder.log("round", scheme=scheme.name, **report.to_dict())
        self.progress(
            scheme.title, report.round + 1, self.settings.rounds, {"loss": f"{report.loss:.4f}"}
        )

    def _download(self, name: str) -> int:
        """Bytes of a trained codec's folder: what each participant fetches once."""
        folder = self.folder.path / "codecs" / name
        return sum((folder / f).stat().st_size for f in ("config.json", "model.safetensors"))


@contextmanager
def _all_of(recorders: Sequence[GradientRecorder]) -> Iterator[None]:
    with ExitStack() as stack:
        for recorder in recorders:
            stack.enter_context(recorder)
        yield
