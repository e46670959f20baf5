"""Everything that is known of a run's cost, as lines for people, and the budgets it may exceed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from system.config import RunConfig
from system.data.corpus import Corpus
from system.errors import ConfigError
from system.forecast.disk import DiskPart, corpus_bytes, disk_parts, free_bytes, model_size
from system.forecast.disk import peak_bytes as most_bytes
from system.forecast.hours import StageSeconds, stage_seconds
from system.forecast.known import (
    Known,
    from_ingested,
    from_tagged,
    probe_rows,
    stage_tokenizer,
)
from system.forecast.rates import Rates, finished_units
from system.forecast.workload import Workload, workloads
from system.influence.design.accuracy_targets import answer_tokens
from system.influence.design.cost import InfluenceCost, check_token_limit, influence_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the run directory has for a forecast; nothing of it is changed."""

    tagged_uri: str | None
    """Manifest of stage `tag`."""
    ingested_uri: str | None
    """Manifest of stage `ingest`."""
    model_dir: Path | None
    """Of stage `model`, or the directory that `model.path` names."""
    mix: Mapping[str, float] | None
    """Examples of each category, once solved."""
    done: frozenset[str]
    """Stages that `run` would skip."""
    attempts: tuple[str, ...]
    """Influence attempts of the same model and batches, the present one first."""
    earlier_uri: str | None = None
    """The influence attempt that the present one appends to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The cost of a run, as far as it is known."""

    config: RunConfig
    done: frozenset[str]
    known: Known | None
    cost: InfluenceCost | None
    work: tuple[Workload, ...]
    """Of all stages of `STAGES`; empty where nothing is known."""
    rates: Rates | None
    why_no_rates: str
    seconds: tuple[StageSeconds, ...]
    """Of the stages that are not done and whose speed is known."""
    why_untimed: str
    """Why some of those have no time, or an empty text."""
    disk: tuple[DiskPart, ...]
    corpus_bytes: int | None
    free_bytes: int | None
    why_unknown: str
    """Why nothing is known, or an empty text."""
    appending: str = ""
    """What the influence stage appends to an earlier result; empty: it measures everything."""

    @property
    def left(self) -> tuple[Workload, ...]:
        """The work of stages that are not done."""
        return tuple(item for item in self.work if item.stage not in self.done)

    @property
    def peak_bytes(self) -> int:
        """What the stages still to run put on the disk at most."""
        return most_bytes(self.disk, self.done)

    def refuse(self, *, max_hours: float | None = None, max_tokens: float | None = None) -> None:
        """Refuses what is above a budget; stages that are done cost nothing.

        Args:
            max_hours: wall time of the stages still to run.
            max_tokens: token equivalents: trained tokens, and a third of the others.

        Raises:
            ConfigError: above a budget, or nothing to hold it against; says what to do.
        """
        if self.cost is not None and "influence" not in self.done:
            check_token_limit(self.config.influence, self.cost, is_exact=self.is_exact)
        if max_tokens is not None:
            self._check_known("--max-tokens", self.why_unknown)
            sizes = {item.stage: item.token_equivalents for item in self.left}
            self._refuse("--max-tokens", max_tokens, sizes, "token equivalents", ",.0f")
        if max_hours is not None:
            why = self.why_unknown or self.why_no_rates or self.why_untimed
            self._check_known("--max-hours", why)
            hours = {item.stage: item.middle / 3600 for item in self.seconds}
            self._refuse("--max-hours", max_hours, hours, "hours", ",.2f")

    @property
    def is_exact(self) -> bool:
        """Whether influence is known to the token."""
        return self.known is not None and self.known.basis == "exact" and not self.known.left_out

    def _check_known(self, flag: str, why: str) -> None:
        if why:
            raise ConfigError(
                f"{flag} was given, but there is nothing to hold it against: {why}. Bring the run "
                "so far and check again, or leave the flag out."
            )

    def _refuse(
        self, flag: str, limit: float, sizes: Mapping[str, float], unit: str, form: str
    ) -> None:
        total = sum(sizes.values())
        if total <= limit:
            return
        largest = sorted(sizes, key=lambda stage: -sizes[stage])[:2]
        lowered = {item.stage: item.lowered_by for item in self.work}
        parts = "; ".join(
            f"{stage} takes {sizes[stage]:{form}} ({lowered[stage]})" for stage in largest
        )
        raise ConfigError(
            f"{flag} allows {limit:{form}} {unit}, but what is still to run takes about "
            f"{total:{form}}. The largest parts: {parts}. Nothing was started."
        )


def make_forecast(config: RunConfig, found: Found, *, probe: bool) -> Forecast:
    """Computes what can be computed, and measures speed where asked and possible.

    Args:
        config: of the run.
        found: what the run directory has.
        probe: measure for some seconds where no run of this run directory tells the speed.

    Raises:
        DataError: a category has too few rows for a dose.
        ConfigError, ModelError: what `run` would refuse as well.
    """
    uri = found.tagged_uri or found.ingested_uri
    corpus = None if uri is None else Corpus.open(uri)
    known, why_unknown = _known(config, found, corpus)
    cost, work, appending = None, (), ""
    if known is not None:
        cost, appending = _influence_cost(config, found, corpus, known)
        work = tuple(workloads(config, known, cost, found.mix))
    left = [item for item in work if item.stage not in found.done]
    rates, why_no_rates = None, ""
    if left and corpus is not None:
        rates, why_no_rates = _rates(config, found, corpus, probe=probe)
    why_untimed = ""
    cluster = config.cluster
    if left and bool(cluster.train_gpus) != bool(cluster.tuner_gpus):
        left = [item for item in left if item.stage == "influence"]
        why_untimed = (
            "train and evaluate train on another kind of device than the tuners "
            "(cluster.train_gpus, cluster.tuner_gpus), whose speed was not measured"
        )
    seconds = () if rates is None else stage_seconds(config, left, rates, _shared_cpus(config))
    return Forecast(
        config=config,
        done=found.done,
        known=known,
        cost=cost,
        work=work,
        rates=rates,
        why_no_rates=why_no_rates if rates is None else "",
        seconds=tuple(seconds),
        why_untimed=why_untimed,
        disk=() if found.model_dir is None else tuple(_disk(config, found, corpus, known, work)),
        corpus_bytes=None if corpus is None else corpus_bytes(corpus),
        free_bytes=free_bytes(config.run_dir),
        why_unknown=why_unknown,
        appending=appending,
    )


def _influence_cost(
    config: RunConfig, found: Found, corpus: Corpus | None, known: Known
) -> tuple[InfluenceCost, str]:
    """The cost of the stage and, where it appends to an earlier result, what it appends."""
    if found.earlier_uri is not None and found.tagged_uri is not None and corpus is not None:
        from system.influence.append.append_cost import append_cost, append_text
        from system.influence.append.earlier import EarlierResult

        attempts, _, name = found.earlier_uri.rpartition("/")
        earlier, model_dir = (
            EarlierResult(attempts, name),
            found.model_dir or Path(config.model.path),
        )
        cost = append_cost(
            config, earlier, corpus, known.lengths, lambda: stage_tokenizer(config, model_dir)
        )
        return cost, append_text(earlier, earlier.category_status(corpus))
    cost = influence_cost(
        config.influence,
        run_seed=config.seed,
        sources=known.categories,
        lengths=known.lengths,
        heldout=known.heldout,
    )
    return cost, ""


def _known(config: RunConfig, found: Found, corpus: Corpus | None) -> tuple[Known | None, str]:
    if corpus is None:
        return None, "rows and tokens are known after ingest (`run CONFIG --until tag`)"
    if found.tagged_uri is not None:
        return from_tagged(corpus, config, found.model_dir), ""
    if found.model_dir is None:
        return None, "tokens are known after the stage model (`run CONFIG --until tag`)"
    return from_ingested(corpus, config, found.model_dir), ""


def _rates(
    config: RunConfig, found: Found, corpus: Corpus, *, probe: bool
) -> tuple[Rates | None, str]:
    """Rates of finished units, else of a probe; else why there are none."""
    for attempt in found.attempts:
        answers = answer_tokens(config) if config.influence.metric == "accuracy" else 0
        rates = finished_units(attempt, answers)
        if rates is not None:
            return rates, ""
    if not probe:
        return None, "--no-probe, and no run of this run directory tells the speed"
    if found.model_dir is None:
        return None, "the stage model has not left a model on this machine yet"
    from system.forecast.probe import ProbeSettings, run_probe, why_no_probe
    from system.training.settings import TrainSettings

    training = TrainSettings.from_influence(config.influence, config.model, config.seed)
    settings = ProbeSettings(
        num_threads=max(1, int(config.cluster.actor_cpus)),
        trains_on_gpu=config.cluster.tuner_gpus > 0,
        scores_on_gpu=config.cluster.scorer_gpus > 0,
        batch_size=config.influence.batch_size,
        max_length=config.model.max_length,
        trust_remote_code=config.model.trust_remote_code,
    )
    rows = probe_rows(corpus, config, found.model_dir)
    why = why_no_probe(found.model_dir, rows.num_rows, training, settings)
    if why:
        return None, why
    return run_probe(found.model_dir, rows, training, settings), ""


def _disk(
    config: RunConfig,
    found: Found,
    corpus: Corpus | None,
    known: Known | None,
    work: tuple[Workload, ...],
) -> list[DiskPart]:
    assert found.model_dir is not None
    rows = {item.stage: item.trained_rows for item in work}
    return disk_parts(
        config,
        model_size(found.model_dir, config.train.lora),
        corpus,
        num_categories=None if known is None else len(known.categories),
        train_rows=rows.get("train"),
    )


def _shared_cpus(config: RunConfig) -> int | None:
    """CPUs that all actors share where they run on this machine, without GPUs."""
    cluster = config.cluster
    if cluster.ray_address != "local" or cluster.tuner_gpus or cluster.scorer_gpus:
        return None
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
